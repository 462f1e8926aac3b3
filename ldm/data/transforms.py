"""Pure functions on uint8 images. What is random takes its key as an argument."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.utils.seeding import uniform


def resize_crop(image: Tensor, height: int, width: int | None = None) -> Tensor:
    """The middle of an image, as much as has the aspect ratio of (height, width), resized to that: uint8 (3, H, W).

    An antialiased bicubic filter; without a width, a square.
    """
    h, w = height, width or height
    full_h, full_w = image.shape[1:]
    if h * full_w >= w * full_h:
        crop_h, crop_w = full_h, max(1, round(w * full_h / h))
    else:
        crop_h, crop_w = max(1, round(h * full_w / w)), full_w
    top, left = (full_h - crop_h) // 2, (full_w - crop_w) // 2
    crop = image[:, top : top + crop_h, left : left + crop_w]
    if (crop_h, crop_w) == (h, w):
        return crop.contiguous()
    return F.interpolate(crop[None], (h, w), mode="bicubic", antialias=True)[0].contiguous()


def flip(images: Tensor, keys: Tensor) -> Tensor:
    """Mirror each image with probability 1/2, decided by its key alone: (B, C, H, W), int64 (B,) -> (B, C, H, W)."""
    mirrored = uniform(keys) < 0.5  # B
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)
