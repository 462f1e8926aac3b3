"""Tensors that stay in their file until they are read, one at a time: a network is loaded in no more than its own size.

Deviation: the bytes are read, not mapped. A mapped file that is replaced or cut while it is in use kills the process,
and its pages count as memory of ours beside the copies that a fused projection or another dtype needs anyway.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ldm.io.inert import MAX_PICKLE, PickledTensor, read_legacy, read_pickle
from ldm.io.magic import format_of
from ldm.io.tensors import read_header
from ldm.utils.errors import WeightsError

BLOCK = 1 << 22  # elements


class Stored(Protocol):
    """A tensor to be: what is known of it, and how to get it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor: ...


@dataclass(frozen=True)
class InFile:
    """A tensor at a place in a file."""

    path: Path
    start: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None  # elements; None is contiguous

    def read(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """The tensor, contiguous, in memory of its own; cast and moved block by block. Raises WeightsError."""
        count = math.prod(self.shape) if self.stride is None else span(self.shape, self.stride)
        flat = torch.empty(count, dtype=dtype or self.dtype, device=device)
        is_same = flat.dtype == self.dtype and flat.device.type == "cpu"
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start)
                for part in flat.split(BLOCK):
                    block = part if is_same else torch.empty(len(part), dtype=self.dtype)
                    self._fill(block, file)
                    if not is_same:
                        part.copy_(block)
        except OSError as error:
            raise WeightsError(f"{self.path}: cannot be read ({error.strerror})") from error
        return flat.view(self.shape) if self.stride is None else flat.as_strided(self.shape, self.stride).contiguous()

    def _fill(self, block: Tensor, file: io.RawIOBase) -> None:
        left = memoryview(block.view(torch.uint8).numpy())
        while left:
            if not (count := file.readinto(left)):
                raise WeightsError(f"{self.path}: cut short while it was read; copy it again")
            left = left[count:]


def index_tensors(path: str | os.PathLike) -> dict[str, Stored]:
    """Every tensor of a .safetensors file or a torch pickle by name, none of them read yet. Raises WeightsError."""
    path = Path(path)
    if format_of(path) == "safetensors":
        return _index_safetensors(path)
    try:
        found = _index_pickle(path) if zipfile.is_zipfile(path) else _index_legacy(path)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or 'cannot be read'}") from error
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path}: damaged or cut short; copy it again") from error
    _refuse_bomb(path, found)
    return found


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a strided view."""
    return 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _index_safetensors(path: Path) -> dict[str, Stored]:
    header = read_header(path)
    return {
        name: InFile(path, header.start + header.places[name][0], shape, header.dtypes[name])
        for name, shape in header.shapes.items()
    }


def _index_pickle(path: Path) -> dict[str, Stored]:
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            root = next((n[: -len("data.pkl")] for n in archive.namelist() if n.endswith("data.pkl")), None)
            if root is None:
                raise WeightsError(f"{path}: a zip archive, but not one that torch wrote (no data.pkl)")
            order = f"{root}byteorder"
            if order in archive.NameToInfo and _stored(archive, order, path) != b"little":
                raise WeightsError(f"{path}: written on a big-endian machine; convert it to safetensors there")
            tensors = read_pickle(_stored(archive, f"{root}data.pkl", path), path)
            places = {t.storage: _place(archive, file, f"{root}data/{t.storage}", path) for t in tensors.values()}
    except WeightsError:
        raise
    except Exception as error:  # a damaged archive ends in any of a dozen types
        raise WeightsError(f"{path}: damaged or cut short ({type(error).__name__}); copy it again") from error
    return {name: _in_storage(path, name, tensor, *places[tensor.storage]) for name, tensor in tensors.items()}


def _index_legacy(path: Path) -> dict[str, Stored]:
    """From before torch 1.6: the storages follow the pickles, each after the number of its elements."""
    with open(path, "rb") as file:
        tensors, storages, position = read_legacy(file.read(MAX_PICKLE), path)
        end, places = path.stat().st_size, {}
        for name, dtype in storages:
            file.seek(position)
            head = file.read(8)
            size = int.from_bytes(head, "little") * dtype.itemsize
            if len(head) < 8 or position + 8 + size > end:
                raise WeightsError(f"{path}: damaged or cut short; copy it again")
            places[name], position = (position + 8, size), position + 8 + size
    if lost := [name for name, tensor in tensors.items() if tensor.storage not in places]:
        raise WeightsError(f"{path}: tensor {lost[0]!r} has no numbers; the file is damaged")
    return {name: _in_storage(path, name, tensor, *places[tensor.storage]) for name, tensor in tensors.items()}


def _stored(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
        raise WeightsError(f"{path}: entry {name!r} is compressed, which no file of torch's is")
    return archive.read(entry)


def _place(archive: zipfile.ZipFile, file, name: str, path: Path) -> tuple[int, int]:
    """First byte and size of an entry's data, which follows its local header: 30 bytes, the name, an extra field."""
    entry = archive.getinfo(name)
    file.seek(entry.header_offset + 26)
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    if entry.compress_type != zipfile.ZIP_STORED or start + entry.file_size > path.stat().st_size:
        raise WeightsError(f"{path}: entry {name!r} is compressed or cut short, which no file of torch's is")
    return start, entry.file_size


def _in_storage(path: Path, name: str, tensor: PickledTensor, start: int, size: int) -> InFile:
    width = tensor.dtype.itemsize
    if (tensor.offset + span(tensor.shape, tensor.stride)) * width > size:
        raise WeightsError(f"{path}: tensor {name!r} reaches beyond its {size:,} bytes; the file is damaged")
    stride = None if tensor.stride == _contiguous(tensor.shape) else tensor.stride
    return InFile(path, start + tensor.offset * width, tensor.shape, tensor.dtype, stride)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _refuse_bomb(path: Path, found: Mapping[str, Stored]) -> None:
    total = sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in found.values())
    if total > 4 * path.stat().st_size:  # expanded views: terabytes from a few bytes
        raise WeightsError(f"{path}: its tensors claim {total:,} bytes, the file has {path.stat().st_size:,}")
