"""What a slot of a config may hold: the functions and classes that the YAML files of its group name, and no others.

A config comes from a person, or from a checkpoint that a stranger made: both are held to the same list.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

MISSING = "???"
PLAIN = (int, float, bool, str, NoneType)
LISTS = (Sequence, Iterable, list, tuple)
_LINE = re.compile(r"^ *_target_: *(?P<target>[\w.]+)|^(?P<key>\w+):", re.MULTILINE)


@cache
def targets(configs: Path, slot: str) -> frozenset[str]:
    """Names of all that may be built in a slot: "codec" is configs/codec, "conditioner.encoders" a part of a group."""
    group, _, part = slot.partition(".")
    found, key = set(), ""
    for path in sorted(Path(configs, group).glob("*.yaml")):
        for line in _LINE.finditer(path.read_text(encoding="utf-8")):
            key = line["key"] or key
            if line["target"] and part in ("", key):
                found.add(line["target"])
    return frozenset(found)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value of a config is what a signature asks for, where that is plain: numbers, texts, lists of them."""
    is_union = isinstance(annotation, UnionType) or get_origin(annotation) is Union
    kinds = get_args(annotation) if is_union else (annotation,)
    return (isinstance(value, str) and value == MISSING) or any(_is(value, kind) for kind in kinds)


def _is(value: Any, kind: Any) -> bool:
    if kind in PLAIN:
        is_number = type(value) is kind or (kind is float and type(value) is int)
        return is_number and not (type(value) is int and abs(value) >= 1 << 63)
    origin = get_origin(kind) or kind
    if origin in LISTS:
        items = [item for item in get_args(kind) if item is not ...]
        return isinstance(value, list | tuple) and (not items or all(any(fits(v, i) for i in items) for v in value))
    if origin in (Mapping, dict):
        _, *of = get_args(kind) or (Any, Any)
        return isinstance(value, Mapping) and all(fits(v, of[0]) for v in value.values())
    return True  # an object, which the wiring makes
