"""PLMS, the linear multistep half of PNDM (arXiv:2202.09778): Stable Diffusion 1's first sampler.

`sample` is that of its own script. `sample_pndm` is diffusers' with `skip_prk_steps`, which differs in three ways: a
step goes to where the table says, not to the next time; it combines the network's outputs, which for v are not eps; and
from a given picture it runs one step ahead of its own times.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import Level, even_intervals, intervals, move
from ldm.utils.errors import ConfigError
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


def sample_pndm(
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    even_steps: int | None = None,
    combines: str = "eps",
    generator: torch.Generator | Noise | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_T (B C H W) at times[0] -> x at times[-1], an evaluation a step: diffusers' PNDM, on a grid with `doubled`.

    A step goes T // even_steps indices down; the second one repeats the first with the mean of both slopes. Without
    even_steps it is the multistep method alone, from one time to the next. combines: what is extrapolated, eps or v.
    callback(step, steps, x, x0) may change x in place.
    """
    if combines not in SLOPES:
        raise ConfigError(f"sampler.combines={combines}: expected one of {', '.join(SLOPES)}")
    slope_of, eps_of = SLOPES[combines]
    x, first, past, steps = x_T, x_T, [], even_intervals(times, process.num_steps, even_steps)
    for step, (t, s) in enumerate(steps):
        x0, start, end = denoise(x, t), process(t), process(s)
        slope = slope_of(x, x0, start)
        if step == 1 and even_steps:
            x, mean = first, (slope + past[0]) / 2
            start, end = process(t + process.num_steps // even_steps / process.num_steps), process(t)
        else:
            past = [slope, *past[:3]]
            weights = ADAMS_BASHFORTH.get(len(past), (1.0,))
            mean = sum(w * each for w, each in zip(weights, past, strict=True))
        if process.ratio(t) < NO_SIGNAL:
            x = _transfer(x, eps_of(mean, x, start), start, end)
        else:
            x, past = move(x, x0, start, end), []
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x


def _v(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    alpha, sigma = level  # alpha^2 + sigma^2 = 1
    return torch.sub(alpha * x, x0) / sigma


def _eps(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    alpha, sigma = level
    return torch.sub(x, x0, alpha=alpha) / sigma


def _transfer(x: Tensor, eps: Tensor, now: Level, then: Level) -> Tensor:
    """Eq. (9): what DDIM does with the noise eps."""
    (alpha, sigma), (alpha_s, sigma_s) = now, then
    return torch.add(x * (alpha_s / alpha), eps, alpha=sigma_s - sigma * alpha_s / alpha)


SLOPES: dict[str, tuple[Callable, Callable]] = {  # what is kept of (x, x0), and the eps of it
    "eps": (_eps, lambda eps, x, level: eps),
    "v": (_v, lambda v, x, level: torch.add(level[0] * v, x, alpha=level[1])),
}
