"""Does a super-resolution model know more than a filter? Held-out images made small, and enlarged again by both."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.super_resolution import SuperResolutionObjective, shrink
from ldm.metrics.held_out import prompts_of, spread_batch
from ldm.models.codec import to_uint8
from ldm.utils.errors import ConfigError
from ldm.utils.images import psnr


class SuperResolution:
    """PSNR in dB of the model and of bicubic interpolation against the images, averaged over images; and the gain."""

    def __init__(self, num_images: int = 128, aug_level: float = 0.0):
        self.num_images, self.aug_level = num_images, aug_level

    def __call__(self, draw, data, objective: nn.Module) -> dict[str, float]:
        images, small, prompts = held_out(data, self.num_images, objective)
        drawn = draw(prompts, range(len(images)), small, self.aug_level)
        ours, theirs = psnr(images, drawn).mean().item(), psnr(images, bicubic(small, images)).mean().item()
        return {"psnr": ours, "bicubic_psnr": theirs, "gain": ours - theirs}


class Enlarged:
    """What the model is given, what bicubic interpolation and the model make of it, and the image itself, in rows."""

    def __init__(self, count: int = 4, aug_level: float = 0.0):
        self.count, self.aug_level = count, aug_level

    def __call__(self, draw, data, objective: nn.Module) -> tuple[Tensor, list[str]]:
        images, small, prompts = held_out(data, self.count, objective)
        drawn = draw(prompts, range(len(images)), small, self.aug_level)
        given = F.interpolate(small, images.shape[2:], mode="nearest")
        rows = torch.stack([given, bicubic(small, images), drawn, images], dim=1).flatten(0, 1)
        return rows, ["given", "bicubic", "model", "image"] * len(images)


def held_out(data, count: int, objective: nn.Module) -> tuple[Tensor, Tensor, list[str]]:
    """Images (B 3 H W uint8) spread over the dataset, the same made small, and what the model reads of each."""
    if not isinstance(objective, SuperResolutionObjective):
        raise ConfigError(f"metrics=super_resolution is of models that enlarge, not of {type(objective).__name__}")
    batch = spread_batch(data, count)
    images, prompts = batch["image"], prompts_of(data, batch["index"], objective)
    return images, to_uint8(shrink(images, objective.factor)), prompts


def bicubic(small: Tensor, images: Tensor) -> Tensor:
    """uint8 images enlarged to the sides of others."""
    return to_uint8(F.interpolate(small.float() / 127.5 - 1, images.shape[2:], mode="bicubic"))
