"""The convolutional leaves of the UNet and the autoencoder: residual block, down- and up-sampling (B C H W).

Eager speed: what a convolution or a norm returns belongs to nobody else, so additions and, without gradients, the
SiLU write into it. Autograd allows it: a convolution does not save its output, nor does a norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.linear import linear, onednn_takes, use_onednn
from ldm.utils.errors import ConfigError


def zero_init(module: nn.Module) -> nn.Module:
    """Set every parameter to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int, groups: int = 32, eps: float = 1e-5) -> nn.GroupNorm:
    """GroupNorm, or a ConfigError that says which number does not fit."""
    if channels % groups:
        raise ConfigError(f"{channels} channels do not split into the {groups} groups of GroupNorm; use a multiple")
    return nn.GroupNorm(groups, channels, eps=eps)


def silu(x: Tensor) -> Tensor:
    """SiLU of a fresh tensor, in place when no gradient is wanted (in place with one, autograd would clone it)."""
    return F.silu(x, inplace=not x.requires_grad)


class Conv2d(nn.Conv2d):
    """nn.Conv2d of stride 1, computed as a product with the gathered patches where torch is slow on a CPU.

    There are two such cases: weights larger than the cache on few positions, as at the bottom of Stable Diffusion's
    UNet, where oneDNN spends up to four times the convolution on laying the weights out anew at every call; and 1x1
    kernels in float32, which torch hands to MKL.
    """

    MANY_WEIGHTS = 1 << 23  # 32 MB in float32
    FEW_POSITIONS = 1 << 8  # of an image: a sample must not depend on its batch

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_product(x):
            return super().forward(x)
        pointwise = self.kernel_size == (1, 1)
        patches = x.flatten(2) if pointwise else F.unfold(x, self.kernel_size, padding=self.padding)  # B C*k*k N
        weight = self.weight.flatten(1)  # C' C*k*k
        out = torch.stack([linear(weight, columns.t()) for columns in patches])  # B C' N
        return out.add_(self.bias[:, None]).unflatten(2, x.shape[2:])

    def is_product(self, x: Tensor) -> bool:
        if not (x.is_contiguous() and self.weight.is_contiguous() and use_onednn(x[0], self.weight)):
            return False
        if self.kernel_size == (1, 1):
            return x.dtype == torch.float32
        return self.weight.numel() >= self.MANY_WEIGHTS and x[0, 0].numel() <= self.FEW_POSITIONS


STRIP = 32  # rows
MANY_VALUES = 1 << 24  # of an image: 256 channels of 256 x 256; below it the loop is not worth its code


def norm_silu_conv(norm: nn.GroupNorm, conv: Conv2d, x: Tensor) -> Tensor:
    """conv(silu(norm(x))) of a 3x3 convolution: (B C H W) -> (B C' H W).

    Without gradients a large image passes in strips on a CPU, so that its normalised copy never exists as a whole:
    the peak of a VAE's memory. That is exact but for rounding: a strip sees one row of each neighbour, and `norm`
    the statistics of the whole image.
    """
    if torch.is_grad_enabled() or x[0].numel() < MANY_VALUES or not onednn_takes(x):
        return conv(silu(norm(x)))
    scale, shift = affine(norm, x)
    strips = []
    for top in range(0, x.shape[2], STRIP):
        above = min(top, 1)
        strip = torch.addcmul(shift, x[:, :, top - above : top + STRIP + 1], scale)
        h = conv(silu(strip).to(x.dtype))
        strips.append(h[:, :, above : above + STRIP])
    return torch.cat(strips, dim=2)


def affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `norm` does to x (B C H W), as a factor and a summand per channel: 2 x (B C 1 1) float32."""

    def group_mean(values) -> Tensor:
        per_channel = sum(strip.sum((2, 3)) for strip in values) / x[0, 0].numel()  # B C
        per_group = per_channel.unflatten(1, (norm.num_groups, -1)).mean(2)  # B G
        return per_group.repeat_interleave(x.shape[1] // norm.num_groups, dim=1)[:, :, None, None]

    mean = group_mean(strip.float() for strip in x.split(STRIP, dim=2))
    variance = group_mean((strip - mean).square_() for strip in x.split(STRIP, dim=2))
    scale = norm.weight[:, None, None] * (variance + norm.eps).rsqrt()
    return scale, norm.bias[:, None, None] - mean * scale


class ResBlock(nn.Module):
    """GN-SiLU-conv, + Linear(SiLU(emb)), GN-SiLU-dropout-conv, added to the input: (B C H W), (B E) -> (B C' H W).

    With `emb_dim` (a denoiser's block) the last convolution starts at zero: arXiv:2006.11239, appendix B.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int | None = None,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb_proj = nn.Linear(emb_dim, out_channels) if emb_dim else None
        self.norm2 = group_norm(out_channels, groups, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if emb_dim:
            zero_init(self.conv2)
        self.skip = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = norm_silu_conv(self.norm1, self.conv1, x)  # B C' H W
        if self.emb_proj is not None:
            h += self.emb_proj(F.silu(emb))[:, :, None, None]
        h = silu(self.norm2(h))  # a step of its own: what the first convolution gave ends here
        h = self.conv2(self.dropout(h))
        h += self.skip(x)
        return h


class Downsample(nn.Module):
    """3x3 convolution of stride 2: (B C H W) -> (B C H/2 W/2).

    The UNet pads every side by one; the autoencoder pads `asymmetric`ally, right and bottom only.
    """

    def __init__(self, channels: int, *, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest neighbour to twice the sides, or to `size` (an odd skip's), then 3x3: (B C H W) -> (B C 2H 2W).

    Twice the sides is also one transposed convolution, whose 4x4 kernel sums the taps that meet the same input pixel:
    4/9 of the arithmetic and no enlarged copy. It is used where it was measured to pay: 1.7x on a CPU.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = x.shape[2:]
        if size is not None and tuple(size) != (2 * height, 2 * width):
            return self.conv(F.interpolate(x, tuple(size), mode="nearest"))
        # Summing the kernel costs as much as convolving some hundred positions. A sample must not depend on its batch,
        # so without gradients only an image's own positions count.
        positions = height * width * (len(x) if x.requires_grad else 1)
        if positions < 1024 or x.device.type != "cpu":
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        kernel = _fold(_fold(self.conv.weight.float(), 2), 3).transpose(0, 1)  # C C 4 4
        return F.conv_transpose2d(x, kernel.to(self.conv.weight), self.conv.bias, stride=2, padding=1)


def _fold(kernel: Tensor, axis: int) -> Tensor:
    """Three taps on a doubled axis as four taps of a transposed convolution."""
    a, b, c = kernel.unbind(axis)
    return torch.stack([c, b + c, a + b, a], axis)
