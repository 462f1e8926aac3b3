"""Forward processes: x_t = alpha(t) x0 + sigma(t) eps, from clean data at t = 0 to noise at t = 1.

| process       | source                             | alpha, sigma                         | the network is fed    |
|---------------|------------------------------------|--------------------------------------|-----------------------|
| DiscreteVP    | arXiv:2006.11239                   | sqrt(alpha_bar), sqrt(1 - alpha_bar) | the table's 0 .. T-1  |
| VPCosine      | arXiv:2102.09672, arXiv:2301.11093 | cos(a t), sin(a t)                   | 1000 t                |
| EDM           | arXiv:2206.00364                   | 1, sigma_max t^rho                   | ln(sigma) / 4         |
| RectifiedFlow | arXiv:2209.03003, arXiv:2403.03206 | 1 - sigma, t (shifted)               | 1000 sigma            |
| interpolant   | arXiv:2401.08740 (SiT)             | its three paths: interpolant.py      | 1 - t                 |

Samplers ask with a number and get two Python floats; training asks with a tensor (B,) and gets tensors.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.utils.errors import ConfigError

Number = float | Tensor
MAX_LENGTH = 1_000_000  # of a table, or a grid of times


class Process:
    """A forward process. A subclass writes `alpha_sigma`, `feed` and `invert` for float64 tensors of any shape.

    num_steps: the T of a process with a table, else None.
    t_min, t_max: the times between which sigma / alpha is positive and finite, where grids in sigma / alpha stand.
    """

    num_steps: int | None = None
    t_min: float = 1e-3
    t_max: float = 1.0

    def __init__(self):
        self._known: dict[float, tuple[tuple[float, float], float]] = {}

    def __call__(self, t: Number) -> tuple[Number, Number]:
        """(alpha, sigma) at time t: floats of a float, tensors of t's shape and dtype of a tensor."""
        if isinstance(t, Tensor):
            alpha, sigma = self.alpha_sigma(t.double())
            return alpha.to(t.dtype), sigma.to(t.dtype)
        return self._at(t)[0]

    def net_time(self, t: Number) -> Number:
        """What the network is fed for time t."""
        if isinstance(t, Tensor):
            return self.feed(t.double()).to(t.dtype)
        return self._at(t)[1]

    def time(self, ratio: Number) -> Number:
        """The t in [0, 1] whose sigma / alpha is `ratio`; beyond the process' range, the nearest."""
        if isinstance(ratio, Tensor):
            return self.invert(ratio.double()).to(ratio.dtype)
        return self.invert(torch.tensor(ratio, dtype=torch.float64, device="cpu")).item()

    def ratio(self, t: float) -> float:
        """sigma / alpha at a number t; infinite where there is no signal."""
        alpha, sigma = self(t)
        return sigma / alpha if alpha > 0 else math.inf

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def feed(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def invert(self, ratio: Tensor) -> Tensor:
        raise NotImplementedError

    def _at(self, t: float) -> tuple[tuple[float, float], float]:
        """Everything about one time as Python numbers, remembered: samplers come back to the same few times."""
        if t not in self._known:
            time = torch.tensor(t, dtype=torch.float64, device="cpu")
            alpha, sigma = self.alpha_sigma(time)
            self._known[t] = (alpha.item(), sigma.item()), self.feed(time).item()
        return self._known[t]


# --- tables (DDPM and everything trained with it) ------------------------------------------------------------------


class DiscreteVP(Process):
    """A variance-preserving table: index i of T stands at t = (i + 1) / T, and t = 0 is clean data.

    Between indices log(sigma / alpha) is linear in the index, as k-diffusion has it. The two ends where it has no
    finite value are linear in sigma / alpha (below index 0) and in alpha / sigma (above the last but one index of a
    zero-terminal-SNR table). alpha_bars: T falling numbers in (0, 1), the last of which may be 0; `indices` are the
    indices fed to the network, 0..T-1 unless the table is a respaced one.
    """

    def __init__(self, alpha_bars: Tensor, indices: Tensor | None = None):
        super().__init__()
        self.num_steps = len(alpha_bars)
        self.alpha_bars = alpha_bars.double()
        self.indices = torch.arange(self.num_steps).double() if indices is None else indices.double()
        table = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bars])
        if self.num_steps < 1 or (table.diff() >= 0).any() or table[-1] < 0:
            raise ConfigError("alpha_bar must fall, from below 1 to 0 or more: every beta must lie in (0, 1]")
        self.log_ratios = (torch.log1p(-table) - table.log()) / 2  # T+1, from -inf
        self.t_min = 1 / self.num_steps
        self.t_max = 1.0 if self.alpha_bars[-1] > 0 else 1 - 1 / self.num_steps
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def alpha_sigma(self, t):
        log_ratios, _ = self._on(t.device)
        position = (t * self.num_steps).clamp(0, self.num_steps)
        below = position.floor().clamp(max=self.num_steps - 1)
        fraction = position - below
        low, high = log_ratios[below.long()], log_ratios[below.long() + 1]
        log_ratio = torch.lerp(low, high, fraction)
        log_ratio = torch.where(low.isinf(), high + fraction.log(), log_ratio)
        log_ratio = torch.where(high.isinf(), low - torch.log1p(-fraction), log_ratio)
        return torch.sigmoid(-2 * log_ratio).sqrt(), torch.sigmoid(2 * log_ratio).sqrt()

    def feed(self, t):
        _, indices = self._on(t.device)
        position = (t * self.num_steps - 1).clamp(0, self.num_steps - 1)
        below = position.floor()
        above = position.ceil()
        return torch.lerp(indices[below.long()], indices[above.long()], position - below)

    def invert(self, ratio):
        log_ratios, _ = self._on(ratio.device)
        log_ratio = ratio.log()
        below = (torch.searchsorted(log_ratios, log_ratio, right=True) - 1).clamp(0, self.num_steps - 1)
        low, high = log_ratios[below], log_ratios[below + 1]
        fraction = (log_ratio - low) / (high - low)
        fraction = torch.where(low.isinf(), (log_ratio - high).exp(), fraction)
        fraction = torch.where(high.isinf(), -torch.expm1(low - log_ratio), fraction)
        return (below + fraction.clamp(0, 1)) / self.num_steps

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            self._tables[device] = self.log_ratios.to(device), self.indices.to(device)
        return self._tables[device]


