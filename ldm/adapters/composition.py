"""Several adapters in one image: arXiv:2402.16843. Each function makes a denoise of a denoise, as guidance does.

merge      W + sum_i k_i dW_i        what injected adapters do together anyway, merged into the weights or not
switch     one of them a step, the next after every tau steps                  §3.1: LoRA Switch
composite  each alone, their guided scores averaged; by regions with masks     §3.2: LoRA Composite
windowed   each for its part of the schedule

denoise = windowed(make, {style: (0, 0.5), face: (0, 1)})       innermost, since it encodes the prompts
denoise = composite(denoise, [style, face], weights=masks)
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ldm.adapters.base import Adapter, check_window, only, within
from ldm.utils.errors import ConfigError

Denoise = Callable[..., Tensor | tuple[Tensor, Tensor]]


def windowed(make: Callable[[], Denoise], windows: Mapping[Adapter, Sequence[float]]) -> Denoise:
    """Each adapter acts in its window, a share (start, end) of the schedule, if it acts at all.

    make() encodes the prompts and gives the denoise of that: once for each set of adapters that act together, which
    may change what the text encoders say.
    """
    for adapter, window in windows.items():
        check_window(f"adapter {adapter.name}", window)
    made: dict[tuple[Adapter, ...], Denoise] = {}

    def inside(x, t, *, variance=False):
        acting = tuple(adapter for adapter, window in windows.items() if adapter.active and within(window, t))
        with only(list(windows), *acting):
            if acting not in made:
                made[acting] = make()
            return made[acting](x, t, variance=variance)

    return inside


def switch(denoise: Denoise, adapters: Sequence[Adapter], times: Sequence[float], *, every: int = 5) -> Denoise:
    """Adapter floor(((n - 1) mod k tau) / tau) + 1 at step n of `times`, tau = every: Eq. (4), arXiv:2402.16843.

    Which step an evaluation belongs to is read off its time, so nothing is carried from call to call.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ConfigError(f"every={every}: adapters switch after 1 step or more")
    starts = [-float(t) for t in times]  # ascending

    def turn(x, t, *, variance=False):
        step = max(bisect.bisect_right(starts, -float(t) + 1e-9) - 1, 0)
        with only(adapters, adapters[step // every % len(adapters)]):
            return denoise(x, t, variance=variance)

    return turn


def composite(
    denoise: Denoise, adapters: Sequence[Adapter], *, weights: Sequence[float | Tensor] | None = None
) -> Denoise:
    """The mean of what each adapter gives alone: Eq. (5), arXiv:2402.16843, on x0, which is affine in its scores.

    weights: of the mean, by default equal; masks (B 1 H W) in the size of x make it a mean of regions. Raises
    ConfigError where nothing has a weight.
    """
    shares = normalised(weights or [1.0] * len(adapters))
    if len(shares) != len(adapters):
        raise ConfigError(f"{len(shares)} weights for {len(adapters)} adapters; give each of them one")

    def together(x, t, *, variance=False):
        outs = []
        for adapter in adapters:
            with only(adapters, adapter):
                outs.append(denoise(x, t, variance=variance))
        if not variance:
            return mean(outs, shares)
        return mean([x0 for x0, _ in outs], shares), mean([v for _, v in outs], shares)

    return together


def normalised(weights: Sequence[float | Tensor]) -> list[float | Tensor]:
    """Divided by their sum, position by position."""
    total = sum(weights)
    smallest = float(total.min()) if isinstance(total, Tensor) else total
    if not smallest > 0 or not math.isfinite(smallest):
        raise ConfigError(
            "the weights of the adapters sum to nothing somewhere: masks must cover the image together; "
            "an adapter without a mask covers all of it"
        )
    return [weight / total for weight in weights]


def mean(values: Sequence[Tensor], shares: Sequence[float | Tensor]) -> Tensor:
    return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum(0)
