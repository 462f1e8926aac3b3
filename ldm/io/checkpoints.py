"""Directories that are complete or absent: written aside, flushed to disk, sealed by a manifest, renamed into place.

    commit(directory, write, step)     write(temporary) fills it; afterwards `directory` is whole, or as it was before
    latest(parent)                     the newest step whose manifest verifies, and why newer ones were passed over
    prune(parent, keep)                forget old steps, never before enough newer ones verify

`manifest.json` (sha256 and size of every file) alone decides what is complete; the link `last` is for people.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ldm.io.files import sync_directory
from ldm.io.text import read_json, write_json
from ldm.utils.errors import CheckpointError, ConfigError, DataError, WeightsError

SCHEMA = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
MAX_JSON = 16 << 20  # bytes
_STEP = re.compile(r"step_(\d{8,12})")


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
    manifest = read_object(directory / MANIFEST)
    files = manifest.get("files")
    if manifest.get("schema") != SCHEMA or not isinstance(files, dict):
        raise CheckpointError(f"{directory}: its manifest has schema {manifest.get('schema')!r}, expected {SCHEMA}")
    named = _STEP.fullmatch(directory.name)
    if named and manifest.get("step") != int(named[1]):
        raise CheckpointError(f"{directory} is damaged: its manifest is of step {manifest.get('step')!r}")
    for name, entry in files.items():
        _verify_file(directory, name, entry, content)
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


def prune(parent: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints."""
    if keep < 2:
        raise ConfigError(f"keep={keep}: keep at least 2 checkpoints, so that one damaged file cannot end a run")
    sweep(parent)
    with writing(f"cannot tidy {parent}"):
        every = steps(parent)
        sound = [step for step, directory in every if _is_sound(directory, content=False)]
        for step, directory in every:
            if len(sound) > keep and step < sound[keep - 1]:
                _remove(directory)


def sweep(parent: Path) -> None:
    """Delete what a killed run left half-written; for the one writer of this directory."""
    with writing(f"cannot tidy {parent}"):
        for orphan in parent.glob(f"{TEMPORARY}*"):
            _remove(orphan)


def point_last(directory: Path) -> None:
    """Let the link `last` beside `directory` name it; replaced in one step."""
    link = directory.parent / "last"
    temporary = _aside(link)
    with writing(f"cannot update {link}"):
        os.symlink(directory.name, temporary)
        os.replace(temporary, link)


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
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
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


def _aside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def _seal(temporary: Path, step: int) -> None:
    """Make every file durable, then list them all in a durable manifest."""
    files = {}
    for path in sorted(temporary.iterdir()):
        _flush(path)
        files[path.name] = {"sha256": sha256(path), "size": path.stat().st_size}
    write_json(temporary / MANIFEST, {"schema": SCHEMA, "step": step, "files": files})


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _verify_file(directory: Path, name: str, entry: object, content: bool) -> None:
    path = directory / name
    if not isinstance(entry, dict) or name != path.name or not path.is_file():
        raise CheckpointError(f"{directory} is damaged: {name} is missing")
    if (size := path.stat().st_size) != entry.get("size"):
        raise CheckpointError(f"{directory} is damaged: {name} has {size} bytes, expected {entry.get('size')}")
    if content and sha256(path) != entry.get("sha256"):
        raise CheckpointError(f"{directory} is damaged: {name} does not have the sha256 in the manifest")


def _is_sound(directory: Path, content: bool) -> bool:
    try:
        return bool(verify(directory, content))
    except CheckpointError:
        return False


def _displace(directory: Path) -> None:
    """Make room for a new directory: a damaged one goes, a complete one is never overwritten."""
    if directory.is_dir() and _is_sound(directory, content=True):
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
