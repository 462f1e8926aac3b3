"""All that a network is told besides x_t and t: named encoders in, one dictionary of named tensors out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.utils import seeding
from ldm.utils.errors import ConfigError, DataError

REQUIRED = object()  # as the default of an encoder: the batch must have its field
DIMS = {"context": "context_dim", "pooled": "pooled_dim", "size": "num_sizes"}  # of conditions that can be joined


class Encoder(nn.Module):
    """forward(values, device) -> tensors by condition name, one row for each value of the field it reads."""

    field: str  # key of the batch
    null: Any  # the value that means "no condition"
    default: Any = REQUIRED  # what it reads for every image of a batch that has no such field
    dims: dict[str, int]  # what a network must know to be built: context_dim, pooled_dim, num_sizes, num_classes

    def without(self, value: Any) -> Any:
        """What it reads instead in the other half of classifier-free guidance."""
        return self.null

    def chosen(self, values: list, half: int) -> list:
        """What it reads of the values of a half of guidance, 0 with them and 1 without: those that a person chose."""
        return values

    def length(self, value: Any) -> int:
        """How long what it gives for a value is, in a unit of its own, where that differs between values."""
        return 0


class Conditioner(nn.Module):
    """Encoders by name, each dropped on its own with probability `dropout` (one number, or one per name; others 0).

    Dropping replaces the input, before encoding, by the encoder's null: classifier-free guidance, arXiv:2207.12598,
    Alg. 1. Without encoders it gives {}, the condition of an unconditional model. Conditions named in `join` may come
    from several encoders: one after the other along the channels. Raises ConfigError when two encoders give the same
    thing unasked or a probability is none, DataError when a batch lacks a field.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        dropout: float | Mapping[str, float] = 0.1,
        join: Sequence[str] = (),
    ):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.dropout = _per_encoder(dropout, encoders)
        self.join = tuple(join)
        if unknown := set(join) - set(DIMS):
            raise ConfigError(f"join={sorted(unknown)}: what can be joined is {', '.join(DIMS)}")
        self.dims: dict[str, int] = {}
        for name, encoder in self.encoders.items():
            _merge(self.dims, encoder.dims, name, [DIMS[condition] for condition in join], int.__add__)
        self.register_buffer("_device", torch.empty(0), persistent=False)  # where conditions are to be made

    @property
    def fields(self) -> set[str]:
        """Keys of the batch that the encoders read."""
        return {encoder.field for encoder in self.encoders.values()}

    def forward(self, batch: dict, key: int | None = None) -> dict[str, Tensor]:
        """Batch of B -> conditions. With a key (training: the run's seed) inputs are dropped, by batch["position"]."""
        values = {name: _values(batch, encoder, name) for name, encoder in self.encoders.items()}
        if key is not None:
            values = {name: self._drop(given, name, batch["position"], key) for name, given in values.items()}
        return self._encode(values)

    def pair(self, batch: dict, **instead: list) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(cond, null): the conditions of a batch, and those of the same batch without them or with other fields.

        All are encoded at once, so that both contexts have one length.
        """
        both = {}
        for name, encoder in self.encoders.items():
            values = _values(batch, encoder, name)
            null = instead.get(encoder.field, [encoder.without(value) for value in values])
            both[name] = encoder.chosen(values, 0) + encoder.chosen(null, 1)
        halves = {name: value.chunk(2) for name, value in self._encode(both).items()}
        return {name: cond for name, (cond, _) in halves.items()}, {name: null for name, (_, null) in halves.items()}

    def length(self, *texts: str | None) -> int:
        """Of the longest of the texts, over all encoders of captions; those of one length are encoded as when alone."""
        encoders = [encoder for encoder in self.encoders.values() if encoder.field == "caption"]
        return max((encoder.length(text) for encoder in encoders for text in texts if text), default=0)

    def _encode(self, values: dict[str, list]) -> dict[str, Tensor]:
        cond: dict[str, Tensor] = {}
        for name, encoder in self.encoders.items():
            _merge(cond, encoder(values[name], self._device.device), name, self.join, _concatenate)
        return cond

    def _drop(self, values: list, name: str, position: Tensor, key: int) -> list:
        draws = seeding.uniform(seeding.keys(key, f"drop/{name}", position.cpu())).tolist()  # B
        null, probability = self.encoders[name].null, self.dropout[name]
        return [null if u < probability else value for u, value in zip(draws, values, strict=True)]


def _values(batch: dict, encoder: Encoder, name: str) -> list:
    if encoder.field in batch:
        values = batch[encoder.field]
        return values.tolist() if isinstance(values, Tensor) and values.ndim == 1 else list(values)
    if encoder.default is not REQUIRED:
        return [encoder.default] * next(len(values) for values in batch.values() if isinstance(values, list | Tensor))
    given = ", ".join(sorted(batch)) or "nothing"
    raise DataError(
        f"encoder {name!r} reads {encoder.field!r} but the data has only {given}; choose another conditioner"
    )


def _per_encoder(dropout: float | Mapping[str, float], encoders: Mapping[str, nn.Module]) -> dict[str, float]:
    given = dict(dropout) if isinstance(dropout, Mapping) else dict.fromkeys(encoders, dropout)
    if unknown := set(given) - set(encoders):
        raise ConfigError(f"dropout for {', '.join(sorted(unknown))}, expected one of: {', '.join(encoders) or 'none'}")
    for name, probability in given.items():
        if not 0 <= probability <= 1:
            raise ConfigError(f"dropout of {name} is {probability}, expected a probability between 0 and 1")
    return {name: given.get(name, 0.0) for name in encoders}


def _merge(into: dict, new: dict, name: str, join: Sequence[str | None], add: Callable) -> None:
    if doubled := sorted((into.keys() & new.keys()) - set(join)):
        raise ConfigError(f"encoder {name!r} gives {', '.join(doubled)}, as does another encoder; keep one of them")
    for key, value in new.items():
        into[key] = add(into[key], value) if key in into else value


def _concatenate(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], dim=-1)
