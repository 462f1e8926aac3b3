"""Files of LoRA and its kin: what they hold, read from their keys alone; written as kohya, diffusers or PEFT do.

    kohya      STEM.lora_down.weight  STEM.lora_up.weight  STEM.lora_mid.weight  STEM.alpha  STEM.dora_scale
    LyCORIS    STEM.hada_w1_a ...  STEM.lokr_w1 ...  STEM.diff  STEM.diff_b  STEM.w_norm  STEM.b_norm
    diffusers  STEM.lora_A.weight  STEM.lora_B.weight  STEM.lora_magnitude_vector; before that STEM.lora.down.weight,
               ....processor.to_q_lora.down.weight, STEM.lora_linear_layer.down.weight
    PEFT       as diffusers, with adapter_config.json beside the file

STEM is a name of `lora_names`. Scales: alpha / rank; without alpha 1; diffusers' and PEFT's stand in their configs.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.adapters.base import Networks
from ldm.adapters.lora_kinds import Change, DoRA, LowRank, Tensors, read
from ldm.adapters.lora_names import Site, adaptable, index, prefixes, sites
from ldm.io.folders import appearing
from ldm.io.stored import Stored, index_tensors
from ldm.io.tensors import read_header, write_tensors
from ldm.io.text import parse_json, read_config, write_json
from ldm.utils.errors import ConfigError, DataError, WeightsError
from ldm.weights.detect import FAMILIES, looks_like
from ldm.weights.ledger import listing
from ldm.weights.sources import shapes_of

Config = dict[str, Any]

LAYOUTS = ("kohya", "diffusers", "peft")
KINDS = {  # the end of a key -> the tensor's name in `lora_kinds`
    **{f"{start}{old}.weight": new for start in ("lora_", "lora.", "lora_linear_layer.")
       for old, new in (("down", "down"), ("up", "up"), ("mid", "mid"))},
    "lora_A.weight": "down", "lora_B.weight": "up",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    "alpha": "alpha", "lora.alpha": "alpha", "lora_linear_layer.alpha": "alpha", "dora_scale": "dora_scale",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": "diff", "diff_b": "diff_b", "w_norm": "diff", "b_norm": "diff_b",
}  # fmt: skip
SPELLINGS = (  # of one key, brought to one
    (r"^(base_model\.model\.|module\.)+", ""),
    (r"_orig_mod\.", ""),
    (r"\.processor\.", "."),
    (r"\.self_attn\.to_(q|k|v|out)_lora\.", r".self_attn.\1_proj.lora."),
    (r"\.to_(q|k|v)_lora\.", r".to_\1.lora."),
    (r"\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.(lora_A|lora_B|lora_magnitude_vector)\.default\b", r".\1"),
)
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # in the header


# --- reading ---------------------------------------------------------------------------------------------------------


def read_lora(path: Path, networks: Networks) -> dict[Site, Change]:
    """What a file, or the folder of one, changes in these networks, every key accounted for. Raises WeightsError."""
    file = _file(path)
    stored = index_tensors(file)
    modules, unknown = split_keys(stored)
    if not modules:
        raise WeightsError(f"{path}: {looks_like(shapes_of(stored))}; expected a LoRA or one of its kin")
    known = index(networks)
    _check_family(path, modules, known, networks)
    strange = [f"{stem}.{next(iter(modules[stem]))}" for stem in sorted(modules.keys() - known.keys())]
    if unknown or strange:
        raise WeightsError(f"{path}: keys that match nothing in this base: {listing(unknown + strange)}")
    configs, blocks = _configs(file), _blocks(networks)
    changes: dict[Site, Change] = {}
    for stem, found in modules.items():
        site, tensors = known[stem], {kind: tensor.read() for kind, tensor in found.items()}
        change = _change(path, stem, tensors, site, networks, _config_of(stem, configs))
        parts = {site: change}
        if isinstance(change, LowRank) and len(own := blocks[site.slot, site.path]) > site.block.count:
            parts = dict(zip(own, change.split(len(own)), strict=True))  # OpenCLIP's in_proj is q, k, v of others
        for part, low in parts.items():
            changes.setdefault(part, low)  # once: some files hold everything under two names
    return changes


def _blocks(networks: Networks) -> dict[tuple[str, str], list[Site]]:
    """The published layers that each of ours consists of."""
    found: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for slot, net in adaptable(networks).items():
        for site in sites(slot, net):
            found[slot, site.path].append(site)
    return found


def split_keys(tensors: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Tensors by stem and by kind, and the keys of no known kind."""
    modules: dict[str, dict[str, Any]] = defaultdict(dict)
    unknown = []
    for key, tensor in tensors.items():
        spelled = key
        for pattern, name in SPELLINGS:
            spelled = re.sub(pattern, name, spelled)
        words = spelled.split(".")
        ends = [n for n in (3, 2, 1) if ".".join(words[-n:]) in KINDS and len(words) > n]
        if ends:
            modules[".".join(words[: -ends[0]])][KINDS[".".join(words[-ends[0] :])]] = tensor
        else:
            unknown.append(key)
    return dict(modules), sorted(unknown)


