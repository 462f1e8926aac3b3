"""Training an autoencoder: pixels, LPIPS, KL and a patch discriminator (arXiv:2112.10752, appendix G, Eq. (25)).

    L = |x - x_hat| / e^s + s + w_p LPIPS(x, x_hat) / e^s + w_kl KL(q(z|x) || N(0, 1)) + lambda w_a L_G + L_D

    lambda = |grad L_rec| / (|grad L_G| + 1e-4) at the decoder's last layer, at most 1e4: Eq. (7), arXiv:2012.09841

Deviation: the original sums every term but L_D over C H W; here each is divided by C H W, so that loss, learning rate
and clipping do not depend on the resolution. Their ratios, and with them the meaning of the published weights, are
kept: LPIPS, one number an image, counts for every value of that image, as it does there.
Deviation: one optimizer steps both sides. Adam does not see how large a side's loss is; clipping would: leave it off.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm.models.autoencoder import AutoencoderKL, kl_divergence, sample_posterior
from ldm.models.codec import to_float, to_uint8
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.perceptual import LPIPS
from ldm.utils.errors import ConfigError
from ldm.utils.images import psnr
from ldm.utils.seeding import keys, normal


def l1(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error."""
    return F.l1_loss(x_hat, x)


def l2(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(x_hat, x)


def hinge(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """L_D = (E relu(1 - D(x)) + E relu(1 + D(x_hat))) / 2, L_G = -E D(x_hat): arXiv:1705.02894.

    This and the games below take logits; with `real` they give the discriminator's loss, without it the generator's.
    """
    return -fake.mean() if real is None else 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """V = E log D(x) + E log(1 - D(x_hat)), D = sigmoid(logit); L_D = -V, L_G = V: Eq. (1), arXiv:1406.2661."""
    return -F.softplus(fake).mean() if real is None else F.softplus(-real).mean() + F.softplus(fake).mean()


def non_saturating(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """As `vanilla`, but L_G = -E log D(x_hat), which still has a gradient when D is sure: the same, section 3."""
    return F.softplus(-fake).mean() if real is None else vanilla(fake, real)


def least_squares(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """L_D = (E (D(x) - 1)^2 + E D(x_hat)^2) / 2, L_G = E (D(x_hat) - 1)^2 / 2: Eq. (9), arXiv:1611.04076."""
    distance = (fake - 1 if real is None else fake).square().mean()
    return 0.5 * (distance if real is None else distance + (real - 1).square().mean())


GAMES = {"hinge": hinge, "vanilla": vanilla, "non_saturating": non_saturating, "least_squares": least_squares}


class Adversary(nn.Module):
    """A patch discriminator (arXiv:1611.07004), the game it plays, its weight, and the step at which it joins."""

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 64,
        num_layers: int = 3,
        *,
        game: str = "hinge",
        weight: float = 0.5,  # on top of the adaptive weight
        start: int = 0,
    ):
        super().__init__()
        if game not in GAMES:
            raise ConfigError(f"discriminator.game={game} is not known; use {', '.join(GAMES)}")
        self.network = PatchDiscriminator(in_channels, channels, num_layers)
        self.game = GAMES[game]
        self.weight = weight
        self.start = start

    def against(self, x_hat: Tensor) -> Tensor:
        """The generator's loss; its gradient passes through the discriminator and leaves nothing there."""
        frozen = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        return self.game(functional_call(self.network, frozen, (x_hat,)).float())

    def forward(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The discriminator's loss, which leaves nothing in the autoencoder, and the mean logits of both sides."""
        real, fake = self.network(x).float(), self.network(x_hat.detach()).float()
        return self.game(fake, real), real.mean(), fake.mean()


PIXELS = 8 * 256**2  # reconstructed at a time in an evaluation
FROZEN = {"all": (), "decoder": ("encoder", "quant_conv")}


class AutoencoderObjective(nn.Module):
    """objective(batch) -> (loss, logs): one backward trains the autoencoder and the discriminator.

    train="decoder" freezes the encoder: what a better decoder makes of latents that stay what they were, as in the
    published fine-tunes of Stable Diffusion's autoencoder. Raises ConfigError for anything but it and "all".
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        *,
        reconstruction: Callable[[Tensor, Tensor], Tensor] = l1,
        kl_weight: float = 1e-6,
        perceptual: LPIPS | None = None,
        perceptual_weight: float = 1.0,
        discriminator: Adversary | None = None,
        learn_logvar: bool = False,
        train: str = "all",
        seed: int = 0,
    ):
        super().__init__()
        if train not in FROZEN:
            raise ConfigError(f"objective.train={train} is not known; use {', '.join(FROZEN)}")
        for part in FROZEN[train]:
            autoencoder.get_submodule(part).requires_grad_(False)
        self.autoencoder = autoencoder
        self.reconstruction = reconstruction
        self.kl_weight = kl_weight
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.discriminator = discriminator
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
        if self.discriminator is not None:
            loss = loss + self._adversarial(batch["step"], likelihood, x, x_hat, logs)
        return loss, {name: value.detach() for name, value in logs.items()}

    @torch.no_grad()
    def evaluate(self, images: Tensor) -> dict[str, float]:
        """PSNR in dB of uint8 images (B C H W) against their reconstructions from the mode, averaged over images."""
        return {"psnr": psnr(images, self.reconstruct(images)).mean().item()}

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 images (B C H W) through the posterior's mode and back, a few at a time."""
        at_once = max(1, PIXELS // images[0, 0].numel())
        modes = (self.autoencoder.encode(to_float(part))[0] for part in images.split(at_once))
        return torch.cat([to_uint8(self.autoencoder.decode(mode)) for mode in modes])

    def _adversarial(self, step: int, likelihood: Tensor, x: Tensor, x_hat: Tensor, logs: dict) -> Tensor:
        """Both sides' losses from the adversary's first step on; until then 0, as the original multiplies them by.

        A zero that depends on the discriminator: under DDP every parameter has a gradient in every step.
        """
        adversary = self.discriminator
        if step < adversary.start:
            return 0.0 * sum(parameter.sum() for parameter in adversary.parameters())
        logs["generator"] = adversary.against(x_hat)
        weight = adversary.weight / x[0].numel()
        if torch.is_grad_enabled():  # otherwise an evaluation of the loss
            logs["adaptive_weight"] = self._adaptive_weight(likelihood * x[0].numel(), logs["generator"])
            weight = weight * logs["adaptive_weight"]
        logs["discriminator"], logs["logits_real"], logs["logits_fake"] = adversary(x, x_hat)
        return weight * logs["generator"] + logs["discriminator"]

    def _adaptive_weight(self, likelihood: Tensor, generator: Tensor) -> Tensor:
        """Eq. (7), arXiv:2012.09841, of the summed likelihood; the clamp is from its code. A constant: no graph."""
        last = self.autoencoder.decoder.conv_out.weight
        wanted = torch.autograd.grad(likelihood, last, retain_graph=True)[0].norm()
        given = torch.autograd.grad(generator, last, retain_graph=True)[0].norm()
        return (wanted / (given + 1e-4)).clamp(0.0, 1e4)
