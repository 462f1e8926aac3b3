"""LoRA (arXiv:2106.09685) and its kin: trained, loaded, injected into any network, merged into it, saved.

| class | configs/adapters       | a change of W                                                   |
| ----- | ---------------------- | --------------------------------------------------------------- |
| LoRA  | lora, locon, dora      | alpha / rank B A; of convolutions too; with its length learned  |
| LoHa  | loha                   | alpha / rank (A1 B1) * (A2 B2)                                  |
| LoKr  | lokr                   | alpha / rank kron(W1, A B)                                      |

`lora_kinds` and `lora_relative` have the formulas, `adapted` what becomes of a layer, `lora_formats` and `lora_writing`
the files, `composition` switches.
"""

import copy
import math
import re
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from ldm.adapters.adapted import Adapted, adapt, restore
from ldm.adapters.base import Adapter, Networks
from ldm.adapters.lora_formats import read_contents
from ldm.adapters.lora_kinds import Change, hadamard, kronecker, low_rank
from ldm.adapters.lora_names import NETWORK, Site, adaptable, sites
from ldm.adapters.lora_relative import DoRA, output_magnitude
from ldm.adapters.lora_writing import write_lora
from ldm.adapters.product import Block
from ldm.utils.errors import ConfigError
from ldm.weights.ledger import listing


class WeightAdapter(Adapter):
    """An adapter that changes weights: whichever changes its subclass makes, in whichever layers."""

    trains = True
    dropout = 0.0

    def __init__(self, name: str, scale: float = 1.0):
        super().__init__(name, scale)
        self.paths: dict[str, list[str]] = {}  # of its layers, by slot

    @abstractmethod
    def changes(self, networks: Networks) -> Mapping[Site, Change]:
        """What it changes in these networks. Raises ConfigError or WeightsError; nothing has been touched."""

    def inject(self, networks: Networks) -> dict[str, int]:
        if self.networks:
            raise ConfigError(f"adapter {self.name}: is injected already; eject it first")
        networks = adaptable(networks)
        changes = self.changes(networks)
        by_layer: dict[tuple[str, str], list[tuple[Block, Change]]] = defaultdict(list)
        for site, change in changes.items():
            layer = networks[site.slot].get_submodule(site.path)
            if isinstance(layer, Adapted) and self.name in layer.strengths:
                raise ConfigError(f"adapter {self.name}: another of this name is there; give it another name=")
            by_layer[site.slot, site.path].append((site.block, change.to(site.parameter(networks))))
        for (slot, path), parts in by_layer.items():
            adapt(networks[slot], path).add(self.name, parts, trained=self.trains, dropout=self.dropout)
            self.paths.setdefault(slot, []).append(path)
        self.networks = networks
        self._update()
        return dict(Counter(site.slot for site in changes))

    def eject(self) -> None:
        for slot, path in self._places():
            restore(self.networks[slot], path, self.name)
        self.networks, self.paths = {}, {}

    def merge(self) -> None:
        """Fold it into the weights, W + scale dW, at the cost of none in speed. The weights as they were stay in main
        memory, so that `unmerge` and `eject` restore every bit; a new scale is merged anew."""
        for layer in self.layers():
            layer.merge(self.name)

    def unmerge(self) -> None:
        for layer in self.layers():
            layer.unmerge(self.name)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {
            f"{slot}.{path}.{name}": p
            for slot, path in self._places()
            for name, p in self.networks[slot].get_submodule(path).named_parameters()
            if p.requires_grad and name.split(".")[1:2] == [self.name]
        }

    def save(self, path: Path, layout: str = "kohya") -> None:
        """layout: kohya, diffusers, or peft (a folder, one network). Raises ConfigError for what it cannot hold."""
        changes = {
            Site(slot, where, block): change
            for slot, where in self._places()
            for block, change in self.networks[slot].get_submodule(where).parts(self.name)
        }
        write_lora(Path(path), changes, self.networks, layout)

    def on(self, networks: Networks) -> "WeightAdapter":
        """The same adapter in copies of its networks, such as those that hold averaged weights."""
        other = copy.copy(self)
        other.networks = {slot: networks[slot] for slot in self.networks}
        return other

    def apply_scale(self, scale: float) -> None:
        for layer in self.layers():
            layer.set(self.name, scale)

    def layers(self) -> Iterator[Adapted]:
        """Those it changes. Raises ConfigError while it is not injected."""
        if not self.networks:
            raise ConfigError(f"adapter {self.name}: is not injected")
        return (self.networks[slot].get_submodule(path) for slot, path in self._places())

    def _places(self) -> list[tuple[str, str]]:
        return [(slot, path) for slot, paths in self.paths.items() for path in paths]


class Loaded(WeightAdapter):
    """An adapter from a file or a folder, of any format in `lora_formats`. Raises WeightsError.

    strict: keys that match nothing in the base are an error; otherwise `notes` names them once it is injected.
    """

    trains = False

    def __init__(self, path: str | Path, scale: float = 1.0, name: str | None = None, *, strict: bool = True):
        super().__init__(name or Path(path).stem, scale)
        self.path = Path(path)
        self.strict = strict
        self.notes: list[str] = []  # of what is in the file and changes nothing

    def changes(self, networks: Networks) -> Mapping[Site, Change]:
        changes, self.notes = read_contents(self.path, networks, strict=self.strict)
        return changes


