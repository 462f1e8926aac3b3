"""Scenes of one to three coloured shapes, drawn from a seed.

About an eighth of all (shape, colour, size, position) combinations is held out: it never occurs in split "train" and
is all of split "held_out", so that accuracy on it measures composition, not memory. Pairs of shape and colour may be
held out besides, whatever their size and position.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, permutations, product
from typing import NamedTuple

import torch

from ldm.utils.seeding import key, keys, uniform

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {  # RGB; any two are at least 95 apart, and each at least 120 from the background
    "red": (214, 40, 48),
    "orange": (244, 132, 28),
    "yellow": (250, 222, 44),
    "green": (46, 164, 79),
    "cyan": (52, 196, 224),
    "blue": (40, 76, 212),
    "purple": (150, 60, 186),
    "black": (36, 36, 42),
}
BACKGROUND = (246, 244, 240)
SIZES = {"small": 0.135, "large": 0.19}  # radius / image side
POSITIONS = {  # centre (x right, y down) on the unit square, and how it is said; the corners serve scenes of several
    "centre": (0.50, 0.50, "in the centre"),
    "left": (0.25, 0.50, "on the left"),
    "right": (0.75, 0.50, "on the right"),
    "top": (0.50, 0.25, "at the top"),
    "bottom": (0.50, 0.75, "at the bottom"),
    "top left": (0.25, 0.25, "at the top left"),
    "top right": (0.75, 0.25, "at the top right"),
    "bottom left": (0.25, 0.75, "at the bottom left"),
    "bottom right": (0.75, 0.75, "at the bottom right"),
}
RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
UNSEEN_PAIRS = (  # of shape and colour, one of each shape, that training with open captions never shows
    ("circle", "yellow"),
    ("square", "purple"),
    ("triangle", "green"),
    ("star", "cyan"),
    ("cross", "orange"),
    ("ring", "black"),
)
ATTRIBUTES = ("shape", "colour", "size", "position")
SPLITS = ("train", "held_out")
MAX_OBJECTS = 3


class Object(NamedTuple):
    """One object; None is what a prompt leaves open. `jitter` in [-1, 1]: x, y, radius, red, green, blue."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    position: str | None = None
    jitter: tuple[float, ...] = (0.0,) * 6


class Scene(NamedTuple):
    """What an image shows. In scenes of two, `relation` is the first's to the second; `jitter` tints the background."""

    objects: tuple[Object, ...]
    relation: str | None = None
    jitter: tuple[float, ...] = (0.0,) * 3


def held_out(shape: str, colour: str, size: str, position: str) -> bool:
    """Whether this combination is kept from training."""
    return key("held out", shape, colour, size, position) % 8 == 0


def draw(
    seed: int,
    split: str,
    indices: Sequence[int],
    objects: int = 1,
    jitter: float = 1.0,
    unseen: tuple[tuple[str, str], ...] = (),  # pairs of shape and colour that are held out too
) -> list[Scene]:
    """The scenes at `indices` of a split, each a function of (seed, split, index) alone, with 1..`objects` objects."""
    numbers = uniform(keys(seed, f"shapes/{split}", torch.as_tensor(indices)), (5 + 7 * MAX_OBJECTS,))
    return [_scene(u, split, objects, jitter, unseen) for u in numbers.tolist()]


def _scene(u: list[float], split: str, objects: int, jitter: float, unseen: tuple) -> Scene:
    positions = _pick(_layouts(1 + int(u[0] * objects)), u[1])
    noise = [jitter * (2 * v - 1) for v in u[2:]]
    chosen = []
    for k, position in enumerate(positions):
        at = 5 + 7 * k
        look = _pick(_looks(split, position, unseen), u[at])
        chosen.append(Object(*look, position, tuple(noise[at - 1 : at + 5])))
    relation = _relation(*positions) if len(positions) == 2 else None
    return Scene(tuple(chosen), relation, tuple(noise[:3]))


def _pick(items: Sequence, u: float):
    return items[int(u * len(items))]


@lru_cache
def _looks(split: str, position: str, unseen: tuple) -> list[tuple[str, str, str]]:
    """The (shape, colour, size) that a split may show at a position."""
    looks = product(SHAPES, COLOURS, SIZES)
    return [look for look in looks if (held_out(*look, position) or look[:2] in unseen) == (split == "held_out")]


@lru_cache
def _layouts(count: int) -> list[tuple[str, ...]]:
    """The places that `count` objects may take: one stays off the corners, several are never in neighbouring cells."""
    if count == 1:
        return [(name,) for name in list(POSITIONS)[:5]]
    return [names for names in permutations(POSITIONS, count) if all(_apart(a, b) for a, b in combinations(names, 2))]


def _apart(a: str, b: str) -> bool:
    return max(abs(p - q) for p, q in zip(POSITIONS[a][:2], POSITIONS[b][:2], strict=True)) >= 0.5


def _relation(a: str, b: str) -> str:
    dx, dy = (q - p for p, q in zip(POSITIONS[a][:2], POSITIONS[b][:2], strict=True))
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"
