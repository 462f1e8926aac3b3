"""PixArt, DiT for text: arXiv:2310.00426 (alpha), arXiv:2401.05252 (delta), arXiv:2403.04692 (Sigma).

    x_t -> patches -> Linear + positions -> block x 28 -> norm, Linear -> unpatchify -> noise, variance    Fig. 4, alpha
    t, sizes -> embed -> one Linear -> six vectors that all blocks share, to which each adds a table of its own
    text -> MLP -> keys and values of an attention between a block's self-attention and its MLP

| config             | latents | interpolation | sizes | parameters  | GMAC (tokens of text) |
| ------------------ | ------- | ------------- | ----- | ----------- | --------------------- |
| pixart_256         | 32x32   | 1             |       | 610,856,096 |    149.05 (120)       |
| pixart_512         | 64x64   | 1             |       | 610,856,096 |    617.99 (120)       |
| pixart_1024        | 128x128 | 2             | 3     | 611,349,152 |  3,254.8  (120)       |
| pixart_sigma_1024  | 128x128 | 2             |       | 610,856,096 |  3,316.8  (300)       |
| pixart_sigma_2k    | 256x256 | 4             |       | 610,856,096 | 26,182.8  (300)       |

Names of conditions and shapes: B batch, C H W, p patch, h w = H / p, W / p, N = h w tokens, L text length, D width.
"""

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.nn.attention import CrossAttention, SelfAttention, attention
from ldm.nn.checks import check_condition, check_context, check_residuals, check_sizes
from ldm.nn.convolution import zero_init
from ldm.nn.embeddings import PatchEmbed, position_table, sinusoid, unpatchify
from ldm.nn.feedforward import MLP
from ldm.nn.linear import Linear
from ldm.nn.modulation import Modulation, add_gated, layer_norm, modulate
from ldm.utils.errors import ConfigError

SINUSOID_DIM = 256  # of t and of each size number
NUM_SIZES = 3  # height and width in pixels, height / width
gelu = partial(F.gelu, approximate="tanh")


# --- Where shifts, scales and gates come from (§2.3 of alpha) ---------------------------------------------------------


