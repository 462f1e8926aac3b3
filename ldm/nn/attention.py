"""Multi-head attention for the whole project: one `scaled_dot_product_attention`, two modules with fused projections.

A boolean mask keeps what is True; one of numbers is added to the scores. An image whose mask keeps nothing gets zeros,
not NaN (torch >= 2.5).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.blockwise import BlockAttention, blockwise_is_faster
from ldm.nn.linear import Linear


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v per head, Eq. (1) of arXiv:1706.03762; scale is 1 / sqrt(d) where not given.

    q: B N (H d); k, v: B L (H d); mask: B L, or anything that broadcasts to B H N L. Returns B N (H d).
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # B H N d
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]  # B 1 1 L
    if mask is None and not causal and scale is None and blockwise_is_faster(q, k):
        out = BlockAttention.apply(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)  # B N (H d), a view: the kernels return it in this order


class QKNorm(nn.Module):
    """RMS norm of queries and keys over each head's width, which bounds the logits (arXiv:2302.05442)."""

    def __init__(self, head_dim: int, eps: float = 1e-6):
        super().__init__()
        self.head_dim = head_dim
        self.q_norm = nn.RMSNorm(head_dim, eps=eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=eps)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        heads = (-1, self.head_dim)
        return self.q_norm(q.unflatten(-1, heads)).flatten(-2), self.k_norm(k.unflatten(-1, heads)).flatten(-2)


class SelfAttention(nn.Module):
    """Tokens attend to each other: (B N D) -> (B N D). Rows of `qkv`: all heads of q, then of k, then of v."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        out_bias: bool = True,
        qk_norm: bool = False,
        scale: float | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self.qkv = Linear(dim, 3 * num_heads * head_dim, bias=bias)
        self.qk_norm = QKNorm(head_dim) if qk_norm else None
        self.out = Linear(num_heads * head_dim, dim, bias=out_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # B N (H d)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        return self.out(attention(q, k, v, self.num_heads, mask, causal, self.scale))


class CrossAttention(nn.Module):
    """Tokens attend to a context: (B N D), (B L C) -> (B N D). Rows of `kv`: all heads of k, then of v."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        out_bias: bool = True,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, num_heads * head_dim, bias=bias)
        self.kv = Linear(context_dim, 2 * num_heads * head_dim, bias=bias)
        self.qk_norm = QKNorm(head_dim) if qk_norm else None
        self.out = Linear(num_heads * head_dim, dim, bias=out_bias)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, (k, v) = self.q(x), self.kv(context).chunk(2, dim=-1)  # B N (H d), B L (H d)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        return self.out(attention(q, k, v, self.num_heads, mask))
