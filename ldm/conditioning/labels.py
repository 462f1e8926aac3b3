"""Class labels: the network embeds them, the class after the last one is "no condition" (arXiv:2207.12598, §3.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.conditioning.conditioner import Encoder
from ldm.utils.errors import ConfigError, DataError


class ClassLabels(Encoder):
    """Class ids, or their names where `class_names` are known, -> labels (B,) int64 in 0..num_classes.

    A name may be several with commas between them, as ImageNet's are. Raises DataError for a label that is no class; ""
    is the null class, as it is the null caption.
    """

    field = "label"

    def __init__(self, num_classes: int, class_names: Sequence[str] | None = None):
        super().__init__()
        if class_names is not None and len(class_names) != num_classes:
            raise ConfigError(f"num_classes is {num_classes}, expected {len(class_names)}: one for each of class_names")
        self.null = num_classes
        self.dims = {"num_classes": num_classes}
        names = list(enumerate(class_names or ()))
        self.ids = {part.strip(): index for index, name in names for part in name.split(",")}
        self.ids |= {name: index for index, name in names} | {"": self.null}

    def forward(self, values: Sequence[int | str], device: torch.device) -> dict[str, Tensor]:
        return {"labels": torch.tensor([self._id(value) for value in values], dtype=torch.int64).to(device)}  # B

    def _id(self, value: int | str) -> int:
        if value in self.ids:
            return self.ids[value]
        if str(value).isdecimal() and int(value) <= self.null:
            return int(value)
        names = [name for name in self.ids if name]
        named = f", or a name such as {', '.join(names[:8])}" if names else ""
        raise DataError(f"label {value!r} is no class; expected 0..{self.null - 1}, {self.null} for none{named}")
