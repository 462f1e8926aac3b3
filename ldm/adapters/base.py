"""Adapters go around a base network, never into it: the verbs that all of them have.

The networks of a system come as a table by slot, as `ldm.weights.systems` names them: "network" is the denoiser, the
others are text encoders. Injected adapters stand beside each other, each with a scale of its own; ejected, they leave
keys and outputs of the base as they were, bit for bit.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ldm.utils.errors import ConfigError

Networks = Mapping[str, nn.Module]
SLACK = 1e-4  # of a time: a step that begins where a window does is in it, however its time was rounded


class Adapter(ABC):
    """Something that changes what networks compute while it is injected. `scale` may change at any time.

    Raises ConfigError for a scale that is no number, and for verbs out of order.
    """

    def __init__(self, name: str, scale: float = 1.0):
        self.name = re.sub(r"\W", "_", name) + "_" * (name in dir(nn.ModuleDict))  # part of parameters' names
        self.networks: Networks = {}  # those it is injected into
        self._scale = check_scale(name, scale)
        self._active = True

    @abstractmethod
    def inject(self, networks: Networks) -> dict[str, int]:
        """Take its place around the networks; returns how many modules it changes, by slot. All or nothing."""

    @abstractmethod
    def eject(self) -> None:
        """Leave the networks as they were."""

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """What training moves, by name: nothing of the base, and nothing of an adapter that was loaded."""

    def merge(self) -> None:
        """Fold it into the weights of the base."""
        raise ConfigError(f"adapter {self.name}: a {type(self).__name__} is no change of weights, it cannot be merged")

    def unmerge(self) -> None:
        """Take it out of the weights again; nothing where it is not in them."""
        return

    @abstractmethod
    def save(self, path: Path, layout: str) -> None:
        """Write it without the base, as others read it."""

    @abstractmethod
    def apply_scale(self, scale: float) -> None:
        """Use this scale from the next call on."""

    @property
    def scale(self) -> float:
        """How strongly it acts: 0 not at all, 1 as it was trained."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = check_scale(self.name, scale)
        self._update()

    @property
    def active(self) -> bool:
        """Whether it acts now; the scale is remembered while it does not."""
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        if active != self._active:
            self._active = active
            self._update()

    def _update(self) -> None:
        if self.networks:
            self.apply_scale(self._scale if self._active else 0.0)


def check_scale(name: str, scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ConfigError(f"adapter {name}: scale={scale}, expected a finite number such as 0.8")
    return float(scale)


def check_window(name: str, window: Sequence[float]) -> tuple[float, float]:
    """(start, end): the share of the schedule in which something acts, 0 the first step."""
    numbers = isinstance(window, Sequence) and len(window) == 2 and all(isinstance(w, int | float) for w in window)
    if not numbers or not 0 <= window[0] < window[1] <= 1:
        raise ConfigError(f"{name}: window={window}, expected [start, end] with 0 <= start < end <= 1")
    return float(window[0]), float(window[1])


def within(window: Sequence[float], t: float) -> bool:
    """Whether a step that begins at time t, which falls from 1 to 0, is in a window; the end is not."""
    start, end = window
    return start <= 1 - t + SLACK and (end == 1 or 1 - t + SLACK < end)


@contextmanager
def only(adapters: Sequence[Adapter], *chosen: Adapter) -> Iterator[None]:
    """Of `adapters`, those chosen act; afterwards all act that did before."""
    before = [adapter.active for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.active = adapter in chosen
        yield
    finally:
        for adapter, active in zip(adapters, before, strict=True):
            adapter.active = active
