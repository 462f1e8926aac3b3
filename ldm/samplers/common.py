"""What the samplers share: the walk over a grid, and the one move that all of them make."""

import math

import torch
from torch import Tensor

from ldm.utils.errors import ConfigError

Level = tuple[float, float]  # (alpha, sigma) at one time


def intervals(times: Tensor) -> list[tuple[float, float]]:
    """The steps (t, s) of a grid: (steps + 1,) -> pairs of floats."""
    moments = times.tolist()
    if len(moments) < 2:
        raise ConfigError(f"a sampler got a grid of {len(moments)} times, hence 0 steps: ask for steps >= 1")
    return list(zip(moments, moments[1:], strict=False))


def even_intervals(times: Tensor, T: int | None, steps: int | None) -> list[tuple[float, float]]:
    """The same, but each step goes T // steps indices down, wherever the next time is: diffusers' DDIM and PNDM.

    A step from below that many indices goes to the end of the grid. steps = None: `intervals`.
    """
    pairs = intervals(times)
    if steps is None:
        return pairs
    if T is None:
        raise ConfigError(f"sampler.even_steps={steps} are of a table, and the process has none; leave them out")
    stride, end = T // steps, times[-1].item()
    indices = [round(t * T) - 1 - stride for t, _ in pairs]
    return [(t, (i + 1) / T if i >= 0 else end) for (t, _), i in zip(pairs, indices, strict=True)]


def move(x: Tensor, x0: Tensor, now: Level, then: Level) -> Tensor:
    """alpha_s x0 + sigma_s eps, with the eps that x at `now` is made of: Eq. (12) of arXiv:2010.02502 without noise.

    The same linear step is Euler's on d(x / alpha) / d(sigma / alpha), and on flow's dx / dsigma.
    """
    (alpha, sigma), (alpha_s, sigma_s) = now, then
    keep = sigma_s / sigma
    # keep x + (alpha_s - alpha keep) x0, by way of a lerp: multiplying by a Python number takes torch as long as both
    return torch.lerp(x0, x, keep).add_(x0, alpha=alpha_s - alpha * keep - (1 - keep))


def posterior_std(now: Level, then: Level) -> float:
    """The standard deviation of q(x_s | x_t, x0), s < t: Eq. (7), arXiv:2006.11239, for any process."""
    (alpha, sigma), (alpha_s, sigma_s) = now, then
    return sigma_s * math.sqrt(max(1 - (alpha * sigma_s / (alpha_s * sigma)) ** 2, 0))
