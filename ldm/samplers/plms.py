"""PLMS, the linear multistep half of PNDM (arXiv:2202.09778): Stable Diffusion 1's first sampler.

As in its own script and in diffusers' PNDM with `skip_prk_steps`, with two exceptions for the latter: it combines the
network's outputs, which for v are not eps, and from a given picture it runs one step ahead of its own times.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import Level, intervals, move
from ldm.utils.seeding import Noise

NO_SIGNAL = 1e3  # sigma / alpha
ADAMS_BASHFORTH = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    generator: torch.Generator | Noise | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_T (B C H W) at times[0] -> x at times[-1] in steps + 1 evaluations: Eq. (9) along the slope of Eq. (12).

    The first step is the trapezoid's and evaluates twice, in place of the paper's Runge-Kutta steps; from pure noise
    it is Euler's. callback(step, steps, x, x0) may change x in place.
    """
    x, past, steps = x_T, [], intervals(times)  # past: the last four eps, newest first
    for step, (t, s) in enumerate(steps):
        now, then = process(t), process(s)
        x0 = denoise(x, t)
        if process.ratio(t) < NO_SIGNAL:
            past = [_eps(x, x0, now), *past[:3]]
        if len(past) > 1:
            weights = ADAMS_BASHFORTH[len(past)]
            x = _transfer(x, sum(w * eps for w, eps in zip(weights, past, strict=True)), now, then)
        elif past and step + 1 < len(steps):
            guess = _transfer(x, past[0], now, then)
            x = _transfer(x, (past[0] + _eps(guess, denoise(guess, s), then)) / 2, now, then)
        else:
            x = move(x, x0, now, then)
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x


def _eps(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    alpha, sigma = level
    return torch.sub(x, x0, alpha=alpha) / sigma


def _transfer(x: Tensor, eps: Tensor, now: Level, then: Level) -> Tensor:
    """Eq. (9): what DDIM does with the noise eps."""
    (alpha, sigma), (alpha_s, sigma_s) = now, then
    return torch.add(x * (alpha_s / alpha), eps, alpha=sigma_s - sigma * alpha_s / alpha)
