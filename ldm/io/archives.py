"""A folder of files, on disk or inside a zip that is read in place: names and bytes, nothing is ever extracted."""

import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ldm.io.files import read_bytes
from ldm.utils.errors import DataError

MAX_MEMBERS = 10_000_000
MAX_MEMBER = 64 << 20  # bytes of one that is read in turn
MAX_RATIO = 200  # bytes out per byte in; text reaches 20, a bomb 1000
UTF8 = 0x800  # the flag of a zip's member whose name is UTF-8; others are read as cp437, whatever they are
SYSTEM_FILES = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin"}


def open_folder(path: str | os.PathLike) -> "DiskFolder | ZipFolder":
    """The folder at a path: a directory, or a .zip file. Raises DataError."""
    path = Path(path)
    if path.is_dir():
        return DiskFolder(path)
    if path.suffix.lower() == ".zip" and path.is_file():
        return ZipFolder(path)
    if path.exists():
        raise DataError(f"{path}: neither a folder nor a .zip file; unpack it, and give the folder")
    raise DataError(f"{path}: no such folder or .zip file")


def read_members(path: str | os.PathLike, wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the wanted files of a folder, a .zip or a .tar, one after another. Raises DataError."""
    path = Path(path)
    if not (path.is_file() and tarfile.is_tarfile(path)):
        folder = open_folder(path)
        yield from ((name, folder.read(name, max_bytes=MAX_MEMBER)) for name in folder.names if wanted(name))
        return
    try:
        with tarfile.open(path, "r|*") as archive:
            members = (entry for entry in archive if entry.isreg() and entry.size <= MAX_MEMBER and wanted(entry.name))
            yield from ((entry.name, archive.extractfile(entry).read()) for entry in members)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut short ({error})") from error


def write_zip(path: str | os.PathLike, files: Iterable[tuple[str, bytes]]) -> int:
    """Write files into a new zip, as they are, without times or owners; returns how many."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        count = 0
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name), data)
            count += 1
    return count


def readable(name: str) -> str:
    """The name of a file as text that can be written anywhere: bytes that are not UTF-8 are taken for Latin-1."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("latin-1")
    return name


class DiskFolder:
    """Regular files below a directory: `names` are sorted relative paths with '/'. Nothing is written or removed.

    `hidden` are names that start with a dot or are an operating system's own, `unreadable` links to nothing and pipes.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        files, self.unreadable = _walk(self.path)
        self.names, self.hidden = _parted(files)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """The bytes of one file. Raises DataError."""
        return read_bytes(self.path / name, max_bytes=max_bytes)


class ZipFolder:
    """Regular members of a zip, read in place; each process opens the file for itself, so workers may share one.

    `names` and `hidden` as of a directory, also where Windows wrote them with backslashes or in bytes of another kind.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._archive, self._process = None, None
        members = [(_name(entry), entry) for entry in self._opened().infolist()]
        members = [(name, entry) for name, entry in members if not name.endswith("/")]
        if len(members) > MAX_MEMBERS:
            raise DataError(f"{path}: {len(members):,} members, at most {MAX_MEMBERS:,} are read")
        self.names, self.hidden = _parted(name for name, _ in members)
        self.unreadable: list[str] = []
        for name, following in zip(self.names, self.names[1:], strict=False):
            if name == following:
                raise DataError(f"{path}: member {name!r} appears twice")
        self._stored = {name: entry.filename for name, entry in members if name != entry.filename}

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """The bytes of one member. Raises DataError."""
        archive = self._opened()
        try:
            entry = archive.getinfo(self._stored.get(name, name))
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
            except Exception as error:  # a damaged directory ends in as many
                raise DataError(f"{self.path}: cannot be read as a zip file ({error})") from error
        return self._archive

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_archive": None, "_process": None}


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """Relative names of all files below root, through links to directories but never twice into the same one; and of
    what is no file: links to nothing, pipes, sockets."""
    files, others, seen, waiting = [], [], set(), [("", root)]
    while waiting:
        prefix, folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        for entry in _entries(folder):
            if entry.is_dir():
                waiting.append((f"{prefix}{entry.name}/", Path(entry.path)))
            else:
                (files if entry.is_file() else others).append(prefix + entry.name)
    return files, sorted(others)


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error


def _name(entry: zipfile.ZipInfo) -> str:
    """The name of a member with '/', in the encoding it most likely has."""
    name = entry.filename
    if not entry.flag_bits & UTF8:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    name = name.replace("\\", "/")
    return posixpath.normpath(name) + "/" * name.endswith("/")


def _parted(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Sorted: those to be seen, and those that are hidden."""
    visible, hidden = [], []
    for name in sorted(names):
        parts = name.split("/")
        is_hidden = any(part.startswith(".") and part != ".." or part.lower() in SYSTEM_FILES for part in parts)
        (hidden if is_hidden else visible).append(name)
    return visible, hidden
