"""The one contract of this project: denoiser(x_t, t, **cond) -> x0, the expected clean image."""

import torch
from torch import Tensor, nn

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.process import Process
from ldm.utils.errors import ConfigError
from ldm.utils.tensors import pad_dims


class Denoiser(nn.Module):
    """A network, the process it was trained on, and what it predicts, together one denoiser.

    net(x, t_net, **cond) gets x (B C H W) and the process' own time t_net (B,) float32; it answers with C channels, or
    with 2C of which the second half is the variance v of arXiv:2102.09672. Raises ConfigError for a prediction that
    says nothing about x0 on a process that ends in pure noise.

    dtype: that of weights in half precision, for which x is cast; None leaves it to autocast.
    """

    def __init__(self, net: nn.Module, process: Process, prediction: Prediction, dtype: torch.dtype | None = None):
        super().__init__()
        if prediction.needs_signal and process(1.0)[0] == 0:
            raise ConfigError(
                f"prediction {type(prediction).__name__} cannot give x0 where alpha = 0, and {type(process).__name__} "
                "ends there (zero terminal SNR): use prediction=v, flow, x0 or edm"
            )
        self.net = net
        self.process = process
        self.prediction = prediction
        self.dtype = dtype
        self._known: dict[tuple, tuple] = {}

    def forward(
        self, x_t: Tensor, t: float | Tensor, *, variance: bool = False, **cond
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x_t (B C H W) at time t (a number, or (B,)) -> x0 (B C H W); with `variance`, (x0, v)."""
        if isinstance(t, Tensor):
            alpha, sigma = (pad_dims(a, x_t).to(x_t.dtype) for a in self.process(t))
            F, v = self.predict(x_t, self.process.net_time(t).float(), alpha, sigma, cond)
            x0 = self.prediction.to_x0(F, x_t, alpha, sigma)
        else:
            alpha, sigma, c_skip, c_out, t_net = self._at(t, x_t)
            F, v = self.predict(x_t, t_net, alpha, sigma, cond)
            x0 = torch.add(x_t * c_skip, F, alpha=c_out)  # to_x0 of numbers, in one operation less
        if not variance:
            return x0
        if v is None:
            raise ConfigError(f"a learned variance needs {2 * F.shape[1]} output channels, the network has half")
        return x0, v

    def predict(
        self, x_t: Tensor, t_net: Tensor, alpha: float | Tensor, sigma: float | Tensor, cond: dict
    ) -> tuple[Tensor, Tensor | None]:
        """The raw network output F (B C H W), and v where there is one."""
        x = self.prediction.net_input(x_t, alpha, sigma)
        F = self.net(x, t_net, **cond) if self.dtype is None else self.net(x.to(self.dtype), t_net, **cond).to(x.dtype)
        channels = x_t.size(1)
        if F.size(1) == channels:
            return F, None
        return F[:, :channels], F[:, channels:]

    def _at(self, t: float, x_t: Tensor) -> tuple[float, float, Tensor, float, Tensor]:
        """alpha, sigma, c_skip, c_out and t_net (B,) of a number t, remembered: they would cost as much as a step."""
        key = t, x_t.size(0), x_t.dtype, x_t.device, self.process, self.prediction
        if key not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            alpha, sigma = self.process(t)
            c_skip, c_out = self.prediction.coefficients(alpha, sigma)
            with torch.inference_mode(False):  # tensors that training may use later
                # multiplying by a Python number takes twice as long as by a tensor
                c_skip = torch.tensor(c_skip, dtype=torch.promote_types(x_t.dtype, torch.float32))
                t_net = torch.full(x_t.shape[:1], self.process.net_time(t), dtype=torch.float32, device=x_t.device)
            self._known[key] = alpha, sigma, c_skip, c_out, t_net
        return self._known[key]


class GaussianDenoiser:
    """The exact denoiser of data ~ N(mean, std^2), and the exact path of its probability-flow ODE: a judge of samplers.

    mean and std are numbers, or tensors that broadcast against x_t.
    """

    def __init__(self, process: Process, mean: float | Tensor = 0.0, std: float | Tensor = 0.5):
        self.process = process
        self.mean = mean
        self.std = std

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        alpha, sigma = (pad_dims(a, x_t) for a in self.process(t))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x_t - alpha * self.mean)

    def solve(self, x_t: Tensor, t: float, s: float) -> Tensor:
        """Where the ODE takes x_t from time t to time s."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.process(t), self.process(s)
        variance_t = (alpha_t * self.std) ** 2 + sigma_t**2
        variance_s = (alpha_s * self.std) ** 2 + sigma_s**2
        return alpha_s * self.mean + (x_t - alpha_t * self.mean) * (variance_s / variance_t) ** 0.5
