"""The diffusion transformer: arXiv:2212.09748 (DiT); arXiv:2401.08740 (SiT) trains the same network on other paths.

    x_t -> patches -> Linear + positions -> block -> block -> ... -> norm, Linear -> unpatchify -> noise, variance
                                              |        |
    t, class, text -> embed ------------------+--------+            Fig. 3; the four kinds of block are Fig. 5

| config | depth | width | heads | parameters at /2 | GMAC of 32x32 latents at /2, /4, /8 (the paper's "Gflops") |
| ------ | ----- | ----- | ----- | ---------------- | ---------------------------------------------------------- |
| dit_s  | 12    | 384   | 6     |       32,865,056 |   6.06,  1.41, 0.36                                        |
| dit_b  | 12    | 768   | 12    |      130,315,808 |  23.01,  5.57, 1.42                                        |
| dit_l  | 24    | 1024  | 16    |      457,840,672 |  80.70, 19.70, 5.01                                        |
| dit_xl | 28    | 1152  | 16    |      674,834,720 | 118.62, 29.04, 7.39                                        |

Names of conditions and shapes: B batch, C H W, p patch, N = H W / p^2 tokens, L text length, D width.
"""

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.nn.attention import CrossAttention, SelfAttention
from ldm.nn.checks import check_condition, check_context, check_labels, check_residuals, check_sizes
from ldm.nn.convolution import zero_init
from ldm.nn.embeddings import PatchEmbed, position_table, sinusoid, unpatchify
from ldm.nn.feedforward import MLP
from ldm.nn.linear import Linear
from ldm.nn.modulation import Modulation, add_gated, layer_norm, modulate
from ldm.utils.errors import ConfigError

TIME_DIM = 256  # width of the sinusoid of t
gelu = partial(F.gelu, approximate="tanh")


# --- Conditions (§3.2) ------------------------------------------------------------------------------------------------


class Conditions(NamedTuple):
    """Time, class and text as vectors of the transformer's width, in the two forms that the blocks take."""

    time: Tensor  # B D
    label: Tensor | None  # B D
    text: Tensor | None  # B L D
    mask: Tensor | None  # B L, True = keep

    def vector(self) -> Tensor:
        """Their sum (B D). Deviation: a text, which the paper has not, enters as the mean of its tokens."""
        c = self.time if self.label is None else self.time + self.label
        if self.text is None:
            return c
        if self.mask is None:
            return c + self.text.mean(1)
        keep = self.mask[..., None].to(c.dtype)  # B L 1
        return c + (self.text * keep).sum(1) / keep.sum(1)

    def tokens(self) -> tuple[Tensor, Tensor | None]:
        """A sequence (B K D) of all, and its mask (B K)."""
        single = [self.time[:, None]] + ([] if self.label is None else [self.label[:, None]])
        tokens = torch.cat([*single, *([] if self.text is None else [self.text])], dim=1)
        return tokens, None if self.mask is None else F.pad(self.mask, (len(single), 0), value=True)


class ConditionEmbedding(nn.Module):
    """t (B), labels (B) and context (B L C) -> Conditions."""

    def __init__(self, dim: int, num_classes: int | None, context_dim: int | None, freq_shift: int):
        super().__init__()
        self.num_classes, self.context_dim, self.freq_shift = num_classes, context_dim, freq_shift
        self.time_mlp = MLP(TIME_DIM, dim, dim)
        self.label_embedding = nn.Embedding(num_classes + 1, dim) if num_classes else None  # the last: no class
        self.text_proj = Linear(context_dim, dim) if context_dim else None

    def forward(
        self, t: Tensor, labels: Tensor | None, context: Tensor | None, mask: Tensor | None, dtype: torch.dtype
    ) -> Conditions:
        check_condition("DiT", "labels", labels, self.num_classes, "num_classes")
        check_context("DiT", context, mask, self.context_dim)
        time = self.time_mlp(sinusoid(t, TIME_DIM, freq_shift=self.freq_shift).to(dtype))
        label = text = None
        if labels is not None:
            check_labels(labels, self.num_classes)
            label = self.label_embedding(labels)
        if context is not None:
            text = self.text_proj(context.to(dtype))
        return Conditions(time, label, text, mask)


# --- The four blocks of Fig. 5: begin(x, conditions) -> x and what every block is then given --------------------------


class AdaLNZeroBlock(nn.Module):
    """Norms shifted and scaled, branches gated, all by the conditions; the gates start at zero: B N D, B D -> B N D."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = SelfAttention(dim, num_heads, dim // num_heads, bias=True)
        self.norm2 = layer_norm(dim, eps)
        self.mlp = MLP(dim, 4 * dim, dim, activation=gelu)
        self.modulation = Modulation(dim, 6)

    @staticmethod
    def begin(x: Tensor, conditions: Conditions) -> tuple[Tensor, tuple[Tensor]]:
        return x, (F.silu(conditions.vector()),)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)  # B D
        x = add_gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        return add_gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class AdaLNBlock(nn.Module):
    """Norms shifted and scaled by the conditions: B N D, B D -> B N D."""

    begin = AdaLNZeroBlock.begin

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = SelfAttention(dim, num_heads, dim // num_heads, bias=True)
        self.norm2 = layer_norm(dim, eps)
        self.mlp = MLP(dim, 4 * dim, dim, activation=gelu)
        self.modulation = Modulation(dim, 4)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = self.modulation(c)  # B D
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))


class CrossAttentionBlock(nn.Module):
    """Self-attention, attention to the conditions as K tokens, MLP: B N D, B K D -> B N D."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, num_heads, dim // num_heads, bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.cross_attn = CrossAttention(dim, dim, num_heads, dim // num_heads, bias=True)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, 4 * dim, dim, activation=gelu)

    @staticmethod
    def begin(x: Tensor, conditions: Conditions) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
        return x, conditions.tokens()

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), tokens, mask)
        return x + self.mlp(self.norm3(x))


