"""The change that the tensors of one module in a file are, by the names that `lora_keys` gives them.

Scales are alpha / rank, without alpha 1; LyCORIS' scalar multiplies them. Whatever the kind, a bias may change too: by
diff_b as it is, by the bias of an up matrix (PEFT's lora_bias) times the scale.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.adapters.lora_kinds import (
    Biased,
    Change,
    Full,
    Hadamard,
    Kronecker,
    LowRank,
    Sparse,
    Sum,
    Tensors,
    Unchanged,
    kronecker_rank,
)
from ldm.adapters.lora_relative import DoRA, GLoRA, Rotation, Stretch
from ldm.utils.errors import WeightsError

SPARSE = ("bias_indices", "bias_values", "bias_size")  # of a weight, in spite of their names
SCALED = {"alpha", "scalar", "diff_b"}
ADDED = {*SCALED, *SPARSE, "dora_scale"}
ONE_NUMBER = ("alpha", "scalar", "on_input")
WHOLE_NUMBERS = ("bias_indices", "bias_size")
MISFIT = (RuntimeError, IndexError, KeyError, ValueError, TypeError, ZeroDivisionError, AttributeError)


class Numbers(NamedTuple):
    """What is said of a module in numbers, by its tensors or by PEFT's settings."""

    alpha: float | None = None
    scalar: float = 1.0
    on_input: float = 0.0  # of (IA)^3: not 0 where inputs are stretched
    stabilized: bool = False  # alpha / sqrt(rank): use_rslora
    whole_rank: int | None = None  # what alpha is divided by where no tensor has a rank

    def scale(self, rank: int) -> float:
        if self.alpha is None or not rank:
            return self.scalar
        return self.scalar * self.alpha / (math.sqrt(rank) if self.stabilized else rank)


def read(
    name: str, tensors: Tensors, shape: torch.Size, *, stabilized: bool = False, rank: int | None = None
) -> Change:
    """The change of a weight of this shape. Raises WeightsError, before anything larger than the tensors is made.

    stabilized, rank: as in `Numbers`, its whole_rank.
    """
    tensors = {key: _checked(f"{name}.{key}", key, tensor) for key, tensor in tensors.items()}
    make = _maker(name, set(tensors))
    said = {key: tensors.pop(key).item() for key in ONE_NUMBER if key in tensors}
    numbers = Numbers(**said, stabilized=stabilized, whole_rank=rank)
    try:
        _check_places(tensors, shape)
        shapes_only = {key: tensor.to("meta") for key, tensor in tensors.items()}
        change = _complete(make, shapes_only, shape, numbers)
        fits = change(torch.empty(shape, device="meta")).shape == shape
    except MISFIT:
        fits = False
    if fits:
        return _complete(make, tensors, shape, numbers)
    shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items())
    raise WeightsError(f"{name} has {shapes}, which do not make a change of a weight {tuple(shape)}")


def _checked(name: str, key: str, tensor: Tensor) -> Tensor:
    """The tensor in a type that can be computed with. Raises WeightsError."""
    if key in ONE_NUMBER and tensor.numel() != 1:
        raise WeightsError(f"{name} holds {tensor.numel()} numbers, expected one; the file is damaged")
    if key in WHOLE_NUMBERS and not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.long()
    if key in ONE_NUMBER and not tensor.is_complex():
        tensor = tensor.double()  # an alpha may be a whole number
    elif tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # nothing is computed in 8 bits
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise WeightsError(f"{name} is not of finite floating-point numbers; the file is damaged")
    return tensor


def _check_places(tensors: Tensors, shape: torch.Size) -> None:
    """Raises one of MISFIT where places lie outside a weight, which no shape tells."""
    if "bias_indices" in tensors:
        places, values, size = (tensors[name] for name in SPARSE)
        inside = (places >= 0).all() and (places < size[:, None]).all()
        if size.tolist() != [shape[0], math.prod(shape[1:])] or places.shape != (2, len(values)) or not inside:
            raise ValueError(f"places in {size.tolist()}")


def _complete(make: "Make", tensors: Tensors, shape: torch.Size, numbers: Numbers) -> Change:
    """The change with all that goes with it. Raises one of MISFIT where shapes do not fit."""
    change = inner = make(tensors, shape, numbers)
    if "bias_values" in tensors:
        change = Sum(inner, Sparse(*(tensors[name] for name in SPARSE), inner.scale))
    if "magnitude" in tensors:  # PEFT's, in whatever shape
        change = DoRA(change, _along(0, tensors["magnitude"], shape))
    if "dora_scale" in tensors:
        change = DoRA(change, _magnitude(tensors["dora_scale"], shape))
    biases = [tensors["diff_b"]] if "diff_b" in tensors else []
    biases += [inner.scale * tensors["up_b"]] if "up_b" in tensors else []
    return Biased(change, sum(bias.reshape(shape[0]) for bias in biases)) if biases else change


