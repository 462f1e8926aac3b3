"""Whole files: read within a bound, or replaced in one step so that nobody ever sees half of one."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ldm.utils.errors import DataError


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
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
