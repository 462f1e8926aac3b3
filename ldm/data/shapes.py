"""Captioned shapes: an endless, exactly known text-to-image dataset, rendered from signed distances at any size."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldm.data.phrases import NUMBERS, caption, open_caption
from ldm.data.scenes import (
    BACKGROUND,
    COLOURS,
    MAX_OBJECTS,
    POSITIONS,
    SHAPES,
    SIZES,
    SPLITS,
    UNSEEN_PAIRS,
    Object,
    Scene,
    draw,
)
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import keys, uniform

POSITION_JITTER = 0.012  # of the image side
RADIUS_JITTER = 0.03  # of the radius
COLOUR_JITTER = 10.0  # of 255, per channel
BLOCK = 256  # scenes rendered together


# Signed distances to outlines of radius 1, negative inside, with the centre of mass at the origin; x right, y down.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt_() - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.5 * math.sqrt(math.pi)  # the area of the circle


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slope = x.abs() * math.cos(math.pi / 6) - y * 0.5
    return torch.maximum(slope, y) - 0.6  # circumradius 1.2


def _star(x: Tensor, y: Tensor) -> Tensor:
    """A pentagram is all that lies behind at least four of the five lines through its tips: second largest distance."""
    tips = [math.pi * (0.4 * k - 0.5) for k in range(5)]
    first = x * math.cos(tips[0]) + y * math.sin(tips[0])
    second = torch.full_like(first, -math.inf)
    for tip in tips[1:]:
        plane = x * math.cos(tip) + y * math.sin(tip)
        second = torch.maximum(second, torch.minimum(first, plane))
        first = torch.maximum(first, plane)
    return second - 1.2 * math.cos(0.4 * math.pi)  # circumradius 1.2


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.maximum(x, y) - 1, torch.minimum(x, y) - 0.34)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_circle(x, y) + 0.24).abs_() - 0.24  # from 0.52 to 1


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    """A circle less a smaller one to its right."""
    x = x - 0.408
    return torch.maximum(_circle(x, y), 0.85 - ((x - 0.55).square() + y.square()).sqrt_())


OUTLINES = {  # those of SHAPES, and one for what is to be learnt later
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
}


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor, size: int) -> Tensor:
    """Share of each pixel that a shape covers: centres and radii (N,) in image sides -> (N, size, size) in [0, 1]."""
    grid = (torch.arange(size) + 0.5) / size
    x = (grid - x[:, None])[:, None, :] / radius[:, None, None]  # N 1 W
    y = (grid - y[:, None])[:, :, None] / radius[:, None, None]  # N H 1
    distance = OUTLINES[shape](x, y)  # N H W, in radii
    return distance.mul_(radius[:, None, None] * -size).add_(0.5).clamp_(0, 1)


def render(scenes: Sequence[Scene], size: int) -> Tensor:
    """Draw scenes, anti-aliased: -> (B, 3, size, size) uint8."""
    images = [_render(scenes[i : i + BLOCK], size) for i in range(0, len(scenes), BLOCK)]
    return torch.cat(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)


def _render(scenes: Sequence[Scene], size: int) -> Tensor:
    back = torch.tensor(BACKGROUND) + 0.4 * COLOUR_JITTER * torch.tensor([scene.jitter for scene in scenes])
    images = back[:, :, None, None].expand(-1, -1, size, size).clone()  # B 3 H W
    for slot in range(MAX_OBJECTS):
        for shape in OUTLINES:
            rows = [i for i, s in enumerate(scenes) if len(s.objects) > slot and s.objects[slot].shape == shape]
            if rows:
                x, y, radius, colour = _geometry([scenes[i].objects[slot] for i in rows])
                alpha = coverage(shape, x, y, radius, size)[:, None]  # N 1 H W
                images[rows] = images[rows].lerp_(colour[:, :, None, None], alpha)
    return images.round_().clamp_(0, 255).to(torch.uint8)


def _geometry(objects: list) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre, radius (N,) in image sides and colour (N, 3) in 0..255, with the jitter put in."""
    jitter = torch.tensor([thing.jitter for thing in objects])
    centre = torch.tensor([POSITIONS[thing.position][:2] for thing in objects]) + POSITION_JITTER * jitter[:, :2]
    radius = torch.tensor([SIZES[thing.size] for thing in objects]) * (1 + RADIUS_JITTER * jitter[:, 2])
    colour = torch.tensor([COLOURS[thing.colour] for thing in objects]) + COLOUR_JITTER * jitter[:, 3:]
    return centre[:, 0], centre[:, 1], radius, colour


