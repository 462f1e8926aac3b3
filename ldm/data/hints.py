"""What steers a picture, made without downloads: uint8 images (B 3 H W) -> uint8 hints (B 3 H W), white on black.

canny, sketch, grey, palette and inpaint read images; segmentation and depth read the scenes of `ldm.data.scenes`, of
which all is known. A network that reads hints of one channel takes the mean of the three.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.scenes import COLOURS, POSITIONS, SHAPES, SIZES, Object, Scene
from ldm.data.shapes import POSITION_JITTER, RADIUS_JITTER, coverage
from ldm.utils.errors import ConfigError, DataError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
TAN_22 = 13573 / 2**15  # of 22.5 degrees, as OpenCV rounds it; of 67.5 degrees it is 2 more
HOLE = -1.0  # of an inpainting hint


def grey(images: Tensor) -> Tensor:
    """Luminance, three times."""
    return _luma(images).round_().to(torch.uint8).expand(-1, 3, -1, -1)


def canny(images: Tensor, low: float = 100.0, high: float = 200.0) -> Tensor:
    """Edges one pixel wide: Canny's detector (1986) with the conventions of OpenCV, which published ControlNets saw.

    Sobel, of the channel where it is steepest, |dx| + |dy|; ridges of it above `low` that hang together with one above
    `high`. There is no blur before it. Raises ConfigError.
    """
    if not 0 <= low <= high:
        raise ConfigError(f"canny: low={low}, high={high}; expected 0 <= low <= high, such as 100 and 200")
    dx, dy = _gradient(images.float())  # B H W
    strength = dx.abs() + dy.abs()
    ridge = _is_ridge(dx, dy, strength)
    return _white(_connected(ridge & (strength > high), ridge & (strength > low)))


def _gradient(images: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel's dx and dy of the steepest channel: 2 x (B H W)."""
    kernel = images.new_tensor(SOBEL)
    kernels = torch.stack([kernel, kernel.t()])[:, None]  # 2 1 3 3
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None]  # BC 1 H+2 W+2
    both = F.conv2d(padded, kernels).unflatten(0, images.shape[:2])  # B C 2 H W
    steepest = both.abs().sum(2).argmax(1)[:, None, None].expand(-1, 1, 2, -1, -1)
    return both.gather(1, steepest)[:, 0].unbind(1)


def _is_ridge(dx: Tensor, dy: Tensor, strength: Tensor) -> Tensor:
    """Where no neighbour across the edge, in one of four directions, is steeper."""
    height, width = strength.shape[1:]
    padded = F.pad(strength, (1, 1, 1, 1))

    def beside(right: int, down: int) -> Tensor:
        return padded[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    flat, steep = dy.abs() < TAN_22 * dx.abs(), dy.abs() > (TAN_22 + 2) * dx.abs()
    to_lower_left = torch.maximum(beside(1, -1), beside(-1, 1))
    to_lower_right = torch.maximum(beside(-1, -1), beside(1, 1))
    across = torch.where((dx < 0) != (dy < 0), to_lower_left, to_lower_right)
    # Of two that are equal, the one further right or down is kept; on a diagonal, neither.
    along_x = (strength > beside(-1, 0)) & (strength >= beside(1, 0))
    along_y = (strength > beside(0, -1)) & (strength >= beside(0, 1))
    return torch.where(flat, along_x, torch.where(steep, along_y, strength > across))


def _connected(strong: Tensor, weak: Tensor) -> Tensor:
    """All of `weak` that hangs together with `strong`, diagonals included: (B H W) bool."""
    while True:
        grown = (F.max_pool2d(strong[:, None].float(), 3, 1, 1)[:, 0] > 0) & weak
        if torch.equal(grown, strong):
            return strong
        strong = grown


def sketch(images: Tensor, width: float = 1.0, gain: float = 2.0) -> Tensor:
    """Soft lines, as of a pencil: Sobel's length, after a Gaussian blur of `width` pixels, times `gain`."""
    if width <= 0 or gain <= 0:
        raise ConfigError(f"sketch: width={width}, gain={gain}; expected positive numbers, such as 1 and 2")
    lines = torch.hypot(*_gradient(_blur(images.float(), width))) / 4 * gain  # 4: Sobel's of a step of 1
    return lines.clamp_(0, 255).round_().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """(B C H W), by a Gaussian cut off at three deviations."""
    radius = min(math.ceil(3 * sigma), min(x.shape[2:]) - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma).square())
    kernel = (kernel / kernel.sum())[None, None, None]  # 1 1 1 K
    flat = x.flatten(0, 1)[:, None]  # BC 1 H W
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="reflect"), kernel)
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="reflect"), kernel.transpose(2, 3))
    return flat.view_as(x)