def _along(axis: int, vector: Tensor, shape: torch.Size) -> Tensor:
    """The vector as it stretches along an axis of a weight of this shape."""
    return vector.reshape([size if i == axis else 1 for i, size in enumerate(shape)])


def _magnitude(found: Tensor, shape: torch.Size) -> Tensor:
    """By its shape, since LyCORIS wrote both: (O 1 ...) one for each output; (1 I ...) one for each input, at first."""
    return _along(0 if found.numel() == shape[0] == len(found) else 1, found, shape)


# --- kinds -----------------------------------------------------------------------------------------------------------

Make = Callable[[Tensors, torch.Size, Numbers], Change]


def _low_rank(tensors: Tensors, shape: torch.Size, numbers: Numbers) -> Change:
    up, down, mid = tensors["up"].flatten(1), tensors["down"], tensors.get("mid")
    if down.ndim > 2 and down.shape[1] != shape[1]:
        raise ValueError(f"{down.shape[1]} inputs, not {shape[1]}")
    kernel = shape[2:] if mid is None else [1] * len(shape[2:])
    return LowRank(down.reshape(len(down), shape[1], *kernel), up, mid, numbers.scale(up.shape[1]))


def _hadamard(tensors: Tensors, shape: torch.Size, numbers: Numbers) -> Change:
    return Hadamard(_named(tensors, "hada_"), numbers.scale(len(tensors["hada_w1_b"])))


def _kronecker(tensors: Tensors, shape: torch.Size, numbers: Numbers) -> Change:
    """Of two whole matrices, alpha means something to PEFT alone."""
    factors = _named(tensors, "lokr_")
    if rank := kronecker_rank(factors):
        return Kronecker(factors, numbers.scale(rank))
    factors["w1"] = factors["w1"] * (numbers.scale(numbers.whole_rank) if numbers.whole_rank else numbers.scalar)
    return Kronecker(factors)


def _full(tensors: Tensors, shape: torch.Size, numbers: Numbers) -> Change:
    """Of the shape of the weight, but for a kernel of one pixel."""
    pixel = [1] * abs(len(shape) - tensors["diff"].ndim)
    if [*tensors["diff"].shape, *pixel][: len(shape)] != [*shape, *pixel][: len(shape)]:
        raise ValueError(f"{tuple(tensors['diff'].shape)} of {tuple(shape)}")
    return Full(numbers.scalar * tensors["diff"])


def _stretch(tensors: Tensors, shape: torch.Size, numbers: Numbers) -> Change:
    return Stretch(_along(int(numbers.on_input != 0), tensors["weight"], shape))


def _glora(tensors: Tensors, shape: torch.Size, numbers: Numbers) -> Change:
    """The first files have the names of the factors the other way round."""
    factors = {name: tensors[name].flatten(1) for name in ("a1", "a2", "b1", "b2")}
    if len(factors["a1"]) != shape[1]:
        factors = dict(zip(("a2", "a1", "b2", "b1"), factors.values(), strict=True))
    return GLoRA(factors, numbers.scale(len(factors["a2"])))


def _rotation(tensors: Tensors, shape: torch.Size, numbers: Numbers) -> Change:
    rescale = tensors.get("rescale")
    return Rotation(tensors["oft_blocks"], None if rescale is None else _along(0, rescale, shape), numbers.alpha or 0.0)


def _unchanged(tensors: Tensors, shape: torch.Size, numbers: Numbers) -> Change:
    return Unchanged()


def _named(tensors: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


KINDS: tuple[tuple[set[str], set[str], Make], ...] = (  # what a change consists of; what may be there beside it
    ({"down", "up"}, {"mid", "up_b", "magnitude", *ADDED}, _low_rank),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2", *ADDED}, _hadamard),
    ({"lokr_w1", "lokr_w2"}, {"lokr_t2", *ADDED}, _kronecker),
    ({"diff"}, SCALED, _full),
    ({"a1", "a2", "b1", "b2"}, SCALED, _glora),
    ({"weight", "on_input"}, set(), _stretch),
    ({"oft_blocks"}, {"rescale", "alpha", "diff_b"}, _rotation),
    ({"diff_b"}, {"alpha"}, _unchanged),
)


def _maker(name: str, keys: set[str]) -> Make:
    whole = {key[:-2] if re.fullmatch(r"lokr_w\d_[ab]", key) else key for key in keys}
    for needed, optional, make in KINDS:
        if needed <= whole <= needed | optional and (whole.isdisjoint(SPARSE) or whole.issuperset(SPARSE)):
            return make
    raise WeightsError(f"{name} has {', '.join(sorted(keys))}, which is no whole change of a kind known here")
