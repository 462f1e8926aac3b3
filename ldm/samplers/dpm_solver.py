"""DPM-Solver++(2M), arXiv:2211.01095."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import Level, intervals
from ldm.utils.seeding import Noise


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    generator: torch.Generator | Noise | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_T (B C H W) at times[0] -> x at times[-1]: Algorithm 2, second order at one evaluation a step.

    The first step, and one to clean data, is first-order: DDIM's. callback(step, steps, x, x0) may change x in place.
    """
    x, x0_last, h_last = x_T, None, math.inf
    steps = intervals(times)
    for step, (t, s) in enumerate(steps):
        now, then = process(t), process(s)
        (alpha, sigma), (alpha_s, sigma_s) = now, then
        h = _log_snr_step(now, then)
        x0 = denoise(x, t)
        keep = sigma_s / sigma
        pull = alpha_s - alpha * keep  # -alpha_s (exp(-h) - 1)
        if h_last == math.inf or h == math.inf:
            x = torch.add(x * keep, x0, alpha=pull)
        else:
            past = pull * h / (2 * h_last)  # D = (1 + 1/2r) x0 - 1/2r x0_last, r = h_last / h
            x = (x * keep).add_(x0, alpha=pull + past).sub_(x0_last, alpha=past)
        x0_last, h_last = x0, h
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x


def _log_snr_step(now: Level, then: Level) -> float:
    """h = lambda_s - lambda_t, lambda = log(alpha / sigma); infinite from pure noise and to clean data."""
    (alpha, sigma), (alpha_s, sigma_s) = now, then
    return math.log(alpha_s * sigma / (alpha * sigma_s)) if alpha * sigma_s > 0 else math.inf
