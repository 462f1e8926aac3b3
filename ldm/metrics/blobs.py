"""What an image of captioned shapes shows, found by classical image analysis: no network.

Background from the border -> connected blobs -> each blob's colour (nearest of the palette), centre (of mass), shape
and radius (best overlap with every outline drawn at that centre with the same area).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.scenes import COLOURS, POSITIONS, SHAPES, SIZES
from ldm.data.shapes import coverage

CONTRAST = 48.0  # distance from the background (of 441) from which a pixel belongs to a blob
SPECK = 0.006  # share of the image below which a blob is dust; the smallest object covers three times that
DUST = 0.02  # share of the image that all dust together may cover
MAX_BLOBS = 4  # one more than a caption can ask for: enough to see that there are too many
MIN_OVERLAP = 0.65  # with the best outline: soft intersection over union
MAX_COLOUR_DISTANCE = 75.0
RADIUS_SLACK = 1.25  # a radius this far from every size is no size
MAX_SIDE = 32  # larger images are averaged down first
BLURS = (0.0, 0.5, 0.8, 1.1)  # in pixels, that an image may have
CHUNK = 128


class Blob(NamedTuple):
    """What one connected piece of an image looks like; None is what nothing in the vocabulary matches."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    position: str | None = None
    x: float = math.nan
    y: float = math.nan


@torch.no_grad()
def describe(images: Tensor, shapes: Sequence[str] = SHAPES) -> list[list[Blob]]:
    """The blobs of each image (B, 3, H, W) uint8, largest first, at most four; each is the likeliest of `shapes`."""
    return [blobs for chunk in images.cpu().split(CHUNK) for blobs in _describe(chunk.float(), shapes)]


def _describe(images: Tensor, shapes: Sequence[str]) -> list[list[Blob]]:
    if images.shape[-1] > MAX_SIDE:
        images = F.interpolate(images, size=(MAX_SIDE, MAX_SIDE), mode="area")
    offset = images - _border(images)[..., None, None]  # B 3 H W
    contrast = offset.norm(dim=1)  # B H W
    owner, masks = _blobs(contrast, (3 * _border(contrast)).clamp(min=CONTRAST))  # above the background's own noise
    found = _recognise(offset[owner], masks, images[owner] - offset[owner], shapes) if len(owner) else []
    blobs: list[list[Blob]] = [[] for _ in images]
    for image, blob in zip(owner.tolist(), found, strict=True):
        blobs[image].append(blob)
    return blobs


def _border(x: Tensor) -> Tensor:
    """Median along the border: (..., H, W) -> (...)."""
    return torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], dim=-1).median(-1).values


