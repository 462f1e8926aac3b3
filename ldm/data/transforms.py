"""Pure functions on uint8 images. What is random takes its key as an argument."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.utils.seeding import uniform


def resize_crop(image: Tensor, size: int) -> Tensor:
    """The centre square of an image, resized with an antialiased bicubic filter: uint8 (3, H, W) -> (3, size, size)."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, top : top + side, left : left + side]
    if side == size:
        return square.contiguous()
    return F.interpolate(square[None], (size, size), mode="bicubic", antialias=True)[0].contiguous()


def flip(images: Tensor, keys: Tensor) -> Tensor:
    """Mirror each image with probability 1/2, decided by its key alone: (B, C, H, W), int64 (B,) -> (B, C, H, W)."""
    mirrored = uniform(keys) < 0.5  # B
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)