class Shapes(torch.utils.data.Dataset):
    """Scenes of 1..`objects` shapes with captions; the label is the first object's shape.

    Item i is a function of (seed, split, i). `jitter` in [0, 1] moves, scales and tints the objects a little.
    `captions`: "full" ones say everything; "open" ones any part of it, and UNSEEN_PAIRS are held out. The default is
    what runs were trained with whose configs do not say.
    """

    def __init__(
        self,
        image_size: int = 32,
        length: int = 20000,
        seed: int = 0,
        split: str = "train",
        objects: int = 1,
        jitter: float = 1.0,
        captions: str = "full",
    ):
        checks = {
            "split": (split, split in SPLITS, f"one of {', '.join(SPLITS)}"),
            "objects": (objects, 1 <= objects <= MAX_OBJECTS, f"1 to {MAX_OBJECTS}"),
            "image_size": (image_size, image_size >= 16, "at least 16 pixels"),
            "length": (length, length >= 1, "at least 1"),
            "jitter": (jitter, 0 <= jitter <= 1, "0 to 1"),
            "captions": (captions, captions in ("open", "full"), "open or full"),
        }
        for name, (value, good, expected) in checks.items():
            if not good:
                raise ConfigError(f"data.{name}={value!r} cannot be: expected {expected}")
        self.image_size = image_size
        self.length = length
        self.seed = seed
        self.split = split
        self.objects = objects
        self.jitter = jitter
        self.open = captions == "open"
        self.class_names = list(SHAPES)
        self._blocks: dict[int, tuple[list[Scene], list[str], Tensor]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        block, row = divmod(index, BLOCK)
        if block not in self._blocks:
            scenes = self._draw(range(block * BLOCK, (block + 1) * BLOCK))
            self._blocks[block] = scenes, self._say(scenes, block * BLOCK), render(scenes, self.image_size)
        scenes, captions, images = self._blocks[block]
        label = SHAPES.index(scenes[row].objects[0].shape)
        return {"image": images[row], "caption": captions[row], "label": label, "scene": scenes[row]}

    def scenes(self) -> list[Scene]:
        """What the images show, in order."""
        return self._draw(range(self.length))

    def captions(self) -> Iterator[str]:
        """Every caption in order, without rendering."""
        return iter(self._say(self.scenes(), 0))

    def prompts(self, count: int, seed: int = 0) -> list[str]:
        """Whole captions of `count` held-out scenes, whichever split this is."""
        return [caption(scene) for scene in self.held_out_scenes(count, seed)]

    def held_out_scenes(self, count: int, seed: int = 0) -> list[Scene]:
        return draw(seed, "held_out", range(count), self.objects, unseen=self.unseen)

    @property
    def unseen(self) -> tuple[tuple[str, str], ...]:
        """The pairs of shape and colour that training never shows."""
        return UNSEEN_PAIRS if self.open else ()

    def _draw(self, indices: range) -> list[Scene]:
        return draw(self.seed, self.split, indices, self.objects, self.jitter, self.unseen)

    def _say(self, scenes: Sequence[Scene], first: int) -> list[str]:
        """Captions of the scenes from index `first` on."""
        if not self.open:
            return [caption(scene) for scene in scenes]
        indices = torch.arange(first, first + len(scenes))
        numbers = uniform(keys(self.seed, f"captions/{self.split}", indices), (NUMBERS,)).tolist()
        return [open_caption(scene, u) for scene, u in zip(scenes, numbers, strict=True)]


class NewShape(torch.utils.data.Dataset):
    """Four images of one shape that `Shapes` never shows, with captions whose word for it those never say."""

    LOOKS = (("red", "large", "centre"), ("blue", "small", "left"), ("green", "large", "top"),
             ("black", "small", "right"))  # fmt: skip

    def __init__(self, image_size: int = 32, shape: str = "crescent"):
        if shape not in OUTLINES.keys() - set(SHAPES):
            raise ConfigError(f"data.shape={shape!r}: expected one of {', '.join(OUTLINES.keys() - set(SHAPES))}")
        scenes = [Scene((Object(shape, *look),)) for look in self.LOOKS]
        self.images, self._captions = render(scenes, image_size), [caption(scene) for scene in scenes]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "caption": self._captions[index]}

    def captions(self) -> Iterator[str]:
        return iter(self._captions)
