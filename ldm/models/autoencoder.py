"""The KL-regularised convolutional autoencoder of latent diffusion: arXiv:2112.10752, section 3.1 and appendix G.

    x -- conv -- [ResBlock x n, Downsample] per level -- Middle -- GN SiLU conv -- quant -- mean, logvar
    z -- post_quant -- conv -- Middle -- [ResBlock x (n+1), Upsample] per level -- GN SiLU conv -- x

    name            channels  mult       blocks  latent   parameters
    SD 1.x 2.x XL   128       1 2 4 4    2 / 3   4, f8    83,653,863
    SD 3, FLUX      128       1 2 4 4    2 / 3   16, f8   83,819,683 (no quant convolutions)
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import SelfAttention
from ldm.nn.convolution import Downsample, ResBlock, Upsample, group_norm, silu
from ldm.utils.errors import ConfigError

EPS = 1e-6  # of every norm here; the denoising UNet's residual blocks use 1e-5


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, added to the input: (B C H W) -> (B C H W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups, EPS)
        self.attention = SelfAttention(channels, 1, channels, bias=True, out_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # B HW C
        h = self.attention(h).transpose(1, 2)  # B C HW
        return x + h.unflatten(2, x.shape[2:])


class Middle(nn.Sequential):
    """ResBlock, attention (or none), ResBlock at the lowest resolution."""

    def __init__(self, channels: int, attention: bool, groups: int):
        super().__init__()
        self.block1 = ResBlock(channels, channels, groups=groups, eps=EPS)
        self.attention = AttentionBlock(channels, groups) if attention else nn.Identity()
        self.block2 = ResBlock(channels, channels, groups=groups, eps=EPS)


class Level(nn.Module):
    """The residual blocks of one resolution, then the way to the next one.

    Its owner walks through it in one loop: a call of the level would keep the level's input, at full resolution twice
    a block's, for as long as all of its blocks take.
    """

    def __init__(self, widths: Sequence[int], groups: int, resample: nn.Module):
        super().__init__()
        pairs = zip(widths, widths[1:], strict=False)
        self.blocks = nn.Sequential(*(ResBlock(a, b, groups=groups, eps=EPS) for a, b in pairs))
        self.resample = resample

    def __iter__(self) -> Iterator[nn.Module]:
        yield from self.blocks
        yield self.resample


class Encoder(nn.Module):
    """Image to the parameters of the posterior: (B C H W) -> (B 2Z H/f W/f)."""

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int], num_blocks: int, attention, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down = nn.Sequential()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            resample = Downsample(width, asymmetric=True) if i < len(widths) - 1 else nn.Identity()
            self.down.append(Level([before] + [width] * num_blocks, groups, resample))
        self.mid = Middle(widths[-1], attention, groups)
        self.norm_out = group_norm(widths[-1], groups, EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for layer in level:
                h = layer(h)
        h = self.mid(h)
        return self.conv_out(silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents to the image: (B Z H/f W/f) -> (B C H W)."""

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int], num_blocks: int, attention, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], attention, groups)
        self.up = nn.Sequential()  # lowest resolution first
        for i, width in reversed(list(enumerate(widths))):
            before = widths[min(i + 1, len(widths) - 1)]
            resample = Upsample(width) if i > 0 else nn.Identity()
            self.up.append(Level([before] + [width] * num_blocks, groups, resample))
        self.norm_out = group_norm(widths[0], groups, EPS)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in self.up:
            for layer in level:
                h = layer(h)
        return self.conv_out(silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] to a diagonal Gaussian over latents and back; `downsample` pixels per latent on each side.

    Raises ConfigError when `groups` does not divide a width, or an image side is not a multiple of `downsample`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,  # per level of the encoder; the decoder has one more
        latent_channels: int = 4,
        attention: bool = True,  # in the middle; nowhere else
        groups: int = 32,
        quant_conv: bool = True,  # the 1x1 convolutions around the latent
        patch: int = 1,  # pixels that share a position of the first level; more than 1 spares the full resolution
    ):
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        pixels, z = in_channels * patch**2, latent_channels
        self.encoder = Encoder(pixels, 2 * z, widths, num_res_blocks, attention, groups)
        self.decoder = Decoder(z, pixels, widths, num_res_blocks + 1, attention, groups)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z, z, 1) if quant_conv else nn.Identity()
        self.latent_channels = latent_channels
        self.patch = patch
        self.downsample = patch * 2 ** (len(widths) - 1)
        # Deviation: the posterior starts narrow (std 0.05, not 1), so the decoder sees the image from the first step.
        narrow_(self.quant_conv if quant_conv else self.encoder.conv_out, z)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x): (B C H W) -> 2 x (B Z H/f W/f)."""
        height, width = x.shape[2:]
        if height % self.downsample or width % self.downsample:
            raise ConfigError(
                f"image size {height}x{width} is not divisible by the autoencoder's down-sampling of "
                f"{self.downsample}; crop or resize the images to a multiple of {self.downsample}"
            )
        h = self.encoder(F.pixel_unshuffle(x, self.patch))
        mean, logvar = self.quant_conv(h).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Latents to an image of about [-1, 1]: (B Z H/f W/f) -> (B C H W)."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.patch)


@torch.no_grad()
def narrow_(layer: nn.Conv2d, latent_channels: int, logvar: float = -6.0) -> None:
    """Start the log-variances, the second half of the layer's output, at a constant."""
    layer.bias[latent_channels:].fill_(logvar)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp logvar) || N(0, 1)) in nats, summed over the latent: (B ...) -> (B,). arXiv:1312.6114, app. B."""
    nats = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
    return nats.flatten(1).sum(dim=1)


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Reparametrised draw from the posterior."""
    return mean + torch.exp(0.5 * logvar) * noise
