"""What the U-Nets of Imagen (arXiv:2205.11487) and of DeepFloyd IF share: how they take text and a low resolution.

t, aug_level, context -> Embedding -> emb (B E), for every ResBlock, and text (B L T), for every attention
x (B C H W), text     -> TextAttention: pixels attend to the text and to each other in one softmax
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import attention
from ldm.nn.checks import is_readable
from ldm.nn.convolution import group_norm, zero_init
from ldm.nn.embeddings import sinusoid
from ldm.nn.feedforward import MLP
from ldm.nn.linear import Linear
from ldm.utils.errors import ConfigError

Activation = Callable[[Tensor], Tensor]
AUG_STEPS = 1000  # an aug_level is embedded as the step of 1000 that has its noise


class AttentionPool(nn.Module):
    """One vector of all tokens: their mean plus a learned position attends to itself and to them: (B L D) -> (B D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"pool_heads={num_heads} does not divide the text's width, context_dim={dim}")
        self.num_heads = num_heads
        self.position = nn.Parameter(torch.randn(1, dim) / dim**0.5)
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        query = mean_pool(text, mask)[:, None] + self.position  # B 1 D
        k, v = self.kv(torch.cat([query, text], dim=1)).chunk(2, dim=-1)  # B 1+L D
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        return attention(self.q(query), k, v, self.num_heads, mask)[:, 0]


class MeanPool(nn.Module):
    """The mean of the tokens: (B L D) -> (B D). The arm that App. D.3.1 of arXiv:2205.11487 finds the worst."""

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        return mean_pool(text, mask)


