"""Numbers to vectors: the sinusoid of time, of noise levels and of sizes."""

import math

import torch
from torch import Tensor


def sinusoid(t: Tensor, dim: int, *, max_period: float = 10_000.0) -> Tensor:
    """cos(t f_i) for all i, then sin(t f_i), f_i = max_period^(-i / half), half = dim / 2: (...) -> (... dim) float32.

    Source: §3.5 of arXiv:1706.03762, as diffusion networks compute it: cos first, exponent over half, not half - 1.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(max_period) * index / half)  # half, rounded as published: t * f reaches 1000 rad
    angles = t.float()[..., None] * freqs  # ... half
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
