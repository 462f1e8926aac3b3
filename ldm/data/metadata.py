"""Captions of pictures in tables beside them, as Hugging Face's imagefolder has them: rows of file_name and text."""

import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ldm.io.archives import DiskFolder, ZipFolder, readable
from ldm.io.tables import READERS, read_table
from ldm.io.text import MAX_TABLE
from ldm.utils.errors import DataError

Folder = DiskFolder | ZipFolder
TABLES = tuple(f"metadata{suffix}" for suffix in READERS)
FILE_FIELDS = ("file_name", "image_file_name", "filename", "file", "image", "path")
CAPTION_FIELDS = ("text", "caption", "prompt")  # which of them a table has, where no data.caption_field is set


class Line(NamedTuple):
    """What a row says: `captions` are several where it lists several, none where it has null or an empty text."""

    name: str  # of the picture, in the folder
    captions: list[str]
    aesthetic: float | None


class Names:
    """The names of a folder, found as others write them: in another Unicode form or case, or with backslashes."""

    def __init__(self, names: Iterable[str]):
        self.names = set(names)
        self._alike: dict[str, list[str]] = {}
        for name in names:
            self._alike.setdefault(plain(name), []).append(name)

    def find(self, name: str) -> str | None:
        """The name itself, or the only one that is like it."""
        name = posixpath.normpath(name.replace("\\", "/")) if name not in self.names else name
        alike = [name] if name in self.names else self._alike.get(plain(name), [])
        return alike[0] if len(alike) == 1 else None


def plain(name: str) -> str:
    """A name in one Unicode form and in small letters: macOS decomposes accents, Windows takes no notice of case."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", readable(name)).casefold())


def tables_in(folder: Folder) -> list[str]:
    """The names of all tables of captions. Raises DataError where a folder has two."""
    tables: dict[str, str] = {}
    for name in folder.names:
        place, base = posixpath.split(name)
        if base.lower() in TABLES and tables.setdefault(place, name) != name:
            raise DataError(f"{folder.path}: {tables[place]!r} and {name!r} may disagree; keep one of them")
    return list(tables.values())


def read_lines(folder: Folder, tables: Sequence[str], caption_field: str | None) -> Iterator[Line]:
    """The lines of all tables. Raises DataError where pictures that they name are not there, with how many."""
    known, ignored = Names(folder.names), Names(folder.unreadable)
    for table in tables:
        where = f"{folder.path}/{table}"
        rows = list(read_table(folder.read(table, max_bytes=MAX_TABLE), where))
        columns = {column: None for _, row in rows for column in row}
        file_field = _column(columns, FILE_FIELDS, where, "the names of pictures", "write file_name")
        wanted = (caption_field,) if caption_field else CAPTION_FIELDS
        text_field = _column(columns, wanted, where, "captions", "set data.caption_field to one of them")
        missing = []
        for place, row in rows:
            file = row.get(file_field)
            if not isinstance(file, str) or not file.strip():
                raise DataError(f"{place}: {file_field!r} is {file!r}, expected the name of a picture")
            path = posixpath.normpath(posixpath.join(posixpath.dirname(table), file.strip()))
            if name := known.find(path):
                score = _score(row.get("aesthetic"), place)
                yield Line(name, list(_captions(row.get(text_field), place)), score)
            elif not ignored.find(path):
                missing.append((place, path))
        if missing:
            place, name = missing[0]
            count = f"{len(missing)} of {len(rows)} lines name one that is not there"
            raise DataError(f"{place}: there is no image {readable(name)!r} in {folder.path} ({count})")


def _column(columns: Iterable[str], wanted: Sequence[str], where: str, what: str, advice: str) -> str:
    """The first of the wanted columns that a table has. Raises DataError; an empty table has all of them."""
    columns = list(columns)
    for name in wanted:
        if name in columns or not columns:
            return name
    names = " or ".join(map(repr, wanted))
    raise DataError(f"{where}: no column {names} with {what}, has fields {sorted(columns)[:20]}; {advice}")


def _captions(value: Any, where: str) -> Iterator[str]:
    """The captions in a value: a text, a number, a list of them; none in null and in an empty text."""
    if isinstance(value, list | tuple):
        for one in value:
            yield from _captions(one, where)
    elif isinstance(value, bool | dict):
        raise DataError(f"{where}: the caption is {value!r}, expected a text or a list of texts")
    elif value is not None and value == value and (text := " ".join(str(value).split())):  # NaN is not itself
        yield text


def _score(value: Any, where: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise DataError(f"{where}: 'aesthetic' is {value!r}, expected a number such as 6.5")
