"""Tensors in files: safetensors read and written, torch pickles read without ever running what they contain."""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm.io.files import replacing
from ldm.io.magic import PICKLES, format_of
from ldm.io.text import parse_json
from ldm.utils.errors import WeightsError

MAX_HEADER = 16 << 20  # bytes; the longest published header is under 1 MB
MAX_TENSORS = 200_000
MAX_NAME = 512
MAX_AXES = 16
MAX_EXTENT = 1 << 40
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Header(NamedTuple):
    """What a safetensors file says it holds."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]  # as written by whoever made the file
    ldm: dict[str, Any]  # what `write_tensors` was given as metadata; empty in files of others
    start: int  # byte of the file that follows the header
    places: dict[str, tuple[int, int]]  # first and last byte after that


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a .safetensors file or a torch pickle (.pt .pth .ckpt .bin), on the CPU. Raises WeightsError."""
    path = Path(path)
    if format_of(path) == "torch":
        from ldm.io.stored import index_tensors  # which reads headers by what is here

        return {name: stored.read() for name, stored in index_tensors(path).items()}
    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as safetensors ({_line(error)})") from error


def read_header(path: str | os.PathLike) -> Header:
    """Names, shapes, dtypes and metadata of a safetensors file, checked against its size. Raises WeightsError."""
    path = Path(path)
    if format_of(path) != "safetensors":
        raise WeightsError(f"{path}: a file of torch's ({' '.join(PICKLES)}), expected safetensors")
    try:
        with open(path, "rb") as file:
            table, space = _header_table(file, os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise WeightsError(f"{path}: damaged header (metadata is not a table of texts)")
    if len(table) > MAX_TENSORS:
        raise WeightsError(f"{path}: {len(table):,} tensors, at most {MAX_TENSORS:,} are read")
    places = {name: _check_entry(name, entry, path) for name, entry in table.items()}
    if (needed := max((end for _, end in places.values()), default=0)) != space:
        state = "cut short" if needed > space else "longer than its header says"
        raise WeightsError(f"{path}: {state} ({space:,} bytes of tensors, {needed:,} expected); copy it again")
    _check_places(places, path)
    shapes = {name: tuple(entry["shape"]) for name, entry in table.items()}
    dtypes = {name: DTYPES[entry["dtype"]] for name, entry in table.items()}
    ours = parse_json(metadata.get("ldm", "{}"), f"{path} (metadata)", WeightsError)
    start = os.path.getsize(path) - space
    return Header(shapes, dtypes, metadata, ours if isinstance(ours, dict) else {}, start, places)


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict | None = None) -> None:
    """A safetensors file, whole or not at all: the same tensors and metadata give the same bytes. Raises WeightsError.

    Tensors that share memory are written one by one, views as the values they show. `metadata` is stored as JSON.
    """
    # Deviation: the library's writer leaves mode 0600 and does not fsync, so this one is ours.
    # Widest first keeps every tensor aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    table, offset = {}, 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise WeightsError(f"{path}: tensor {name!r} is {tensor.dtype}, which a safetensors file cannot hold")
        end = offset + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    table["__metadata__"] = {"format": "pt"}  # without it transformers refuses a file
    if metadata is not None:
        table["__metadata__"]["ldm"] = _canonical(metadata)
    header = _canonical(table).encode()
    header += b" " * (-len(header) % 8)
    try:
        with replacing(path) as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for name in order:
                flat = tensors[name].detach().cpu().contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written ({error.strerror})") from error


def _header_table(file: BinaryIO, size: int, path: Path) -> tuple[dict, int]:
    """The JSON table at the start of a safetensors file, and the bytes that follow it."""
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > MAX_HEADER or 8 + length > size:
        reason = f"{size:,} bytes, a header of {length:,}"
        raise WeightsError(f"{path}: not a safetensors file, or cut short ({reason}); copy it again")
    try:
        text = file.read(length).decode()
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path}: not a safetensors file (its header is not text)") from error
    table = parse_json(text, str(path), WeightsError)
    if not isinstance(table, dict):
        raise WeightsError(f"{path}: damaged header (not a table)")
    return table, size - 8 - length


def _check_entry(name: str, entry: Any, path: Path) -> tuple[int, int]:
    """Where the data of one header entry begins and ends."""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise WeightsError(f"{path}: damaged header (tensor name {name[:40]!r})")
    try:
        (start, end), shape, width = entry["data_offsets"], entry["shape"], DTYPES[entry["dtype"]].itemsize
        if len(shape) > MAX_AXES or not all(type(n) is int and 0 <= n < MAX_EXTENT for n in [start, end, *shape]):
            raise ValueError(entry)
        if end - start != math.prod(shape) * width:
            raise ValueError(entry)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path}: damaged header (tensor {name!r}: {str(entry)[:100]})") from error
    return start, end


def _check_places(places: Mapping[str, tuple[int, int]], path: Path) -> None:
    """The tensors lie one behind the other, none in another."""
    before = 0
    for name, (start, end) in sorted(places.items(), key=lambda item: item[1]):
        if start != before:
            raise WeightsError(f"{path}: damaged header (tensor {name!r} overlaps another or leaves a hole)")
        before = end


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
