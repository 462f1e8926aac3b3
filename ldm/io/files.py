"""Whole files: read within a bound, or replaced in one step so that nobody ever sees half of one.

What a file system may lack (exFAT, SMB, FUSE: locks, flushed directories) is done without, and that is said once.
"""

import errno
import fcntl
import functools
import gzip
import io
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from ldm.utils.errors import DataError

UNSUPPORTED = {errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
UNREADABLE = {errno.EACCES, errno.EBADF, errno.EISDIR}  # a directory that cannot be opened as a file
DAY = 24 * 3600  # seconds
_TEMPORARY = re.compile(r"\.tmp-(?:(\d+)-.+|.+-(\d+)-[0-9a-f]{8})")  # of `replacing` and of checkpoints


def read_bytes(path: str | os.PathLike, *, max_bytes: int) -> bytes:
    """The bytes of a regular file of at most max_bytes. Raises DataError."""
    path = Path(path)
    try:
        if not path.is_file():
            raise DataError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        if (size := path.stat().st_size) > max_bytes:
            raise DataError(f"{path}: {size:,} bytes, at most {max_bytes:,} are read from a file of this kind")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def read_gzip(path: str | os.PathLike, *, max_bytes: int) -> bytes:
    """What a gzip file holds, at most max_bytes of it. Raises DataError."""
    packed = read_bytes(path, max_bytes=max_bytes)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            data = file.read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or not a gzip file ({error})") from error
    if len(data) > max_bytes:
        raise DataError(f"{path}: unpacks to over {max_bytes:,} bytes, more than is read from a file of this kind")
    return data


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Write beside `path`, flush to disk, rename over it; on any failure `path` is as it was and nothing is left."""
    path = Path(path)
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(aside, "wb") as file:  # mode 0666 & ~umask, as any file of the user's
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: str | os.PathLike) -> None:
    """Make the names in a directory survive a power cut, where the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED | UNREADABLE:
            raise
        say_once(f"folders cannot be flushed to this disk ({error.strerror}); a power cut may lose its newest files")


def hold(file: IO, *, wait: bool = False) -> bool:
    """Lock an open file for this process until it is closed; False where another process has it."""
    try:
        # Not flock: forked data workers would share it and outlive a killed run by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in UNSUPPORTED:
            raise
        folder = Path(file.name).parent
        say_once(f"{folder}: no locks here ({error.strerror}); let only one program at a time write there")
    return True


def sweep_temporaries(*folders: Path) -> None:
    """Delete what killed programs left half-written in these folders, which nobody but the caller writes to now.

    A name tells which process began it: those of living ones stay for a day.
    """
    for path in (path for folder in folders for path in folder.glob(".tmp-*")):
        with suppress(OSError):  # or it stays
            if _is_left(path):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_left(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if not match:
        return False
    process = int(match[1] or match[2])
    if process == os.getpid() or path.lstat().st_mtime < time.time() - DAY:  # containers give out the same numbers
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # somebody else's
        pass
    return False


@functools.cache
def say_once(text: str) -> None:
    """A warning that is printed the first time only."""
    print(f"warning: {text}", file=sys.stderr)
