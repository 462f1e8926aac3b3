"""The position-wise layers of transformers and of embeddings."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.linear import Linear


class MLP(nn.Module):
    """Linear, activation, Linear: (... D) -> (... out_dim)."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int, *, activation: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.activation = activation
        self.fc2 = Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class GEGLU(nn.Module):
    """value * GELU(gate), both from one Linear, then back to D: (... D) -> (... D). Eq. (6), arXiv:2002.05202."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.proj = Linear(dim, 2 * hidden_dim)
        self.out = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # ... hidden_dim
        h = F.gelu(gate)
        return self.out(h * value if h.requires_grad else h.mul_(value))  # a new tensor only where autograd keeps h
