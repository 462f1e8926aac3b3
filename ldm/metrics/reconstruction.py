"""How well an autoencoder gives images back."""

import torch
from torch import Tensor, nn


class PSNR:
    """Peak signal-to-noise ratio in dB on held-out images."""

    def __init__(self, num_images: int = 512):
        self.num_images = num_images

    def __call__(self, draw, data, objective: nn.Module) -> dict[str, float]:
        return objective.evaluate(_spread(data, self.num_images, objective))


class Pairs:
    """Images and their reconstructions side by side."""

    def __init__(self, count: int = 8):
        self.count = count

    def __call__(self, draw, data, objective: nn.Module) -> tuple[Tensor, list[str]]:
        images = _spread(data, self.count, objective)
        pairs = torch.stack([images, objective.reconstruct(images)], dim=1).flatten(0, 1)
        return pairs, ["image", "reconstruction"] * len(images)


def _spread(data, count: int, objective: nn.Module) -> Tensor:
    stride = max(1, len(data) // count)
    images = torch.stack([data[index]["image"] for index in range(0, len(data), stride)[:count]])
    return images.to(next(objective.parameters()).device)
