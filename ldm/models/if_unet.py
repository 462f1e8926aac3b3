"""The U-Net of Imagen's base (arXiv:2205.11487, App. F.1) and of DeepFloyd IF: ADM's (arXiv:2105.05233), with text.

    x, low_res -> conv_in -> level 0 -> ResBlock, halved -> level 1 -> ... -> level n    every output is a skip
                                |                              |               |
                                |                              |    ResBlock, TextAttention, ResBlock
                                |                              |               |
           out <- conv_out <- level 0 <- ResBlock, doubled <- level 1 <- ... <- level n    cat(h, skip) enters a block

    block = ResBlock (scaled and shifted by time, pooled text and aug_level) -> TextAttention, at the coarse levels

| config    | channels x mult    | blocks      | attention at    | text         | parameters    |  GMAC |
| --------- | ------------------ | ----------- | --------------- | ------------ | ------------- | ----- |
| imagen_64 | 512 x 1 2 3 4      | 3           | 32, 16, 8 of 64 | 4096         | 2,437,591,043 |   778 |
| if_i_m    | 192 x 1 2 3 4      | 3           | 32, 16, 8 of 64 | 4096 -> 768  |   371,605,830 |   115 |
| if_i_l    | 320 x 1 2 3 4      | 3           | 32, 16, 8 of 64 | 4096 -> 1280 |   935,365,830 |   306 |
| if_i_xl   | 704 x 1 2 3 4      | 3           | 32, 16, 8 of 64 | 4096 -> 2816 | 4,304,695,110 | 1,440 |
| if_ii_m   | 96 x 1 2 4 6 8     | 2 2 3 5 5   | 32, 16 of 256   | 4096 -> 768  |   460,997,382 |   539 |
| if_ii_l   | 160 x 1 2 4 6 8    | 2 2 3 5 5   | 32, 16 of 256   | 4096 -> 1280 | 1,183,628,550 | 1,490 |
| if_iii_l  | 64 x 1 2 4 8 12 16 | 2 2 3 3 4 4 | 32 of 1024      | 4096 -> 1024 |   660,105,862 | 4,639 |

GMAC: of one image of that size and 77 tokens. II and III enlarge: their attention reads the text alone, and the sum of
every ResBlock is scaled. Whoever calls them enlarges `low_res` bilinearly with align_corners=True, and noises it to
`aug_level`, the step of 1000 of the cosine schedule / 1000. IF's texts have 77 tokens, the padding included, no mask.

Names of conditions and shapes: B batch, C H W, L text length, D its width, E of the time embedding.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.nn.checks import check_context
from ldm.nn.convolution import Conv2d, group_norm, zero_init
from ldm.nn.linear import Linear
from ldm.nn.text_unet import Activation, Embedding, TextAttention, check_inputs
from ldm.utils.errors import ConfigError

ACTIVATIONS: dict[str, Activation] = {"silu": F.silu, "gelu": F.gelu}
Resample = Callable[[Tensor], Tensor]
halve: Resample = partial(F.avg_pool2d, kernel_size=2)
double: Resample = partial(F.interpolate, scale_factor=2.0, mode="nearest")


class ResBlock(nn.Module):
    """ADM's residual block: the embedding scales and shifts the second norm: (B C H W), (B E) -> (B C' H W).

    resample: between the first norm and the first convolution, and of the skip: BigGAN's blocks (arXiv:1809.11096).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_dim: int,
        activation: Activation,
        skip_scale: float,
        resample: Resample | None = None,
    ):
        super().__init__()
        self.activation, self.skip_scale, self.resample = activation, skip_scale, resample
        self.norm1 = group_norm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb_proj = Linear(emb_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = zero_init(Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.activation(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)  # B C' H W
        scale, shift = self.emb_proj(emb)[:, :, None, None].chunk(2, dim=1)  # B C' 1 1
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        h = self.conv2(self.activation(h))
        h += self.skip(x)
        return h if self.skip_scale == 1 else h.mul_(self.skip_scale)


class Block(nn.Module):
    """ResBlock, then attention where the level has it; the unit that activation checkpointing recomputes."""

    def __init__(self, res: ResBlock, attention: TextAttention | None, *, checkpointing: bool):
        super().__init__()
        self.res = res
        self.attention = attention
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, emb, text, mask, use_reentrant=False)
        return self.compute(x, emb, text, mask)

    def compute(self, x: Tensor, emb: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.res(x, emb)
        return x if self.attention is None else self.attention(x, text, mask)


class Level(NamedTuple):
    """What the blocks of one resolution share."""

    channels: int
    num_res_blocks: int
    attends: bool


MakeBlock = Callable[[int, int, bool], Block]  # channels coming in, going out, whether it attends
MakeRes = Callable[..., ResBlock]


class EncoderLevel(nn.Module):
    """Blocks of one resolution, then the step down; every output is a skip."""

    def __init__(self, width: int, level: Level, downsample: ResBlock | None, make_block: MakeBlock):
        super().__init__()
        widths = [width] + [level.channels] * (level.num_res_blocks - 1)
        self.blocks = nn.ModuleList(make_block(width, level.channels, level.attends) for width in widths)
        self.downsample = downsample

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None, mask: Tensor | None) -> list[Tensor]:
        skips = []
        for block in self.blocks:
            x = block(x, emb, text, mask)
            skips.append(x)
        if self.downsample is not None:
            skips.append(self.downsample(x, emb))
        return skips


class Encoder(nn.Module):
    """The way down: (B C H W) -> list of skips, finest first; the last one enters the middle."""

    def __init__(self, in_channels: int, levels: Sequence[Level], make_block: MakeBlock, make_res: MakeRes):
        super().__init__()
        width = levels[0].channels
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.skip_channels = [width]
        self.levels = nn.ModuleList()
        for level in levels:
            last = len(self.levels) == len(levels) - 1
            down = None if last else make_res(level.channels, level.channels, resample=halve)
            self.levels.append(EncoderLevel(width, level, down, make_block))
            width = level.channels
            self.skip_channels += [width] * (level.num_res_blocks + (not last))

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None, mask: Tensor | None) -> list[Tensor]:
        skips = [self.conv_in(x)]
        for level in self.levels:
            skips += level(skips[-1], emb, text, mask)
        return skips


