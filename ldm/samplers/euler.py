"""Euler's method on d(x / alpha) / d(sigma / alpha) = eps (arXiv:2206.00364), and its ancestral form."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import intervals, move
from ldm.utils.seeding import Noise, randn_like


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    generator: torch.Generator | Noise | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_T (B C H W) at times[0] -> x at times[-1]: Algorithm 1 of arXiv:2206.00364 without its second half.

    Equal to DDIM with eta = 0 on every process, and to Euler on dx / dsigma = eps - x0 for rectified flow.
    callback(step, steps, x, x0) may change x in place.
    """
    x, steps = x_T, intervals(times)
    for step, (t, s) in enumerate(steps):
        x0 = denoise(x, t)
        x = move(x, x0, process(t), process(s))
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x


def sample_ancestral(
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    generator: torch.Generator | Noise | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_T (B C H W) at times[0] -> x at times[-1]: an Euler step to a lower noise level, then fresh noise up to s.

    With r = sigma / alpha: r_up^2 = eta^2 r_s^2 (r_t^2 - r_s^2) / r_t^2 and r_down^2 = r_s^2 - r_up^2 (k-diffusion).
    Equal to DDIM with the same eta when s_noise = 1. callback(step, steps, x, x0) may change x in place.
    """
    x, steps = x_T, intervals(times)
    for step, (t, s) in enumerate(steps):
        alpha_s, _ = process(s)
        r_t, r_s = process.ratio(t), process.ratio(s)
        r_up = min(r_s, eta * r_s * math.sqrt(1 - (r_s / r_t) ** 2))
        r_down = math.sqrt(r_s**2 - r_up**2)
        x0 = denoise(x, t)
        x = move(x, x0, process(t), (alpha_s, alpha_s * r_down))
        if r_up > 0:
            x.add_(randn_like(x, generator), alpha=alpha_s * r_up * s_noise)
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x
