"""The conditional UNet of latent diffusion: arXiv:2112.10752 (LDM, Stable Diffusion), arXiv:2307.01952 (SDXL).

    x, image -> conv_in -> level 0 -> level 1 -> ... -> level n          UNetEncoder: every output is a skip
                              |          |                |
                              |          |              middle
                              |          |                |
       out <- conv_out <- level 0 <- level 1 <- ... <- level n          UNetDecoder: cat(h, skip) enters every block

    block = ResBlock (+ time, class, pooled text and sizes) -> Transformer of `depth` (self-attention, text, GEGLU)

| config       | channels x mult     | depth, then middle | heads   | context | vector          | parameters    |
| ------------ | ------------------- | ------------------ | ------- | ------- | --------------- | ------------- |
| sd15         | 320 x 1 2 4 4       | 1 1 1 0, 1         | 8       | 768     |                 |   859,520,964 |
| sd21         | 320 x 1 2 4 4       | 1 1 1 0, 1         | 64 wide | 1024    |                 |   865,910,724 |
| sdxl         | 320 x 1 2 4         | 0 2 10, 10         | 64 wide | 2048    | 1280 + 6 x 256  | 2,567,463,684 |
| sdxl_refiner | 384 x 1 2 4 4       | 0 4 4 0, 4         | 64 wide | 1280    | 1280 + 5 x 256  | 2,259,526,660 |

Names of conditions and shapes: B batch, C H W, N = H W tokens, L text length, D text width, E = 4 channels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.nn.attention import CrossAttention, SelfAttention
from ldm.nn.convolution import Downsample, ResBlock, Upsample, group_norm, silu, zero_init
from ldm.nn.embeddings import sinusoid
from ldm.nn.feedforward import GEGLU, MLP
from ldm.nn.linear import Linear, linear
from ldm.utils.errors import ConfigError

SIZE_DIM = 256  # width of the sinusoid of each size number, §2.2 of arXiv:2307.01952


class TokenConv(Linear):
    """A Linear that keeps its weight in the shape of the 1x1 convolution which SD 1.x files hold."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__(dim, out_dim)
        self.weight = nn.Parameter(self.weight[:, :, None, None].detach())

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.flatten(1), self.bias)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, GEGLU, each after a LayerNorm and added: (B N C) -> (B N C)."""

    def __init__(self, dim: int, num_heads: int, context_dim: int | None):
        super().__init__()
        head_dim = dim // num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, num_heads, head_dim)
        self.norm2 = nn.LayerNorm(dim) if context_dim else None
        self.cross_attn = CrossAttention(dim, context_dim, num_heads, head_dim) if context_dim else None
        self.norm3 = nn.LayerNorm(dim)
        self.ff = GEGLU(dim, 4 * dim)

    def forward(self, x: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.norm2(x), context, context_mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the pixels of a feature map, as a residual: (B C H W) -> (B C H W)."""

    def __init__(self, dim: int, depth: int, head_dim: int, *, context_dim: int | None, linear_projection: bool):
        super().__init__()
        if dim % head_dim:
            raise ConfigError(f"head_dim={head_dim} does not divide {dim} channels; choose a divisor such as 32 or 64")
        projection = Linear if linear_projection else TokenConv
        self.norm = group_norm(dim, eps=1e-6)  # 1e-6 here, 1e-5 in the ResBlocks: as published
        self.proj_in = projection(dim, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, dim // head_dim, context_dim) for _ in range(depth))
        self.proj_out = projection(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # B N C
        for block in self.blocks:
            h = block(h, context, context_mask)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])  # B C H W


class Level(NamedTuple):
    """What the blocks of one resolution share."""

    channels: int
    depth: int
    head_dim: int