# --- to be trained ---------------------------------------------------------------------------------------------------


class Trained(WeightAdapter):
    """An adapter that begins as no change of the layers it targets, Linear and Conv2d.

    targets, text_targets: patterns (regular expressions) of published names, such as down_blocks.0...attn1.to_q of the
    denoiser and text_model.encoder.layers.0.self_attn.q_proj of text encoders; None changes nothing there.
    decompose: DoRA, whose lengths begin as those of W. Raises ConfigError.
    """

    def __init__(
        self,
        rank: int,
        alpha: float | None,
        targets: str | None,
        text_targets: str | None,
        rank_stabilized: bool,
        decompose: bool,
        name: str,
    ):
        super().__init__(name)
        if rank < 1 or (alpha is not None and not (math.isfinite(alpha) and alpha > 0)):
            raise ConfigError(f"adapter {name}: rank={rank}, alpha={alpha}; expected at least 1, and more than 0")
        self.rank = rank
        root = math.sqrt(rank) if rank_stabilized else rank  # arXiv:2312.03732
        self.strength = 1.0 if alpha is None else alpha / root
        self.targets, self.text_targets = targets, text_targets
        self.decompose = decompose

    @abstractmethod
    def change(self, weight: Tensor) -> Change:
        """One that is zero, for this weight."""

    def changes(self, networks: Networks) -> Mapping[Site, Change]:
        chosen: dict[Site, Change] = {}
        for slot, net in networks.items():
            pattern = self.targets if slot == NETWORK else self.text_targets
            if pattern is not None:
                chosen |= {site: self._begin(site.parameter(networks)) for site in self._matching(pattern, slot, net)}
        if not chosen:
            raise ConfigError(f"adapter {self.name}: neither targets nor text_targets is set, so it changes nothing")
        return chosen

    def _matching(self, pattern: str, slot: str, net: nn.Module) -> list[Site]:
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:  # a checkpoint's may be meant so
            raise ConfigError(
                f"adapter {self.name}: {pattern[:80]!r} could search for ever; "
                "repeat no group, and use at most three of *, +"
            )
        names = {site: name for site, name in sites(slot, net).items() if site.parameter({slot: net}).ndim > 1}
        try:
            found = [site for site, name in names.items() if re.search(pattern, name)]
        except re.error as error:
            raise ConfigError(f"adapter {self.name}: {pattern!r} is no regular expression ({error})") from error
        if not found:
            raise ConfigError(
                f"adapter {self.name}: {pattern!r} matches none of {slot}'s layers: {listing(list(names.values()))}"
            )
        return found

    def _begin(self, weight: Tensor) -> Change:
        change = self.change(weight)
        return DoRA(change, output_magnitude(weight)) if self.decompose else change


class LoRA(Trained):
    """B A of low rank, B zero. Of a convolution A has the kernel, or with `tucker` a factor between them (LoCon)."""

    def __init__(
        self,
        rank: int = 4,
        alpha: float | None = None,  # of the scale alpha / rank; None: 1
        *,
        targets: str | None = None,
        text_targets: str | None = None,
        rank_stabilized: bool = False,  # alpha / sqrt(rank): arXiv:2312.03732
        decompose: bool = False,  # arXiv:2402.09353
        tucker: bool = False,
        dropout: float = 0.0,  # of the layer's input; not of DoRA, which has no branch of its own
        name: str = "lora",
    ):
        super().__init__(rank, alpha, targets, text_targets, rank_stabilized, decompose, name)
        if not 0 <= dropout < 1 or (dropout and decompose):
            raise ConfigError(f"adapter {name}: dropout={dropout}, expected 0 to below 1, and 0 with decompose=true")
        self.tucker = tucker
        self.dropout = dropout

    def change(self, weight: Tensor) -> Change:
        return low_rank(weight, self.rank, self.strength, tucker=self.tucker)


class LoHa(Trained):
    """(A1 B1) * (A2 B2), of rank up to rank^2: arXiv:2108.06098, Eq. (2)."""

    def __init__(
        self,
        rank: int = 4,
        alpha: float | None = None,
        *,
        targets: str | None = None,
        text_targets: str | None = None,
        rank_stabilized: bool = False,
        decompose: bool = False,
        tucker: bool = False,
        name: str = "loha",
    ):
        super().__init__(rank, alpha, targets, text_targets, rank_stabilized, decompose, name)
        self.tucker = tucker

    def change(self, weight: Tensor) -> Change:
        return hadamard(weight, self.rank, self.strength, tucker=self.tucker)


class LoKr(Trained):
    """kron(W1, A B), as LyCORIS has it: arXiv:2309.14859, §3.2."""

    def __init__(
        self,
        rank: int = 4,
        alpha: float | None = None,
        *,
        factor: int = -1,  # rows and columns of W1, at most; -1: near the square root of W's
        targets: str | None = None,
        text_targets: str | None = None,
        rank_stabilized: bool = False,
        decompose: bool = False,
        name: str = "lokr",
    ):
        super().__init__(rank, alpha, targets, text_targets, rank_stabilized, decompose, name)
        self.factor = factor

    def change(self, weight: Tensor) -> Change:
        return kronecker(weight, self.rank, self.strength, factor=self.factor)
