"""Ancestral sampling of DDPM, arXiv:2006.11239, and of its learned variance, arXiv:2102.09672."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import Level, intervals, posterior_std
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import Noise, randn_like


def sample(
    denoise: Callable[..., Tensor | tuple[Tensor, Tensor]],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    variance: str = "fixed_small",
    noisy_end: bool = False,
    generator: torch.Generator | Noise | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_T (B C H W) at times[0] -> x at times[-1]: Algorithm 2, over whatever grid, with the beta between its times.

    variance: fixed_small is the posterior's (beta tilde), fixed_large is beta, learned lies between them where the
    network says (denoise must answer (x0, v)). The last step to clean data adds no noise; with noisy_end, only one from
    the table's first entry does not, as diffusers has it.
    callback(step, steps, x, x0) may change x in place.
    """
    if variance not in PREDICTORS:
        raise ConfigError(f"sampler.variance={variance} is not known; use one of {', '.join(PREDICTORS)}")
    predict = PREDICTORS[variance]
    x, steps = x_T, intervals(times)
    for step, (t, s) in enumerate(steps):
        now, then = process(t), process(s)
        x0, std = predict(denoise, x, t, now, then)
        (alpha, sigma), (alpha_s, sigma_s) = now, then
        scale = alpha / alpha_s  # sqrt(1 - beta)
        keep = scale * (sigma_s / sigma) ** 2
        x = torch.add(x * keep, x0, alpha=alpha_s - alpha * keep)  # Eq. (7)
        if sigma_s > 0 or (noisy_end and t > 1.5 * process.t_min):
            x.add_(randn_like(x, generator).mul_(std))
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x


def beta_std(now: Level, then: Level) -> float:
    """The root of beta between two times: the deviation of q(x_t | x_s)."""
    (alpha, sigma), (alpha_s, sigma_s) = now, then
    return max(sigma**2 - (alpha * sigma_s / alpha_s) ** 2, 0) ** 0.5


def _fixed_small(denoise: Callable, x: Tensor, t: float, now: Level, then: Level) -> tuple[Tensor, float]:
    return denoise(x, t), posterior_std(now, then)


def _fixed_large(denoise: Callable, x: Tensor, t: float, now: Level, then: Level) -> tuple[Tensor, float]:
    return denoise(x, t), beta_std(now, then)


def _learned(denoise: Callable, x: Tensor, t: float, now: Level, then: Level) -> tuple[Tensor, Tensor]:
    x0, v = denoise(x, t, variance=True)
    small, large = posterior_std(now, then), beta_std(now, then)
    small = max(small, 1e-10)
    return x0, small * (large / small) ** ((v + 1) / 2)  # Eq. (15), arXiv:2102.09672, of deviations


PREDICTORS = {"fixed_small": _fixed_small, "fixed_large": _fixed_large, "learned": _learned}