def _blobs(contrast: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Pieces of contrast (B, H, W) above `least` (B,): -> owner image (M,), masks (M, H, W), largest first."""
    labels = _components(contrast > least[:, None, None])  # B HW
    area = torch.zeros(len(labels), labels.shape[1] + 1).scatter_add_(1, labels, torch.ones(labels.shape))
    area = area[:, 1:] / labels.shape[1]  # B HW, share of the image
    dust = torch.where(area < SPECK, area, 0).sum(1)
    top, label = area.topk(MAX_BLOBS, dim=1)  # B 4
    # An image full of dust shows nothing that can be trusted.
    owner, rank = ((top >= SPECK) & (dust <= DUST)[:, None]).nonzero().unbind(1)
    masks = labels[owner] == label[owner, rank, None] + 1
    masks = masks.view(-1, *contrast.shape[1:]).float()
    return owner, F.max_pool2d(masks[:, None], 3, 1, 1)[:, 0]  # one pixel more: the faint rim


def _components(mask: Tensor) -> Tensor:
    """Label the 8-connected pieces of (B, H, W): -> (B, H*W) int64, 0 outside, else 1 + a pixel of the piece."""
    inside = mask.flatten(1)
    labels = torch.arange(1, inside.shape[1] + 1).expand_as(inside) * inside
    while True:
        spread = F.max_pool2d(labels.view(mask.shape).float()[:, None], 3, 1, 1).flatten(1).long() * inside
        spread = torch.where(inside, spread.gather(1, (spread - 1).clamp(min=0)), 0)  # jump to the label's label
        if torch.equal(spread, labels):
            return labels
        labels = spread


def _recognise(offset: Tensor, masks: Tensor, back: Tensor, shapes: Sequence[str]) -> list[Blob]:
    """Colour, centre, shape and radius of blobs, from M 3 H W pixels less their background and M H W masks."""
    strength = offset.norm(dim=1) * masks
    core = (strength / strength.amax((1, 2), keepdim=True)) ** 4  # where the shape covers whole pixels
    paint = torch.einsum("mchw,mhw->mc", offset, core) / core.sum((1, 2))[:, None]  # M 3, less the background
    # Projected on the paint, noise averages out; its length alone would grow with it.
    alpha = torch.einsum("mchw,mc->mhw", offset, paint) / paint.square().sum(1)[:, None, None]
    alpha = (alpha * masks).clamp_(0, 1)  # M H W, share of the pixel that is covered
    grid = (torch.arange(alpha.shape[-1]) + 0.5) / alpha.shape[-1]
    x, y = (alpha.sum(axis) @ grid / alpha.sum((1, 2)) for axis in (1, 2))
    outline, overlap, index, radius = _fit(alpha, x, y, shapes)
    # A thin or blurred outline nowhere covers a whole pixel: the paint that explains it best is stronger than its core.
    paint = torch.einsum("mchw,mhw->mc", offset, outline) / outline.square().sum((1, 2))[:, None]
    colours = _colours(paint + back[..., 0, 0])
    blobs = zip(index, overlap, colours, radius.tolist(), x.tolist(), y.tolist(), strict=True)
    return [
        Blob(shapes[i] if o > MIN_OVERLAP else None, colour, _size(r), _position(u, v), u, v)
        for i, o, colour, r, u, v in blobs
    ]


def _fit(alpha: Tensor, x: Tensor, y: Tensor, shapes: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outline that overlaps alpha (M, H, W) best, its overlap, its index in `shapes` and its radius (M,).

    Blur adds its variance to a shape's and keeps its mass, so mass and variance give every candidate, a shape under a
    blur, its radius and its strength without a search.
    """
    side = alpha.shape[-1]
    grid = (torch.arange(side) + 0.5) / side
    mass = alpha.sum((1, 2))
    along = [(alpha.sum(axis) * (grid - c[:, None]).square()).sum(1) / mass for axis, c in ((1, x), (2, y))]
    spread = along[0] + along[1]  # M, in squared image sides
    candidates = []
    for index, shape in enumerate(shapes):
        for blur in BLURS:
            own = spread - (2 * blur**2 + 1 / 6) / side**2  # a pixel's own variance is 1/12 per axis
            radius = (own.clamp(min=1 / side**2) / _unit_spread(shape)).sqrt()
            drawn = _gauss(side, blur) @ coverage(shape, x, y, radius, side) @ _gauss(side, blur)
            scaled = drawn * (mass / drawn.sum((1, 2)))[:, None, None]
            overlap = torch.minimum(scaled, alpha).sum((1, 2)) / torch.maximum(scaled, alpha).sum((1, 2))
            candidates.append((drawn, overlap, torch.full(overlap.shape, index), radius))
    columns = [torch.stack(column) for column in zip(*candidates, strict=True)]
    best = columns[1].argmax(0)
    return tuple(column[best, torch.arange(len(best))] for column in columns)


@lru_cache
def _gauss(side: int, sigma: float) -> Tensor:
    """The (side, side) matrix that blurs by sigma pixels; symmetric, so it serves both axes."""
    step = torch.arange(side)[:, None] - torch.arange(side)
    kernel = torch.exp(-0.5 * (step / max(sigma, 1e-3)).square())
    return kernel / kernel[side // 2].sum()


@lru_cache
def _unit_spread(shape: str) -> float:
    """Mean squared distance from the centre, of the outline of radius 1."""
    half, grid = torch.tensor([0.5]), 4 * ((torch.arange(512) + 0.5) / 512 - 0.5)
    drawn = coverage(shape, half, half, torch.tensor([0.25]), 512)[0]
    return (drawn * (grid.square() + grid.square()[:, None])).sum().item() / drawn.sum().item()


def _colours(rgb: Tensor) -> list[str | None]:
    distance, index = torch.cdist(rgb, torch.tensor(list(COLOURS.values())).float()).min(1)
    return [list(COLOURS)[i] if d < MAX_COLOUR_DISTANCE else None for d, i in zip(distance, index, strict=True)]


def _position(x: float, y: float) -> str:
    return min(POSITIONS, key=lambda name: math.dist((x, y), POSITIONS[name][:2]))


def _size(radius: float) -> str | None:
    name = min(SIZES, key=lambda size: abs(math.log(radius / SIZES[size])))
    return name if 1 / RADIUS_SLACK < radius / SIZES[name] < RADIUS_SLACK else None
