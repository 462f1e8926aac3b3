"""SiT's stochastic sampler, arXiv:2401.08740: the flow from noise to data, and Langevin steps on the way."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import intervals, move
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import Noise, randn_like

# D(t) from data (t = 0) to noise (t = 1): how much noise is exchanged. The reverse of the forward process itself,
# which the paper calls SBDM, is what sampler=ddpm follows.
DIFFUSIONS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda t, sigma: 1.0,
    "sigma": lambda t, sigma: sigma,
    "linear": lambda t, sigma: t,
    "decreasing": lambda t, sigma: (1 - math.cos(math.pi * t)) ** 2 / 4,
    "increasing_decreasing": lambda t, sigma: math.sin(math.pi * t) ** 2,
}


def sample(
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    diffusion: str = "sigma",
    norm: float = 1.0,
    last: str = "mean",
    generator: torch.Generator | Noise | None = None,
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_T (B C H W) at times[0] -> x at times[-1]: Euler-Maruyama on dx = v dt + D s dt + sqrt(2 D) dW.

    Every D keeps the marginals of the path. It is norm times one of DIFFUSIONS, as in the published code, where w_t of
    the paper is 2 D. The last step adds no noise; `last` = "mean" keeps its share of the score s, "clean" ends in x0.
    Deviation: the step along v is that of DDIM, which on the line is Euler's.
    callback(step, steps, x, x0) may change x in place.
    """
    if diffusion not in DIFFUSIONS or last not in ("mean", "clean"):
        raise ConfigError(
            f"sampler.diffusion={diffusion}, sampler.last={last}: expected one of {', '.join(DIFFUSIONS)}, and mean or "
            "clean"
        )
    x, steps = x_T, intervals(times)
    for step, (t, s) in enumerate(steps):
        now, then = process(t), process(s)
        alpha, sigma = now
        exchanged = norm * DIFFUSIONS[diffusion](t, sigma) * (t - s)  # D dt
        x0 = denoise(x, t)
        score = torch.sub(alpha * x0, x) / sigma**2
        x = move(x, x0, now, then)
        if step + 1 < len(steps) or last == "mean":
            x.add_(score, alpha=exchanged)
        if step + 1 < len(steps):
            x.add_(randn_like(x, generator), alpha=math.sqrt(2 * exchanged))
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x
