"""Adapters of weights written as kohya's trainer, diffusers or PEFT write them (`lora_formats` has the names)."""

from collections.abc import Mapping
from pathlib import Path

from ldm.adapters.base import Networks
from ldm.adapters.lora_formats import PEFT_CONFIG, PEFT_WEIGHTS
from ldm.adapters.lora_kinds import Change, LowRank, Tensors
from ldm.adapters.lora_names import Site, adaptable, prefixes, sites
from ldm.adapters.lora_relative import DoRA
from ldm.io.folders import appearing
from ldm.io.tensors import write_tensors
from ldm.io.text import write_json
from ldm.utils.errors import ConfigError
from ldm.weights.ledger import listing

LAYOUTS = ("kohya", "diffusers", "peft")
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
NORMS = {"diff": "w_norm", "diff_b": "b_norm"}


def write_lora(path: Path, changes: Mapping[Site, Change], networks: Networks, layout: str = "kohya") -> None:
    """One .safetensors file, or PEFT's folder. Raises ConfigError for what a layout cannot hold, WeightsError."""
    if layout not in LAYOUTS:
        raise ConfigError(f"{path}: layout={layout!r} is not known; expected one of {', '.join(LAYOUTS)}")
    if layout == "peft":
        return _write_peft(path, changes, networks)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: expected a .safetensors file for layout={layout}")
    starts, tensors = prefixes(networks), {}
    for site, name in _named(changes, networks):
        prefix = starts[site.slot]
        if layout == "kohya":
            found = _kohya(prefix.flat[0] + name.replace(".", "_"), changes[site])
        else:
            found = _diffusers(prefix.dotted[0] + name, changes[site], folded=True)
        tensors |= found
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors)


def _named(changes: Mapping[Site, Change], networks: Networks) -> list[tuple[Site, str]]:
    names = {site: name for slot, net in adaptable(networks).items() for site, name in sites(slot, net).items()}
    if whole := sorted(site.path for site in changes if site not in names):
        raise ConfigError(f"q, k and v of {listing(whole)} are changed as one, which only OpenCLIP's own names can say")
    return [(site, names[site]) for site in changes]


def _kohya(stem: str, change: Change) -> Tensors:
    found = change.tensors()
    ends = KOHYA | (NORMS if change.is_vector else {})
    return {f"{stem}.{ends.get(key, key)}": tensor.detach() for key, tensor in found.items()}


def _diffusers(stem: str, change: Change, *, folded: bool) -> Tensors:
    """folded: the scale is in B, since the layout has no place for it."""
    low, magnitude = (change.change, change.magnitude) if isinstance(change, DoRA) else (change, None)
    if not isinstance(low, LowRank) or (magnitude is not None and len(magnitude) == 1):
        raise ConfigError(f"{stem}: a {type(low).__name__} of this kind has no place in diffusers' layout; use kohya")
    tensors = low.tensors()
    scale = low.scale if folded else 1.0
    found = {f"{stem}.lora_A.weight": low.kernel(), f"{stem}.lora_B.weight": tensors["up"] * scale}
    if magnitude is not None:
        kernel_axes = magnitude.ndim - 2
        shape = (1, -1, *[1] * kernel_axes) if kernel_axes else (-1,)
        found[f"{stem}.lora_magnitude_vector"] = magnitude.reshape(shape)
    return {key: tensor.detach() for key, tensor in found.items()}


def _write_peft(path: Path, changes: Mapping[Site, Change], networks: Networks) -> None:
    """A folder for the one network that is changed: its scales are exact."""
    if len(slots := {site.slot for site in changes}) != 1:
        raise ConfigError(f"{path}: PEFT's layout holds one network, this adapter changes {', '.join(sorted(slots))}")
    tensors, ranks, alphas = {}, {}, {}
    for site, name in _named(changes, networks):
        tensors |= _diffusers(f"base_model.model.{name}", changes[site], folded=False)
        low = changes[site].change if isinstance(changes[site], DoRA) else changes[site]
        ranks[name], alphas[name] = low.rank, low.scale * low.rank
    config = {
        "peft_type": "LORA", "r": next(iter(ranks.values())), "lora_alpha": next(iter(alphas.values())),
        "rank_pattern": ranks, "alpha_pattern": alphas, "target_modules": sorted(ranks),
        "use_dora": any(isinstance(change, DoRA) for change in changes.values()), "bias": "none",
    }  # fmt: skip
    with appearing(path) as folder:
        write_tensors(folder / PEFT_WEIGHTS[0], tensors)
        write_json(folder / PEFT_CONFIG, config)