class Block(nn.Module):
    """ResBlock, then a transformer where the level has one; the unit that activation checkpointing recomputes."""

    def __init__(self, res: ResBlock, transformer: SpatialTransformer | None, *, checkpointing: bool):
        super().__init__()
        self.res = res
        self.transformer = transformer
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, emb, context, mask, use_reentrant=False)
        return self.compute(x, emb, context, mask)

    def compute(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.res(x, emb)
        return x if self.transformer is None else self.transformer(x, context, mask)


MakeBlock = Callable[[int, Level], Block]  # (channels coming in, level) -> block


class EncoderLevel(nn.Module):
    """Blocks of one resolution, then the step down; every output is a skip."""

    def __init__(self, blocks: list[Block], downsample: Downsample | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, *conditions: Tensor | None, feature: Tensor | None = None) -> list[Tensor]:
        """feature: added to the last output of its shape, the last block's or the step down's, before what follows."""
        skips = []
        for block in self.blocks:
            x = block(x, *conditions)
            skips.append(x)
        feature = add_feature(skips, feature)
        if self.downsample is not None:
            skips.append(self.downsample(skips[-1]))
            feature = add_feature(skips, feature)
        if feature is not None:
            shapes = " and ".join(str(tuple(skip.shape[1:])) for skip in skips[-2:])
            raise ConfigError(f"a feature is {tuple(feature.shape[1:])}, but its level's last outputs are {shapes}")
        return skips


def add_feature(skips: list[Tensor], feature: Tensor | None) -> Tensor | None:
    """Add a feature of the last skip's shape to that skip; another is returned, still to be added."""
    if feature is None or feature.shape[1:] != skips[-1].shape[1:]:
        return feature
    skips[-1] = skips[-1] + feature
    return None


class UNetEncoder(nn.Module):
    """The way down: (B C H W) -> list of skips, finest first; the last one enters the middle."""

    def __init__(self, in_channels: int, levels: Sequence[Level], num_res_blocks: int, make_block: MakeBlock):
        super().__init__()
        width = levels[0].channels
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.skip_channels = [width]
        self.levels = nn.ModuleList()
        for level in levels:
            last = len(self.levels) == len(levels) - 1
            blocks = [make_block(width if i == 0 else level.channels, level) for i in range(num_res_blocks)]
            width = level.channels
            self.levels.append(EncoderLevel(blocks, None if last else Downsample(width)))
            self.skip_channels += [width] * (num_res_blocks + (not last))

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        features: Sequence[Tensor] = (),  # one per level
    ) -> list[Tensor]:
        skips = [self.conv_in(x)]
        for level, feature in zip(self.levels, features or [None] * len(self.levels), strict=True):
            skips += level(skips[-1], emb, context, mask, feature=feature)
        return skips


class Middle(nn.ModuleList):
    """ResBlock, transformer, ResBlock at the coarsest resolution: (B C H W) -> (B C H W)."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        for block in self:
            x = block(x, emb, context, mask)
        return x


class DecoderLevel(nn.Module):
    """Blocks of one resolution, each fed with a skip, then the step up to the size of the next skip."""

    def __init__(self, blocks: list[Block], upsample: Upsample | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample

    def forward(self, x: Tensor, skips: list[Tensor], *conditions: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), *conditions)
        if self.upsample is not None:
            x = self.upsample(x, size=skips[-1].shape[2:])  # not just twice: odd sizes were rounded up
        return x


class UNetDecoder(nn.Module):
    """The way up: middle output and skips -> (B out_channels H W). `levels[0]` is the coarsest, as it runs."""

    def __init__(
        self, out_channels: int, levels: Sequence[Level], skip_channels: Sequence[int], make_block: MakeBlock
    ):
        super().__init__()
        skip_channels = list(skip_channels)
        num_blocks = len(skip_channels) // len(levels)  # num_res_blocks + 1: conv_in's and the downsamplers' skips
        width = levels[-1].channels
        self.levels = nn.ModuleList()
        for level in reversed(levels):
            blocks = []
            for _ in range(num_blocks):
                blocks.append(make_block(width + skip_channels.pop(), level))
                width = level.channels
            self.levels.append(DecoderLevel(blocks, Upsample(width) if skip_channels else None))
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        skips: Sequence[Tensor],
        emb: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        skips = list(skips)
        for level in self.levels:
            x = level(x, skips, emb, context, mask)
        return self.conv_out(silu(self.norm_out(x)))


def add_residuals(skips: list[Tensor], h: Tensor, residuals: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What a ControlNet or another adapter adds to the skips and to the middle."""
    if len(residuals) != len(skips) + 1:
        raise ConfigError(f"got {len(residuals)} residuals, expected {len(skips) + 1}: one per skip, then the middle")
    *to_skips, to_middle = residuals
    return [skip + residual for skip, residual in zip(skips, to_skips, strict=True)], h + to_middle


