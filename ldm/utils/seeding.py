"""Randomness as a pure function of (seed, purpose, position): nothing is carried along, so nothing can be lost.

A *key* is 64 bits mixed from integers and words. `uniform` and `normal` turn a tensor of keys, one per image, into
numbers: image k of a batch gets what it would get alone, on any number of workers, ranks or devices, and after a kill.
The bits are SplitMix64's (Steele, Lea and Flood, 2014), a counter run through a 64-bit finaliser.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, 2^64 / golden ratio, as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_TO_UNIT = 2.0**-53


def key(*parts: int | str) -> int:
    """A signed 64-bit key of integers and words, the same on every machine (`hash()` of a str is not)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def keys(seed: int, purpose: str, positions: Tensor) -> Tensor:
    """One key per image position: (B,) int64 -> (B,) int64."""
    return _mix(positions.long() * _GOLDEN + key(seed, purpose))


def uniform(key_per_image: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Uniform numbers in [0, 1) with 53 bits: keys (B,) -> (B, *shape) float64."""
    return _bits(key_per_image, math.prod(shape)).view(-1, *shape)


def normal(key_per_image: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers by Box-Muller: keys (B,) -> (B, *shape)."""
    count = math.prod(shape)
    half = (count + 1) // 2
    u = _bits(key_per_image, 2 * half)  # B 2*half
    radius = torch.log1p(-u[:, :half]).mul_(-2).sqrt_()
    angle = u[:, half:] * (2 * math.pi)
    z = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]
    return z.view(-1, *shape).to(dtype)


class Noise:
    """A stream of normal noise per image, seeded one by one: `noise(x)` draws the next tensor shaped like x (B ...)."""

    def __init__(self, seeds: Sequence[int], purpose: str = "sample"):
        self.seeds = list(seeds)
        self.purpose = purpose
        self.draws = 0

    def __call__(self, like: Tensor) -> Tensor:
        purpose = f"{self.purpose}/{self.draws}"
        self.draws += 1
        per_image = torch.tensor([key(seed, purpose) for seed in self.seeds], device=like.device)
        return normal(per_image, like.shape[1:], like.dtype)


class BatchNoise(Noise):
    """A stream of noise per position of a training run, keyed where the tensors are: no accelerator waits for it."""

    def __init__(self, seed: int, purpose: str, positions: Tensor):
        super().__init__([seed], purpose)
        self.positions = positions

    def __call__(self, like: Tensor) -> Tensor:
        purpose = f"{self.purpose}/{self.draws}"
        self.draws += 1
        return normal(keys(self.seeds[0], purpose, self.positions.to(like.device)), like.shape[1:], like.dtype)


class TorchNoise(Noise):
    """A stream per image from torch's own generator on the CPU, as diffusers draws from a list of generators.

    For the images of published programs: the state is carried along, so draws must come in the program's order.
    """

    def __init__(self, seeds: Sequence[int]):
        super().__init__(seeds)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        shape = (1, *like.shape[1:])
        return torch.cat([torch.randn(shape, generator=g, dtype=like.dtype) for g in self.generators]).to(like.device)


def randn_like(x: Tensor, generator: "torch.Generator | Noise | None" = None) -> Tensor:
    """Normal noise shaped like x, from a `Noise`, a torch generator, or torch's global one."""
    if isinstance(generator, Noise):
        return generator(x)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _bits(key_per_image: Tensor, count: int) -> Tensor:
    counter = torch.arange(1, count + 1, device=key_per_image.device) * _GOLDEN
    mixed = _mix(key_per_image[:, None] + counter)  # B count
    return _shift(mixed, 11).double().mul_(_TO_UNIT)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit integers."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
