"""A folder of files, on disk or inside a zip that is read in place: names and bytes, nothing is ever extracted."""

import os
import stat
import zipfile
from pathlib import Path

from ldm.io.files import read_bytes
from ldm.utils.errors import DataError

MAX_MEMBERS = 10_000_000
MAX_RATIO = 200  # bytes out per byte in; text reaches 20, a bomb 1000


def open_folder(path: str | os.PathLike) -> "DiskFolder | ZipFolder":
    """The folder at a path: a directory, or a .zip file. Raises DataError."""
    path = Path(path)
    if path.is_dir():
        return DiskFolder(path)
    if path.suffix.lower() == ".zip" and path.is_file():
        return ZipFolder(path)
    raise DataError(f"{path}: {'neither a folder nor a .zip file' if path.exists() else 'no such folder or .zip file'}")


class DiskFolder:
    """Regular files below a directory: `names` are sorted relative paths with '/'. Nothing is written or removed."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.names = sorted(name for name in _walk(self.path) if _visible(name))

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """The bytes of one file. Raises DataError."""
        return read_bytes(self.path / name, max_bytes=max_bytes)


class ZipFolder:
    """Regular members of a zip, read in place; each process opens the file for itself, so workers may share one."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._archive, self._process = None, None
        members = [entry for entry in self._opened().infolist() if not entry.is_dir()]
        if len(members) > MAX_MEMBERS:
            raise DataError(f"{path}: {len(members):,} members, at most {MAX_MEMBERS:,} are read")
        self.names = sorted(entry.filename for entry in members if _visible(entry.filename))
        for name, following in zip(self.names, self.names[1:], strict=False):
            if name == following:
                raise DataError(f"{path}: member {name!r} appears twice")

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """The bytes of one member. Raises DataError."""
        archive = self._opened()
        try:
            entry = archive.getinfo(name)
            self._check(entry, max_bytes)
            return archive.read(entry)
        except Exception as error:  # a damaged member ends in any of half a dozen types
            raise DataError(f"{self.path}/{name}: cannot be read ({error})") from error

    def _check(self, entry: zipfile.ZipInfo, max_bytes: int) -> None:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise ValueError("not a regular file")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"compression method {entry.compress_type}, expected stored or deflated")
        if entry.file_size > max_bytes or entry.file_size > MAX_RATIO * max(entry.compress_size, 64):
            raise ValueError(f"unpacks {entry.compress_size:,} bytes to {entry.file_size:,}")

    def _opened(self) -> zipfile.ZipFile:
        if self._process != os.getpid():  # a fork would share the file's position with its parent
            try:
                self._archive, self._process = zipfile.ZipFile(self.path), os.getpid()
            except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
                raise DataError(f"{self.path}: cannot be read as a zip file ({error})") from error
        return self._archive

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_archive": None, "_process": None}


def _walk(root: Path) -> list[str]:
    """Relative names of all files below root, through links to directories but never twice into the same one."""
    names, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        names += [os.path.relpath(os.path.join(folder, file), root).replace(os.sep, "/") for file in files]
    return names


def _visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
