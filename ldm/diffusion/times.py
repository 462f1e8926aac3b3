"""Where in time: grids for samplers, and draws for training.

A grid is `grid(process, steps, ...) -> times`: steps + 1 falling float64 numbers on the CPU, the last of which is 0
("clean", also for `final=None`), or 1/T for `final="alpha0"` (the table's own first entry; `set_alpha_to_one=False`).
A draw is `draw(u, process, ...) -> t`: (B,) float64 in [0, 1) -> (B,) in (0, 1], on the indices of a table.
Spacings as in Table 2 of arXiv:2305.08891. Both raise ConfigError for what cannot be.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.process import DiscreteVP, Process, check_length, space_indices
from ldm.utils.errors import ConfigError

RESPACINGS = {  # of DeepFloyd IF, by the names its authors gave them: how many of each section, the cleanest first
    "fast27": "10,10,3,2,2",
    "smart27": "7,4,2,1,2,4,7",
    "smart50": "10,6,4,3,2,2,3,4,6,10",
    "smart100": "1,1,1,1,2,2,2,2,2,2,3,3,4,4,5,5,6,7,7,8,9,10,13",
    "smart185": "1,1,2,2,2,3,3,3,4,5,6,7,8,9,10,11,12,13,14,15,16,18,20",
    "super27": "1,1,1,1,1,1,1,2,5,13",
    "super40": "2,2,2,2,2,2,3,4,6,15",
    "super100": "4,4,6,6,8,8,10,10,14,30",
}

LONGEST = 10_000  # times in a list

# --- grids for samplers --------------------------------------------------------------------------------------------


def leading(
    process: Process, steps: int, offset: int = 1, extra: int | None = None, final: str | None = None
) -> Tensor:
    """Indices 0, k, 2k, ... plus `offset`, with k = T // steps: diffusers' for Stable Diffusion. Misses the noisiest.

    extra: laid out for so many steps more, of which the cleanest are left out (1: diffusers' DPM-Solver and UniPC;
    None: 0).
    """
    extra = extra or 0
    _check(process, steps + extra)
    T = table_length(process, "leading")
    indices = torch.arange(steps + extra - 1, extra - 1, -1) * (T // (steps + extra)) + offset
    if indices[0] >= T:
        raise ConfigError(f"times.offset={offset} takes {steps} steps past the {T} of the table; lower it")
    return _indices_to_times(indices, T, final)


def compvis(process: Process, steps: int, final: str | None = None) -> Tensor:
    """Indices 1, 1 + k, 1 + 2k, ... up to T, with k = T // steps: latent diffusion's own script (arXiv:2112.10752).

    Where T // k is not `steps`, it takes more of them: 31 for 30, 77 for 75.
    """
    _check(process, steps)
    T = table_length(process, "compvis")
    if (T - 1) % (T // steps) == 0:
        works = [n for n in range(1, T + 1) if (T - 1) % (T // n)]
        near = [str(n) for n in [*[n for n in works if n < steps][-1:], *[n for n in works if n > steps][:1]]]
        raise ConfigError(f"steps={steps}: times=compvis reads index {T} of a table of {T}; use {' or '.join(near)}")
    return _indices_to_times(torch.arange(0, T, T // steps).flip(0) + 1, T, final)


def sgm(process: Process, steps: int, final: str | None = None) -> Tensor:
    """Even steps from index T - 1 to 0, without 0, rounded down: the SDXL program's, arXiv:2307.01952."""
    _check(process, steps)
    T = table_length(process, "sgm")
    return _indices_to_times((T - 1 - torch.arange(steps, dtype=torch.float64) * ((T - 1) / steps)).floor(), T, final)


def trailing(process: Process, steps: int, final: str | None = None) -> Tensor:
    """Even steps down from t = 1, which every process has."""
    _check(process, steps)
    if process.num_steps is None:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    T = process.num_steps
    indices = torch.round(T - torch.arange(steps, dtype=torch.float64) * (T / steps)) - 1
    return _indices_to_times(indices, T, final)


def linspace(
    process: Process, steps: int, rounded: bool = False, extra: int | None = None, final: str | None = None
) -> Tensor:
    """Even steps from t = 1 to the process' t_min, then to 0; `rounded` to whole indices of a table, as DDIM's.

    extra: laid out for so many steps more, of which the cleanest are left out (1: diffusers' DPM-Solver and UniPC).
    """
    extra = extra or 0
    _check(process, steps + extra)
    if process.num_steps is None:
        return _with_zero(torch.linspace(1, process.t_min, steps + extra, dtype=torch.float64)[:steps])
    indices = torch.linspace(process.num_steps - 1, 0, steps + extra, dtype=torch.float64)[:steps]
    return _indices_to_times(indices.round() if rounded else indices, process.num_steps, final)


