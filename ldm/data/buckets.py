"""Aspect-ratio buckets: images of many shapes without cutting them to squares. arXiv:2307.01952, §2.3 and App. I.

    a bucket is a (height, width) in multiples of `step`, of 0.9 to 1 times the target area, no longer than 4 : 1;
    an image goes to the bucket of the nearest aspect ratio, is resized to cover it, and what stands out is cut off
    evenly on both sides

At 1024 pixels and steps of 64 this is the paper's list, 512 x 2048 to 2048 x 512.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.utils.errors import ConfigError

Shape = tuple[int, int]  # height, width

MAX_ASPECT = 4
MIN_AREA = 0.9  # of image_size^2


def bucket_shapes(image_size: int, step: int = 64) -> list[Shape]:
    """All buckets for the area image_size^2, wide ones first. Raises ConfigError."""
    if step < 1 or image_size % step:
        raise ConfigError(
            f"data.bucket_step={step} must divide image_size={image_size}; 64 is usual, 8 does for tiny images"
        )
    area = image_size**2
    sides = range(step, MAX_ASPECT * image_size + 1, step)
    shapes = [(height, width) for height in sides for width in sides]
    return [
        (height, width)
        for height, width in shapes
        if MIN_AREA * area <= height * width <= area and max(height, width) <= MAX_ASPECT * min(height, width)
    ]


def nearest_bucket(size: Shape, shapes: Sequence[Shape]) -> int:
    """Index of the bucket whose aspect ratio is nearest, by quotient: 2 is as far from 1 as 1/2 is."""
    ratio = math.log(size[0] / size[1])
    return min(range(len(shapes)), key=lambda i: abs(math.log(shapes[i][0] / shapes[i][1]) - ratio))


def covering(size: Shape, target: Shape) -> Shape:
    """The shape of an image of this size when it is made just large enough to cover the target."""
    (height, width), (h, w) = size, target
    if h * width >= w * height:
        return h, max(w, round(width * h / height))
    return max(h, round(height * w / width)), w


def micro_conditions(size: Shape, target: Shape) -> Tensor:
    """SDXL's six numbers (§2.2): original height, width; top and left of the crop in the resized image; target."""
    height, width = covering(size, target)
    return torch.tensor([*size, (height - target[0]) // 2, (width - target[1]) // 2, *target])


def describe(sizes: Sequence[Shape], groups: Sequence[int], shapes: Sequence[Shape]) -> str:
    """What a user wants to know before training: how many images each bucket gets, and how much of them is cut off."""
    cut: dict[int, list[float]] = {}
    for size, group in zip(sizes, groups, strict=True):
        cut.setdefault(group, []).append(1 - math.prod(shapes[group]) / math.prod(covering(size, shapes[group])))
    lines = ["height x width    images    cut off on average, at most"]
    for group in sorted(cut):
        (height, width), shares = shapes[group], cut[group]
        mean = sum(shares) / len(shares)
        lines.append(f"{height:6d} x {width:<6d} {len(shares):9,}    {mean:7.1%} {max(shares):15.1%}")
    every = [share for shares in cut.values() for share in shares]
    total = f"{len(every):,} images in {len(cut)} of {len(shapes)} buckets; {sum(every) / len(every):.1%} of the pixels"
    return "\n".join([*lines, f"{total} are cut off"])
