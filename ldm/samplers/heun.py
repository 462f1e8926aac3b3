"""EDM's second-order sampler with churn: Algorithms 1 and 2 of arXiv:2206.00364, on x / alpha and sigma / alpha."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import Level, intervals, move
from ldm.utils.seeding import Noise, randn_like

NO_SIGNAL = 1e3  # sigma / alpha


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float | None = None,
    s_noise: float = 1.0,
    generator: torch.Generator | Noise | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_T (B C H W) at times[0] -> x at times[-1] in 2 steps - 1 evaluations; s_churn = 0 is the ODE (Algorithm 1).

    A step to clean data is Euler's, as its slope there is not finite. Deviation: so is one from beyond NO_SIGNAL (the
    paper's sigma_max is 80): processes that end in pure noise leave it in one step, too long for a trapezoid.
    s_min and s_max (None: no limit) are in sigma / alpha. callback(step, steps, x, x0) may change x in place.
    """
    x, steps = x_T, intervals(times)
    for step, (t, s) in enumerate(steps):
        r, r_s = process.ratio(t), process.ratio(s)
        gamma = min(s_churn / len(steps), math.sqrt(2) - 1) if s_min <= r <= (s_max or math.inf) else 0.0
        if gamma > 0:
            x, t = _add_noise(x, process, t, gamma, s_noise, generator)
            r = process.ratio(t)
        now, then = process(t), process(s)
        x0 = denoise(x, t)
        x_s = move(x, x0, now, then)
        if r_s > 0 and r < NO_SIGNAL:
            slope = _eps(x, x0, now)
            x0 = denoise(x_s, s)
            # the trapezoid's (slope + slope_s) / 2 in place of slope
            x_s = x_s + (r_s - r) * then[0] / 2 * (_eps(x_s, x0, then) - slope)
        x = x_s
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x


def _eps(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    alpha, sigma = level
    return torch.sub(x, x0, alpha=alpha) / sigma


def _add_noise(
    x: Tensor, process: Process, t: float, gamma: float, s_noise: float, generator: torch.Generator | Noise | None
) -> tuple[Tensor, float]:
    """x raised to the noise level (1 + gamma) r, or to the process' highest, and its time."""
    r = process.ratio(t)
    t_hat = process.time((1 + gamma) * r)
    (alpha, _), (alpha_hat, _) = process(t), process(t_hat)
    added = math.sqrt(max(process.ratio(t_hat) ** 2 - r**2, 0)) * s_noise
    return torch.add(x * (alpha_hat / alpha), randn_like(x, generator), alpha=alpha_hat * added), t_hat
