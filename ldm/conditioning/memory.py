"""What a frozen encoder has read is not read again: a prompt with many seeds, the empty text of every batch."""

from collections.abc import Callable, Hashable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

Conditions = dict[str, Tensor]
SIZE = 256  # texts: 60 MB of CLIP-L's float32 context, 100 MB of bigG's


class Memory:
    """The conditions of the last `size` inputs of a network, forgotten when a weight of it is changed, moved or cast.

    Only a network in eval mode of which no gradient is wanted is remembered. What is recalled is a copy and equals
    what the network would give; the batch it was first read in may show in the last bit. A copy of a memory is empty.
    """

    def __init__(self, size: int = SIZE):
        self.size = size
        self.rows: dict[Hashable, Conditions] = {}
        self._state: Hashable = None

    def __reduce__(self):
        return Memory, (self.size,)

    def recall(
        self, network: nn.Module, inputs: Sequence[Hashable], encode: Callable[[list], Conditions], *how: Hashable
    ) -> Conditions:
        """Conditions of the inputs, row by row. `encode` reads those not known; `how` is all else it depends on."""
        new = list(dict.fromkeys(inputs))
        if not _frozen(network):
            return _stack(dict(zip(new, _rows(encode(new)), strict=True)), inputs)
        self._forget_if_changed((how, _autocast(), _weights(network)))
        known = {key: self.rows.pop(key) for key in new if key in self.rows}  # to be put back as the latest
        if new := [key for key in new if key not in known]:
            rows = _rows(encode(new))
            known |= {key: _cloned(row) for key, row in zip(new, rows, strict=True)}
        self.rows |= known
        for key in list(self.rows)[: -self.size]:
            del self.rows[key]
        return _stack(known, inputs)

    def _forget_if_changed(self, state: Hashable) -> None:
        if state != self._state:
            self.rows.clear()
            self._state = state


def _frozen(network: nn.Module) -> bool:
    wanted = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in network.parameters())
    return not network.training and not wanted


def _weights(network: nn.Module) -> Hashable:
    """Changes with every assignment and every in-place operation: of a weight, of the scale of an adapter in it."""
    tensors = chain(network.parameters(), network.buffers())
    return tuple((p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in tensors)


def _autocast() -> Hashable:
    return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))


def _rows(cond: Conditions) -> list[Conditions]:
    return [dict(zip(cond, row, strict=True)) for row in zip(*cond.values(), strict=True)]


def _cloned(row: Conditions) -> Conditions:
    return {name: value.clone() for name, value in row.items()}  # a view would keep its whole batch


def _stack(rows: dict[Hashable, Conditions], inputs: Sequence[Hashable]) -> Conditions:
    names = next(iter(rows.values()))
    return {name: torch.stack([rows[key][name] for key in inputs]) for name in names}
