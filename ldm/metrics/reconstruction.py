"""How well an autoencoder gives images back."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.metrics.held_out import spread_batch
from ldm.metrics.pairs import ssim
from ldm.models.codec import to_float
from ldm.utils.images import psnr

CHUNK = 64  # images compared at a time


class Reconstruction:
    """PSNR in dB and SSIM of held-out images and their reconstructions from the mode, averaged over images.

    perceptual: a distance of images in [-1, 1], LPIPS, averaged too.
    """

    def __init__(self, num_images: int = 512, perceptual: Callable[[Tensor, Tensor], Tensor] | None = None):
        self.num_images, self.perceptual = num_images, perceptual

    @torch.no_grad()
    def __call__(self, draw, data, objective: nn.Module) -> dict[str, float]:
        images = _held_out(data, self.num_images, objective)
        measures = {"psnr": psnr, "ssim": ssim}
        if self.perceptual is not None:
            measures["lpips"] = self._lpips
        pairs = list(zip(images.split(CHUNK), objective.reconstruct(images).split(CHUNK), strict=True))
        return {name: torch.cat([of(*pair) for pair in pairs]).mean().item() for name, of in measures.items()}

    def _lpips(self, images: Tensor, rebuilt: Tensor) -> Tensor:
        return self.perceptual.to(images.device)(to_float(images), to_float(rebuilt))


class Pairs:
    """Images and their reconstructions side by side."""

    def __init__(self, count: int = 8):
        self.count = count

    def __call__(self, draw, data, objective: nn.Module) -> tuple[Tensor, list[str]]:
        images = _held_out(data, self.count, objective)
        pairs = torch.stack([images, objective.reconstruct(images)], dim=1).flatten(0, 1)
        return pairs, ["image", "reconstruction"] * len(images)


def _held_out(data, count: int, objective: nn.Module) -> Tensor:
    return spread_batch(data, count)["image"].to(next(objective.parameters()).device)
