"""Low-rank changes of several adapters to one weight as one product."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.lora_kinds import LowRank


class Block(NamedTuple):
    """The index-th of `count` equal parts of the rows of a weight, where it is several published ones (q, k, v)."""

    index: int
    count: int

    def of(self, rows: Tensor, axis: int = 0) -> Tensor:
        """A view."""
        size = rows.shape[axis] // self.count
        return rows.narrow(axis, self.index * size, size)


class Segment(NamedTuple):
    """One LowRank within a product."""

    adapter: str
    block: Block
    rank: int
    scale: float  # alpha / rank


Part = tuple[Segment, Tensor, Tensor]  # with its A (r I ...) and B (O r)


class Product(nn.Module):
    """B diag(strength) A x of everything that adapters add to P blocks of a weight, ranks concatenated.

    down (P R, I ...), up (P O, R): block p has ranks p R to p R + R; those it does not need are zero. `strength`
    (P R) holds k s, so that a scale changes in place: nothing is compiled or captured anew for it.
    """

    def __init__(self, parts: Sequence[Part], mid: Tensor | None = None, dropout: float = 0.0):
        super().__init__()
        self.segments = [segment for segment, _, _ in parts]
        self.adapters = {segment.adapter for segment in self.segments}
        self.blocks = sorted({segment.block for segment in self.segments})
        self.rank = max(sum(s.rank for s in self.segments if s.block == block) for block in self.blocks)
        self.dropout = dropout  # of x, while it trains: §4 of the reference code of arXiv:2106.09685
        _, down, up = parts[0]
        self.down = nn.Parameter(down.new_zeros(len(self.blocks) * self.rank, *down.shape[1:]))
        self.up = nn.Parameter(up.new_zeros(len(self.blocks) * len(up), self.rank))
        self.mid = None if mid is None else nn.Parameter(mid)
        self.register_buffer("strength", torch.zeros(len(self.down), device=down.device), persistent=False)
        with torch.no_grad():
            for (_, down, up), (_, to_down, to_up) in zip(parts, self.parts(), strict=True):
                to_down.copy_(down)
                to_up.copy_(up)

    def forward(self, out: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """`out` and the product; `out`, a fresh tensor, is written into. `layer` knows how x goes through A, then B."""
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        kernel = self.kernel()
        strength = self.strength.view(-1, *[1] * (kernel.ndim - 1))
        h = layer.project(x, (kernel * strength).to(kernel.dtype))  # ... P R
        if torch.is_grad_enabled():  # autograd would not have it written into
            return out + layer.expand(h, self.matrix())
        for p, (block, up) in enumerate(zip(self.blocks, self.up.chunk(len(self.blocks)), strict=True)):
            block.of(out, layer.axis).add_(layer.expand(h.narrow(layer.axis, p * self.rank, self.rank), up))
        return out

    def matrix(self) -> Tensor:
        """B of the whole weight (O P R): each block in its rows and ranks, zero elsewhere."""
        if self.blocks[0].count == 1:
            return self.up
        ups = self.up.chunk(len(self.blocks))
        whole = self.up.new_zeros(len(ups[0]) * self.blocks[0].count, len(ups) * self.rank)
        for p, (block, up) in enumerate(zip(self.blocks, ups, strict=True)):
            block.of(whole).narrow(1, p * self.rank, self.rank).copy_(up)
        return whole

    def kernel(self) -> Tensor:
        """A, of a Tucker decomposition with its kernel: (P R, I ...)."""
        return self.down if self.mid is None else torch.einsum("srhw,ri->sihw", self.mid, self.down.flatten(1))

    def set(self, strengths: Mapping[str, float]) -> None:
        """k of each adapter; those not named do nothing."""
        values = torch.zeros(len(self.down))
        for segment, (_, start, _) in zip(self.segments, self._places(), strict=True):
            values[start : start + segment.rank] = segment.scale * strengths.get(segment.adapter, 0.0)
        self.strength.copy_(values)

    def add_to(self, total: Tensor, strengths: Mapping[str, float]) -> None:
        """What the adapters of these strengths add to the whole weight, added in place."""
        kernel, ups = self.kernel().flatten(1), self.up.chunk(len(self.blocks))
        for segment, (p, start, column) in zip(self.segments, self._places(), strict=True):
            if k := strengths.get(segment.adapter, 0.0):
                a, b = kernel[start : start + segment.rank], ups[p][:, column : column + segment.rank]
                rows = segment.block.of(total)
                rows.add_((b.to(total) @ a.to(total)).view(rows.shape), alpha=k * segment.scale)

    def parts(self) -> list[Part]:
        """What it was made of: views."""
        ups = self.up.chunk(len(self.blocks))
        return [
            (s, self.down[start : start + s.rank], ups[p][:, column : column + s.rank])
            for s, (p, start, column) in zip(self.segments, self._places(), strict=True)
        ]

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """Of each segment: which of `blocks`, the first row of `down`, the first column of `up`."""
        used = dict.fromkeys(self.blocks, 0)
        for segment in self.segments:
            p, column = self.blocks.index(segment.block), used[segment.block]
            used[segment.block] += segment.rank
            yield p, p * self.rank + column, column


def part(adapter: str, block: Block, change: LowRank, kernel: Tensor) -> Part:
    return Segment(adapter, block, change.rank, change.scale), kernel, change.up


def train(adapter: str, changes: Sequence[tuple[Block, LowRank]], dropout: float = 0.0) -> Product:
    """The product of one adapter, to be trained: with Tucker's factors as they are, of which a weight has one block."""
    mid = changes[0][1].mid
    return Product([part(adapter, block, change, change.down) for block, change in changes], mid, dropout)


def join(joined: Product | None, adapter: str, changes: Sequence[tuple[Block, LowRank]]) -> Product:
    """The product of what is there and of one more adapter."""
    more = [part(adapter, block, change, change.kernel()) for block, change in changes]
    return Product((joined.parts() if joined else []) + more).requires_grad_(False)


def without(joined: Product, adapter: str) -> Product | None:
    """What is left when an adapter goes."""
    parts = [part for part in joined.parts() if part[0].adapter != adapter]
    return Product(parts).requires_grad_(False) if parts else None
