"""The error of a denoiser on one fixed grid of held-out images and noise levels: what can be compared between runs.

x_t = alpha x0 + sigma eps at angles phi = atan(sigma / alpha) in the middle of equal strata of [0, pi/2]: the same
signal-to-noise ratios whatever the process, and the same x0 and eps whatever the run's seed. Unweighted:

    x0_mse = E |x0_hat - x0|^2    eps_mse = E |eps_hat - eps|^2 = (alpha / sigma)^2 x0_mse
"""

import math

import torch
from torch import Tensor, nn

from ldm.data.loader import fetch
from ldm.metrics.held_out import spread
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import BatchNoise, keys, normal

CHUNK = 64  # images at a time


class HeldOutLoss:
    """held_out_x0_mse and held_out_eps_mse, and as *_1, *_2, ... those of each stratum, from clean to noise.

    What an objective draws besides, such as masks or augmentation noise, it draws by its own seed, as in training.
    """

    def __init__(self, num_images: int = 256, strata: int = 8, seed: int = 0):
        if num_images < 1 or strata < 1:
            raise ConfigError(f"num_images={num_images}, strata={strata} of held_out_loss: expected at least 1 of each")
        self.num_images, self.strata, self.seed = num_images, strata, seed

    def __call__(self, draw, data, objective: nn.Module) -> dict[str, float]:
        items = spread(data, self.num_images)
        chunks = zip(items.split(CHUNK), torch.arange(len(items)).split(CHUNK), strict=True)
        errors = torch.cat([self._errors(fetch(data, part), at, objective) for part, at in chunks])  # N K
        x0, ratio = errors.mean(0), torch.tensor(self.ratios())
        table = {}
        for name, values in {"x0": x0, "eps": x0 / ratio**2}.items():
            table[f"held_out_{name}_mse"] = values.mean().item()
            table |= {f"held_out_{name}_mse_{k}": value for k, value in enumerate(values.tolist(), 1)}
        return table

    def ratios(self) -> list[float]:
        """sigma / alpha of every stratum."""
        return [math.tan((k + 0.5) / self.strata * math.pi / 2) for k in range(self.strata)]

    @torch.no_grad()
    def _errors(self, batch: dict, position: Tensor, objective: nn.Module) -> Tensor:
        """Mean squared error of x0 for every image and level, (B K) float64."""
        device = next(objective.parameters()).device
        batch = {**batch, "image": batch["image"].to(device), "position": position.to(device)}
        x0, process = objective.latents(batch), objective.denoiser.process  # B C H W
        eps = normal(keys(self.seed, "held_out_eps", batch["position"]), x0.shape[1:], x0.dtype)
        cond = objective.conditioner(batch)
        cond |= objective.image_conditions(batch, x0.shape, BatchNoise(self.seed, "condition", batch["position"]))
        errors = []
        for ratio in self.ratios():
            t = process.time(ratio)
            alpha, sigma = process(t)
            x0_hat = objective.denoiser(alpha * x0 + sigma * eps, t, **cond).float()
            errors.append((x0_hat - x0).double().square().flatten(1).mean(1).cpu())  # B
        return torch.stack(errors, dim=1)