class InContextBlock(nn.Module):
    """A ViT block: the conditions are K more tokens, which are cut off after the last block: B N+K D -> B N+K D."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, num_heads, dim // num_heads, bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, 4 * dim, dim, activation=gelu)

    @staticmethod
    def begin(x: Tensor, conditions: Conditions) -> tuple[Tensor, tuple[Tensor | None]]:
        tokens, mask = conditions.tokens()
        mask = None if mask is None else F.pad(mask, (x.shape[1], 0), value=True)  # B N+K
        return torch.cat([x, tokens], dim=1), (mask,)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


# --- The last layer: LayerNorm, then Linear, B N D -> B N p*p*C -------------------------------------------------------


class AdaLNFinalLayer(nn.Module):
    """The norm shifted and scaled by the conditions."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm = layer_norm(dim)
        self.modulation = Modulation(dim, 2)
        self.linear = Linear(dim, out_dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)  # B D
        return self.linear(modulate(self.norm(x), shift, scale))


class FinalLayer(nn.Module):
    """An ordinary norm; the conditions have had their say."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = Linear(dim, out_dim)

    def forward(self, x: Tensor, *_: Tensor | None) -> Tensor:
        return self.linear(self.norm(x))


CONDITIONING = {  # Fig. 5
    "in_context": (InContextBlock, FinalLayer),
    "cross_attention": (CrossAttentionBlock, FinalLayer),
    "adaln": (AdaLNBlock, AdaLNFinalLayer),
    "adaln_zero": (AdaLNZeroBlock, AdaLNFinalLayer),
}


# --- The network (Fig. 3) ---------------------------------------------------------------------------------------------


class DiT(nn.Module):
    """x (B C H W) at time t (B), with a class, a text, both or neither -> (B C H W), or (B 2C H W) with a variance.

    Errors: ConfigError where numbers do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        sample_size: int = 32,  # side of the latents whose positions are 0, 1, 2, ...; other sizes are fitted into them
        patch_size: int = 2,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        conditioning: str = "adaln_zero",  # in_context, cross_attention, adaln
        num_classes: int | None = None,  # of `labels`; the null class is one more row
        context_dim: int | None = None,  # D of `context`
        learned_variance: bool = True,  # twice the channels: the variance of arXiv:2102.09672 after the prediction
        freq_shift: int = 0,  # 1 and mlp_eps=1e-5: as diffusers' DiT computes, with the same weights
        mlp_eps: float = 1e-6,  # of the norm before the MLP
        checkpointing: bool = False,  # recompute each block in the backward pass: less memory, a third more time
    ):
        super().__init__()
        check_sizes(sample_size, patch_size, width, num_heads)
        if conditioning not in CONDITIONING:
            raise ConfigError(f"conditioning={conditioning!r} is unknown; expected one of: {', '.join(CONDITIONING)}")
        self.in_channels, self.sample_size, self.patch_size = in_channels, sample_size, patch_size
        self.conditioning, self.learned_variance = conditioning, learned_variance
        self.mlp_eps, self.checkpointing = mlp_eps, checkpointing
        block, final = CONDITIONING[conditioning]
        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.embed = ConditionEmbedding(width, num_classes, context_dim, freq_shift)
        self.begin = block.begin
        self.blocks = nn.ModuleList(block(width, num_heads, mlp_eps) for _ in range(depth))
        self.final = final(width, patch_size**2 * in_channels * (2 if learned_variance else 1))
        self.init_weights()

    def init_weights(self) -> None:
        """As published: the first prediction is zero, and under adaLN-Zero every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))  # as the Linear that it is: a view
        nn.init.zeros_(self.patch_embed.bias)
        for table in (self.embed.time_mlp.fc1, self.embed.time_mlp.fc2, self.embed.label_embedding):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaLNZeroBlock | AdaLNFinalLayer):
                zero_init(module.modulation)
        zero_init(self.final.linear)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        labels: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """residuals: added to what the first blocks give, one each (B N D).

        Errors: ConfigError for a condition that the network was not built for, or an x that does not fit.
        """
        check_residuals("DiT", residuals, len(self.blocks))
        p, recompute = self.patch_size, self.checkpointing and torch.is_grad_enabled()
        grid = x.shape[2] // p, x.shape[3] // p
        h, c, _ = self.enter(x, t, labels=labels, context=context, context_mask=context_mask)
        for block, residual in zip_longest(self.blocks, residuals):
            h = checkpoint(block, h, *c, use_reentrant=False) if recompute else block(h, *c)
            h = h if residual is None else h + residual
        return unpatchify(self.final(h[:, : grid[0] * grid[1]], *c), grid, p)  # B C H W

    def enter(
        self,
        x: Tensor,
        t: Tensor,
        *,
        labels: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple, tuple]:
        """What the first block reads (B N D), what every block is given besides, and what the last layer is."""
        grid = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        tokens = self.patch_embed(x)  # B N D
        base = self.sample_size // self.patch_size
        positions = position_table(grid, tokens.shape[2], base=base, device=x.device)  # N D
        given = self.embed(t, labels, context, context_mask, x.dtype)
        h, c = self.begin((tokens + positions).to(x.dtype), given)  # the dtype is x's also under autocast
        return h, c, c
