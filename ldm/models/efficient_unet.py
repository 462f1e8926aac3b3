"""The Efficient U-Net: the super-resolution networks of Imagen, App. B.1 and F of arXiv:2205.11487.

    x, low_res -> conv_in -> DBlock -> DBlock -> DBlock -> DBlock        Fig. A.30; each halves, then computes
                                |         |         |         |
                out <- Dense <- UBlock <- UBlock <- UBlock <- UBlock     each computes, then doubles

    DBlock = conv of stride 2 -> ResNetBlock x n -> TextAttention, at the coarsest -> skip            Fig. A.28
    UBlock = cat(h, skip) -> ResNetBlock x n -> TextAttention -> nearest neighbour, conv              Fig. A.29
    ResNetBlock = norm, swish, conv, norm, CombineEmbs, swish, conv, + conv 1x1, x 1/sqrt(2)          Fig. A.27

| config           | channels         | blocks  | attention       | text | parameters  | GMAC            |
| ---------------- | ---------------- | ------- | --------------- | ---- | ----------- | --------------- |
| imagen_64to256   | 128 256 512 1024 | 2 4 8 8 | pixels and text | 4096 | 566,954,755 | 299 at 256 px   |
| imagen_256to1024 | 128 256 512 1024 | 2 4 8 8 | text            | 4096 | 558,557,955 | 4,618 at 1024   |

The paper's base is another network: `if_unet`. Its sizes for these two, of one ladder, are 600M and 400M; it gives
neither the width of the text inside them nor the initialisation. GMAC: with 128 tokens.

Names of conditions and shapes: B batch, C H W, L text length, D its width, E of the time embedding.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.nn.checks import check_context
from ldm.nn.convolution import Conv2d, Upsample, group_norm, silu, zero_init
from ldm.nn.linear import Linear
from ldm.nn.text_unet import Embedding, TextAttention, check_inputs
from ldm.utils.errors import ConfigError

SKIP_SCALE = 2**-0.5  # App. B.1, as arXiv:2011.13456 and arXiv:2104.07636: a sum of two keeps their variance


class ResNetBlock(nn.Module):
    """Fig. A.27, (B C H W), (B E) -> (B C' H W). CombineEmbs is here: the embedding scales and shifts the second norm.

    The figures draw it once per block; `use_scale_shift_norm` of App. F puts it in.
    """

    def __init__(self, in_channels: int, out_channels: int, *, emb_dim: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb_proj = Linear(emb_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))  # B C' H W
        scale, shift = self.emb_proj(emb)[:, :, None, None].chunk(2, dim=1)  # B C' 1 1
        h = self.conv2(silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        h += self.skip(x)
        return h.mul_(SKIP_SCALE)


class DBlock(nn.Module):
    """Fig. A.28: down-sampling before the convolutions: (B C H W) -> (B C' H/2 W/2)."""

    def __init__(self, in_channels: int, blocks: list[ResNetBlock], attention: TextAttention | None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, blocks[0].conv1.in_channels, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(blocks)
        self.attention = attention

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.conv(x)
        for block in self.blocks:
            x = block(x, emb)
        return x if self.attention is None else self.attention(x, text, mask)


class UBlock(nn.Module):
    """Fig. A.29: up-sampling after the convolutions: (B C+S H W), what came and the skip, -> (B C' 2H 2W)."""

    def __init__(self, blocks: list[ResNetBlock], attention: TextAttention | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attention = attention
        self.upsample = Upsample(blocks[-1].conv2.out_channels)

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, emb)
        return self.upsample(x if self.attention is None else self.attention(x, text, mask))


def check_blocks(
    channels: Sequence[int], num_res_blocks: Sequence[int], attention: Sequence[bool], num_heads: int
) -> None:
    """ConfigError where the numbers do not fit together."""
    if len({len(channels), len(num_res_blocks), len(attention)}) != 1 or 0 in num_res_blocks:
        raise ConfigError(
            f"channels={list(channels)}, num_res_blocks={list(num_res_blocks)} and attention={list(attention)} "
            "must have one entry per block, and num_res_blocks at least 1"
        )
    if wrong := [c for c, attends in zip(channels, attention, strict=True) if attends and 2 * c % num_heads]:
        raise ConfigError(f"num_heads={num_heads} does not divide twice the {wrong[0]} channels")


class EfficientUNet(nn.Module):
    """x (B C H W) at time t (B), a low resolution and a text, or none -> (B C H W).

    Lists go from the finest block to the coarsest. Errors: ConfigError where numbers do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        channels: Sequence[int] = (128, 256, 512, 1024),  # one DBlock and one UBlock each: each halves the sides
        num_res_blocks: Sequence[int] = (2, 4, 8, 8),  # in each of them: most of the parameters are at the coarsest
        attention: Sequence[bool] = (False, False, False, True),
        num_heads: int = 8,
        self_attention: bool = True,  # False: attention reads the text alone, as at 1024 px
        context_dim: int | None = None,  # D of `context`
        text: str = "cross_attention",  # mean_pool, attention_pool: added to the time embedding only
        pool_heads: int = 64,
        super_resolution: bool = True,  # takes `low_res` and `aug_level`
        groups: int = 32,  # of GroupNorm
        input_skip: bool = False,  # x and low_res, scaled by the embedding, are added to the output: begins as low_res
        checkpointing: bool = False,  # recompute each block in the backward pass: less memory, a third more time
    ):
        super().__init__()
        check_blocks(channels, num_res_blocks, attention, num_heads)
        self.in_channels, self.divisor, self.checkpointing = in_channels, 2 ** len(channels), checkpointing
        width = channels[0]
        self.embed = Embedding(width, 4 * width, context_dim=context_dim, text=text, pool_heads=pool_heads,
                               super_resolution=super_resolution)  # fmt: skip
        res = partial(ResNetBlock, emb_dim=4 * width, groups=groups)
        attend = partial(TextAttention, text_dim=self.embed.text_width, self_attention=self_attention, groups=groups)
        self.conv_in = nn.Conv2d(in_channels * (2 if super_resolution else 1), width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        above = [width, *channels]  # of what comes from the finer block
        below = [*channels[1:], 0]  # of what comes from the coarser block
        for i, (c, count, attends) in enumerate(zip(channels, num_res_blocks, attention, strict=True)):
            head_dim = 2 * c // num_heads  # hidden_size = 2 x channels, Fig. A.28
            pair = [attend(c, num_heads, head_dim) if attends else None for _ in range(2)]
            self.down.append(DBlock(above[i], [res(c, c) for _ in range(count)], pair[0]))
            self.up.insert(0, UBlock([res(below[i] + c, c), *(res(c, c) for _ in range(count - 1))], pair[1]))
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, in_channels, 1)  # "Dense", Fig. A.30
        # Deviation: the paper has no such skip. Without it a small network takes long to learn to pass colours on.
        self.skip = Linear(4 * width, self.conv_in.in_channels) if input_skip else None
        self.init_weights()

    def init_weights(self) -> None:
        """The paper does not tell. The first prediction is zero; what follows a norm keeps torch's defaults, since sums
        that are scaled would fade through the blocks if one summand were zero; a skip of equal widths is the identity.
        """
        zero_init(self.conv_out)
        if self.skip is not None:
            zero_init(self.skip)
            nn.init.ones_(self.skip.bias.data[self.in_channels :])
        for module in self.modules():
            if isinstance(module, ResNetBlock) and module.skip.in_channels == module.skip.out_channels:
                nn.init.dirac_(module.skip.weight)
                nn.init.zeros_(module.skip.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        low_res: Tensor | None = None,
        aug_level: Tensor | None = None,
    ) -> Tensor:
        """low_res: as large as x, with noise of aug_level (B), 0 to 1. Errors: ConfigError for what does not fit."""
        check_context("EfficientUNet", context, context_mask, self.embed.context_dim)
        given = dict(low_res=low_res, aug_level=aug_level, super_resolution=self.embed.aug_mlp is not None)
        check_inputs("EfficientUNet", x, self.in_channels, self.divisor, **given)
        conditions = *self.embed(t, aug_level, context, context_mask, x.dtype), context_mask  # B E, B L D, B L
        inputs = x if low_res is None else torch.cat([x, low_res.to(x.dtype)], dim=1)
        h = self.conv_in(inputs)
        skips = []
        for block in self.down:
            h = self.run(block, h, *conditions)
            skips.append(h)
        h = self.run(self.up[0], skips.pop(), *conditions)
        for block in self.up[1:]:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), *conditions)
        out = self.conv_out(silu(self.norm_out(h)))
        if self.skip is None:
            return out
        scaled = self.skip(conditions[0])[:, :, None, None] * inputs  # B C H W, or B 2C H W
        return out + scaled.unflatten(1, (-1, self.in_channels)).sum(1)

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
