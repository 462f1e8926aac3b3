"""What one adapter changes in one weight, by kind: a function of few parameters that is zero when training begins.

    LoRA, LoCon  s B A                              arXiv:2106.09685; convolutions, Tucker: arXiv:2309.14859
    LoHa         s (A1 B1) * (A2 B2)                arXiv:2108.06098
    LoKr         s kron(W1, W2), W2 = A B           arXiv:2212.10650, arXiv:2309.14859
    DoRA         m (W + dW) / |W + dW| - W          arXiv:2402.09353, around any of them
    Full         dW itself

s = alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732). A weight is (O I) or (O I k k); of a fused one, the
rows of one published matrix. Files hold the `tensors` of a kind under LyCORIS' names.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.utils.errors import WeightsError

Tensors = dict[str, Tensor]


class Change(nn.Module):
    """A change of one weight at full strength: (O I ...) -> (O I ...)."""

    bias: Tensor | None = None  # the change of the bias, where there is one
    is_vector = False  # of a norm

    def forward(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def tensors(self) -> Tensors:
        """As they stand in a file."""
        raise NotImplementedError


class LowRank(Change):
    """s B A: up B (O r), down A (r I). Of a convolution A is (r I k k); with Tucker (r I 1 1), then mid (r r k k)."""

    def __init__(self, down: Tensor, up: Tensor, mid: Tensor | None = None, scale: float = 1.0):
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.mid = None if mid is None else nn.Parameter(mid)
        self.scale = scale

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def kernel(self) -> Tensor:
        """A with its kernel: (r I) or (r I k k)."""
        return self.down if self.mid is None else torch.einsum("srhw,ri->sihw", self.mid, self.down.flatten(1))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * (self.up @ self.kernel().flatten(1)).view(weight.shape)

    def split(self, count: int) -> "list[LowRank]":
        """Of each of `count` blocks of rows, all with the same A."""
        mid = None if self.mid is None else self.mid.detach()
        return [LowRank(self.down.detach(), up, mid, self.scale) for up in self.up.detach().chunk(count)]

    def tensors(self) -> Tensors:
        up = self.up.view(*self.up.shape, *[1] * (self.down.ndim - 2))
        found = {"down": self.down, "up": up, "alpha": torch.tensor(self.scale * self.rank)}
        return found if self.mid is None else found | {"mid": self.mid}


class Hadamard(Change):
    """s (w1_a w1_b) * (w2_a w2_b): a (O r), b (r I k k flat); with Tucker t (r r k k), a (r O), b (r I)."""

    def __init__(self, factors: Mapping[str, Tensor], scale: float = 1.0):
        super().__init__()
        self.factors = nn.ParameterDict({name: nn.Parameter(factor) for name, factor in factors.items()})
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        first, second = (product(self.factors, f"w{i}", f"t{i}") for i in (1, 2))
        return (self.scale * first * second).view(weight.shape)

    def tensors(self) -> Tensors:
        rank = self.factors["w1_b"].shape[0]
        return {f"hada_{name}": p for name, p in self.factors.items()} | {"alpha": torch.tensor(self.scale * rank)}


class Kronecker(Change):
    """s kron(w1, w2): each whole, or a product of w_a and w_b, w2 also with Tucker's t2."""

    def __init__(self, factors: Mapping[str, Tensor], scale: float = 1.0):
        super().__init__()
        self.factors = nn.ParameterDict({name: nn.Parameter(factor) for name, factor in factors.items()})
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        first, second = (product(self.factors, f"w{i}", f"t{i}") for i in (1, 2))
        if second.ndim == 2:  # of a convolution, its kernel is flat
            (o1, i1), (o, i, *kernel) = first.shape, weight.shape
            second = second.view(o // o1, i // i1, *kernel)
        return self.scale * torch.kron(first.view(*first.shape, *[1] * (second.ndim - 2)), second)

    def tensors(self) -> Tensors:
        found = {f"lokr_{name}": p for name, p in self.factors.items()}
        rank = kronecker_rank(self.factors)
        return found | ({"alpha": torch.tensor(self.scale * rank)} if rank else {})


class Full(Change):
    """The change itself, and that of the bias."""

    def __init__(self, diff: Tensor, diff_b: Tensor | None = None):
        super().__init__()
        self.diff = nn.Parameter(diff)
        self.diff_b = None if diff_b is None else nn.Parameter(diff_b)

    @property
    def bias(self) -> Tensor | None:
        return self.diff_b

    @property
    def is_vector(self) -> bool:
        return self.diff.ndim == 1

    def forward(self, weight: Tensor) -> Tensor:
        return self.diff.view(weight.shape)

    def tensors(self) -> Tensors:
        return {"diff": self.diff} | ({} if self.diff_b is None else {"diff_b": self.diff_b})


class DoRA(Change):
    """Eq. (5), arXiv:2402.09353: the direction of W + dW, its length m learned; the norm takes no gradient (§4.3).

    magnitude has size 1 in the axes that a norm runs over: (O 1 ...) one for each output, (1 I ...) for each input.
    """

    def __init__(self, change: Change, magnitude: Tensor):
        super().__init__()
        self.change = change
        self.magnitude = nn.Parameter(magnitude)

    def forward(self, weight: Tensor) -> Tensor:
        direction = weight + self.change(weight)
        return self.magnitude / norm_as(direction.detach(), self.magnitude) * direction - weight

    def tensors(self) -> Tensors:
        return self.change.tensors() | {"dora_scale": self.magnitude}


def norm_as(weight: Tensor, magnitude: Tensor) -> Tensor:
    """The norm over the axes in which `magnitude` has size 1; never zero, since layers may start at zero."""
    axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    return torch.linalg.vector_norm(weight, dim=axes, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)


def output_magnitude(weight: Tensor) -> Tensor:
    """One for each output, as §4 of arXiv:2402.09353 and PEFT have it: (O 1 ...)."""
    return norm_as(weight, weight.new_empty(len(weight), *[1] * (weight.ndim - 1), device="meta"))


def product(factors: nn.ParameterDict, name: str, tucker: str) -> Tensor:
    """A matrix that is whole, or in two factors, or with its kernel in three."""
    if name in factors:
        return factors[name]
    a, b = factors[f"{name}_a"], factors[f"{name}_b"]
    return torch.einsum("ijhw,ip,jr->prhw", factors[tucker], a, b) if tucker in factors else a @ b


def kronecker_rank(factors: Mapping[str, Tensor]) -> int | None:
    """None where both matrices are whole: then alpha means nothing."""
    return next((len(factors[name]) for name in ("w1_b", "w2_b") if name in factors), None)


# --- where training begins -------------------------------------------------------------------------------------------


def low_rank(weight: Tensor, rank: int, scale: float, *, tucker: bool = False) -> LowRank:
    """A Kaiming uniform as torch's layers, B zero: §4.1 of arXiv:2106.09685 and all trainers."""
    tucker = tucker and math.prod(weight.shape[2:]) > 1
    down = weight.new_empty(rank, weight.shape[1], *([1] * (weight.ndim - 2) if tucker else weight.shape[2:]))
    mid = weight.new_empty(rank, rank, *weight.shape[2:]) if tucker else None
    for factor in [down] + [mid] * tucker:
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    return LowRank(down, weight.new_zeros(weight.shape[0], rank), mid, scale)


def hadamard(weight: Tensor, rank: int, scale: float, *, tucker: bool = False) -> Hadamard:
    """Deviations as small as LyCORIS has them (arXiv:2309.14859); one factor of the second product is zero."""
    tucker = tucker and math.prod(weight.shape[2:]) > 1
    rows, columns = weight.shape[0], weight.shape[1] if tucker else weight[0].numel()
    factors = {}
    for i, std in ((1, 0.1), (2, 0.0)):
        factors[f"w{i}_a"] = weight.new_empty(*((rank, rows) if tucker else (rows, rank))).normal_(std=std)
        factors[f"w{i}_b"] = weight.new_empty(rank, columns).normal_()
        if tucker:
            factors[f"t{i}"] = weight.new_empty(rank, rank, *weight.shape[2:]).normal_(std=0.1)
    return Hadamard(factors, scale)


def kronecker(weight: Tensor, rank: int, scale: float, *, factor: int = -1) -> Kronecker:
    """W1 (o1 i1) whole; W2 (o2 i2 k k) whole where two factors of this rank would hold as much, and then unscaled."""
    (o1, o2), (i1, i2) = split(weight.shape[0], factor), split(weight.shape[1], factor)
    columns = i2 * math.prod(weight.shape[2:])
    factors = {"w1": nn.init.kaiming_uniform_(weight.new_empty(o1, i1), a=math.sqrt(5))}
    if rank * (o2 + columns) >= o2 * columns:
        return Kronecker(factors | {"w2": weight.new_zeros(o2, i2, *weight.shape[2:])})
    factors["w2_a"] = weight.new_zeros(o2, rank)
    factors["w2_b"] = nn.init.kaiming_uniform_(weight.new_empty(rank, columns), a=math.sqrt(5))
    return Kronecker(factors, scale)


def split(size: int, factor: int) -> tuple[int, int]:
    """size = a b with a <= b: a is `factor` where that divides, else the largest divisor up to it, or to the root."""
    limit = min(factor, math.isqrt(size)) if factor > 0 else math.isqrt(size)
    first = next(a for a in range(limit, 0, -1) if size % a == 0)
    return first, size // first


# --- from the tensors of a file --------------------------------------------------------------------------------------

COMPLETE = (  # what a change consists of; what may be there beside it
    ({"down", "up"}, {"mid", "alpha", "dora_scale", "magnitude"}),
    ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2", "alpha", "dora_scale"}),
    ({"lokr_w1", "lokr_w2"}, {"lokr_t2", "alpha", "dora_scale"}),
    ({"diff"}, {"diff_b"}),
)


def read(
    name: str, tensors: Tensors, shape: torch.Size, *, stabilized: bool = False, rank: int | None = None
) -> Change:
    """The change that the tensors of one module are, for a weight of this shape. Raises WeightsError.

    stabilized: alpha is divided by the root of the rank, as PEFT's use_rslora says. rank: what alpha is divided by
    where no tensor has one, in PEFT's LoKr of two whole matrices. Without alpha the scale is 1.
    """
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not (tensor.is_meta or tensor.isfinite().all()):
            raise WeightsError(f"{name}.{key} is not of finite floating-point numbers; the file is damaged")
    whole = {key[:-2] if re.fullmatch(r"lokr_w\d_[ab]", key) else key for key in tensors}
    if not any(needed <= whole <= needed | optional for needed, optional in COMPLETE):
        raise WeightsError(f"{name} has {', '.join(sorted(tensors))}, which is no whole change of a kind known here")
    shapes_only = {key: tensor if key == "alpha" else tensor.to("meta") for key, tensor in tensors.items()}
    try:
        fits = _change(shapes_only, shape, stabilized, rank)(torch.empty(shape, device="meta")).shape == shape
    except (RuntimeError, IndexError, KeyError, ValueError):
        fits = False
    if fits:
        return _change(tensors, shape, stabilized, rank)
    shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items() if tensor.ndim)
    raise WeightsError(f"{name} has {shapes}, which do not make a change of a weight {tuple(shape)}")


