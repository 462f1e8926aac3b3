"""Micro-conditions, SDXL's (arXiv:2307.01952, §2.2, Algorithm 1) and PixArt's: numbers, each embedded alone.

A condition without one is not defined: guidance keeps the sizes, and moves the refiner's aesthetic score instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.conditioning.conditioner import Encoder
from ldm.utils.errors import ConfigError, DataError

NAMES = ("original height", "width", "crop top", "left", "target height", "width")  # pixels


class Sizes(Encoder):
    """Six numbers of NAMES per image -> size (B count), the first `count` of them: all in SDXL, 4 in its refiner."""

    field = "size"
    null = None

    def __init__(self, count: int = len(NAMES)):
        super().__init__()
        if not 1 <= count <= len(NAMES):
            raise ConfigError(f"count is {count}, expected 1 to {len(NAMES)}: {', '.join(NAMES)}")
        self.count = count
        self.dims = {"num_sizes": count}
        self.rows: tuple[dict, dict] = ({}, {})  # by place in NAMES: what is said instead, with and without a prompt

    def chosen(self, values: list, half: int) -> list:
        rows = [list(value) for value in values]
        for row in rows:
            for place, number in self.rows[half].items():
                row[place] = number
        return rows if self.rows[half] else values

    def without(self, value: Sequence[float] | Tensor) -> Sequence[float] | Tensor:
        return value

    def forward(self, values: Sequence[Sequence[float] | Tensor], device: torch.device) -> dict[str, Tensor]:
        return {"size": torch.stack([self._row(value) for value in values]).to(device)}  # B count

    def _row(self, value: Sequence[float] | Tensor) -> Tensor:
        row = _floats(value)
        if row is None or row.ndim != 1 or len(row) < self.count:
            raise DataError(f"size is {value!r}, expected {', '.join(NAMES[: self.count])}")
        return row[: self.count]


class SizeAndRatio(Sizes):
    """Original height and width, and height / width of what is drawn -> size (B 3): PixArt's, arXiv:2310.00426."""

    def __init__(self):
        super().__init__()
        self.dims = {"num_sizes": 3}

    def forward(self, values: Sequence[Sequence[float] | Tensor], device: torch.device) -> dict[str, Tensor]:
        height, width, *_, target_height, target_width = super().forward(values, device)["size"].unbind(1)  # B
        return {"size": torch.stack([height, width, target_height / target_width], dim=1)}  # B 3


class AestheticScore(Encoder):
    """The score the training images were rated with, 1 to 10 -> size (B 1). Guidance steers away from `null_score`."""

    field = "aesthetic"

    def __init__(self, score: float = 6.0, null_score: float = 2.5):
        super().__init__()
        self.default = score
        self.null = null_score
        self.dims = {"num_sizes": 1}

    def forward(self, values: Sequence[float], device: torch.device) -> dict[str, Tensor]:
        scores = _floats(values)
        if scores is None or scores.ndim != 1:
            raise DataError(f"aesthetic scores are {list(values)}, expected a number for each image")
        return {"size": scores[:, None].to(device)}  # B 1


def _floats(value: object) -> Tensor | None:
    try:
        return torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        return None
