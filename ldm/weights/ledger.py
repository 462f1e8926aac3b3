"""Names and values of published tensors, translated both ways with every key accounted for.

A table row is (pattern of ours, theirs), or (pattern of ours, theirs, theirs, ...) where a fused projection of ours is
several tensors of theirs, stacked along the first axis. Values are never changed: a round trip is bit-exact.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from ldm.utils.errors import WeightsError

Table = Sequence[tuple[str, ...]]
Names = dict[str, tuple[str, ...]]  # our key -> their keys
MAX_LINES = 1 << 20  # characters of names that are looked at; the longest published file has a third of that


class Mismatch(WeightsError):
    """Names of tensors that are not those of the network."""

    def __init__(self, missing: list[str], unknown: list[str]):
        super().__init__(f"weights made for another network: missing {listing(missing)}; unknown {listing(unknown)}")
        self.missing, self.unknown = missing, unknown


@cache
def say(line: str) -> None:
    """A line on the terminal for people, the first time that it is said."""
    print(line, file=sys.stderr)


class Lazy(Mapping):
    """A state dict whose tensors are made when they are asked for, and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]):
        self.makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def changed(state: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> Lazy:
    """The state dict with every tensor changed; `change` also gets its name."""
    return Lazy({name: lambda name=name: change(name, state[name]) for name in state})


def without(state: Mapping[str, Tensor], is_extra: Callable[[str], bool]) -> Lazy:
    """The state dict without some names."""
    return Lazy({name: lambda name=name: state[name] for name in state if not is_extra(name)})


def translate(key: str, table: Table) -> tuple[str, ...]:
    """Apply each row of the table, top to bottom, at most once."""
    theirs = (key,)
    for pattern, *names in table:
        if re.search(pattern, theirs[0]):
            theirs = tuple(re.sub(pattern, name, theirs[0], count=1) for name in names)
    return theirs


def to_ours(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """A published state dict under our names. Mismatch names keys that are missing or left over."""
    expected = {their for theirs in names.values() for their in theirs}
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unknown:
        raise Mismatch(missing, unknown)
    return {
        our: state[theirs[0]] if len(theirs) == 1 else torch.cat([state[their] for their in theirs])
        for our, theirs in names.items()
    }


def to_theirs(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Our state dict under published names: the inverse of `to_ours`. Parts of a fused tensor are copies."""
    published = {}
    for our, theirs in names.items():
        parts = [part.clone() for part in state[our].chunk(len(theirs))] if len(theirs) > 1 else [state[our]]
        published |= zip(theirs, parts, strict=True)
    return published


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; of tensors that have only a shape, as far as one can tell."""
    return a.shape == b.shape and (a.is_meta or torch.equal(a, b))


def listing(keys: list[str]) -> str:
    """The first three keys and how many there are."""
    return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "none"


def first_row(table: dict[str, str], keys: Iterable[str]) -> str | None:
    """The words of the first pattern that one of the keys has; None where none has."""
    lines = "\n".join(keys)[:MAX_LINES]
    return next((words for pattern, words in table.items() if re.search(pattern, lines, re.MULTILINE)), None)
