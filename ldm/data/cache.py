"""What frozen networks make of a dataset, computed once: latents by image, conditions by text.

    DIR/latents-KEY/bucket-NN/   one table for each bucket, one row for each image
    DIR/texts-KEY/               one table for each encoder, one row for each distinct text
    a table is header.json and a raw file per column, rows of one size after another, mapped into memory and never read
    whole; rows are only ever appended, and those count that the header counts, which is replaced when they are on disk

So a table is good at any moment: a kill costs the rows since the last commit. Nothing here deletes a file.
"""

import hashlib
import json
import math
import mmap
import os
import struct
import time
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import singledispatch
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ldm.data.images import ImageFolder
from ldm.data.loader import facts, fetch, groups
from ldm.io.files import hold, sweep_temporaries
from ldm.io.text import read_json, write_json
from ldm.utils.errors import DataError, in_a_line

SCHEMA = 1
VERSION = 1  # of what is done to an image between its file and the codec
HEADER = "header.json"
STORABLE = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORABLE}
MAX_EXTENT = 1 << 40
PREFETCH = 1 << 16  # bytes of a row from which on the disk is told of a whole batch before it is read


class Table:
    """Rows of named tensors on disk: `append`, `commit`, then `read`. The first rows decide dtypes and shapes.

    One writer at a time (`exclusive`). Raises DataError for a damaged table, rows of other shapes, or a full disk.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.columns: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.count = self._written = 0
        self._committed = time.monotonic()
        self._mapped: dict[str, tuple[mmap.mmap, Tensor]] = {}
        if (self.directory / HEADER).exists():
            self._open()

    def __len__(self) -> int:
        return self.count

    def __reduce__(self):
        return Table, (self.directory,)  # a copy, or a worker, maps the same files

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """Rows (N ...) of every column, to be seen after the next commit."""
        rows = {name: value.detach().cpu().contiguous() for name, value in rows.items()}
        found = {name: (value.dtype, tuple(value.shape[1:])) for name, value in rows.items()}
        self.columns = self.columns or found
        if found != self.columns:
            raise DataError(f"{self.directory}: rows of {found} do not fit into a table of {self.columns}")
        for name, value in rows.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise DataError(f"{self.directory}: {name} is not finite in {value.dtype}; store float32")
            self._write(name, value)
        self._written += len(value)

    def commit(self, every: float = 0.0) -> None:
        """Make the rows appended so far durable, then count them; not within `every` seconds of the last time."""
        if self.count == self._written or time.monotonic() - self._committed < every:
            return
        for name in self.columns:
            with open(self._path(name), "rb") as file:
                os.fsync(file.fileno())
        columns = {n: {"dtype": str(t).removeprefix("torch."), "shape": list(s)} for n, (t, s) in self.columns.items()}
        write_json(self.directory / HEADER, {"schema": SCHEMA, "count": self._written, "columns": columns})
        self.count, self._committed = self._written, time.monotonic()
        self._mapped.clear()

    def column(self, name: str) -> Tensor:
        """All rows of a column, (N ...), mapped: for reading."""
        return self._memory(name)[1]

    def read(self, name: str, rows: Tensor) -> Tensor:
        """These rows (B,) of a column, (B ...), in memory."""
        mapped, column = self._memory(name)
        if (size := self._row_bytes(name)) >= PREFETCH:  # for small rows the calls cost as much as the copy
            for row in rows.tolist():
                start = row * size // mmap.PAGESIZE * mmap.PAGESIZE
                mapped.madvise(mmap.MADV_WILLNEED, start, (row + 1) * size - start)
        return column.index_select(0, rows)

    def _write(self, name: str, value: Tensor) -> None:
        path = self._path(name)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            path.touch()
            with open(path, "r+b") as file:
                file.seek(self._written * self._row_bytes(name))  # over what a killed writer left uncounted
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); what is counted in it is safe") from error

    def _memory(self, name: str) -> tuple[mmap.mmap, Tensor]:
        if name not in self._mapped:
            dtype, shape = self.columns[name]
            with open(self._path(name), "rb") as file, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                mapped = mmap.mmap(file.fileno(), self.count * self._row_bytes(name), access=mmap.ACCESS_READ)
                mapped.madvise(mmap.MADV_RANDOM)  # or each row would be read with megabytes of its neighbours
                self._mapped[name] = mapped, torch.frombuffer(mapped, dtype=dtype).view(self.count, *shape)
        return self._mapped[name]

    def _open(self) -> None:
        header = read_json(self.directory / HEADER)
        try:
            if header["schema"] != SCHEMA:
                raise ValueError(f"schema {header['schema']!r}, expected {SCHEMA}")
            for name, entry in header["columns"].items():
                if not name.isidentifier():
                    raise ValueError(f"column {name!r}")
                self.columns[name] = DTYPES[entry["dtype"]], tuple(entry["shape"])
            numbers = [header["count"], *(n for _, shape in self.columns.values() for n in shape)]
            if len(numbers) > 64 or not all(type(n) is int and 0 < n < MAX_EXTENT for n in numbers):
                raise ValueError(f"impossible numbers {str(numbers)[:80]}")
            for name in self.columns:
                needed, there = header["count"] * self._row_bytes(name), self._path(name).stat().st_size
                if there < needed:
                    raise ValueError(f"{name} has {there:,} bytes, expected {needed:,}")
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            problem = f"not a whole table ({in_a_line(error)})"
            raise DataError(f"{self.directory}: {problem}; delete it, and it is made anew") from error
        self.count = self._written = header["count"]

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.bin"

    def _row_bytes(self, name: str) -> int:
        dtype, shape = self.columns[name]
        return dtype.itemsize * math.prod(shape)


class StoredLatents(Dataset):
    """A dataset whose items hold "moments" instead of "image": the posterior's mean and log-variance, as stored.

    `tables` together hold every item of it once. A batch is one gather; all else of an item is as it was.
    """

    def __init__(self, dataset: Dataset, tables: Sequence[Table]):
        self.dataset, self.tables = dataset, list(tables)
        self.starts = [0, *accumulate(len(table) for table in tables)]
        items = torch.cat([table.column("item") for table in tables])
        self.rows = torch.full((len(items),), -1, dtype=torch.int32)  # of an item: 4 bytes an image
        inside = items[(0 <= items) & (items < len(items))]
        if len(inside) == len(items):
            self.rows[items] = torch.arange(len(items), dtype=torch.int32)
        if (self.rows < 0).any():
            raise DataError(f"{tables[0].directory.parent}: does not hold {len(items):,} images once each; delete it")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {name: values[0] for name, values in self.batch(torch.tensor([index])).items()}

    def batch(self, items: Tensor) -> dict[str, Any]:
        """The batch of these items (B,), all of one bucket."""
        rows = self.rows.index_select(0, items).long()
        bucket = bisect_right(self.starts, int(rows[0])) - 1
        table, rows = self.tables[bucket], rows - self.starts[bucket]
        stored = {name: table.read(name, rows) for name in table.columns if name not in ("item", "content")}
        return {**stored, **facts(self.dataset, stored["index"])}

    def groups(self) -> Tensor:
        return torch.bucketize(self.rows, torch.tensor(self.starts[1:], dtype=torch.int32), right=True)


@groups.register
def _(dataset: StoredLatents) -> Tensor | None:
    return dataset.groups() if len(dataset.tables) > 1 else None


@fetch.register
def _(dataset: StoredLatents, items: Tensor) -> dict[str, Any]:
    return dataset.batch(items)


class Texts:
    """What an encoder makes of texts: a table whose column "digest" says of which."""

    def __init__(self, table: Table):
        self.table = table
        digests = table.column("digest")  # N 2
        self._order = digests[:, 0].argsort()
        self._sorted = digests[self._order]
        self._first = self._sorted[:, 0].contiguous()

    def __reduce__(self):
        return Texts, (self.table,)

    def find(self, texts: Sequence[str | None]) -> Tensor:
        """The row of each text (B,), -1 where it is not here."""
        wanted = torch.tensor([text_digest(text) for text in texts]).view(-1, 2)
        at = torch.searchsorted(self._first, wanted[:, 0].contiguous()).clamp(max=len(self._first) - 1)
        return torch.where((self._sorted[at] == wanted).all(1), self._order[at], -1)

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """The conditions in these rows (B,)."""
        return {name: self.table.read(name, rows) for name in self.table.columns if name != "digest"}


def text_digest(text: str | None) -> tuple[int, int]:
    """128 bits of a text as two integers; no text at all has its own."""
    person = b"none" if text is None else b"text"
    return struct.unpack("<qq", hashlib.blake2b((text or "").encode(), digest_size=16, person=person).digest())


def image_digests(images: Tensor) -> Tensor:
    """128 bits of every image: B 3 H W uint8 -> B 16 uint8."""
    digests = [hashlib.blake2b(image.contiguous().numpy().data, digest_size=16).digest() for image in images]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 16)


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold a directory of tables for writing; whoever comes later, another rank for instance, waits."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "lock", "a") as file:
            hold(file, wait=True)
            sweep_temporaries(directory, *(path for path in directory.iterdir() if path.is_dir()))
            yield
    except OSError as error:
        raise DataError(f"cache={directory.parent} cannot be used ({error.strerror or error})") from error


# Which dataset this is. What `identity` says has to be the same for rows to be looked for at all; a changed `stamp` is
# a reason to look at the images again.


@singledispatch
def identity(dataset: Dataset) -> str:
    """The settings of a dataset that decide its images."""
    settings = {name: value for name, value in vars(dataset).items() if isinstance(value, int | float | str)}
    return json.dumps([VERSION, type(dataset).__qualname__, len(dataset), settings], sort_keys=True)


@singledispatch
def stamp(dataset: Dataset) -> str | None:
    """Changes whenever an image may have: sizes and times of files. None where there is nothing so cheap."""
    return None


@identity.register
def _(dataset: ImageFolder) -> str:
    names = digest(*(sample.name for sample in dataset.samples))
    return json.dumps([VERSION, "ImageFolder", dataset.shapes, dataset.background, names])


@stamp.register
def _(dataset: ImageFolder) -> str:
    path = dataset.folder.path
    files = [path] if path.is_file() else [path / sample.name for sample in dataset.samples]
    found = [file.stat() if file.exists() else None for file in files]  # one that is gone by now is named when read
    return digest(*(f"{stat.st_size} {stat.st_mtime_ns}" if stat else "gone" for stat in found))


@identity.register
def _(dataset: Subset) -> str:
    return json.dumps([identity(dataset.dataset), digest(*map(str, dataset.indices))])


@stamp.register
def _(dataset: Subset) -> str | None:
    return stamp(dataset.dataset)


def digest(*parts: str | bytes) -> str:
    """sha256 of texts and bytes, each with its length."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        whole.update(b"%d " % len(data) + data)
    return whole.hexdigest()