class Table(nn.Module):
    """A block's own vectors, added to those it shares: (B count D), or (B 1 D) for all of them -> count x (B D)."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(count, dim) / dim**0.5)

    def forward(self, shared: Tensor) -> tuple[Tensor, ...]:
        return (self.table + shared).unbind(1)


class AdaLNSingle(nn.Module):
    """One Linear for the whole network: the embedding (B D) -> what blocks (B 6 D) and final layer (B 1 D) share.

    The final layer is given the embedding itself, as published.
    """

    own = Table

    def __init__(self, dim: int):
        super().__init__()
        self.linear = Linear(dim, 6 * dim)

    def forward(self, emb: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(F.silu(emb)).unflatten(1, (6, -1)), emb[:, None]


class AdaLNPerBlock(nn.Module):
    """DiT's adaLN-Zero, a Linear per block, which alpha's ablation starts from: the embedding (B D), twice."""

    own = Modulation

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, emb: Tensor) -> tuple[Tensor, Tensor]:
        return F.silu(emb), F.silu(emb)


MODULATION = {"single": AdaLNSingle, "per_block": AdaLNPerBlock}


class VectorEmbedding(nn.Module):
    """t (B) and the micro-conditions of alpha's 1024 model (B 3), each number through its sinusoid: -> (B D)."""

    def __init__(self, dim: int, num_sizes: int):
        super().__init__()
        if num_sizes not in (0, NUM_SIZES) or num_sizes and dim % NUM_SIZES:
            raise ConfigError(f"num_sizes={num_sizes}, width={dim}: expected 0, or 3 and a width that 3 divides")
        self.num_sizes = num_sizes
        self.time_mlp = MLP(SINUSOID_DIM, dim, dim)
        self.size_mlp = MLP(SINUSOID_DIM, dim // 3, dim // 3) if num_sizes else None  # of height and of width
        self.ratio_mlp = MLP(SINUSOID_DIM, dim // 3, dim // 3) if num_sizes else None

    def forward(self, t: Tensor, size: Tensor | None, dtype: torch.dtype) -> Tensor:
        check_condition("PixArt", "size", size, self.num_sizes, "num_sizes")
        emb = self.time_mlp(sinusoid(t, SINUSOID_DIM).to(dtype))
        if size is None:
            return emb
        sizes = sinusoid(size, SINUSOID_DIM).to(dtype)  # B 3 256
        return emb + torch.cat([self.size_mlp(sizes[:, :2]).flatten(1), self.ratio_mlp(sizes[:, 2])], dim=1)


# --- The block --------------------------------------------------------------------------------------------------------


class KVCompression(nn.Module):
    """R x R neighbours of keys or of values become one, at first their mean: (B N D) -> (B N/R^2 D). §2.4 of Sigma."""

    def __init__(self, dim: int, ratio: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, ratio, stride=ratio, groups=dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        ratio = self.conv.kernel_size[0]
        if min(grid) < ratio:
            raise ConfigError(f"{grid[0]}x{grid[1]} tokens cannot be compressed by kv_ratio={ratio}: use a larger x")
        x = x.transpose(1, 2).unflatten(2, grid)  # B D h w
        return self.norm(self.conv(x).flatten(2).transpose(1, 2))


class ImageAttention(SelfAttention):
    """Self-attention whose keys and values may be compressed: (B N D) -> (B N D)."""

    def __init__(self, dim: int, num_heads: int, kv_ratio: int):
        super().__init__(dim, num_heads, dim // num_heads, bias=True)
        self.compression = KVCompression(dim, kv_ratio) if kv_ratio > 1 else None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # B N D
        if self.compression is not None:
            k, v = self.compression(k, grid), self.compression(v, grid)
        return self.out(attention(q, k, v, self.num_heads))


class PixArtBlock(nn.Module):
    """DiT's block with an attention to the text, neither normed nor gated, in between: (B N D) -> (B N D)."""

    def __init__(self, dim: int, num_heads: int, modulation: nn.Module, kv_ratio: int):
        super().__init__()
        self.modulation = modulation
        self.norm1 = layer_norm(dim)
        self.attn = ImageAttention(dim, num_heads, kv_ratio)
        self.cross_attn = CrossAttention(dim, dim, num_heads, dim // num_heads, bias=True)
        self.norm2 = layer_norm(dim)
        self.mlp = MLP(dim, 4 * dim, dim, activation=gelu)

    def forward(self, x: Tensor, c: Tensor, text: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)  # B D
        x = add_gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), grid))
        x = x + self.cross_attn(x, text, mask)
        return add_gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Norm, modulated, then Linear: (B N D) -> (B N out_dim)."""

    def __init__(self, dim: int, out_dim: int, modulation: nn.Module):
        super().__init__()
        self.modulation = modulation
        self.norm = layer_norm(dim)
        self.linear = Linear(dim, out_dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)  # B D
        return self.linear(modulate(self.norm(x), shift, scale))


# --- The network ------------------------------------------------------------------------------------------------------


class PixArt(nn.Module):
    """x (B C H W) at time t (B) with a text (B L context_dim) -> (B C H W), or (B 2C H W) with a variance.

    Any H and W that the patches divide: positions are fitted into those of sample_size, as multi-aspect training does.
    Errors: ConfigError where numbers do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        context_dim: int,
        *,
        sample_size: int = 64,  # side of the latents it is made for; with patch_size the scale of the positions
        interpolation: float = 1.0,  # of the positions: how much larger the images are than those trained on first
        patch_size: int = 2,
        width: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        modulation: str = "single",  # per_block: as DiT, a third more parameters
        num_sizes: int = 0,  # K of `size`: 3 in alpha's 1024 model
        kv_ratio: int = 1,  # side of the squares of keys and values that become one,
        kv_layers: Sequence[int] = (),  # in these blocks, counted from 0
        learned_variance: bool = True,  # twice the channels: the variance of arXiv:2102.09672 after the prediction
        checkpointing: bool = False,  # recompute each block in the backward pass: less memory, a third more time
    ):
        super().__init__()
        check_sizes(sample_size, patch_size, width, num_heads)
        if modulation not in MODULATION:
            raise ConfigError(f"modulation={modulation!r} is unknown; expected one of: {', '.join(MODULATION)}")
        if (kv_ratio > 1) != bool(kv_layers) or not set(kv_layers) <= set(range(depth)):
            raise ConfigError(f"kv_ratio={kv_ratio} needs kv_layers between 0 and {depth - 1}, got {list(kv_layers)}")
        self.in_channels, self.context_dim = in_channels, context_dim
        self.sample_size, self.interpolation, self.patch_size = sample_size, interpolation, patch_size
        self.learned_variance, self.checkpointing = learned_variance, checkpointing
        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.embed = VectorEmbedding(width, num_sizes)
        self.text_mlp = MLP(context_dim, width, width, activation=gelu)
        self.modulation = MODULATION[modulation](width)
        own, ratios = self.modulation.own, [kv_ratio if i in kv_layers else 1 for i in range(depth)]
        self.blocks = nn.ModuleList(PixArtBlock(width, num_heads, own(width, 6), ratio) for ratio in ratios)
        out_channels = in_channels * (2 if learned_variance else 1)
        self.final = FinalLayer(width, patch_size**2 * out_channels, own(width, 2))
        self.init_weights()

    def init_weights(self) -> None:
        """As published: the first prediction is zero and the text adds nothing yet, but tables start random."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, KVCompression):
                nn.init.constant_(module.conv.weight, 1 / module.conv.kernel_size[0] ** 2)
                nn.init.zeros_(module.conv.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))  # as the Linear that it is: a view
        for small in (self.embed, self.modulation, self.text_mlp):
            for module in small.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            zero_init(block.cross_attn.out)
        zero_init(self.final.linear)
        for module in self.modules():
            if isinstance(module, Modulation):
                zero_init(module)  # adaLN-Zero

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        size: Tensor | None = None,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """size (B 3): height and width in pixels, height / width. residuals: added to what the first blocks give, one
        each (B N D): arXiv:2401.05252, §3.3. Errors: ConfigError for what does not fit."""
        check_residuals("PixArt", residuals, len(self.blocks))
        p, recompute = self.patch_size, self.checkpointing and torch.is_grad_enabled()
        h, given, ending = self.enter(x, t, context=context, context_mask=context_mask, size=size)
        for block, residual in zip_longest(self.blocks, residuals):
            h = checkpoint(block, h, *given, use_reentrant=False) if recompute else block(h, *given)
            h = h if residual is None else h + residual
        return unpatchify(self.final(h, *ending), (x.shape[2] // p, x.shape[3] // p), p)  # B C H W

    def enter(
        self,
        x: Tensor,
        t: Tensor,
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        size: Tensor | None = None,
    ) -> tuple[Tensor, tuple, tuple]:
        """What the first block reads (B N D), what every block is given besides, and what the last layer is."""
        check_context("PixArt", context, context_mask, self.context_dim)
        grid = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        h = (self.patch_embed(x) + self.positions(grid, x.device)).to(x.dtype)  # B N D
        text = self.text_mlp(context.to(x.dtype))  # B L D
        c, c_final = self.modulation(self.embed(t, size, x.dtype))
        return h, (c, text, context_mask, grid), (c_final,)

    def positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """(N D): of this input's own grid, since images of every shape are trained together."""
        base = self.sample_size // self.patch_size
        width = self.patch_embed.out_channels
        return position_table(grid, width, base=base, interpolation=self.interpolation, device=device)