def from_betas(betas: Sequence[float] | Tensor, zero_terminal_snr: bool = False) -> DiscreteVP:
    """The process of any list of betas: alpha_bar_i = prod_{j <= i} (1 - beta_j), Eq. (4), arXiv:2006.11239."""
    alpha_bars = torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), dim=0)
    if zero_terminal_snr:  # Algorithm 1, arXiv:2305.08891: keep sqrt(alpha_bar) at index 0, bring the last one to 0
        root = alpha_bars.sqrt()
        alpha_bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return DiscreteVP(alpha_bars)


def linear(
    T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, zero_terminal_snr: bool = False
) -> DiscreteVP:
    """Betas on a line, §4 of arXiv:2006.11239."""
    check_length("process.T", T)
    return from_betas(torch.linspace(beta_start, beta_end, T, dtype=torch.float64), zero_terminal_snr)


def scaled_linear(
    T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, zero_terminal_snr: bool = False
) -> DiscreteVP:
    """Roots of the betas on a line: what the files of latent diffusion (arXiv:2112.10752) call "linear"."""
    check_length("process.T", T)
    root = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T, dtype=torch.float64)
    return from_betas(root.square(), zero_terminal_snr)


def cosine(
    T: int = 1000, offset: float = 0.008, max_beta: float = 0.999, zero_terminal_snr: bool = False
) -> DiscreteVP:
    """alpha_bar proportional to cos^2, betas capped: Eq. (17), arXiv:2102.09672."""
    check_length("process.T", T)
    angle = (torch.arange(T + 1, dtype=torch.float64) / T + offset) / (1 + offset) * (math.pi / 2)
    alpha_bars = angle.cos().square()
    return from_betas((1 - alpha_bars[1:] / alpha_bars[:-1]).clamp(max=max_beta), zero_terminal_snr)


def check_length(name: str, length: int) -> None:
    """ConfigError for a table or grid that cannot be, before it takes memory."""
    if not 1 <= length <= MAX_LENGTH:
        raise ConfigError(f"{name}={length}: expected 1 to {MAX_LENGTH:,}")


