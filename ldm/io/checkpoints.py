"""Directories that are complete or absent: written aside, flushed to disk, sealed by a manifest, renamed into place.

    commit(directory, write, step)     write(temporary) fills it; afterwards `directory` is whole, or as it was before
    latest(parent)                     the newest step whose manifest verifies, and why newer ones were passed over
    prune(parent, keep)                forget old steps, never before enough newer ones verify

`manifest.json` (sha256 and size of every file) alone decides what is complete; the link `last` is for people.
Where links cannot be, `last` is a file that holds the name.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ldm.io.files import replacing, say_once, sync_directory
from ldm.io.text import read_json, write_json
from ldm.utils.errors import CheckpointError, ConfigError, DataError, WeightsError

SCHEMA = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
MAX_JSON = 16 << 20  # bytes
SETTLED = 0.1  # seconds after which a further write to a file shows in its time
_STEP = re.compile(r"step_(\d{8,12})")
_sums: dict[tuple, str] = {}  # sha256 by (device, inode, size, time): of settled files that were read before


def step_directory(parent: Path, step: int) -> Path:
    return parent / f"step_{step:08d}"


def steps(parent: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint under `parent`, whole or damaged, newest first."""
    found = [(_STEP.fullmatch(path.name), path) for path in parent.glob("step_*")]
    return sorted(((int(match[1]), path) for match, path in found if match and path.is_dir()), reverse=True)