def _change(tensors: Tensors, shape: torch.Size, stabilized: bool, whole_rank: int | None) -> Change:
    """Raises one of several errors where shapes do not fit."""
    tensors = dict(tensors)
    alpha = tensors.pop("alpha", None)
    by_output, either = tensors.pop("magnitude", None), tensors.pop("dora_scale", None)

    def scale(rank: int) -> float:
        return 1.0 if alpha is None else alpha.item() / (math.sqrt(rank) if stabilized else rank)

    if "diff" in tensors:
        return Full(**tensors)
    if "up" in tensors:
        tensors["up"] = tensors["up"].flatten(1)
        change = LowRank(**tensors, scale=scale(tensors["up"].shape[1]))
    elif "hada_w1_b" in tensors:
        change = Hadamard(_named(tensors, "hada_"), scale(len(tensors["hada_w1_b"])))
    else:
        factors = _named(tensors, "lokr_")
        rank = kronecker_rank(factors)
        if not rank and whole_rank:
            factors["w1"] = factors["w1"] * scale(whole_rank)
        change = Kronecker(factors, scale(rank) if rank else 1.0)
    if by_output is not None:  # PEFT's, in whatever shape
        return DoRA(change, by_output.view(shape[0], *[1] * (len(shape) - 1)))
    return change if either is None else DoRA(change, _magnitude(either, shape))


def _named(tensors: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _magnitude(found: Tensor, shape: torch.Size) -> Tensor:
    """By its shape, since LyCORIS wrote both: (O 1 ...) one for each output; (1 I ...) one for each input, at first."""
    rows = found.numel() == shape[0] == len(found)
    return found.view((shape[0], *[1] * (len(shape) - 1)) if rows else (1, shape[1], *[1] * (len(shape) - 2)))