def mean_pool(text: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return text.mean(1)
    keep = mask[..., None].to(text.dtype)  # B L 1
    return (text * keep).sum(1) / keep.sum(1)


class TextPooling(nn.Module):
    """The pooled text as a summand of the time embedding: norm, pool, Linear, norm: (B L D) -> (B E)."""

    def __init__(self, dim: int, emb_dim: int, pool: nn.Module):
        super().__init__()
        self.norm_in = nn.LayerNorm(dim)
        self.pool = pool
        self.proj = Linear(dim, emb_dim)
        self.norm_out = nn.LayerNorm(emb_dim)

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        return self.norm_out(self.proj(self.pool(self.norm_in(text), mask)))


TEXT = {  # App. D.3.1: how the text enters -> how it is pooled, and whether attention reads its tokens
    "mean_pool": (lambda dim, num_heads: MeanPool(), False),
    "attention_pool": (AttentionPool, False),
    "cross_attention": (AttentionPool, True),
}


class Embedding(nn.Module):
    """t (B), aug_level (B) and context (B L D) -> emb (B E), after its activation, and the text (B L T) of attention.

    `text_width` is T, or None where attention reads no text. Errors: ConfigError for numbers that do not fit.
    """

    def __init__(
        self,
        channels: int,
        emb_dim: int,
        *,
        context_dim: int | None,
        text_dim: int | None = None,  # T; None: the context as it is
        text: str = "cross_attention",
        pool_heads: int = 64,
        super_resolution: bool = False,
        activation: Activation = F.silu,
    ):
        super().__init__()
        if text not in TEXT:
            raise ConfigError(f"text={text!r} is unknown; expected one of: {', '.join(TEXT)}")
        pool, reads = TEXT[text]
        self.channels, self.emb_dim, self.activation = channels, emb_dim, activation
        self.context_dim, self.text, self.pool_heads = context_dim, text, pool_heads
        self.text_width = (text_dim or context_dim) if context_dim and reads else None
        self.time_mlp = MLP(channels, emb_dim, emb_dim, activation=activation)
        self.aug_mlp = MLP(channels, emb_dim, emb_dim, activation=activation) if super_resolution else None
        self.pooling = TextPooling(context_dim, emb_dim, pool(context_dim, pool_heads)) if context_dim else None
        self.text_proj = Linear(context_dim, text_dim) if self.text_width and text_dim else None

    def forward(
        self, t: Tensor, aug_level: Tensor | None, context: Tensor | None, mask: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        emb = self.time_mlp(sinusoid(t, self.channels).to(dtype))  # B E
        if self.aug_mlp is not None:
            emb = emb + self.aug_mlp(sinusoid(AUG_STEPS * aug_level.float(), self.channels).to(dtype))
        if context is None:
            return self.activation(emb), None
        context = context.to(dtype)
        emb = emb + self.pooling(context, mask)
        return self.activation(emb), context if self.text_proj is None else self.text_proj(context)


class TokenGroupNorm(nn.GroupNorm):
    """GroupNorm over channels and tokens, (B L D) -> (B L D), so that the length of the padding has a say: IF's."""

    def __init__(self, dim: int):
        super().__init__(32, dim)

    def forward(self, text: Tensor) -> Tensor:
        return super().forward(text.transpose(1, 2)).transpose(1, 2)


TEXT_NORMS = {"layer": nn.LayerNorm, "group": TokenGroupNorm}


class TextAttention(nn.Module):
    """Pixels attend to text and, with `self_attention`, to each other: (B C H W), (B L T) -> (B C H W), a residual.

    Keys and values of both are concatenated, the text's first: App. D.3.1 of arXiv:2205.11487. Rows of `qkv`: all heads
    of q, then k, then v.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        head_dim: int,
        *,
        text_dim: int | None,
        self_attention: bool = True,
        groups: int = 32,
        text_norm: str = "layer",
    ):
        super().__init__()
        if not (text_dim or self_attention):
            raise ConfigError("self_attention=False leaves nothing to attend to without a text: give it a context_dim")
        if text_norm not in TEXT_NORMS:
            raise ConfigError(f"text_norm={text_norm!r} is unknown; expected one of: {', '.join(TEXT_NORMS)}")
        self.num_heads, self.head_dim, self.self_attention = num_heads, head_dim, self_attention
        width = num_heads * head_dim
        self.norm = group_norm(channels, groups)
        self.qkv = Linear(channels, 3 * width if self_attention else width)
        self.text_norm = TEXT_NORMS[text_norm](text_dim) if text_dim else None
        self.text_kv = Linear(text_dim, 2 * width) if text_dim else None
        self.out = zero_init(Linear(width, channels))

    def forward(self, x: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # B N C
        q, *own = self.qkv(h).split(self.num_heads * self.head_dim, dim=-1)  # B N (H d); own: k and v, or nothing
        if self.text_kv is not None:
            of_text = self.text_kv(self.text_norm(text)).chunk(2, dim=-1)  # B L (H d)
            own = [torch.cat(pair, dim=1) for pair in zip(of_text, own, strict=True)] if own else of_text  # B L+N (H d)
        k, v = own
        if mask is not None and self.text_kv is not None:
            mask = F.pad(mask, (0, k.shape[1] - mask.shape[1]), value=True)  # B L+N
        else:
            mask = None
        h = self.out(attention(q, k, v, self.num_heads, mask))  # B N C
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


def check_inputs(
    network: str,
    x: Tensor,
    channels: int,
    divisor: int,
    *,
    low_res: Tensor | None,
    aug_level: Tensor | None,
    super_resolution: bool,
) -> None:
    """ConfigError unless x has `channels` and sides that `divisor` divides, and the rest is there just when wanted."""
    if x.shape[1] != channels:
        raise ConfigError(f"x has {x.shape[1]} channels, but the {network} was built with in_channels={channels}")
    if x.shape[2] % divisor or x.shape[3] % divisor:
        raise ConfigError(f"x is {x.shape[2]}x{x.shape[3]}, but this {network} needs sides that {divisor} divides")
    for name, value in (("low_res", low_res), ("aug_level", aug_level)):
        if super_resolution and value is None:
            raise ConfigError(f"the {network} was built with super_resolution=True but got no `{name}`: pass it")
        if value is not None and not super_resolution:
            raise ConfigError(f"the {network} got `{name}`, but it was built with super_resolution=False: drop it")
    if super_resolution and low_res.shape != x.shape:
        raise ConfigError(f"`low_res` is {tuple(low_res.shape)}, expected {tuple(x.shape)} as x: enlarge it first")
    if super_resolution and is_readable(aug_level) and not ((aug_level >= 0) & (aug_level <= 1)).all():
        raise ConfigError(f"`aug_level` is {aug_level.tolist()}, expected numbers from 0 (no noise) to 1 (only noise)")