def palette(images: Tensor, cell: int = 64) -> Tensor:
    """The colours of squares of `cell` pixels and nothing else: the hint of the colour adapter, arXiv:2302.08453."""
    height, width = images.shape[2:]
    if not 1 <= cell <= min(height, width):
        raise ConfigError(f"palette: cell={cell}; expected 1 to {min(height, width)}, the shorter side of the image")
    small = F.interpolate(images.float(), (height // cell, width // cell), mode="area")
    return F.interpolate(small, (height, width), mode="nearest").round_().to(torch.uint8)


def inpaint(images: Tensor, mask: Tensor) -> Tensor:
    """What is to be kept, and -1 where the mask (B 1 H W) is 0.5 or more: float32 (B 3 H W), as no uint8 is -1."""
    if mask.shape[2:] != images.shape[2:]:
        (a, b), (c, d) = mask.shape[2:], images.shape[2:]
        raise DataError(f"the mask is {a}x{b} pixels, its image {c}x{d}; give one of that size")
    return (images.float() / 255).masked_fill(mask >= 0.5, HOLE)


def segmentation(scenes: Sequence[Scene], size: int) -> Tensor:
    """Every object in the colour that stands for its kind, on black."""
    colours = dict(zip(SHAPES, COLOURS.values(), strict=False))
    return _paint(scenes, size, lambda thing: colours[thing.shape])


def depth(scenes: Sequence[Scene], size: int) -> Tensor:
    """The nearer the brighter: objects are of one size, so a large one is near; the background is black, far away."""
    nearest = max(SIZES.values())
    return _paint(scenes, size, lambda thing: (255.0 * SIZES[thing.size] / nearest,) * 3)


def _paint(scenes: Sequence[Scene], size: int, colour: Callable[[Object], Sequence[float]]) -> Tensor:
    hints = torch.zeros(len(scenes), 3, size, size)
    for hint, scene in zip(hints, scenes, strict=True):
        for thing in scene.objects:
            inside = (_covered(thing, size) >= 0.5).float()
            hint.lerp_(hint.new_tensor(colour(thing))[:, None, None], inside)
    return hints.round_().to(torch.uint8)


def _covered(thing: Object, size: int) -> Tensor:
    """Share of each pixel that an object covers, where it was drawn: (1, size, size)."""
    x, y = (p + POSITION_JITTER * j for p, j in zip(POSITIONS[thing.position][:2], thing.jitter[:2], strict=True))
    radius = SIZES[thing.size] * (1 + RADIUS_JITTER * thing.jitter[2])
    return coverage(thing.shape, *(torch.tensor([number]) for number in (x, y, radius)), size)


def _luma(images: Tensor) -> Tensor:
    """(B 3 H W) uint8 -> (B 1 H W) float32, 0..255."""
    return (images.float() * torch.tensor(LUMA, device=images.device)[:, None, None]).sum(1, keepdim=True)


def _white(lines: Tensor) -> Tensor:
    return (lines[:, None].to(torch.uint8) * 255).expand(-1, 3, -1, -1)