class DecoderLevel(nn.Module):
    """Blocks of one resolution, each fed with a skip, then the step up."""

    def __init__(self, blocks: list[Block], upsample: ResBlock | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, text, mask)
        return x if self.upsample is None else self.upsample(x, emb)


class Decoder(nn.Module):
    """The way up: middle output and skips -> (B out_channels H W). `levels[0]` is the coarsest, as it runs."""

    def __init__(
        self,
        out_channels: int,
        levels: Sequence[Level],
        skip_channels: Sequence[int],
        make_block: MakeBlock,
        make_res: MakeRes,
        activation: Activation,
    ):
        super().__init__()
        skip_channels = list(skip_channels)
        width = levels[-1].channels
        self.levels = nn.ModuleList()
        for level in reversed(levels):
            blocks = []
            for _ in range(level.num_res_blocks + 1):
                blocks.append(make_block(width + skip_channels.pop(), level.channels, level.attends))
                width = level.channels
            self.levels.append(DecoderLevel(blocks, make_res(width, width, resample=double) if skip_channels else None))
        self.norm_out = group_norm(width)
        self.activation = activation
        self.conv_out = zero_init(nn.Conv2d(width, out_channels, 3, padding=1))  # the first prediction is zero

    def forward(
        self, x: Tensor, skips: Sequence[Tensor], emb: Tensor, text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        skips = list(skips)
        for level in self.levels:
            x = level(x, skips, emb, text, mask)
        return self.conv_out(self.activation(self.norm_out(x)))


def plan(
    widths: Sequence[int], num_res_blocks: int | Sequence[int], attention: Sequence[bool], head_dim: int
) -> list[Level]:
    """The levels, finest first; ConfigError where the numbers do not fit together."""
    count = len(widths)
    counts = [num_res_blocks] * count if isinstance(num_res_blocks, int) else list(num_res_blocks)
    if (len(counts), len(attention)) != (count, count):
        raise ConfigError(
            f"channel_mult has {count} levels, so attention needs {count} entries and num_res_blocks one or {count}; "
            f"got attention={list(attention)}, num_res_blocks={counts}"
        )
    levels = [Level(*numbers) for numbers in zip(widths, counts, attention, strict=True)]
    for level in levels:
        if (level.attends or level is levels[-1]) and level.channels % head_dim:
            raise ConfigError(f"head_dim={head_dim} does not divide {level.channels} channels; choose a divisor")
    return levels


def activation_named(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation={name!r} is unknown; expected one of: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def make_block(
    res: MakeRes, attention: Callable[..., TextAttention], head_dim: int, checkpointing: bool,
    width: int, out: int, attends: bool,
) -> Block:  # fmt: skip
    """With the first four given, what `MakeBlock` says."""
    attend = attention(out, out // head_dim, head_dim) if attends else None
    return Block(res(width, out), attend, checkpointing=checkpointing)


class IFUNet(nn.Module):
    """x (B C H W) at time t (B) with its text, or none, and a low resolution, or none -> (B C H W), or (B 2C H W).

    Lists go from the finest level to the coarsest. The defaults are Imagen's. Errors: ConfigError where numbers do not
    fit together.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        channels: int = 512,
        channel_mult: Sequence[int] = (1, 2, 3, 4),  # one level each; every level but the last halves the sides
        num_res_blocks: int | Sequence[int] = 3,  # per level of the encoder; the decoder has one more
        attention: Sequence[bool] = (False, True, True, True),  # per level; the middle always has it
        head_dim: int = 64,
        self_attention: bool = True,  # False: pixels attend to the text alone
        context_dim: int | None = None,  # D of `context`
        text_dim: int | None = None,  # of the text in attention, where it is projected
        text: str = "cross_attention",  # mean_pool, attention_pool: added to the time embedding only
        text_norm: str = "layer",  # group: IF's
        pool_heads: int = 64,
        super_resolution: bool = False,  # takes `low_res` and `aug_level`
        skip_scale: float = 1.0,  # of every ResBlock's sum
        activation: str = "silu",  # gelu: IF's
        learned_variance: bool = False,  # twice the channels: the variance of arXiv:2102.09672 after the prediction
        checkpointing: bool = False,  # recompute each block in the backward pass: less memory, a third more time
    ):
        super().__init__()
        act = activation_named(activation)
        levels = plan([channels * mult for mult in channel_mult], num_res_blocks, attention, head_dim)
        self.in_channels, self.learned_variance, self.divisor = in_channels, learned_variance, 2 ** (len(levels) - 1)
        self.skip_scale, self.activation, self.text_norm = skip_scale, activation, text_norm
        emb_dim, coarsest = max(level.channels for level in levels), levels[-1].channels
        self.embed = Embedding(channels, emb_dim, context_dim=context_dim, text_dim=text_dim, text=text,
                               pool_heads=pool_heads, super_resolution=super_resolution, activation=act)  # fmt: skip
        res = partial(ResBlock, emb_dim=emb_dim, activation=act, skip_scale=skip_scale)
        reads = dict(text_dim=self.embed.text_width, text_norm=text_norm, self_attention=self_attention)
        block = partial(make_block, res, partial(TextAttention, **reads), head_dim, checkpointing)
        self.encoder = Encoder(in_channels * (2 if super_resolution else 1), levels, block, res)
        self.middle = nn.ModuleList(block(coarsest, coarsest, attends) for attends in (True, False))
        out_channels = in_channels * (2 if learned_variance else 1)
        self.decoder = Decoder(out_channels, levels, self.encoder.skip_channels, block, res, act)

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
        check_context("IFUNet", context, context_mask, self.embed.context_dim)
        given = dict(low_res=low_res, aug_level=aug_level, super_resolution=self.embed.aug_mlp is not None)
        check_inputs("IFUNet", x, self.in_channels, self.divisor, **given)
        conditions = *self.embed(t, aug_level, context, context_mask, x.dtype), context_mask  # B E, B L T, B L
        skips = self.encoder(x if low_res is None else torch.cat([x, low_res.to(x.dtype)], dim=1), *conditions)
        h = skips[-1]
        for block in self.middle:
            h = block(h, *conditions)
        return self.decoder(h, skips, *conditions)
