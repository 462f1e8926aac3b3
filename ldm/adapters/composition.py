"""Several adapters in one image: arXiv:2402.16843. Each function makes a denoise of denoises, as guidance does.

    merge      W + sum_i k_i dW_i        what injected adapters do together anyway, merged into the weights or not
    switch     one of them a step, the next after every tau steps                  §3.1: LoRA Switch
    composite  each alone, their guided scores averaged; by regions with masks     §3.2: LoRA Composite
    windowed   each for its part of the schedule

`denoises` has one denoise for each adapter, so that prompts can be encoded with that adapter's text encoder alone; it
may be the same one several times.
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ldm.adapters.base import Adapter, only
from ldm.utils.errors import ConfigError

Denoise = Callable[..., Tensor | tuple[Tensor, Tensor]]


def switch(
    denoises: Sequence[Denoise], adapters: Sequence[Adapter], times: Sequence[float], *, every: int = 5
) -> Denoise:
    """Adapter floor(((n - 1) mod k tau) / tau) + 1 at step n of `times`, tau = every: Eq. (4), arXiv:2402.16843.

    Which step an evaluation belongs to is read off its time, so nothing is carried from call to call.
    """
    check_pairs(denoises, adapters)
    if every < 1:
        raise ConfigError(f"every={every}: adapters switch after 1 step or more")
    starts = [-float(t) for t in times]  # ascending

    def denoise(x, t, *, variance=False):
        step = max(bisect.bisect_right(starts, -float(t) + 1e-9) - 1, 0)
        i = step // every % len(adapters)
        with only(adapters, adapters[i]):
            return denoises[i](x, t, variance=variance)

    return denoise


def composite(
    denoises: Sequence[Denoise], adapters: Sequence[Adapter], *, weights: Sequence[float | Tensor] | None = None
) -> Denoise:
    """The mean of what each adapter gives alone: Eq. (5), arXiv:2402.16843, on x0, which is affine in its scores.

    weights: of the mean, by default equal; masks (B 1 H W) in the size of x make it a mean of regions. Raises
    ConfigError where nothing has a weight.
    """
    check_pairs(denoises, adapters)
    shares = normalised(weights or [1.0] * len(adapters))
    if len(shares) != len(adapters):
        raise ConfigError(f"{len(shares)} weights for {len(adapters)} adapters; give each of them one")

    def denoise(x, t, *, variance=False):
        outs = []
        for adapter, own in zip(adapters, denoises, strict=True):
            with only(adapters, adapter):
                outs.append(own(x, t, variance=variance))
        if not variance:
            return mean(outs, shares)
        return mean([x0 for x0, _ in outs], shares), mean([v for _, v in outs], shares)

    return denoise


def windowed(denoise: Denoise, windows: Mapping[Adapter, tuple[float, float]]) -> Denoise:
    """Each adapter acts while low <= t <= high, its window; those without one always do."""
    for adapter, (low, high) in windows.items():
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"adapter {adapter.name}: window=[{low}, {high}], expected 0 <= low <= high <= 1 in t")

    def inside(x, t, *, variance=False):
        acting = [adapter for adapter, (low, high) in windows.items() if low <= t <= high and adapter.active]
        with only(list(windows), *acting):
            return denoise(x, t, variance=variance)

    return inside


def check_pairs(denoises: Sequence[Denoise], adapters: Sequence[Adapter]) -> None:
    if not adapters or len(denoises) != len(adapters):
        raise ConfigError(f"{len(denoises)} denoisers for {len(adapters)} adapters; expected one for each of them")


def normalised(weights: Sequence[float | Tensor]) -> list[float | Tensor]:
    """Divided by their sum, position by position."""
    total = sum(weights)
    smallest = float(total.min()) if isinstance(total, Tensor) else total
    if not smallest > 0 or not math.isfinite(smallest):
        raise ConfigError("the weights of the adapters sum to nothing somewhere: masks must cover the image together")
    return [weight / total for weight in weights]


def mean(values: Sequence[Tensor], shares: Sequence[float | Tensor]) -> Tensor:
    return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum(0)
