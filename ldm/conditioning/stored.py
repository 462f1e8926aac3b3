"""Encoders that have read their texts already: the captions of a dataset, or the few prompts of a command."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.conditioning.conditioner import Encoder
from ldm.io.tensors import read_header, read_tensors, write_tensors
from ldm.utils.errors import DataError, WeightsError

BATCH = 16  # texts that are read at once


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


class KnownTexts(Encoder):
    """Conditions of a few texts, and of none, in place of an encoder that need not stay in memory: T5-XXL's is 19 GB.

    how: the settings they were read with, which a system can compare with its own. Raises DataError for another text.
    """

    field = "caption"
    null = ""

    def __init__(self, texts: Sequence[str], conditions: Mapping[str, Tensor], how: Mapping[str, Any]):
        super().__init__()
        self.rows = {text: row for row, text in enumerate(texts)}
        self.conditions, self.how = dict(conditions), dict(how)  # each condition has one row for each text
        self.dims = {"context_dim": self.conditions["context"].shape[-1]}

    @classmethod
    @torch.no_grad()
    def read(
        cls, encoder: Encoder, texts: Sequence[str], how: Mapping[str, Any], device: torch.device | str
    ) -> "KnownTexts":
        """What an encoder makes of them."""
        texts = list(dict.fromkeys([cls.null, *texts]))
        batches = [encoder(texts[i : i + BATCH], torch.device(device)) for i in range(0, len(texts), BATCH)]
        return cls(texts, {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}, how)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "KnownTexts":
        """From a file of `save`. Raises WeightsError."""
        told, conditions = read_header(path).ldm, read_tensors(path)
        texts, how = told.get("texts"), told.get("how")
        if not (isinstance(texts, list) and isinstance(how, dict) and "context" in conditions):
            raise WeightsError(f"{path}: holds no texts that were read; make one with python -m ldm.tools.embed")
        if any(len(rows) != len(texts) for rows in conditions.values()) or cls.null not in texts:
            raise WeightsError(f"{path}: its {len(texts)} texts are not those of its tensors; make the file again")
        return cls(texts, conditions, how)

    def save(self, path: str | os.PathLike) -> None:
        """As one .safetensors file."""
        write_tensors(path, self.conditions, {"texts": list(self.rows), "how": self.how})

    def forward(self, values: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        if unknown := [text for text in values if text not in self.rows]:
            raise DataError(f"the text {unknown[0][:60]!r} has not been read; of {len(self.rows)} texts none is that")
        rows = [self.rows[text] for text in values]
        return {name: condition[rows].to(device) for name, condition in self.conditions.items()}
