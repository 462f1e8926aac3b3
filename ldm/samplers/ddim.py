"""DDIM, arXiv:2010.02502."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import even_intervals, move, posterior_std
from ldm.utils.seeding import Noise, randn_like


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    eta: float = 0.0,
    even_steps: int | None = None,
    clip: Callable[[Tensor, float], Tensor] | None = None,
    generator: torch.Generator | Noise | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_T (B C H W) at times[0] -> x at times[-1]: Eq. (12), with the noise of Eq. (16).

    eta = 0 is deterministic: the first-order solver of the ODE, equal to Euler's. eta = 1 is DDPM with `fixed_small`.
    As diffusers has it: even_steps, each T // even_steps indices down (`even_intervals`), and clip(x0, t), for the x0
    of a step while its eps stays that of the network.
    callback(step, steps, x, x0) may change x in place.
    """
    x, steps = x_T, even_intervals(times, process.num_steps, even_steps)
    for step, (t, s) in enumerate(steps):
        now, (alpha_s, sigma_s) = process(t), process(s)
        std = eta * posterior_std(now, (alpha_s, sigma_s))  # Eq. (16)
        x0 = denoise(x, t)
        x = move(x, x0, now, (alpha_s, math.sqrt(sigma_s**2 - std**2)))  # Eq. (12)
        if clip is not None:
            clipped = clip(x0, t)
            x.add_(clipped - x0, alpha=alpha_s)
            x0 = clipped
        if std > 0:
            x.add_(randn_like(x, generator), alpha=std)
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x