def commit(directory: Path, write: Callable[[Path], None], step: int) -> Path:
    """Fill a temporary neighbour with `write` and make it `directory` in one step; on any error nothing of it stays.

    Raises CheckpointError when the disk is full or read-only, or when `directory` already is a complete checkpoint.
    """
    temporary = _aside(directory)
    with writing(f"cannot write checkpoint {directory}"):
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            _seal(temporary, step)
            if os.path.lexists(directory):
                _displace(directory)
            os.rename(temporary, directory)
            sync_directory(directory.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return directory


def verify(directory: Path, content: bool = True) -> dict:
    """The manifest of a complete checkpoint; `content=False` compares names and sizes only.  Raises CheckpointError."""
    return _verify(directory, sha256 if content else None)


def _verify(directory: Path, sum_of: Callable[[Path], str] | None) -> dict:
    manifest = read_object(directory / MANIFEST)
    files = manifest.get("files")
    if manifest.get("schema") != SCHEMA or not isinstance(files, dict):
        raise CheckpointError(f"{directory}: its manifest has schema {manifest.get('schema')!r}, expected {SCHEMA}")
    named = _STEP.fullmatch(directory.name)
    if named and manifest.get("step") != int(named[1]):
        raise CheckpointError(f"{directory} is damaged: its manifest is of step {manifest.get('step')!r}")
    for name, entry in files.items():
        _verify_file(directory, name, entry, sum_of)
    return manifest


def latest(parent: Path, content: bool = True) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies (None if there is none) and one line for each newer one that does not."""
    skipped = []
    for _, directory in steps(parent):
        try:
            verify(directory, content)
            return directory, skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def whole(parent: Path) -> list[Path]:
    """Checkpoints whose every byte is right, newest first; what this process has read since it changed is believed."""
    return [directory for _, directory in steps(parent) if _is_sound(directory, _known_sum)]


def prune(parent: Path, keep: int, spare: Path | None = None) -> None:
    """Delete all but the newest `keep` whole checkpoints; damaged ones do not count, and `spare` stays in any case."""
    if keep < 2:
        raise ConfigError(f"keep={keep}: keep at least 2 checkpoints, so that one damaged file cannot end a run")
    sweep(parent)
    with writing(f"cannot tidy {parent}"):
        every = steps(parent)
        sound = [step for step, directory in every if _is_sound(directory, _known_sum)]
        for step, directory in every:
            if len(sound) > keep and step < sound[keep - 1] and directory != spare:
                _remove(directory)


def sweep(parent: Path) -> None:
    """Delete what a killed run left half-written; for the one writer of this directory."""
    with writing(f"cannot tidy {parent}"):
        for orphan in parent.glob(f"{TEMPORARY}*"):
            _remove(orphan)


def point_last(directory: Path) -> None:
    """Let `last` beside `directory` name it, replaced in one step. It is for people: a failure is said, not raised."""
    last = directory.parent / "last"
    temporary = _aside(last)
    try:
        try:
            os.symlink(directory.name, temporary)
            os.replace(temporary, last)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            with replacing(last) as file:
                file.write(f"{directory.name}\n".encode())
            say_once(f"no links on this disk ({error.strerror}); {last} is a file that names the newest checkpoint")
    except OSError as error:
        say_once(f"{last} cannot be updated ({error.strerror}); the newest step_* beside it is the last checkpoint")


def followed(path: Path) -> Path:
    """The checkpoint that a file `last` names, where links cannot be; any other path as it is."""
    if path.name != "last" or not path.is_file():
        return path
    with open(path, "rb") as file:
        name = file.read(100).decode(errors="replace").strip()
    return path.with_name(name) if _STEP.fullmatch(name) else path


def read_object(path: Path) -> dict:
    """The JSON object in one file of a checkpoint.  Raises CheckpointError."""
    try:
        value = read_json(path, max_bytes=MAX_JSON)
    except DataError as error:
        raise CheckpointError(f"{path.parent} is not a complete checkpoint: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.parent} is damaged: {path.name} holds a JSON {type(value).__name__}")
    return value


def sha256(path: Path) -> str:
    begun, identity = time.time_ns(), _identity(path)
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    if begun - identity[-1] > SETTLED * 1e9 and len(_sums) < 10_000:
        _sums[identity] = digest.hexdigest()
    return digest.hexdigest()


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn the failures of a write into one CheckpointError that says what was being done."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {error.strerror or error}; what was there before is untouched") from error
    except (DataError, WeightsError) as error:
        raise CheckpointError(f"{what}: {error}") from error


def _identity(path: Path) -> tuple:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _known_sum(path: Path) -> str:
    """sha256 of a file, as it was read before if nobody has written to it since: pruning need not read it all again."""
    return _sums.get(_identity(path)) or sha256(path)


def _aside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def _seal(temporary: Path, step: int) -> None:
    """Make every file durable, then list them all in a durable manifest."""
    files = {}
    for path in sorted(temporary.iterdir()):
        _flush(path)
        files[path.name] = {"sha256": _known_sum(path), "size": path.stat().st_size}
    write_json(temporary / MANIFEST, {"schema": SCHEMA, "step": step, "files": files})


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _verify_file(directory: Path, name: str, entry: object, sum_of: Callable[[Path], str] | None) -> None:
    path = directory / name
    if not isinstance(entry, dict) or name != path.name or not path.is_file():
        raise CheckpointError(f"{directory} is damaged: {name} is missing")
    try:
        size, found = path.stat().st_size, sum_of and sum_of(path)
    except OSError as error:
        raise CheckpointError(f"{directory} is damaged: {name} cannot be read ({error.strerror})") from error
    if size != entry.get("size"):
        raise CheckpointError(f"{directory} is damaged: {name} has {size} bytes, expected {entry.get('size')}")
    if sum_of and found != entry.get("sha256"):
        raise CheckpointError(f"{directory} is damaged: {name} does not have the sha256 in the manifest")


def _is_sound(directory: Path, sum_of: Callable[[Path], str]) -> bool:
    try:
        return bool(_verify(directory, sum_of))
    except CheckpointError:
        return False


def _displace(directory: Path) -> None:
    """Make room for a new directory: a damaged one goes, a complete one is never overwritten."""
    if directory.is_dir() and _is_sound(directory, sha256):
        raise CheckpointError(f"{directory} already is a complete checkpoint; it is not overwritten")
    _remove(directory)


def _remove(path: Path) -> None:
    """Delete a link, file or directory; a directory is renamed first, so that nobody ever sees half of one."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if not path.name.startswith(TEMPORARY):
        path = path.rename(_aside(path))
    shutil.rmtree(path)
