"""Folders that are written aside and appear whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.io.files import sync_directory
from ldm.utils.errors import WeightsError


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` at the end; on any failure nothing is left. WeightsError if it exists."""
    if os.path.lexists(path):
        raise WeightsError(f"{path}: already exists; choose another name or delete it")
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        aside.mkdir(parents=True)
        yield aside
        sync_directory(aside)
        os.rename(aside, path)
        sync_directory(path.parent)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
