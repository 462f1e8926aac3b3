"""The variational bound in bits, and learned variances: arXiv:2006.11239, arXiv:2102.09672.

    L_vlb = L_0 + ... + L_T,  L_i = KL(q(x_{i-1} | x_i, x0) || p(x_{i-1} | x_i)),  L_0 = -log2 p(x0 | x_0)

over the T indices of a table; all terms are means over the values of an image, in bits.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.special import log_ndtr, ndtr

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import DiffusionObjective
from ldm.diffusion.process import DiscreteVP, Process
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import Noise, randn_like
from ldm.utils.tensors import pad_dims

HALF_BIN = 1 / 255  # of uint8 values brought to [-1, 1]


def log_variances(process: DiscreteVP, t: Tensor) -> tuple[Tensor, Tensor]:
    """(log beta tilde, log beta) of the step down from t (B): what fixed_small and fixed_large sample with.

    beta tilde of index 0 would be 0: there it is that of index 1, as published with arXiv:2102.09672.
    """
    index = _index(process, t)
    small, _ = _betas(process, index.clamp(min=1))
    return small.log(), _betas(process, index)[1].log()


def log_variance(process: DiscreteVP, t: Tensor, v: Tensor) -> Tensor:
    """Eq. (15), arXiv:2102.09672: v (B C H W) of -1 is log beta tilde, of 1 log beta; it may lie beyond."""
    small, large = (pad_dims(a, v).to(v.dtype) for a in log_variances(process, t))
    return torch.lerp(small, large, (v + 1) / 2)


def bound(process: DiscreteVP, t: Tensor, x0: Tensor, x0_hat: Tensor, v: Tensor) -> Tensor:
    """The term of L_vlb at t (B) for a network that answers (x0_hat, v), each B C H W: (B,) bits per value."""
    index = _index(process, t)
    log_model = log_variance(process, t, v)
    log_true, of_x0 = (pad_dims(a, x0).to(x0.dtype) for a in (log_variances(process, t)[0], _pull(process, index)))
    apart = of_x0 * (x0 - x0_hat)  # of the two means, Eq. (7), arXiv:2006.11239
    kl = 0.5 * (log_model - log_true - 1 + (log_true - log_model).exp() + apart**2 * (-log_model).exp())
    terms = torch.where(pad_dims(index, x0) == 0, -log_likelihood(x0, x0_hat, log_model / 2), kl)
    return terms.flatten(1).mean(1) / math.log(2)


def log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of the uint8 value that became x under a normal distribution: Eq. (13), arXiv:2006.11239.

    Values beyond 0.999 stand for all that lie outside. Deviation: the exact distribution function; the code published
    with the paper has a tanh in its place, up to 2e-4 away, and less than that in bits on average.
    """
    precision = (-log_std).exp()
    below = -(x - mean).abs()  # on the side where two close numbers near 0, not near 1, are subtracted
    inside = ndtr((below + HALF_BIN) * precision) - ndtr((below - HALF_BIN) * precision)
    outside = log_ndtr((HALF_BIN - x.sign() * (x - mean)) * precision)
    return torch.where(x.abs() > 0.999, outside, inside.clamp(min=1e-12).log())


@torch.no_grad()
def bits_per_dim(denoiser: Denoiser, x0: Tensor, *, generator: torch.Generator | Noise | None = None, **cond) -> Tensor:
    """L_vlb of images x0 (B C H W) in [-1, 1], bits per value (B,), in one evaluation for each index of the table."""
    process = denoiser.process
    alpha, sigma = process(1.0)
    prior = 0.5 * ((alpha * x0) ** 2 + sigma**2 - 1 - 2 * math.log(sigma))
    total = prior.flatten(1).mean(1) / math.log(2)
    for index in reversed(range(process.num_steps)):
        t = torch.full(x0.shape[:1], (index + 1) / process.num_steps, dtype=torch.float64, device=x0.device)
        alpha, sigma = process(t[0].item())
        x_t = torch.add(alpha * x0, randn_like(x0, generator), alpha=sigma)
        total += bound(process, t, x0, *denoiser(x_t, t, variance=True, **cond))
    return total


class HybridObjective(DiffusionObjective):
    """`DiffusionObjective` + vlb_weight L_vlb, Eq. (16), arXiv:2102.09672: it trains the variance half v, and v alone.

    vlb_weight is on the sum over the T indices. One of them is drawn, so its term counts vlb_weight T times: with 0.001
    once for T = 1000, the loss of DiT and PixArt, and T / 1000 times for a respaced table. That holds for
    density=uniform; another one weights the terms as it does those of L_simple.
    Raises ConfigError for a process without a table, and a network without a variance.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        codec: nn.Module,
        conditioner: nn.Module,
        density: Callable[..., Tensor],
        weighting: Callable[..., Tensor],
        *,
        vlb_weight: float = 0.001,
        seed: int = 0,
        stratified: bool = True,
        offset_noise: float = 0.0,
    ):
        super().__init__(denoiser, codec, conditioner, density, weighting,
                         seed=seed, stratified=stratified, offset_noise=offset_noise)  # fmt: skip
        check_table(denoiser.process)
        self.vlb_weight = vlb_weight

    def other_losses(self, x0, x_t, t, F, v):
        return {"vlb": self.vlb_weight * variational_loss(self.denoiser, x0, x_t, t, F, v)}


def check_table(process: Process) -> None:
    """ConfigError for a process without steps to bound."""
    if process.num_steps is None:
        raise ConfigError(
            f"objective=hybrid bounds the steps of a table, and {type(process).__name__} has none: "
            "use process=ddpm_linear or another table, or objective=diffusion"
        )


def variational_loss(denoiser: Denoiser, x0: Tensor, x_t: Tensor, t: Tensor, F: Tensor, v: Tensor | None) -> Tensor:
    """L_vlb as one drawn term estimates it, of the halves F and v of a network's output: v alone learns from it."""
    if v is None:
        raise ConfigError("objective=hybrid trains a variance and the network gives none: set learned_variance")
    process = denoiser.process
    alpha, sigma = (pad_dims(a, x0).to(x0.dtype) for a in process(t))
    x0_hat = denoiser.prediction.to_x0(F.detach().float(), x_t, alpha, sigma)  # the mean learns from L_simple alone
    return process.num_steps * bound(process, t, x0, x0_hat, v.float()).mean()


def _index(process: DiscreteVP, t: Tensor) -> Tensor:
    return (t.double() * process.num_steps).round() - 1


def _betas(process: DiscreteVP, index: Tensor) -> tuple[Tensor, Tensor]:
    """(beta tilde, beta) of the step from `index` to the one below; index 0 goes to clean data."""
    (alpha, sigma), (alpha_s, sigma_s) = process((index + 1) / process.num_steps), process(index / process.num_steps)
    beta = sigma**2 - (alpha * sigma_s / alpha_s) ** 2
    return beta * (sigma_s / sigma) ** 2, beta


def _pull(process: DiscreteVP, index: Tensor) -> Tensor:
    """The weight of x0 in the mean of q(x_s | x_t, x0), Eq. (7), arXiv:2006.11239."""
    (_, sigma), (alpha_s, _) = process((index + 1) / process.num_steps), process(index / process.num_steps)
    return alpha_s * _betas(process, index)[1] / sigma**2
