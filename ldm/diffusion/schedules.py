"""The steps of diffusers' schedulers: which noise levels they visit, and which times they show the network there.

Its schedulers share a vocabulary (`timestep_spacing`, `use_karras_sigmas`, ...) but lay the same words out differently:
some lay out one step more and leave the cleanest out, some interpolate sigma, some show whole indices only. A
`Schedule` says so with a knob each; `ldm.weights.schedulers` sets them as each class has them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.process import DiscreteVP, Process
from ldm.diffusion.times import table_length
from ldm.utils.errors import ConfigError

FINITE = 4095.9998779  # sigma / alpha where a zero-terminal-SNR table has none: alpha_bar = 2 ** -24
BELOW = 1e-6  # of an index, by which float32 misses the last one of Stable Diffusion's table: 998 is shown
BETA = 0.6  # both parameters of the beta distribution, §4 of arXiv:2407.12173
CHOICES = {
    "spacing": ("leading", "trailing", "linspace"),
    "sigmas": (None, "karras", "exponential", "beta"),
    "ends": ("grid", "table"),
    "shown": ("exact", "round", "truncate"),
    "final": (None, "clean", "alpha0", "last"),
    "initial": ("prior", "sigma"),
}


@dataclass(frozen=True)
class Schedule:
    """A grid of a table as one of diffusers' schedulers lays it out: schedule(process) -> times. Raises ConfigError."""

    steps: int
    spacing: str = "leading"  # of indices: leading, trailing, linspace (Table 2 of arXiv:2305.08891)
    offset: int = 0  # on the indices of leading
    extra: int = 0  # leading and linspace are laid out for so many steps more, of which the cleanest are left out
    rounded: bool = True  # linspace: to whole indices
    sigmas: str | None = None  # instead of the indices' own: karras, exponential, beta
    ends: str = "grid"  # of these sigmas: those of the indices, or of the whole table
    rho: float = 7.0  # of karras
    sigma_min: float | None = None  # other ends
    sigma_max: float | None = None
    lambda_min: float | None = None  # indices with log(alpha / sigma) below are not visited
    shown: str = "exact"  # of the indices at such sigmas, the network sees: exact, round, truncate
    final: str | None = None  # where it ends: clean (also null), alpha0 (the table's first entry), last (stays)
    initial: str = "prior"  # scale of the first noise: prior, sqrt(alpha^2 + sigma^2); sigma
    doubled: bool = False  # the second time stands twice: of sampler=pndm
    finite: bool = False  # a table that ends without signal begins just below its end

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                names = ", ".join("null" if each is None else each for each in known)
                raise ConfigError(f"times.{name}={getattr(self, name)}: expected one of {names}")
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigError(f"steps={self.steps!r}: expected a whole number, 1 or more; times=respaced takes others")

    def __call__(self, process: Process) -> Tensor:
        """steps + 1 falling times."""
        return self._lay(process)[0]

    def shown_by(self, process: Process) -> Process:
        """The process as the network sees it on this grid."""
        times, indices = self._lay(process)
        at = (indices + 1) / process.num_steps
        return Shown(process, dict(zip(times.tolist(), process.net_time(at).tolist(), strict=False)))

    def _lay(self, process: Process) -> tuple[Tensor, Tensor]:
        """steps + 1 times, and for all but the last of them the index that is shown."""
        T = table_length(process, "schedule")
        table = process.log_ratios[1:].exp()  # sigma / alpha of the indices
        table = table.where(table.isfinite(), FINITE) if self.finite else table
        indices = self._indices(T, process)
        if indices[0] > T - 1 or indices[-1] < 0:
            raise ConfigError(f"times.offset={self.offset} takes {self.steps} steps past the {T} of the table")
        ratios = _interpolate(table, indices)
        if self.sigmas:
            ratios = self._spread(ratios if self.ends == "grid" else table.flip(0))
            indices = (process.time(ratios) * T - 1).clamp(0, T - 1)
            below = (indices - BELOW).clamp(min=0).floor()
            indices = {"exact": indices, "round": indices.round(), "truncate": below}[self.shown]
        if self.sigmas or not torch.equal(indices, indices.round()) or (self.finite and process.alpha_bars[-1] == 0):
            times = process.time(ratios)
        else:
            times = (indices + 1) / T
        if self.doubled:
            times, indices = (torch.cat([each[:2], each[1:]]) for each in (times, indices))
        end = {None: 0.0, "clean": 0.0, "alpha0": 1 / T, "last": times[-1].item()}[self.final]
        return torch.cat([times, times.new_tensor([end])]), indices

    def _indices(self, T: int, process: DiscreteVP) -> Tensor:
        """Falling, whole or not."""
        count = self.steps + self.extra
        if count > T:
            raise ConfigError(f"steps={self.steps}: the process has {T}; ask for 1 to {T - self.extra} steps")
        if self.lambda_min is None:
            last = T
        else:
            last = int((-process.log_ratios[1:] >= self.lambda_min).sum())
        if self.spacing == "trailing":
            indices = torch.arange(self.steps, dtype=torch.float64) * (-T / self.steps) + last
            return indices[indices > 0.5].round() - 1
        if self.spacing == "leading":
            indices = torch.arange(count, dtype=torch.float64) * (last // count) + self.offset
        else:
            indices = torch.linspace(0, last - 1, count, dtype=torch.float64)
            indices = indices.round() if self.rounded else indices
        return indices.flip(0)[: self.steps]

    def _spread(self, ratios: Tensor) -> Tensor:
        high = ratios[0].item() if self.sigma_max is None else self.sigma_max
        low = ratios[-1].item() if self.sigma_min is None else self.sigma_min
        if not 0 < low <= high < math.inf:
            raise ConfigError(f"sigma_min={low:g} <= sigma_max={high:g} must be numbers above 0")
        ramp = torch.linspace(0, 1, self.steps, dtype=torch.float64)
        if self.sigmas == "karras":  # Eq. (5), arXiv:2206.00364
            return (high ** (1 / self.rho) + ramp * (low ** (1 / self.rho) - high ** (1 / self.rho))) ** self.rho
        if self.sigmas == "exponential":
            return (math.log(high) + ramp * math.log(low / high)).exp()
        return low + beta_quantiles(1 - ramp) * (high - low)


class Shown(DiscreteVP):
    """A table that shows the network given numbers at given times, and its own elsewhere."""

    def __init__(self, process: DiscreteVP, numbers: dict[float, float]):
        super().__init__(process.alpha_bars, process.indices)
        self.numbers = numbers

    def net_time(self, t):
        return self.numbers[t] if isinstance(t, float) and t in self.numbers else super().net_time(t)


def beta_quantiles(p: Tensor, a: float = BETA) -> Tensor:
    """x with F(x) = p for the beta distribution with both parameters `a`, by bisection; float64 in [0, 1]."""
    tail = torch.minimum(p, 1 - p)
    low, high = torch.zeros_like(p), torch.full_like(p, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = _beta_tail(middle, a) < tail
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(p > 0.5, 1 - high, torch.where(tail == 0, 0.0, high))


def _beta_tail(x: Tensor, a: float) -> Tensor:
    """F(x) for x <= 1/2: the series of x^a (1 - x)^(a - 1) integrated term by term."""
    total, term = torch.zeros_like(x), torch.ones_like(x)
    for k in range(60):
        total = total + term / (a + k)
        term = term * x * (k + 1 - a) / (k + 1)
    norm = math.exp(2 * math.lgamma(a) - math.lgamma(2 * a))
    return x**a * total / norm


def _interpolate(table: Tensor, indices: Tensor) -> Tensor:
    """sigma / alpha at indices, linear between them."""
    below, above = indices.floor().long(), indices.ceil().long()
    fraction = indices - below
    return torch.where(fraction == 0, table[below], table[below] + fraction * (table[above] - table[below]))
