"""What to repaint, for training inpainting models: random strokes and boxes, each mask a function of its key."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.utils.errors import ConfigError
from ldm.utils.seeding import uniform

STROKES, SEGMENTS, BOXES = 4, 5, 3  # at most
WIDTH = 0.04, 0.30  # of a segment, in sides of the square of the image's area
LENGTH = 0.05, 0.60
TURN = 0.5 * math.pi  # between two segments, at most, to either side
BOX = 0.12, 0.60  # of the height and of the width
DRAWS = 3 + STROKES * (4 + 3 * SEGMENTS)  # random numbers that a mask takes, at most


def strokes_and_boxes(keys: Tensor, height: int, width: int, *, full: float = 0.25) -> Tensor:
    """One mask per key, True = repaint: (B,) int64 -> (B 1 H W) bool on the CPU. Raises ConfigError.

    Thick strokes or boxes, equally often (arXiv:2109.07161, 2.3); a share `full` of the masks repaints everything, as
    in the training of Stable Diffusion's inpainting model.
    """
    if not 0 <= full <= 1:
        raise ConfigError(f"masks.full={full}: expected a share between 0 and 1")
    masks = torch.zeros(len(keys), 1, height, width, dtype=torch.bool)
    for mask, numbers in zip(masks[:, 0], uniform(keys.cpu(), (DRAWS,)).tolist(), strict=True):
        u = iter(numbers)
        if next(u) < full:
            mask.fill_(True)
        elif next(u) < 0.5:
            _boxes(mask, u)
        else:
            _strokes(mask, u)
    return masks


def _between(u: float, ends: tuple[float, float]) -> float:
    return ends[0] + (ends[1] - ends[0]) * u


def _boxes(mask: Tensor, u: Iterator[float]) -> None:
    """One to BOXES rectangles, all within the image."""
    for _ in range(1 + int(BOXES * next(u))):
        rows, columns = (_interval(size, max(1, round(_between(next(u), BOX) * size)), next(u)) for size in mask.shape)
        mask[rows, columns] = True


def _interval(size: int, length: int, u: float) -> slice:
    start = int(u * (size - length + 1))
    return slice(start, start + length)


def _strokes(mask: Tensor, u: Iterator[float]) -> None:
    """One to STROKES bent lines of one to SEGMENTS segments, each with its own width and with round ends."""
    height, width = mask.shape
    side = math.sqrt(height * width)
    for _ in range(1 + int(STROKES * next(u))):
        x, y, angle = next(u) * width, next(u) * height, next(u) * 2 * math.pi
        for _ in range(1 + int(SEGMENTS * next(u))):
            angle += _between(next(u), (-TURN, TURN))
            length = _between(next(u), LENGTH) * side
            radius = max(0.75, 0.5 * _between(next(u), WIDTH) * side)  # never between the pixels
            x_to = min(max(x + length * math.cos(angle), 0), width)
            y_to = min(max(y + length * math.sin(angle), 0), height)
            _segment(mask, (x, y), (x_to, y_to), radius)
            x, y = x_to, y_to


def _segment(mask: Tensor, start: tuple[float, float], end: tuple[float, float], radius: float) -> None:
    """Every pixel whose centre is nearer than radius to the line between two points (x, y)."""
    (x0, y0), (x1, y1) = start, end
    left, top = (max(0, int(min(pair) - radius)) for pair in ((x0, x1), (y0, y1)))
    window = mask[top : int(max(y0, y1) + radius) + 1, left : int(max(x0, x1) + radius) + 1]
    y = torch.arange(window.shape[0])[:, None] + (top + 0.5 - y0)  # H 1, from the start
    x = torch.arange(window.shape[1]) + (left + 0.5 - x0)  # W
    dx, dy = x1 - x0, y1 - y0
    along = ((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-12)).clamp(0, 1)  # share of the way, H W
    window |= (x - along * dx).square() + (y - along * dy).square() < radius * radius
