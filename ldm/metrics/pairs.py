"""How far two images of the same thing are apart: uint8 B 3 H W each, a number for each pair. PSNR: utils/images.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.utils.errors import DataError

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity: Eq. (13) of Wang et al., 2004, in Gaussian windows inside the image, over RGB: -> (B,).

    DataError for images smaller than a window.
    """
    if images.shape != others.shape or min(images.shape[2:]) < WINDOW:
        shapes = " and ".join(str(tuple(x.shape)) for x in (images, others))
        raise DataError(f"SSIM compares images of one shape, {WINDOW} pixels a side or more, not {shapes}")
    x, y = images.double() / 255, others.double() / 255
    mean_x, mean_y, xx, yy, xy = map(_blur, (x, y, x * x, y * y, x * y))
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    structure = (2 * (xy - mean_x * mean_y) + K2**2) / (xx - mean_x**2 + yy - mean_y**2 + K2**2)
    return (luminance * structure).mean((1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    """Weighted means of windows: B C H W -> B C H-10 W-10."""
    at = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = (-0.5 * (at / SIGMA) ** 2).exp()
    kernel = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    return F.conv2d(F.conv2d(x, kernel, groups=x.shape[1]), kernel.transpose(2, 3), groups=x.shape[1])