def respaced(process: DiscreteVP, spec: int | str) -> DiscreteVP:
    """The process restricted to some of its indices, which the network still sees as before; §4 of arXiv:2102.09672."""
    kept = torch.tensor(space_indices(process.num_steps, spec))
    return DiscreteVP(process.alpha_bars[kept], process.indices[kept])


def space_indices(T: int, spec: int | str) -> list[int]:
    """Rising indices out of 0..T-1: "250" spreads them from end to end, "10,20" does so in equal sections of the table,
    of which some may be left out ("10,10,0,0": from the middle down), "ddim50" takes the whole stride that gives 50
    (arXiv:2102.09672, arXiv:2010.02502).
    """
    spec = str(spec)
    if not all(part.isdecimal() for part in spec.removeprefix("ddim").split(",")):
        raise ConfigError(f"respacing '{spec}' is not understood: write a number (250), sections ('10,20') or ddim50")
    if spec.startswith("ddim"):
        count = int(spec.removeprefix("ddim"))
        strides = (range(0, T, stride) for stride in range(1, T + 1))
        found = next((list(indices) for indices in strides if len(indices) == count), None)
        if found is None:
            raise ConfigError(f"respacing '{spec}': no whole stride gives {count} of {T} steps; write {count} instead")
        return found
    counts = [int(part) for part in spec.split(",")]
    if not any(counts):
        raise ConfigError(f"respacing '{spec}': a sampler needs at least one step")
    indices, start = [], 0
    for section, count in enumerate(counts):
        size = T // len(counts) + (section < T % len(counts))
        if count > size:
            raise ConfigError(f"respacing '{spec}': {count} steps do not fit a section of {size}; ask for 0 to {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        at = 0.0
        for _ in range(count):  # added up, as published: a multiple would round some of IF's to another index
            indices.append(start + round(at))
            at += stride
        start += size
    return indices


# --- continuous processes ------------------------------------------------------------------------------------------


class VPCosine(Process):
    """alpha = cos(a t), sigma = sin(a t), with `a` such that log-SNR ends at `logsnr_min` instead of -infinity.

    The cosine schedule of arXiv:2102.09672 in continuous time, as arXiv:2301.11093 writes it.
    """

    def __init__(self, logsnr_min: float = -20.0):
        super().__init__()
        self.angle = math.atan(math.exp(-logsnr_min / 2))

    def alpha_sigma(self, t):
        return (self.angle * t).cos(), (self.angle * t).sin()

    def feed(self, t):
        return 1000 * t

    def invert(self, ratio):
        return (ratio.atan() / self.angle).clamp(0, 1)


class EDM(Process):
    """alpha = 1, sigma = sigma_max t^rho: the variance-exploding process of arXiv:2206.00364.

    Our t is only a name for sigma; with rho = 7 an even grid of t is close to the steps of its Eq. (5). Train with
    density=log_normal: even draws of t spend a fifth below sigma_min. Grids in sigma end at sigma_min, then step to 0.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        super().__init__()
        self.sigma_max = sigma_max
        self.rho = rho
        self.t_min = self.time(float(sigma_min))

    def alpha_sigma(self, t):
        return torch.ones_like(t), self.sigma_max * t**self.rho

    def feed(self, t):
        return self.alpha_sigma(t)[1].log() / 4  # c_noise of Table 1

    def invert(self, ratio):
        return (ratio / self.sigma_max).clamp(0, 1) ** (1 / self.rho)


class RectifiedFlow(Process):
    """alpha = 1 - sigma, sigma = shift t / (1 + (shift - 1) t): Eq. (23), arXiv:2403.03206.

    shift = 1 is arXiv:2209.03003; FLUX's exp(mu) is the same map with shift = exp(mu). t_min is the *shifted* 1/1000,
    so that a linspace grid is shifted twice at its end, as the published sampler of Stable Diffusion 3 has it.
    """

    t_max = 1 - 1e-3

    def __init__(self, shift: float = 1.0):
        super().__init__()
        self.shift = shift
        self.t_min = self(1e-3)[1]

    def alpha_sigma(self, t):
        sigma = self.shift * t / (1 + (self.shift - 1) * t)
        return 1 - sigma, sigma

    def feed(self, t):
        return 1000 * self.alpha_sigma(t)[1]

    def invert(self, ratio):
        sigma = 1 - 1 / (1 + ratio)  # also where ratio is infinite
        return sigma / (self.shift - (self.shift - 1) * sigma)
