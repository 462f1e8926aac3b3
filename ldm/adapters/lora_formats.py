"""Files of LoRA and its kin: what they hold, read from their keys alone; `lora_writing` writes them.

    kohya      STEM.lora_down.weight  STEM.lora_up.weight  STEM.lora_mid.weight  STEM.alpha  STEM.dora_scale
    LyCORIS    STEM.hada_w1_a ...  STEM.lokr_w1 ...  STEM.diff  STEM.diff_b  STEM.w_norm  STEM.b_norm
               STEM.a1.weight ...  STEM.oft_blocks  STEM.rescale  STEM.weight  STEM.on_input  STEM.scalar
               STEM.bias_indices  STEM.bias_values  STEM.bias_size
    diffusers  STEM.lora_A.weight  STEM.lora_B.weight  STEM.lora_magnitude_vector; before that STEM.lora.down.weight,
               ....processor.to_q_lora.down.weight, STEM.lora_linear_layer.down.weight
    PEFT       as diffusers, with STEM.lora_B.bias, and adapter_config.json beside the file

STEM is a name of `lora_names`. Scales: alpha / rank; without alpha 1; diffusers' and PEFT's stand in their configs.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.adapters.base import Networks
from ldm.adapters.lora_bases import other_base
from ldm.adapters.lora_keys import GENERAL, Keys, split_keys, unread_kind
from ldm.adapters.lora_kinds import Change, LowRank, Tensors
from ldm.adapters.lora_names import Site, adaptable, index, sites
from ldm.adapters.lora_tensors import read
from ldm.io.stored import index_tensors
from ldm.io.tensors import read_header
from ldm.io.text import parse_json, read_config
from ldm.utils.errors import DataError, WeightsError
from ldm.weights.detect import looks_like
from ldm.weights.ledger import equal, listing
from ldm.weights.sources import shapes_of

Config = dict[str, Any]

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # in the header
PEFT_TYPES = ("LORA", "LOHA", "LOKR")
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")  # beginnings of training that change the base as well
LARGEST = 1e30  # alpha


class Contents(NamedTuple):
    """What a file changes, and what else is to be said of it."""

    changes: dict[Site, Change]
    notes: list[str]


def read_lora(path: Path, networks: Networks) -> dict[Site, Change]:
    """What a file, or the folder of one, changes in these networks, every key accounted for. Raises WeightsError."""
    return read_contents(path, networks).changes


def read_contents(path: Path, networks: Networks, *, strict: bool = True) -> Contents:
    """`read_lora` with notes of what is in the file and changes nothing.

    strict: keys that match nothing in these networks are an error, otherwise a note.
    """
    file = _file(path)
    stored = index_tensors(file)
    keys, known = split_keys(stored), index(networks)
    if not any(found.keys() - GENERAL for found in keys.modules.values()):
        what = unread_kind(keys.unknown) or looks_like(shapes_of(stored))
        raise WeightsError(f"{path}: {what}; expected a LoRA or one of its kin")
    _check_once(path, keys)
    stray = _strays(path, keys, known, networks)
    if stray and strict:
        raise WeightsError(f"{path}: {stray}; strict=false leaves them out")
    modules = {stem: found for stem, found in keys.modules.items() if stem in known}
    if not modules:
        raise WeightsError(f"{path}: {stray}, which is all there is")
    configs = _configs(file)
    made = {}
    for stem, found in modules.items():
        tensors = {kind: tensor.read() for kind, tensor in found.items()}
        made[stem] = _change(f"{path}: {stem}", stem, tensors, known[stem], networks, _config_of(stem, configs))
    empty = [stem for stem, change in made.items() if isinstance(change, LowRank) and not change.rank * change.scale]
    changes = _by_site(path, {stem: change for stem, change in made.items() if stem not in empty}, known, networks)
    return Contents(changes, _notes(keys, stray, empty))


def _check_once(path: Path, keys: Keys) -> None:
    if keys.twice and len(keys.adapters) > 1:
        raise WeightsError(f"{path}: holds the adapters {listing(keys.adapters)}; save each in a file of its own")
    if keys.twice:
        raise WeightsError(f"{path}: tensors that another key gives already: {listing(keys.twice)}; keep one of them")


def _strays(path: Path, keys: Keys, known: Mapping[str, Site], networks: Networks) -> str:
    """The keys that match nothing, and why, in words. Raises WeightsError where the file is for another base."""
    unmatched = keys.modules.keys() - known.keys()
    if reason := other_base(keys.modules, known, networks):
        names = f": {len(unmatched)} of its {len(keys.modules)} layers are not there" if unmatched else ""
        raise WeightsError(f"{path}: {reason}{names}")
    strange = [f"{stem}.{next(iter(keys.modules[stem]))}" for stem in sorted(unmatched)]
    if not (strays := keys.unknown + strange):
        return ""
    kind = unread_kind(strays)
    return (f"holds {kind}: " if kind else "") + f"keys that match nothing in this base: {listing(strays)}"


def _by_site(
    path: Path, made: Mapping[str, Change], known: Mapping[str, Site], networks: Networks
) -> dict[Site, Change]:
    """Changes by the published layers they are about: some files hold everything under two names."""
    blocks = _blocks(networks)
    changes: dict[Site, Change] = {}
    for stem, change in made.items():
        site = known[stem]
        parts = {site: change}
        if isinstance(change, LowRank) and len(own := blocks[site.slot, site.path]) > site.block.count:
            parts = dict(zip(own, change.split(len(own)), strict=True))  # OpenCLIP's in_proj is q, k, v of others
        for part, low in parts.items():
            if part in changes and not _same(changes[part], low):
                raise WeightsError(f"{path}: {stem} is a second, other change of a layer; keep one of them")
            changes.setdefault(part, low)
    return changes


def _same(a: Change, b: Change) -> bool:
    first, second = a.tensors(), b.tensors()
    return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)


def _notes(keys: Keys, stray: str, empty: list[str]) -> list[str]:
    notes = [f"left out: {stray}"] if stray else []
    if empty:
        notes.append(f"layers whose rank or alpha is 0, which changes nothing: {listing(empty)}")
    if keys.embeddings:
        words = listing(keys.embeddings)
        notes.append(f"left out: the embeddings bundled with it, which its trigger words would need: {words}")
    return notes


def _blocks(networks: Networks) -> dict[tuple[str, str], list[Site]]:
    """The published layers that each of ours consists of."""
    found: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for slot, net in adaptable(networks).items():
        for site in sites(slot, net):
            found[slot, site.path].append(site)
    return found


def _change(name: str, stem: str, tensors: Tensors, site: Site, networks: Networks, config: Config) -> Change:
    if "alpha" not in tensors and config:
        own = [alpha for module, alpha in config["alpha_pattern"].items() if f".{stem}".endswith(f".{module}")]
        tensors["alpha"] = torch.tensor(float((own or [config["lora_alpha"]])[0]))
    if "bias" in tensors:
        tensors["diff_b"] = _difference(name, tensors.pop("bias"), site.parameter(networks, "bias"), config)
    shape = site.parameter(networks).shape
    return read(name, tensors, shape, stabilized=config.get("use_rslora") is True, rank=config.get("r"))


def _difference(name: str, bias: Tensor, base: Tensor | None, config: Config) -> Tensor:
    """What a bias that PEFT trained changes: it saves the whole of it."""
    if config.get("bias", "none") == "none":
        raise WeightsError(f"{name}.bias: nothing says whether this is a whole bias or a difference; save it as diff_b")
    if base is None or base.shape != bias.shape:
        raise WeightsError(
            f"{name}.bias is {tuple(bias.shape)}, the base has {base if base is None else tuple(base.shape)}"
        )
    return bias.to(base) - base


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
    """The settings that decide a scale, when they can be. Names only: a file brings no regular expressions."""
    kind, start = str(config.get("peft_type") or "LORA"), str(config.get("init_lora_weights")).lower()
    if kind not in PEFT_TYPES:
        raise WeightsError(f"{file}: peft_type={kind[:40]} is not read here; those read are {', '.join(PEFT_TYPES)}")
    if start.startswith(CHANGED_BASE):
        raise WeightsError(
            f"{file}: init_lora_weights={start[:40]} goes with a changed base; convert it to a LoRA in PEFT"
        )
    pattern, rank = config.get("alpha_pattern") or {}, config.get("r")
    alpha = config.get("lora_alpha", config.get("alpha"))  # the second is that of LoHa and LoKr
    names = pattern if isinstance(pattern, dict) else {"": None}
    fits = all(re.fullmatch(r"[\w.]+", name) for name in names)
    if not fits or not all(map(_is_number, (alpha, *names.values()))):
        found = f"lora_alpha={str(alpha)[:40]}, alpha_pattern={str(pattern)[:60]}"
        raise WeightsError(f"{file}: its settings have {found}; expected numbers, by names of modules")
    if rank is not None and not (type(rank) is int and rank > 0):
        raise WeightsError(f"{file}: its settings have r={str(rank)[:40]}, expected a whole number above 0")
    return config | {"lora_alpha": alpha, "alpha_pattern": pattern}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST


def _config_of(stem: str, configs: Mapping[str, Config]) -> Config:
    return next((config for start, config in configs.items() if stem.startswith(start)), {})