def karras(
    process: Process, steps: int, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    """Even steps of (sigma / alpha)^(1 / rho), then 0: Eq. (5), arXiv:2206.00364. None takes the process' own ends."""
    _check(process, steps)
    high, low = _ends(process, sigma_min, sigma_max)
    ratios = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64) ** rho
    return _ratios_to_times(process, ratios, sigma_max)


def logsnr(process: Process, steps: int, sigma_min: float | None = None, sigma_max: float | None = None) -> Tensor:
    """Even steps of log(sigma / alpha), then 0: arXiv:2206.00927 (k-diffusion's "exponential")."""
    _check(process, steps)
    high, low = _ends(process, sigma_min, sigma_max)
    ratios = torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp()
    return _ratios_to_times(process, ratios, sigma_max)


def respaced(process: Process, steps: int | str, final: str | None = None) -> Tensor:
    """Indices spread from end to end (250), in sections ("10,20") or at a whole stride ("ddim50"): arXiv:2102.09672.

    Or one of `RESPACINGS` by its name ("smart50").
    """
    if isinstance(steps, int):
        _check(process, steps)
    T = table_length(process, "respaced")
    return _indices_to_times(torch.tensor(space_indices(T, RESPACINGS.get(steps, steps))).flip(0), T, final)


def sit(process: Process, steps: int, last: float = 0.04) -> Tensor:
    """Even steps from t = 1 to `last`, then to 0: the grid of SiT's stochastic sampler, arXiv:2401.08740."""
    _check(process, steps)
    if not 0 < last < 1:
        raise ConfigError(f"times.last={last}: the size of the last step lies between 0 and 1")
    return _with_zero(torch.linspace(1, last, steps, dtype=torch.float64))


def lcm(process: Process, steps: int, original: int = 50) -> Tensor:
    """Out of `original` even steps from t = 1 every so many, then 0: 999, 759, 499, 259 (arXiv:2310.04378).

    These are the times at which a consistency model was distilled: indices 19, 39, ..., 999 of 1000.
    """
    _check(process, steps)
    _check(process, original)
    if steps > original:
        raise ConfigError(f"steps={steps}: this grid takes them out of times.original={original}; ask for fewer")
    stride = 1 / original if process.num_steps is None else process.num_steps // original / process.num_steps
    picked = torch.arange(steps, dtype=torch.float64) * original / steps
    return _with_zero((original - picked.floor()) * stride)


def listed(
    process: Process,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    final: str | None = None,
) -> Tensor:
    """Times one by one: falling indices of a table, or falling sigma / alpha, of which a last 0 is clean data."""
    if (timesteps is None) == (sigmas is None):
        raise ConfigError("times=list needs one of times.timesteps=[999,749,...] and times.sigmas=[14.6,...,0.03]")
    name, given = ("timesteps", timesteps) if sigmas is None else ("sigmas", sigmas)
    is_list = isinstance(given, Sequence) and not isinstance(given, str) and 1 <= len(given) <= LONGEST
    if not is_list or not all(type(each) in (int, float) and 0 <= each < math.inf for each in given):
        raise ConfigError(f"times.{name}={str(given)[:60]}: expected 1 to {LONGEST} numbers from 0 up")
    if any(after >= before for before, after in zip(given, given[1:], strict=False)):
        raise ConfigError(f"times.{name}={str(given)[:60]}: expected numbers that fall, from noise to data")
    values = torch.tensor(given, dtype=torch.float64)
    if sigmas is not None:
        return _with_zero(process.time(values[values > 0]))
    T = table_length(process, "list")
    if given[0] > T - 1:
        raise ConfigError(f"times.timesteps begins at {given[0]}, the table ends at {T - 1}")
    return _indices_to_times(values, T, final)


def _check(process: Process, steps: int) -> None:
    if not isinstance(steps, int):
        raise ConfigError(f"steps={steps!r} must be a whole number; only times=respaced takes sections and ddim50")
    if steps < 1:
        raise ConfigError(f"steps={steps}: a sampler needs at least one step")
    check_length("steps", steps)
    if process.num_steps is not None and steps > process.num_steps:
        raise ConfigError(f"steps={steps}: the process has {process.num_steps}; ask for 1 to {process.num_steps} steps")


