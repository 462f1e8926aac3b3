"""What one adapter changes in one weight, by kind: a function of few parameters that is zero when training begins.

    LoRA, LoCon  s B A                              arXiv:2106.09685; convolutions, Tucker: arXiv:2309.14859
    LoHa         s (A1 B1) * (A2 B2)                arXiv:2108.06098
    LoKr         s kron(W1, W2), W2 = A B           arXiv:2212.10650, arXiv:2309.14859
    Full         dW itself; Sparse holds the few elements of one that are not zero

s = alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732). A weight is (O I) or (O I k k); of a fused one, the
rows of one published matrix. Files hold the `tensors` of a kind under LyCORIS' names; `lora_tensors` reads them, and
`lora_relative` has the kinds that depend on the weight they change.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

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
    """The change itself."""

    def __init__(self, diff: Tensor):
        super().__init__()
        self.diff = nn.Parameter(diff)

    @property
    def is_vector(self) -> bool:
        return self.diff.ndim == 1

    def forward(self, weight: Tensor) -> Tensor:
        return self.diff.view(weight.shape)

    def tensors(self) -> Tensors:
        return {"diff": self.diff}


class Sparse(Change):
    """The elements of a change that are not zero: values (n), rows and columns (2 n) of a weight that is flat (O I)."""

    def __init__(self, places: Tensor, values: Tensor, size: Tensor, scale: float = 1.0):
        super().__init__()
        self.register_buffer("places", places.long(), persistent=False)
        self.register_buffer("size", size, persistent=False)
        self.values = nn.Parameter(values)
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        whole = torch.zeros_like(weight)
        rows, columns = self.places
        whole.flatten(1).index_put_((rows, columns), self.scale * self.values.to(whole.dtype), accumulate=True)
        return whole

    def tensors(self) -> Tensors:
        return {"bias_indices": self.places, "bias_values": self.values, "bias_size": self.size}


class Sum(Change):
    """One change and another of the same weight."""

    def __init__(self, first: Change, second: Change):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, weight: Tensor) -> Tensor:
        return self.first(weight) + self.second(weight)

    def tensors(self) -> Tensors:
        return self.second.tensors() | self.first.tensors()


class Unchanged(Change):
    """None at all, where only the bias changes."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)

    def tensors(self) -> Tensors:
        return {}


class Biased(Change):
    """A change of the weight, and one of the bias."""

    def __init__(self, change: Change, diff_b: Tensor):
        super().__init__()
        self.change = change
        self.diff_b = nn.Parameter(diff_b)

    @property
    def bias(self) -> Tensor:
        return self.diff_b

    @property
    def is_vector(self) -> bool:
        return self.change.is_vector

    def forward(self, weight: Tensor) -> Tensor:
        return self.change(weight)

    def tensors(self) -> Tensors:
        return self.change.tensors() | {"diff_b": self.diff_b}


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
