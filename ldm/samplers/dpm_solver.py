"""DPM-Solver++ of orders 1 to 3, multistep (arXiv:2211.01095); DPM-Solver (arXiv:2206.00927), and both with noise."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import Level, intervals
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import Noise, randn_like

FEW_STEPS = 15  # below which the published code lowers the order at the end


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    order: int = 2,
    solver: str = "midpoint",
    extrapolates: str = "x0",
    stochastic: bool = False,
    lower_order_final: bool = False,
    euler_at_final: bool = False,
    generator: torch.Generator | Noise | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_T (B C H W) at times[0] -> x at times[-1]: Algorithm 2 for order = 2, one evaluation a step.

    extrapolates: x0 (DPM-Solver++) or eps (DPM-Solver). solver: midpoint or heun, the two forms of second order (§5.2).
    stochastic: the SDE's (Appendix B.5), up to second order. The first step, and one to clean data, is first-order:
    DDIM's. With lower_order_final and few steps, the last is first-order too, the one before it second-order;
    euler_at_final does so for the last of any number. callback(step, steps, x, x0) may change x in place.
    """
    check(order, solver, extrapolates, stochastic)
    x, past, steps = x_T, [], intervals(times)  # past: (lambda, x0 or eps), newest first
    for step, (t, s) in enumerate(steps):
        now, then = process(t), process(s)
        x0 = denoise(x, t)
        value = x0 if extrapolates == "x0" else torch.sub(x, x0, alpha=now[0]) / now[1]
        past = [(log_snr(now), value), *past[: order - 1]]
        left = len(steps) - step if lower_order_final and len(steps) < FEW_STEPS else order
        terms = min(len(past), 1 if euler_at_final and step + 1 == len(steps) else left)
        x = advance(x, now, then, past[:terms], solver, extrapolates, stochastic)
        if stochastic and then[1] > 0:
            x.add_(randn_like(x, generator), alpha=noise_std(now, then, extrapolates))
        if log_snr(now) == -math.inf:
            past = []
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x


def advance(
    x: Tensor, now: Level, then: Level, past: list[tuple[float, Tensor]], solver: str, extrapolates: str, noisy: bool
) -> Tensor:
    """x one step on, without noise: keep x - scale (phi_1 D0 + phi_2 D1 + phi_3 D2), D the differences of `past`."""
    (alpha, sigma), (alpha_s, sigma_s), (lambda_t, value) = now, then, past[0]
    h = log_snr(then) - lambda_t
    if extrapolates == "x0":  # §4.1 of arXiv:2211.01095; Eq. (18) for the SDE
        z, scale, keep = -(1 + noisy) * h, alpha_s, sigma_s / sigma * (math.exp(-h) if noisy and h < math.inf else 1.0)
    else:  # Eq. (3.7) of arXiv:2206.00927
        z, scale, keep = h, sigma_s * (1 + noisy), alpha_s / alpha
    phi = math.expm1(z)
    if h in (0, math.inf) or len(past) == 1:
        return torch.add(x * keep, value, alpha=-scale * phi)
    second = phi / z - 1
    (lambda_1, value_1), r = past[1], (lambda_t - past[1][0]) / h
    first_difference = (value - value_1) / r
    if len(past) == 2:
        weight = phi / 2 if solver == "midpoint" else second
        return torch.add(x * keep, value, alpha=-scale * phi).sub_(first_difference, alpha=scale * weight)
    r_1 = (lambda_1 - past[2][0]) / h
    change = first_difference - (value_1 - past[2][1]) / r_1
    D1, D2 = first_difference + change * (r / (r + r_1)), change / (r + r_1)
    third = (phi - z) / z**2 - 0.5
    return torch.add(x * keep, value, alpha=-scale * phi).sub_(D1, alpha=scale * second).sub_(D2, alpha=scale * third)


def noise_std(now: Level, then: Level, extrapolates: str) -> float:
    """What the SDE adds in a step, beside what it exchanges."""
    h = log_snr(then) - log_snr(now)
    return then[1] * math.sqrt(-math.expm1(-2 * h) if extrapolates == "x0" else math.expm1(2 * h))


def log_snr(level: Level) -> float:
    """lambda = log(alpha / sigma); infinite for pure noise and clean data."""
    alpha, sigma = level
    return math.log(alpha / sigma) if alpha * sigma > 0 else math.copysign(math.inf, alpha - sigma)


def check(order: int, solver: str, extrapolates: str, stochastic: bool) -> None:
    if order not in (1, 2, 3) or (stochastic and order == 3):
        raise ConfigError(f"sampler.order={order}: DPM-Solver is written for 1, 2 and 3, and stochastic for 1 and 2")
    if solver not in ("midpoint", "heun") or extrapolates not in ("x0", "eps"):
        raise ConfigError(
            f"sampler.solver={solver}, sampler.extrapolates={extrapolates}: expected midpoint or heun, and x0 or eps"
        )
