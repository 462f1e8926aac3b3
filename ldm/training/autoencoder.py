"""Training an autoencoder: pixels, LPIPS, KL and a patch discriminator (arXiv:2112.10752, appendix G, Eq. (25)).

    L = |x - x_hat| / e^s + s + w_p LPIPS(x, x_hat) / e^s + w_kl KL(q(z|x) || N(0, 1)) + lambda w_a L_G + L_D

    lambda = |grad L_rec| / (|grad L_G| + 1e-4) at the decoder's last layer: Eq. (7), arXiv:2012.09841
    L_G = -mean D(x_hat),  L_D = (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) / 2: hinge, arXiv:1705.02894

Deviation: the original sums every term over C H W; here each is divided by C H W, so that loss, learning rate and
clipping do not depend on the resolution. Their ratios, and with them the meaning of the published weights, are kept.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm.models.autoencoder import AutoencoderKL, kl_divergence, sample_posterior
from ldm.models.codec import to_float, to_uint8
from ldm.models.perceptual import LPIPS
from ldm.utils.seeding import keys, normal


def l1(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error."""
    return F.l1_loss(x_hat, x)


def l2(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(x_hat, x)


class AutoencoderObjective(nn.Module):
    """objective(batch) -> (loss, logs): one backward trains the autoencoder and the discriminator.

    The generator's term sees the discriminator with detached parameters and the discriminator's term sees detached
    reconstructions, so neither reaches the other's parameters. The adversary joins at step `adversarial_start`.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        *,
        reconstruction: Callable[[Tensor, Tensor], Tensor] = l1,
        kl_weight: float = 1e-6,
        perceptual: LPIPS | None = None,
        perceptual_weight: float = 1.0,
        discriminator: nn.Module | None = None,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 0,
        learn_logvar: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.autoencoder = autoencoder
        self.reconstruction = reconstruction
        self.kl_weight = kl_weight
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.seed = seed
        # s, the log-variance of a pixel; learned or zero
        self.logvar = nn.Parameter(torch.zeros(()), requires_grad=learn_logvar)

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: "image" uint8 (B C H W), "position" (B,), "step"; a scalar loss and its parts."""
        x = to_float(batch["image"])
        mean, logvar = self.autoencoder.encode(x)
        mean, logvar = mean.float(), logvar.float()
        noise = normal(keys(self.seed, "posterior", batch["position"].to(x.device)), mean.shape[1:])
        x_hat = self.autoencoder.decode(sample_posterior(mean, logvar, noise)).float()

        error = self.reconstruction(x_hat, x)
        kl = kl_divergence(mean, logvar).mean()
        logs = {"reconstruction": error, "kl": kl}
        if self.perceptual is not None:
            logs["perceptual"] = self.perceptual(x_hat, x).mean()
            error = error + self.perceptual_weight * logs["perceptual"]
        likelihood = error / self.logvar.exp() + self.logvar
        loss = likelihood + self.kl_weight * kl / x[0].numel()
        if self.discriminator is not None and batch["step"] >= self.adversarial_start:
            generator = self._generator_loss(likelihood, x_hat, logs)
            loss = loss + generator + self._discriminator_loss(x, x_hat.detach(), logs)
        return loss, {name: value.detach() for name, value in logs.items()}

    @torch.no_grad()
    def evaluate(self, images: Tensor) -> dict[str, float]:
        """PSNR in dB of uint8 images (B C H W) against their reconstructions from the mode, averaged over images."""
        return {"psnr": psnr(images, self.reconstruct(images)).mean().item()}

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 images (B C H W) through the posterior's mode and back."""
        mode, _ = self.autoencoder.encode(to_float(images))
        return to_uint8(self.autoencoder.decode(mode))

    def _generator_loss(self, likelihood: Tensor, x_hat: Tensor, logs: dict[str, Tensor]) -> Tensor:
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        adversarial = -functional_call(self.discriminator, frozen, (x_hat,)).float().mean()
        logs["generator"] = adversarial
        if not torch.is_grad_enabled():  # an evaluation of the loss
            return self.adversarial_weight * adversarial
        last = self.autoencoder.decoder.conv_out.weight
        wanted = torch.autograd.grad(likelihood, last, retain_graph=True)[0].norm()
        given = torch.autograd.grad(adversarial, last, retain_graph=True)[0].norm()
        logs["adaptive_weight"] = (wanted / (given + 1e-4)).clamp(0.0, 1e4)
        return self.adversarial_weight * logs["adaptive_weight"] * adversarial

    def _discriminator_loss(self, x: Tensor, x_hat: Tensor, logs: dict[str, Tensor]) -> Tensor:
        real, fake = self.discriminator(x).float(), self.discriminator(x_hat).float()
        logs["logits_real"], logs["logits_fake"] = real.mean(), fake.mean()
        logs["discriminator"] = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        return logs["discriminator"]


def psnr(images: Tensor, rebuilt: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images in dB: 2 x (B C H W) -> (B,); at most 100, which means equal."""
    mse = (images.double() - rebuilt.double()).div_(255).square_().mean((1, 2, 3))
    return -10.0 * mse.clamp(min=1e-10).log10()
