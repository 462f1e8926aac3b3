"""What the network predicts. Every choice is one line through its output F: x0 = c_skip x_t + c_out F.

| F    | its target                                       | c_skip                      | c_out                        |
|------|--------------------------------------------------|-----------------------------|------------------------------|
| Eps  | eps                                              | 1 / alpha                   | -sigma / alpha               |
| X0   | x0                                               | 0                           | 1                            |
| V    | alpha eps - sigma x0                             | alpha / (alpha^2 + sigma^2) | -sigma / (alpha^2 + sigma^2) |
| Flow | eps - x0                                         | 1 / (alpha + sigma)         | -sigma / (alpha + sigma)     |
| EDM  | (sigma/sigma_d x0 - alpha sigma_d eps) / sqrt(n) | alpha sigma_d^2 / n         | sigma sigma_d / sqrt(n)      |
| SiT  | -(alpha' x0 + sigma' eps)                        | sigma' / w                  | sigma / w                    |
| SiT  | -eps / sigma, the score                          | 1 / alpha                   | sigma^2 / alpha              |

with n = (alpha sigma_d)^2 + sigma^2, the variance of x_t, and c_in = 1 / sqrt(n) on the EDM network's input;
w = alpha sigma' - sigma alpha', and a dash for the slope in t of a path of arXiv:2401.08740.
alpha and sigma are numbers, or tensors that broadcast against x_t.
"""

from torch import Tensor

from ldm.diffusion.interpolant import Interpolant
from ldm.diffusion.process import Process
from ldm.utils.errors import ConfigError

Number = float | Tensor


class Prediction:
    """A kind of network output; `needs_signal` says that x0 cannot be had from it where alpha = 0."""

    needs_signal = False

    def coefficients(self, alpha: Number, sigma: Number) -> tuple[Number, Number]:
        """(c_skip, c_out) of x0 = c_skip x_t + c_out F."""
        raise NotImplementedError

    def target(self, x0: Tensor, eps: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """The F that gives x0 back: to_x0(target(x0, eps), alpha x0 + sigma eps) = x0."""
        raise NotImplementedError

    def to_x0(self, F: Tensor, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        c_skip, c_out = self.coefficients(alpha, sigma)
        return c_skip * x_t + c_out * F

    def net_input(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """What the network sees of x_t."""
        return x_t

    def gain(self, alpha: Number, sigma: Number) -> Number:
        """(d x0 / d F)^2: how a squared error of F becomes one of x0."""
        return self.coefficients(alpha, sigma)[1] ** 2


class Eps(Prediction):
    """The noise: Eq. (14), arXiv:2006.11239."""

    needs_signal = True

    def coefficients(self, alpha, sigma):
        return 1 / alpha, -sigma / alpha

    def target(self, x0, eps, alpha, sigma):
        return eps


class X0(Prediction):
    """The clean image."""

    def coefficients(self, alpha, sigma):
        return 0 * alpha, 0 * alpha + 1

    def target(self, x0, eps, alpha, sigma):
        return x0


class V(Prediction):
    """The velocity on the circle from x0 to eps: Appendix D, arXiv:2202.00512."""

    def coefficients(self, alpha, sigma):
        norm = alpha**2 + sigma**2  # 1 where variance is preserved
        return alpha / norm, -sigma / norm

    def target(self, x0, eps, alpha, sigma):
        return alpha * eps - sigma * x0


class Flow(Prediction):
    """The velocity on the line from x0 to eps: arXiv:2209.03003."""

    def coefficients(self, alpha, sigma):
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)

    def target(self, x0, eps, alpha, sigma):
        return eps - x0


class EDMPrecond(Prediction):
    """EDM's preconditioning, for any alpha. Source: Table 1, arXiv:2206.00364, with x_t / alpha and sigma / alpha."""

    def __init__(self, sigma_data: float = 0.5):
        self.sigma_data = sigma_data

    def std(self, alpha: Number, sigma: Number) -> Number:
        """The standard deviation of x_t when that of the data is sigma_data."""
        return ((alpha * self.sigma_data) ** 2 + sigma**2) ** 0.5

    def coefficients(self, alpha, sigma):
        std = self.std(alpha, sigma)
        return alpha * self.sigma_data**2 / std**2, sigma * self.sigma_data / std

    def target(self, x0, eps, alpha, sigma):
        return (sigma / self.sigma_data * x0 - alpha * self.sigma_data * eps) / self.std(alpha, sigma)

    def net_input(self, x_t, alpha, sigma):
        return x_t / self.std(alpha, sigma)


class Velocity(Prediction):
    """SiT's velocity from noise to data, arXiv:2401.08740: data - noise on the line, so minus that of `Flow`.

    Raises ConfigError for a process that is none of SiT's paths.
    """

    def __init__(self, process: Process):
        if not isinstance(process, Interpolant):
            raise ConfigError(
                f"prediction=sit_velocity is along a path of SiT, {type(process).__name__} is none: use "
                "process=sit_linear, sit_gvp or sit_vp, or prediction=flow or v"
            )
        self.path = process

    def coefficients(self, alpha, sigma):
        alpha_slope, sigma_slope = self.path.slope(alpha, sigma)
        w = alpha * sigma_slope - sigma * alpha_slope
        return sigma_slope / w, sigma / w

    def target(self, x0, eps, alpha, sigma):
        alpha_slope, sigma_slope = self.path.slope(alpha, sigma)
        return -(alpha_slope * x0 + sigma_slope * eps)


class Score(Prediction):
    """The gradient of log p(x_t), arXiv:2011.13456; weighting=snr makes of its error that of eps, as in SiT."""

    needs_signal = True

    def coefficients(self, alpha, sigma):
        return 1 / alpha, sigma**2 / alpha

    def target(self, x0, eps, alpha, sigma):
        return -eps / sigma
