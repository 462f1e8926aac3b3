"""What a denoiser sees of an image: uint8 outside, float inside. Only a codec converts, nobody asks which one it is.

    x = codec.encode(images)        (B 3 H W) uint8 -> (B channels H/downsample W/downsample) float32
    images = codec.decode(x)
"""

import copy
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderKL, sample_posterior
from ldm.utils.errors import ConfigError, DataError, NonFiniteError
from ldm.utils.finite import check_finite
from ldm.utils.seeding import Noise, randn_like

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's mode "L"


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1]; float32 is there already: a hole of exactly 0 is no uint8."""
    if images.dtype == torch.float32:
        return images
    if images.dtype != torch.uint8:
        raise DataError(f"images are {images.dtype}; a codec takes uint8 of 0..255, or float32 of -1..1")
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(x: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 0..255, rounded, clipped outside."""
    return x.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


class PixelCodec(nn.Module):
    """The image itself; with `channels=1` its luminance, decoded to three equal channels."""

    downsample = 1
    bounded = True  # x0 lies in [-1, 1]

    def __init__(self, channels: int = 3):
        super().__init__()
        if channels not in (1, 3):
            raise ConfigError(f"codec.channels={channels}; a pixel codec has 3 channels (RGB) or 1 (luminance)")
        self.channels = channels

    def encode(self, images: Tensor, generator: "torch.Generator | Noise | None" = None) -> Tensor:
        """(B 3 H W) or (B 1 H W) uint8 -> (B channels H W); `generator` has nothing to draw."""
        x = to_float(images).expand(-1, 3, -1, -1)
        return x if self.channels == 3 else (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)

    def decode(self, x: Tensor) -> Tensor:
        """(B channels H W) -> (B 3 H W) uint8."""
        return to_uint8(x).expand(-1, 3, -1, -1)


class LatentCodec(nn.Module):
    """A frozen autoencoder's latents, (z - shift) * scale: arXiv:2112.10752, appendix G.

    scale, shift: a number or one per latent channel (SD 1.x: 0.18215 and 0; SDXL: 0.13025; SD 3: 1.5305 and 0.0609).
    precision: what the autoencoder computes in: fp32, bf16 or fp16. It stays in evaluation mode and outside autocast.
    SDXL's overflows in float16: an image that does so is computed once more in float32 (and a warning printed once).
    """

    bounded = False

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        scale: float | Sequence[float] = 1.0,
        shift: float | Sequence[float] = 0.0,
        precision: str = "fp32",
    ):
        super().__init__()
        if precision not in DTYPES:
            raise ConfigError(f"codec.precision={precision} is not known; use {', '.join(DTYPES)}")
        # Channels last: 0.7 of the time of decoding on a CPU, and what a GPU's half-precision convolutions want.
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.autoencoder.to(DTYPES[precision], memory_format=torch.channels_last)
        self.channels = autoencoder.latent_channels
        self.downsample = autoencoder.downsample
        self.overflowed = False  # said once
        self.register_buffer("scale", self._per_channel("scale", scale))  # C 1 1
        self.register_buffer("shift", self._per_channel("shift", shift))  # C 1 1

    @classmethod
    @torch.no_grad()
    def measured(
        cls, autoencoder: AutoencoderKL, batches: Sequence[Tensor], *, per_channel: bool = True
    ) -> "LatentCodec":
        """Scale and shift that give the latents of these images mean 0 and standard deviation 1.

        batches: (B 3 H W) uint8, each of its own size.
        """
        codec = cls(autoencoder)
        parts = [codec.moments(chunk) for batch in batches for chunk in batch.split(64)]  # B 2C h w
        mean, logvar = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1).double().chunk(2)  # C N
        axes = (1,) if per_channel else (0, 1)
        shift = mean.mean(axes, keepdim=True)
        variance = (mean - shift).square().mean(axes) + logvar.exp().mean(axes)  # law of total variance
        codec.scale.copy_(variance.rsqrt().view(-1, 1, 1))
        codec.shift.copy_(shift.view(-1, 1, 1))
        return codec

    @torch.no_grad()
    def encode(self, images: Tensor, generator: "torch.Generator | Noise | None" = None) -> Tensor:
        """(B 3 H W) uint8 -> (B C H/f W/f): a draw from the posterior with a generator, its mode without."""
        return self.draw(self.moments(images), generator)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and clamped log-variance of the posterior before scaling: (B 3 H W) uint8 -> (B 2C H/f W/f) float32."""
        return self._finite(lambda vae, x: torch.cat(vae.encode(x), dim=1), to_float(images.to(self.scale.device)))

    def draw(self, moments: Tensor, generator: "torch.Generator | Noise | None" = None) -> Tensor:
        """Scaled latents of `moments` (B 2C h w) -> (B C h w): a draw with a generator, the mode without."""
        z, logvar = moments.float().chunk(2, dim=1)
        if generator is not None:
            z = sample_posterior(z, logvar, randn_like(z, generator))
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """(B C H/f W/f) -> (B 3 H W) uint8. Raises NonFiniteError for what is not a number: no black images."""
        if not x.isfinite().all():
            raise NonFiniteError("the latents to decode are not finite; the network that made them went wrong")
        return to_uint8(self._finite(lambda vae, z: vae.decode(z), x.to(self.scale) / self.scale + self.shift))

    def train(self, mode: bool = True) -> "LatentCodec":
        """Stays in evaluation mode whatever its parent does."""
        return super().train(False)

    def _finite(self, compute: Callable[[AutoencoderKL, Tensor], Tensor], x: Tensor) -> Tensor:
        """compute(autoencoder, x) in float32 and NCHW; images that overflow the autoencoder's dtype computed again."""
        dtype = next(self.autoencoder.parameters()).dtype
        with torch.autocast(x.device.type, enabled=False):
            y = compute(self.autoencoder, x.to(dtype)).float().contiguous()
            if not (finite := y.isfinite().flatten(1).all(1)).all() and dtype == torch.float16:
                if not self.overflowed:
                    print("warning: the autoencoder overflows in float16; such images take float32", file=sys.stderr)
                    self.overflowed = True
                y[~finite] = compute(copy.deepcopy(self.autoencoder).float(), x[~finite])
        check_finite(y, "what the autoencoder gives is not finite", {"autoencoder": self.autoencoder}, torch.float32)
        return y

    def _per_channel(self, name: str, value: float | Sequence[float]) -> Tensor:
        values = torch.tensor(value, dtype=torch.float32).flatten()
        if len(values) not in (1, self.channels):
            raise ConfigError(
                f"codec.{name} has {len(values)} numbers; expected one, or one per latent channel ({self.channels})"
            )
        return values.expand(self.channels).reshape(-1, 1, 1).clone()
