"""Are drawn images as bright as real ones? What a schedule that ends short of pure noise gets wrong."""

import torch
from torch import Tensor, nn

from ldm.data.loader import fetch
from ldm.metrics.held_out import prompts_of, spread
from ldm.models.codec import to_float


class Brightness:
    """Distance of the mean intensities of images, drawn and held-out: Fig. 2 of arXiv:2305.08891 as numbers.

    brightness_gap is the 1-Wasserstein distance of the two histograms, brightness the mean of what is drawn (-1 to 1).
    """

    def __init__(self, num_images: int = 512):
        self.num_images = num_images

    def __call__(self, draw, data, objective: nn.Module) -> dict[str, float]:
        items = spread(data, self.num_images)
        drawn = brightness(draw(prompts_of(data, items, objective), range(self.num_images)))
        real = brightness(fetch(data, items)["image"])
        gap = (drawn.sort().values - real.sort().values).abs().mean()  # of equally many: pairs in order of size
        return {"brightness_gap": gap.item(), "brightness": drawn.mean().item()}


def brightness(images: Tensor) -> Tensor:
    """uint8 (B 3 H W) -> the mean of each, (B,) float64 in [-1, 1]."""
    return to_float(images).to(torch.float64).mean((1, 2, 3)).cpu()
