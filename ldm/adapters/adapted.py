"""A layer with what adapters change in its weight: it stands where the layer stood, until the last of them is gone.

    y = layer(x) + sum_i k_i s_i B_i A_i x                      low rank: one product over the concatenated ranks
    y = that of a layer of weight W + sum_i k_i change_i(W)     every other kind; a bias likewise, from zero if need be

The layer's own parameters keep their names, and `weight` is what all of it together amounts to.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm.adapters.lora_kinds import Change, LowRank
from ldm.adapters.product import Block, Product, join, train, without
from ldm.nn.linear import linear
from ldm.utils.errors import ConfigError


class Placed(nn.Module):
    """A change that is no low-rank one, of one block of a weight."""

    def __init__(self, block: Block, change: Change):
        super().__init__()
        self.block = block
        self.change = change
        # What acts, as a value: by it those who remember what a network gave (`conditioning.memory`) see it change.
        self.register_buffer("strength", torch.zeros(()), persistent=False)

    def add_to(self, total: Tensor, weight: Tensor, strength: float) -> None:
        """What it makes of `weight`, added in place."""
        self.block.of(total).add_(self.change(self.block.of(weight)), alpha=strength)

    def add_to_bias(self, total: Tensor, strength: float) -> None:
        if self.change.bias is not None:
            self.block.of(total).add_(self.change.bias, alpha=strength)


class Adapted(nn.Module):
    """A layer and its adapters by name. One that trains has a product of its own; all that were loaded share one."""

    axis = -1  # of channels

    def __init__(self, layer: nn.Module):
        super().__init__()
        # One dict for both: parameters keep their names, and what is assigned, moved or cast here is so there too.
        self._parameters = layer._parameters
        self.__dict__["layer"] = layer  # no child, which would name the parameters once more
        self.products = nn.ModuleDict()
        self.placed = nn.ModuleDict()  # lists
        self.joined: Product | None = None
        self.strengths: dict[str, float] = {}
        self.merged: set[str] = set()
        self.original: dict[str, Tensor] = {}  # parameters that a merge has overwritten, in main memory
        self.live: dict[str, float] = {}  # strengths of `placed` that act and are not merged
        self.biased: dict[str, float] = {}  # those that give a bias to a layer without one, which no merge can hold
        self.acting: list[Product] = []  # those that are not merged

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)  # in_features, kernel_size, eps, ...

    # --- what it computes ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        own = {key: self._total(key, self.live).to(p.dtype) for key, p in self._own().items()} if self.live else {}
        if self.biased:
            own["bias"] = self.bias
        out = functional_call(self.layer, own, (x,)) if own else self.layer(x)
        for product in self.acting:
            out = product(out, x, self)
        return out

    def project(self, x: Tensor, kernel: Tensor) -> Tensor:
        """x through A."""
        return linear(x, kernel.flatten(1))

    def expand(self, h: Tensor, up: Tensor) -> Tensor:
        """What A gave through B."""
        return linear(h, up)

    @property
    def weight(self) -> Tensor:
        """With all changes, for those who look instead of calling."""
        weight, rest = self._parameters["weight"], self._unmerged()
        if not self.live and not self.acting:
            return weight
        total = self._total("weight", rest)
        for product in self.acting:
            product.add_to(total, rest)
        return total.to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        bias, weight = self._parameters["bias"], self._parameters["weight"]
        if bias is None:
            return self._total("bias", self.biased, weight.new_zeros(len(weight))).to(weight) if self.biased else None
        return self._total("bias", self.live).to(bias.dtype) if self.live else bias

    def _own(self) -> dict[str, nn.Parameter]:
        return {key: p for key, p in self._parameters.items() if p is not None}

    def _pristine(self, key: str) -> Tensor:
        """A parameter as it is without any adapter."""
        p = self._parameters[key]
        return self.original[key].to(p) if self.merged else p

    def _total(self, key: str, strengths: Mapping[str, float], start: Tensor | None = None) -> Tensor:
        """A parameter and what adapters but for products make of it, in float32 at least."""
        start = self._parameters[key] if start is None else start
        total = start.to(torch.promote_types(start.dtype, torch.float32), copy=True)
        for name in strengths.keys() & self.placed.keys():
            for part in self.placed[name]:
                if key == "bias":
                    part.add_to_bias(total, strengths[name])
                else:
                    part.add_to(total, self._pristine(key).to(total.dtype), strengths[name])
        return total

    # --- what it has --------------------------------------------------------------------------------------------------

    def add(self, name: str, parts: Sequence[tuple[Block, Change]], *, trained: bool, dropout: float = 0.0) -> None:
        """One more adapter, of strength zero."""
        low = [part for part in parts if isinstance(part[1], LowRank)]
        others = [Placed(*part) for part in parts if not isinstance(part[1], LowRank)]
        if others:
            self.placed[name] = nn.ModuleList(others).requires_grad_(trained)
        if low and trained:
            self.products[name] = train(name, low, dropout)
        elif low:
            self.joined = join(self.joined, name, low)
        self.set(name, 0.0)

    def remove(self, name: str) -> None:
        self.unmerge(name)
        for table in (self.products, self.placed, self.strengths):
            if name in table:
                table.pop(name)
        if self.joined is not None and name in self.joined.adapters:
            self.joined = without(self.joined, name)
        self._refresh()

    def parts(self, name: str) -> list[tuple[Block, Change]]:
        """What `add` was given, with the numbers of now: copies. Of loaded ones, Tucker decompositions as kernels."""
        found = [(part.block, part.change) for part in self.placed[name]] if name in self.placed else []
        for product in self._all_products():
            mid = None if product.mid is None else product.mid.detach().clone()
            found += [
                (s.block, LowRank(down.detach().clone(), up.detach().clone(), mid, s.scale))
                for s, down, up in product.parts()
                if s.adapter == name
            ]
        return sorted(found, key=lambda part: part[0])

    def set(self, name: str, strength: float) -> None:
        self.strengths[name] = strength
        if name in self.merged:
            self._write()
        self._refresh()

    def merge(self, name: str) -> None:
        """Fold an adapter into the parameters; what they were is kept, so that taking it out again costs no bit."""
        if not self.merged:
            self.original = {key: p.detach().to("cpu", copy=True) for key, p in self._own().items()}
        self.merged.add(name)
        self._write()
        self._refresh()

    def unmerge(self, name: str) -> None:
        if name in self.merged:
            self.merged.remove(name)
            self._write()
            self._refresh()

    @torch.no_grad()
    def _write(self) -> None:
        """The parameters from the original ones and what is merged, in place: their addresses stay."""
        merged = {name: self.strengths[name] for name in self.merged}
        for key, p in self._own().items():
            total = self._total(key, merged, self.original[key].to(p.device))
            if key == "weight":
                for product in self._all_products():
                    product.add_to(total, merged)
            p.copy_(total)
        if not merged:
            self.original = {}

    def _refresh(self) -> None:
        """What `forward` goes by. A product stays when its strengths are zero: a value, not another program."""
        rest = self._unmerged()
        self.live = {name: rest[name] for name in self.placed if rest.get(name)}
        self.biased = {}
        for name, parts in self.placed.items():
            for part in parts:
                part.strength.fill_(self.live.get(name, 0.0))
            if self._parameters["bias"] is None and any(part.change.bias is not None for part in parts):
                self.biased |= {name: k} if (k := self.strengths.get(name)) else {}
        self.acting = [product for product in self._all_products() if not product.adapters.isdisjoint(rest)]
        for product in self.acting:
            product.set(rest)

    def _unmerged(self) -> dict[str, float]:
        return {name: k for name, k in self.strengths.items() if name not in self.merged}

    def _all_products(self) -> list[Product]:
        return [*self.products.values()] + ([] if self.joined is None else [self.joined])


class AdaptedConv2d(Adapted):
    """The same of a convolution: A has its kernel, stride and padding, B is 1x1."""

    axis = 1

    def project(self, x: Tensor, kernel: Tensor) -> Tensor:
        layer = self.layer
        return F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)

    def expand(self, h: Tensor, up: Tensor) -> Tensor:
        return F.conv2d(h, up[:, :, None, None])


NORMS = (nn.GroupNorm, nn.LayerNorm)
ADAPTABLE = (nn.Linear, nn.Conv2d, *NORMS)


def plain(module: nn.Module) -> nn.Module:
    """The layer itself."""
    return module.layer if isinstance(module, Adapted) else module


def is_layer(module: nn.Module) -> bool:
    """Whether adapters can change it: a layer of the base, adapted or not."""
    layer = plain(module)
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        return False
    return isinstance(layer, ADAPTABLE) and layer._parameters["weight"] is not None


def adapt(net: nn.Module, path: str) -> Adapted:
    """The adapted layer at a path of a network, put there if it is not."""
    layer = net.get_submodule(path)
    if isinstance(layer, Adapted):
        return layer
    if not is_layer(layer):
        raise ConfigError(f"{path} is a {type(layer).__name__}, which adapters cannot change")
    adapted = (AdaptedConv2d if isinstance(layer, nn.Conv2d) else Adapted)(layer)
    _put(net, path, adapted.train(layer.training))
    return adapted


def restore(net: nn.Module, path: str, name: str) -> None:
    """Take an adapter from the layer at a path; the layer itself comes back when it was the last."""
    adapted = net.get_submodule(path)
    adapted.remove(name)
    if not adapted.strengths:
        _put(net, path, adapted.layer)


def _put(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, module)