def split_features(features: Sequence[Tensor], num_levels: int) -> tuple[Sequence[Tensor], Tensor | None]:
    """What an adapter adds inside the encoder: one tensor per level, and perhaps one more to the middle's output."""
    if len(features) not in (0, num_levels, num_levels + 1):
        raise ConfigError(f"got {len(features)} features, expected {num_levels}, one per level (and the middle's)")
    return features[:num_levels], features[num_levels] if len(features) > num_levels else None


class VectorConditioning(nn.Module):
    """Time, and where they are used class, pooled text and sizes, as one vector added to every ResBlock: -> (B E)."""

    def __init__(self, channels: int, pooled_dim: int | None, num_sizes: int, num_classes: int | None, size_dim: int):
        super().__init__()
        self.channels, self.size_dim = channels, size_dim
        self.out_dim = emb_dim = 4 * channels
        self.pooled_dim, self.num_sizes, self.num_classes = pooled_dim, num_sizes, num_classes
        vector_dim = (pooled_dim or 0) + num_sizes * size_dim
        self.time_mlp = MLP(channels, emb_dim, emb_dim)
        self.vector_mlp = MLP(vector_dim, emb_dim, emb_dim) if vector_dim else None
        self.label_embedding = nn.Embedding(num_classes + 1, emb_dim) if num_classes else None

    def forward(
        self, t: Tensor, pooled: Tensor | None, size: Tensor | None, labels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        check_condition("pooled", pooled, self.pooled_dim, "pooled_dim")
        check_condition("size", size, self.num_sizes, "num_sizes")
        check_condition("labels", labels, self.num_classes, "num_classes")
        emb = self.time_mlp(sinusoid(t, self.channels).to(dtype))  # B E
        if self.vector_mlp is not None:
            parts = [] if pooled is None else [pooled.to(dtype)]
            parts += [] if size is None else [sinusoid(size, self.size_dim).flatten(1).to(dtype)]
            emb = emb + self.vector_mlp(torch.cat(parts, dim=1))
        if labels is not None:
            emb = emb + self.label_embedding(labels)
        return emb


def check_condition(name: str, value: Tensor | None, wanted: int | None, knob: str) -> None:
    """ConfigError unless the network was built for this condition exactly when it is given, in the right width."""
    if value is None and wanted:
        raise ConfigError(f"the UNet was built with {knob}={wanted} but got no `{name}`: pass it, or unset {knob}")
    if value is not None and not wanted:
        raise ConfigError(f"the UNet got `{name}` {tuple(value.shape)} but has no use for it: drop it, or set {knob}")
    if value is not None and value.ndim > 1 and value.shape[-1] != wanted:
        raise ConfigError(f"`{name}` has width {value.shape[-1]}, but the UNet was built with {knob}={wanted}")


def plan(widths: Sequence[int], depth: Sequence[int], head_dim: int | Sequence[int]) -> tuple[list[Level], Level]:
    """The levels, finest first, and the middle; ConfigError where the lists do not fit together."""
    count = len(widths)
    head_dims = [head_dim] * count if isinstance(head_dim, int) else list(head_dim)
    if (len(depth), len(head_dims)) != (count + 1, count):
        raise ConfigError(
            f"channel_mult has {count} levels, so depth needs {count + 1} entries (the last is the middle's) and "
            f"head_dim one or {count}; got depth={list(depth)}, head_dim={head_dims}"
        )
    levels = [Level(*numbers) for numbers in zip(widths, depth[:-1], head_dims, strict=True)]
    return levels, Level(widths[-1], depth[-1], head_dims[-1])


class UNet(nn.Module):
    """UNetEncoder, middle, UNetDecoder: x (B C H W) at time t (B) and its conditions -> (B out_channels H W).

    Lists go from the finest level to the coarsest. Errors: ConfigError where numbers do not fit together.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int | None = None,  # as many as in_channels
        channels: int = 320,
        channel_mult: Sequence[int] = (1, 2, 4, 4),  # one level each; every level but the last halves the sides
        num_res_blocks: int = 2,  # per level of the encoder; the decoder has one more
        depth: Sequence[int] = (1, 1, 1, 0, 1),  # transformer blocks after a ResBlock: per level, then the middle
        head_dim: int | Sequence[int] = 64,  # one for all, or one per level
        context_dim: int | None = None,  # D of `context`
        pooled_dim: int | None = None,  # D of `pooled`
        num_sizes: int = 0,  # K of `size`
        size_dim: int = SIZE_DIM,  # of the sinusoid of each
        num_classes: int | None = None,  # of `labels`; the null class is one more row
        linear_projection: bool = True,  # False: files hold a transformer's ends as 1x1 convolutions, as SD 1.x
        dropout: float = 0.0,  # in the ResBlocks, as published
        checkpointing: bool = False,  # recompute each block in the backward pass: less memory, a third more time
    ):
        super().__init__()
        levels, middle = plan([channels * mult for mult in channel_mult], depth, head_dim)
        self.in_channels = in_channels
        self.context_dim = context_dim if any(depth) else None
        self.conditioning = VectorConditioning(channels, pooled_dim, num_sizes, num_classes, size_dim)
        res = partial(ResBlock, emb_dim=self.conditioning.out_dim, dropout=dropout)
        transformer = partial(SpatialTransformer, context_dim=context_dim, linear_projection=linear_projection)

        def make_block(width: int, level: Level) -> Block:
            attend = transformer(*level) if level.depth else None
            return Block(res(width, level.channels), attend, checkpointing=checkpointing)

        self.encoder = UNetEncoder(in_channels, levels, num_res_blocks, make_block)
        self.middle = Middle(make_block(middle.channels, m) for m in (middle, middle._replace(depth=0)))
        self.decoder = UNetDecoder(out_channels or in_channels, levels, self.encoder.skip_channels, make_block)
        self.init_weights()

    def init_weights(self) -> None:
        """torch's defaults, as published, but whatever ends a residual branch or the network starts at zero."""
        zero_init(self.decoder.conv_out)  # the first prediction is zero, the mean of every target
        for module in self.modules():
            if isinstance(module, SpatialTransformer):
                zero_init(module.proj_out)  # as the second convolution of a ResBlock: each block starts as the identity

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        size: Tensor | None = None,
        labels: Tensor | None = None,
        image: Tensor | None = None,
        features: Sequence[Tensor] | None = None,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Added inside the encoder: features, one tensor per level, finest first, then perhaps one for the middle.
        Added to what the decoder reads: residuals, one per skip, finest first, then one for the middle. ConfigError."""
        check_condition("context", context, self.context_dim, "context_dim")
        if context is None:
            check_condition("context_mask", context_mask, None, "context_dim")
        emb = self.conditioning(t, pooled, size, labels, x.dtype)  # B E
        to_levels, to_middle = split_features(features or (), len(self.encoder.levels))
        skips = self.encoder(self.concatenate(x, image), emb, context, context_mask, to_levels)
        h = self.middle(skips[-1], emb, context, context_mask)
        if to_middle is not None:
            h = h + to_middle
        if residuals is not None:
            skips, h = add_residuals(skips, h, residuals)
        return self.decoder(h, skips, emb, context, context_mask)

    def concatenate(self, x: Tensor, image: Tensor | None) -> Tensor:
        x = x if image is None else torch.cat([x, image], dim=1)
        if x.shape[1] != self.in_channels:
            raise ConfigError(
                f"x and `image` have {x.shape[1]} channels together, but the UNet was built with "
                f"in_channels={self.in_channels}: {'pass the missing `image`' if image is None else 'check `image`'}"
            )
        return x
