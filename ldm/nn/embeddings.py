"""Numbers, places and patches to vectors: the sinusoid of time, the table of positions, the ends of a transformer."""

import math

import torch
from torch import Tensor, nn

from ldm.nn.linear import linear
from ldm.utils.errors import ConfigError


def sinusoid(t: Tensor, dim: int, *, max_period: float = 10_000.0, freq_shift: int = 0) -> Tensor:
    """cos(t f_i) for all i, then sin(t f_i), f_i = max_period^(-i / (half - freq_shift)): (...) -> (... dim) float32.

    Source: §3.5 of arXiv:1706.03762, as diffusion networks compute it: cos first, exponent over half = dim / 2.
    freq_shift=1 is what that paper's first implementation did, and a few networks still do.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(max_period) * index / (half - freq_shift))  # half, rounded as published: t f is large
    angles = t.float()[..., None] * freqs  # ... half
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(
    grid: tuple[int, int], dim: int, *, base: int, interpolation: float = 1.0, device: torch.device | None = None
) -> Tensor:
    """Fixed sin-cos positions of h x w tokens, row by row: -> (h*w, dim) float32. The table of arXiv:2111.06377.

    The first half of the channels is the column's, the second the row's. Token i of n along a side is at place
    i base / (n interpolation): every grid covers what base x base does (`interpolation`: §2.3 of arXiv:2403.04692).
    """
    height, width = grid
    columns, rows = (_axis(n, dim // 2, base, interpolation, device) for n in (width, height))
    columns, rows = columns.expand(height, -1, -1), rows[:, None].expand(-1, width, -1)  # h w dim/2
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def _axis(n: int, dim: int, base: int, interpolation: float, device: torch.device | None) -> Tensor:
    """sin, then cos, of n places: (n, dim) float32, computed as published: places in float32, angles in float64."""
    precise = torch.float32 if device is not None and device.type == "mps" else torch.float64  # which has no float64
    places = torch.arange(n, dtype=torch.float32, device=device) / (n / base) / interpolation
    index = torch.arange(dim // 2, dtype=precise, device=device)
    angles = places.to(precise)[:, None] * 10_000.0 ** (-index / (dim // 2))  # n dim/2
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


class PatchEmbed(nn.Conv2d):
    """Square patches through one Linear, row by row: (B C H W) -> (B N D). ConfigError for an x that does not split.

    The weight is kept in the shape of the strided convolution that files hold.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        p = self.kernel_size[0]
        if x.shape[1] != self.in_channels:
            raise ConfigError(f"x has {x.shape[1]} channels, but the network was built with {self.in_channels}")
        if x.shape[2] % p or x.shape[3] % p:
            raise ConfigError(f"x is {x.shape[2]}x{x.shape[3]}, which does not split into patches of patch_size={p}")
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B C h p w p
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # B N C*p*p
        return linear(patches, self.weight.flatten(1), self.bias)


def unpatchify(x: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Tokens back to pixels: (B h*w p*p*C) -> (B C H W); a token's channels are in the order p p C."""
    x = x.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)  # B h w p p C
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # B C H W