def table_length(process: Process, name: str) -> int:
    if process.num_steps is None:
        raise ConfigError(f"times={name} needs a table, which {type(process).__name__} has not; use times=trailing")
    return process.num_steps


def _indices_to_times(indices: Tensor, T: int, final: str | None) -> Tensor:
    ends = {None: 0.0, "clean": 0.0, "alpha0": 1 / T}
    if final not in ends:
        raise ConfigError(f"times.final={final} is not known; use clean or alpha0")
    return torch.cat([(indices.double() + 1) / T, torch.tensor([ends[final]], dtype=torch.float64)])


def _ends(process: Process, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    high = process.ratio(process.t_max) if sigma_max is None else sigma_max
    low = process.ratio(process.t_min) if sigma_min is None else sigma_min
    if not 0 < low < high <= process.ratio(1.0):
        raise ConfigError(f"sigma_min={low:g} < sigma_max={high:g} must lie between 0 and {process.ratio(1.0):g}")
    return high, low


def _ratios_to_times(process: Process, ratios: Tensor, sigma_max: float | None) -> Tensor:
    times = process.time(ratios)
    if sigma_max is None:
        times[0] = 1.0  # also for a process that has no signal, hence no finite ratio, at t = 1
    return _with_zero(times)


def _with_zero(times: Tensor) -> Tensor:
    return torch.cat([times, times.new_zeros(1)])


class WholeIndices(DiscreteVP):
    """A table that shows the network whole indices only: diffusers' DPM-Solver and UniPC on grids of sigma.

    rule: round, to the nearest, as on Karras' grid; truncate, to the one below, as on that of log-SNR.
    """

    def __init__(self, process: DiscreteVP, rule: str = "round"):
        super().__init__(process.alpha_bars, process.indices)
        self.rule = {"round": torch.round, "truncate": lambda t: torch.floor(t + 1e-6)}[rule]

    def feed(self, t):
        return super().feed(self.rule(t * self.num_steps) / self.num_steps)


# --- draws for training --------------------------------------------------------------------------------------------


def uniform(u: Tensor, process: Process, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Even over (low, high]: every index equally often, Algorithm 1 of arXiv:2006.11239.

    high = 0.2 gives indices 0..199 of 1000, what SDXL's refiner was trained on (arXiv:2307.01952).
    """
    T = process.num_steps
    first, last = (low, high) if T is None else (round(low * T), round(high * T))
    if not 0 <= first < last <= (T or 1):
        raise ConfigError(f"density.low={low} < density.high={high} must leave times between 0 and 1 to draw from")
    t = first + (last - first) * (1 - u)
    return t.clamp(2.0**-53, 1) if T is None else t.ceil().clamp(first + 1, last) / T


def logit_normal(u: Tensor, process: Process, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = sigmoid(mean + std n): Eq. (19), arXiv:2403.03206."""
    return _on_table(torch.sigmoid(mean + std * _normal(u)), process)


def mode(u: Tensor, process: Process, scale: float = 1.29) -> Tensor:
    """Heavier in the middle (scale > 0) or at the ends (scale < 0), -1 <= scale <= 1.75: Eq. (20), arXiv:2403.03206."""
    return _on_table(1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u), process)


def cubic(u: Tensor, process: Process) -> Tensor:
    """t = 1 - u^3: mostly noise, where a picture's layout is decided (T2I-Adapter, §3.3 of arXiv:2302.08453)."""
    return _on_table(1 - u**3, process)


def cosmap(u: Tensor, process: Process) -> Tensor:
    """The density 2 / (pi - 2 pi t + 2 pi t^2): Eq. (21), arXiv:2403.03206."""
    return _on_table(1 - 1 / (torch.tan(math.pi / 2 * (1 - u)) + 1), process)


def log_normal(u: Tensor, process: Process, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """ln(sigma / alpha) ~ N(mean, std^2): Table 1, arXiv:2206.00364."""
    return _on_table(process.time(torch.exp(mean + std * _normal(u))), process)


def _normal(u: Tensor) -> Tensor:
    return torch.special.ndtri(u.clamp(min=2.0**-54))  # u = 0 would be -infinity


def _on_table(t: Tensor, process: Process) -> Tensor:
    """t in (0, 1]; for a table of T, the next index above."""
    if process.num_steps is None:
        return t.clamp(2.0**-53, 1)
    return (t * process.num_steps).ceil().clamp(1, process.num_steps) / process.num_steps
