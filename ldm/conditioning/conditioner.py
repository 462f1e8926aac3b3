"""All that a network is told besides x_t and t: named encoders in, one dictionary of named tensors out.

An encoder is a module with `field` (the key of the batch that it reads), `null` (the value that means "no condition"),
`dims` (what a network must know to be built: context_dim, pooled_dim, num_classes) and
`forward(values: list, device) -> dict` of tensors by condition name.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.utils import seeding
from ldm.utils.errors import ConfigError, DataError


class Conditioner(nn.Module):
    """Encoders by name, each dropped on its own with probability `dropout` (one number, or one per name; others 0).

    Dropping replaces the input, before encoding, by the encoder's null: classifier-free guidance, arXiv:2207.12598,
    Alg. 1. Without encoders it gives {}, the condition of an unconditional model. Raises ConfigError when two encoders
    give the same thing or a probability is none, DataError when a batch lacks a field.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], dropout: float | Mapping[str, float] = 0.1):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.dropout = _per_encoder(dropout, encoders)
        self.dims: dict[str, int] = {}
        for name, encoder in self.encoders.items():
            _merge(self.dims, encoder.dims, name)
        self.register_buffer("_device", torch.empty(0), persistent=False)  # where conditions are to be made

    @property
    def fields(self) -> set[str]:
        """Keys of the batch that the encoders read."""
        return {encoder.field for encoder in self.encoders.values()}

    def forward(self, batch: dict, key: int | None = None) -> dict[str, Tensor]:
        """Batch of B -> conditions. With a key (training: the run's seed) inputs are dropped, by batch["position"]."""
        cond: dict[str, Tensor] = {}
        for name, encoder in self.encoders.items():
            values = _values(batch, encoder.field, name)
            if key is not None:
                values = self._drop(values, name, encoder.null, batch["position"], key)
            _merge(cond, encoder(values, self._device.device), name)
        return cond

    def null(self, count: int) -> dict[str, Tensor]:
        """Conditions of `count` images that have none: the other half of classifier-free guidance."""
        return self({encoder.field: [encoder.null] * count for encoder in self.encoders.values()})

    def _drop(self, values: list, name: str, null, position: Tensor, key: int) -> list:
        draws = seeding.uniform(seeding.keys(key, f"drop/{name}", position.cpu()))  # B
        return [null if u < self.dropout[name] else value for u, value in zip(draws.tolist(), values, strict=True)]


def _values(batch: dict, field: str, name: str) -> list:
    if field not in batch:
        given = ", ".join(sorted(batch)) or "nothing"
        raise DataError(f"encoder {name!r} reads {field!r} but the data has only {given}; choose another conditioner")
    values = batch[field]
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _per_encoder(dropout: float | Mapping[str, float], encoders: Mapping[str, nn.Module]) -> dict[str, float]:
    given = dict(dropout) if isinstance(dropout, Mapping) else dict.fromkeys(encoders, dropout)
    if unknown := set(given) - set(encoders):
        raise ConfigError(f"dropout for {', '.join(sorted(unknown))}, expected one of: {', '.join(encoders) or 'none'}")
    for name, probability in given.items():
        if not 0 <= probability <= 1:
            raise ConfigError(f"dropout of {name} is {probability}, expected a probability between 0 and 1")
    return {name: given.get(name, 0.0) for name in encoders}


def _merge(into: dict, new: dict, name: str) -> None:
    if doubled := sorted(into.keys() & new.keys()):
        raise ConfigError(f"encoder {name!r} gives {', '.join(doubled)}, as does another encoder; keep one of them")
    into.update(new)
