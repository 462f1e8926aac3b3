"""The paths of SiT, arXiv:2401.08740: processes that also know how fast they move.

| process | alpha                       | sigma             | d alpha / dt   | d sigma / dt           |
|---------|-----------------------------|-------------------|----------------|------------------------|
| Linear  | 1 - t                       | t                 | -1             | 1                      |
| GVP     | cos(pi t / 2)               | sin(pi t / 2)     | -pi / 2 sigma  | pi / 2 alpha           |
| VP      | exp(-(19.9 t + 0.2) t / 4)  | sqrt(1 - alpha^2) | -rate alpha    | rate alpha^2 / sigma   |

SiT's own time runs the other way, from noise at 0 to data at 1: its network is fed 1 - t, not multiplied by anything.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.process import Number, Process
from ldm.utils.errors import ConfigError


class Interpolant(Process):
    """A path of SiT. A subclass writes `path`, `slope` and `invert`.

    margin: how far from pure noise it ends, in t. 0.001 (and density.low=0.001) for predictions of noise and score, as
    published: no x0 can be had of them without any signal.
    """

    t_max = 1 - 1e-3

    def __init__(self, margin: float = 0.0):
        super().__init__()
        if not 0 <= margin <= 0.1:
            raise ConfigError(f"process.margin={margin}: a path ends within 0.1 of pure noise; use 0, or 0.001 for eps")
        self.margin = margin

    def alpha_sigma(self, t):
        return self.path(t.clamp(max=1 - self.margin))

    def feed(self, t):
        return (1 - t).clamp(min=self.margin)

    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at float64 times."""
        raise NotImplementedError

    def slope(self, alpha: Number, sigma: Number) -> tuple[Number, Number]:
        """(d alpha / dt, d sigma / dt) where the path has this alpha and sigma."""
        raise NotImplementedError


class Linear(Interpolant):
    """The line from data to noise: rectified flow, but for what the network is fed."""

    def path(self, t):
        return 1 - t, t

    def slope(self, alpha, sigma):
        return 0 * alpha - 1, 0 * sigma + 1

    def invert(self, ratio):
        return 1 - 1 / (1 + ratio)  # also where ratio is infinite


class GVP(Interpolant):
    """The quarter of a circle: the generalised variance-preserving path."""

    def path(self, t):
        return (math.pi / 2 * (1 - t)).sin(), (math.pi / 2 * t).sin()  # both exact at both ends

    def slope(self, alpha, sigma):
        return -math.pi / 2 * sigma, math.pi / 2 * alpha

    def invert(self, ratio):
        return ratio.atan() / (math.pi / 2)


class VP(Interpolant):
    """The variance-preserving diffusion of arXiv:2011.13456, beta from 0.1 to 20.

    Its velocity is infinite at t = 0: train with density.low=1e-5, as published.
    """

    t_max = 1.0
    low, rise = 0.1, 19.9  # beta at t = 0, and what it gains until t = 1

    def path(self, t):
        log_alpha = -(self.rise * t / 4 + self.low / 2) * t
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def slope(self, alpha, sigma):
        log_alpha = alpha.log() if isinstance(alpha, Tensor) else math.log(alpha)
        rate = (self.low**2 - 4 * self.rise * log_alpha) ** 0.5 / 2  # beta(t) / 2
        return -rate * alpha, rate * alpha**2 / sigma

    def invert(self, ratio):
        beta = (self.low**2 + 2 * self.rise * torch.log1p(ratio**2)).sqrt()
        return ((beta - self.low) / self.rise).clamp(max=1)
