"""Adaptive layer norm: shift, scale and gate vectors that come from the conditions (§3.2 of arXiv:2212.09748)."""

import torch
from torch import Tensor, nn

from ldm.nn.linear import Linear


def layer_norm(dim: int, eps: float = 1e-6) -> nn.LayerNorm:
    """The norm of diffusion transformers: its factor and summand are the conditions', not its own."""
    return nn.LayerNorm(dim, eps=eps, elementwise_affine=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift in one pass: (B N D), (B D), (B D) -> (B N D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def add_gated(x: Tensor, gate: Tensor, h: Tensor) -> Tensor:
    """x + gate h in one pass: (B N D), (B D), (B N D) -> (B N D)."""
    return torch.addcmul(x, gate[:, None], h)


class Modulation(nn.Module):
    """`count` vectors from one Linear of c, which has been through SiLU: (B D) -> count x (B D)."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.count = count
        self.linear = Linear(dim, count * dim)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(c).chunk(self.count, dim=-1)
