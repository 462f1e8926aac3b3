"""Captions, JSON and YAML from outside: strict UTF-8, bounded size and depth, no duplicate keys."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ldm.io.files import read_bytes, replacing
from ldm.utils.errors import DataError, LdmError, reading

MAX_TEXT = 1 << 20  # bytes of one caption or one configuration
MAX_TABLE = 1 << 30  # bytes of a table of captions, read line by line
MAX_YAML = 1 << 16  # bytes; the longest published one has 5 KB, and reading it takes a second per 100 KB
MAX_DEPTH = 32
MAX_TABLES = 1_000_000  # of one JSON text; mT5's vocabulary is 250,000 lists
_DROPPED = object()  # stands for NaN and Infinity until the object that has it is complete


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 with or without a byte-order mark, stripped. Raises DataError naming the offending byte."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise DataError(f"{name}: not UTF-8 text ({where}); save it as UTF-8") from error
    if "\0" in text:
        raise DataError(f"{name}: holds a NUL character, so it is not plain text; save it as UTF-8")
    return text.strip()


def parse_json(text: str, name: str, error: type[LdmError] = DataError, *, lenient: bool = False) -> Any:
    """The value of JSON text, without duplicate keys, NaN or more than MAX_DEPTH levels. Raises `error`.

    lenient: entries of objects that are NaN or Infinity, which Python's programs write, are left out instead.
    """
    constant = (lambda _: _DROPPED) if lenient else _refuse_constant
    if (tables := text.count("{") + text.count("[")) > MAX_TABLES:
        raise error(f"{name}: {tables:,} tables and lists in one JSON text, at most {MAX_TABLES:,} are read")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=constant, parse_float=_finite)
        _check_depth(value, MAX_DEPTH)
    except (ValueError, RecursionError) as problem:
        raise error(f"{name}: not the JSON expected here ({' '.join(str(problem).split())[:200]})") from problem
    return value


def read_json(path: str | os.PathLike, *, max_bytes: int = MAX_TEXT, lenient: bool = False) -> Any:
    """The value in a JSON file. Raises DataError."""
    return parse_json(decode_text(read_bytes(path, max_bytes=max_bytes), str(path)), str(path), lenient=lenient)


def read_config(path: str | os.PathLike, *, lenient: bool = False) -> dict[str, Any]:
    """A resolved configuration written with weights: one JSON object, in which nothing is left to interpolate."""
    config = read_json(path, lenient=lenient)
    if not isinstance(config, dict):
        raise DataError(f"{path}: holds a JSON {type(config).__name__}, a configuration is an object")
    if any("${" in text for text in _strings(config)):  # would read the environment: ${oc.env:...}
        raise DataError(f"{path}: holds an interpolation ('${{...}}'); a configuration stored with weights is resolved")
    return config


class _Plain(yaml.SafeLoader):
    """Without references, by which a few lines become a table of any size, and with dates as they are written."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a reference to another entry")
        return super().compose_node(parent, index)


def read_yaml(path: str | os.PathLike, kind: type = dict) -> Any:
    """A configuration that others wrote as YAML: one table, or a list, of plain values. Raises DataError."""
    text = decode_text(read_bytes(path, max_bytes=MAX_YAML), str(path))
    with reading(path, "not the YAML expected here", DataError):  # its values of many types end in as many errors
        config = yaml.load(text, _Plain)
        _check_depth(config, MAX_DEPTH)
    if not isinstance(config, kind):
        raise DataError(f"{path}: holds a YAML {type(config).__name__}, a configuration is a {kind.__name__}")
    return config


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Indented JSON with sorted keys, in one step."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(Path(path)) as file:
        file.write(text.encode())


def parse_jsonl(data: bytes, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("name:line", object) for each line that is not empty. Raises DataError naming the line."""
    for number, line in enumerate(data.splitlines(), start=1):
        where = f"{name}:{number}"
        if text := decode_text(line, where):
            row = parse_json(text, where)
            if not isinstance(row, dict):
                raise DataError(f"{where}: holds a JSON {type(row).__name__}, every line is an object")
            yield where, row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"key {name[:40]!r} appears twice")
        table[name] = value
    return {name: value for name, value in table.items() if value is not _DROPPED}


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _check_depth(value: Any, levels: int) -> None:
    if value is _DROPPED:
        raise ValueError("a list with NaN or Infinity")
    if not isinstance(value, dict | list):
        if not isinstance(value, str | int | float | None):  # of YAML: dates, sets, bytes
            raise ValueError(f"a {type(value).__name__}")
        return
    if isinstance(value, dict) and not all(isinstance(key, str | int | float | None) for key in value):
        raise ValueError("a key that is no text")
    if levels == 0:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    for child in value.values() if isinstance(value, dict) else value:
        _check_depth(child, levels - 1)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for child in value.values():
            yield from _strings(child)
    elif isinstance(value, list):
        for child in value:
            yield from _strings(child)
