"""Multistep sampling of latent consistency models, arXiv:2310.04378."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import intervals
from ldm.utils.seeding import Noise, randn_like

Number = float | Tensor


def boundary(process: Process, t: Number, sigma_data: float, scaling: float) -> tuple[Number, Number]:
    """(c_skip, c_out) of the consistency function f(x, t) = c_skip x + c_out x0(x, t) of arXiv:2310.04378.

    f is the identity at the cleanest time, index 0 of a table; time is counted in 1000 indices, times `scaling`.
    """
    s = scaling * 1000 * (t - process.t_min)
    return sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2) ** 0.5


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    sigma_data: float = 0.5,
    scaling: float = 10.0,
    generator: torch.Generator | Noise | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_T (B C H W) at times[0] -> x at times[-1]: to the end at once, and with fresh noise back to the next time.

    callback(step, steps, x, x0) may change x in place.
    """
    x, steps = x_T, intervals(times)
    for step, (t, s) in enumerate(steps):
        c_skip, c_out = boundary(process, t, sigma_data, scaling)
        x0 = denoise(x, t)
        x = torch.add(c_skip * x, x0, alpha=c_out)
        if step + 1 < len(steps):
            alpha_s, sigma_s = process(s)
            x = torch.add(alpha_s * x, randn_like(x, generator), alpha=sigma_s)
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x
