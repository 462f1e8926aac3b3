"""A frozen encoder that has read the captions of a dataset already."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.conditioning.conditioner import Encoder


class Known(Protocol):
    """Conditions of texts, kept somewhere."""

    def find(self, texts: Sequence[str | None]) -> Tensor: ...  # rows (B,), -1 where a text is not known

    def read(self, rows: Tensor) -> dict[str, Tensor]: ...  # rows (B,) -> tensors by condition name


class StoredEncoder(Encoder):
    """What `encoder` gives, looked up in `texts`; a batch with a text that is not there is encoded as ever.

    Its parameters and buffers are the encoder's own under the same names: a checkpoint holds the same with and without.
    """

    def __init__(self, encoder: Encoder, texts: Known):
        super().__init__()
        self.field, self.null, self.default, self.dims = encoder.field, encoder.null, encoder.default, encoder.dims
        self.texts = texts
        self._encoder = [encoder.eval()]  # in a list: as a submodule it would put its name before those of the weights
        for table in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = encoder.__dict__[table]

    @property
    def encoder(self) -> Encoder:
        return self._encoder[0]

    def without(self, value: Any) -> Any:
        return self.encoder.without(value)

    def length(self, value: Any) -> int:
        return self.encoder.length(value)

    def forward(self, values: Sequence[str | None], device: torch.device) -> dict[str, Tensor]:
        rows = self.texts.find(values)  # B
        if (rows < 0).any():
            return self.encoder(values, device)
        dtype = next(self.parameters()).dtype
        known = {name: value.to(device) for name, value in self.texts.read(rows).items()}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in known.items()}