def _change(path: Path, stem: str, tensors: Tensors, site: Site, networks: Networks, config: Config) -> Change:
    if "alpha" not in tensors and config:
        pattern = config.get("alpha_pattern") or {}
        own = [alpha for module, alpha in pattern.items() if f".{stem}".endswith(f".{module}")]
        tensors = tensors | {"alpha": torch.tensor(float((own or [config["lora_alpha"]])[0]))}
    name, shape, stabilized = f"{path}: {stem}", site.parameter(networks).shape, bool(config.get("use_rslora"))
    change = read(name, tensors, shape, stabilized=stabilized, rank=config.get("r"))
    if change.bias is not None:
        bias = site.parameter(networks, "bias")
        if bias is None or bias.shape != change.bias.shape:
            raise WeightsError(f"{name}: changes a bias {tuple(change.bias.shape)}, which the base has not")
    return change


def _check_family(
    path: Path, modules: Mapping[str, dict[str, Stored]], known: Mapping[str, Site], networks: Networks
) -> None:
    """The width of the text tells the families of Stable Diffusion apart."""
    widths = [set(), set()]
    for stem, tensors in modules.items():
        if re.search(r"attn2[._]to_[kv]$", stem) and "down" in tensors:
            widths[0].add(tensors["down"].shape[1])
    widths[1] |= {site.parameter(networks).shape[1] for stem, site in known.items() if stem.endswith("attn2.to_k")}
    if widths[0] and widths[1] and widths[0] != widths[1]:
        made, base = (" or ".join(map(_family, sorted(found))) for found in widths)
        raise WeightsError(f"{path}: made for {made}, but the base is {base}")


def _family(width: int) -> str:
    return f"{FAMILIES.get(width, 'another network')} (text of width {width})"


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = (*PEFT_WEIGHTS, *DIFFUSERS_WEIGHTS)
    there = [path / name for name in names if (path / name).is_file()]
    if not there:
        raise WeightsError(f"{path}: a folder without {' or '.join(names)}; give the file itself")
    return there[0]


def _configs(file: Path) -> dict[str, Config]:
    """Settings of PEFT beside the file, or of diffusers within it, by how keys begin."""
    try:
        if file.name in PEFT_WEIGHTS:
            if not (file.parent / PEFT_CONFIG).is_file():
                raise WeightsError(f"{file}: no {PEFT_CONFIG} beside it, which holds the scale; copy it there")
            return {"": _checked(read_config(file.parent / PEFT_CONFIG), file)}
        header = read_header(file).metadata.get(DIFFUSERS_CONFIG) if file.suffix == ".safetensors" else None
        table = parse_json(header or "{}", f"{file} (metadata)", WeightsError)
    except DataError as error:
        raise WeightsError(str(error)) from error
    found: dict[str, Config] = defaultdict(dict)
    for key, value in (table if isinstance(table, dict) else {}).items():
        start, _, name = key.partition(".")
        found[f"{start}."][name] = value
    return {start: _checked(config, file) for start, config in found.items()}


def _checked(config: Config, file: Path) -> Config:
    """The settings that decide a scale, when they are numbers. Names only: a file brings no regular expressions."""
    pattern = config.get("alpha_pattern") or {}
    config = {"lora_alpha": config.get("alpha")} | config  # as PEFT's LoHa and LoKr have it
    numbers = [config["lora_alpha"], *(pattern.values() if isinstance(pattern, dict) else [None])]
    names = all(re.fullmatch(r"[\w.]+", name) for name in pattern)
    if not names or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        found = f"lora_alpha={numbers[0]}, alpha_pattern={str(pattern)[:60]}"
        raise WeightsError(f"{file}: its settings have {found}; expected numbers, by names of modules")
    return config


def _config_of(stem: str, configs: Mapping[str, Config]) -> Config:
    return next((config for start, config in configs.items() if stem.startswith(start)), {})


# --- writing ---------------------------------------------------------------------------------------------------------

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
