"""UniPC, arXiv:2302.04867: a multistep predictor, corrected with the evaluation that the next step makes anyway."""

import math
from collections.abc import Callable
from itertools import zip_longest

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import Level, intervals
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import Noise


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    order: int = 2,
    lower_order_final: bool = True,
    generator: torch.Generator | Noise | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_T (B C H W) at times[0] -> x at times[-1]: UniPC-`order` on x0, with B(h) = e^h - 1, one evaluation a step.

    The order rises from 1 and, with lower_order_final, falls back to it at the end; a step from pure noise or to clean
    data is DDIM's.
    callback(step, steps, x, x0) sees the prediction before its correction, and may change it in place.
    """
    if order not in (1, 2, 3):
        raise ConfigError(f"sampler.order={order}: UniPC is written for 1, 2 (with guidance) and 3 (without)")
    x, steps = x_T, intervals(times)
    past, correct = [], []  # (log SNR, x0), newest first; what the last step's correction adds of each x0
    for step, (t, s) in enumerate(steps):
        now, then = process(t), process(s)
        (alpha, sigma), (alpha_s, sigma_s) = now, then
        x0, log_snr = denoise(x, t), _log_snr(now)
        past = [(log_snr, x0), *past[:order]]
        h = _log_snr(then) - log_snr
        left = len(steps) - step if lower_order_final else order
        p = min(order, len(past), left) if h < math.inf else 1
        predictor, corrector = _predict_and_correct([(earlier - log_snr) / h for earlier, _ in past[1:p]], h)
        keep = sigma_s / sigma
        pull = alpha_s - alpha * keep  # alpha_s (1 - exp(-h))
        weights = [keep * c + pull * w for c, w in zip_longest(correct, predictor, fillvalue=0.0)]
        x = x * keep
        for weight, (_, x0_k) in zip(weights, past, strict=False):
            x.add_(x0_k, alpha=weight)
        correct = [pull * w for w in corrector]
        if log_snr == -math.inf:
            past, correct = [], []
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x


def _predict_and_correct(points: list[float], h: float) -> tuple[list[float], list[float]]:
    """UniP's weights on x0 and the earlier x0 at `points`; what UniC adds on the x0 to come, on x0 and the earlier."""
    old, new = _weights(points, h), _weights([1.0, *points], h)
    change = [b - a for a, b in zip(old, new[1:], strict=True)]
    return [1 - sum(old), *old], [new[0], sum(old) - sum(new), *change]


def _weights(points: list[float], h: float) -> list[float]:
    """a_m / r_m of the differences x0(r_m) - x0(0) at points r_m, in steps h: R_p(h) a B(h) = phi_p(h), Theorem 3.1.

    For one point a = 1/2 is enough.
    """
    if len(points) < 2:
        return [0.5 / r for r in points]
    b, phi, factorial = [], math.expm1(-h) / -h - 1, 1
    for n in range(2, len(points) + 2):
        b.append(phi * factorial / math.expm1(-h))
        factorial *= n
        phi = phi / -h - 1 / factorial
    for k in range(len(b) - 1):  # Björck and Pereyra's solution of sum_m r_m^n a_m = b_n
        for n in range(len(b) - 1, k, -1):
            b[n] -= points[k] * b[n - 1]
    for k in range(len(b) - 2, -1, -1):
        for n in range(k + 1, len(b)):
            b[n] /= points[n] - points[n - k - 1]
        for n in range(k, len(b) - 1):
            b[n] -= b[n + 1]
    return [a / r for a, r in zip(b, points, strict=True)]


def _log_snr(level: Level) -> float:
    """lambda = log(alpha / sigma); infinite for pure noise and clean data."""
    alpha, sigma = level
    return math.log(alpha / sigma) if alpha * sigma > 0 else math.copysign(math.inf, alpha - sigma)
