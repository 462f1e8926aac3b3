"""A published system: the network that draws, the autoencoder and the text encoders that belong together."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.io.stored import index_tensors
from ldm.utils.errors import WeightsError
from ldm.weights.components import class_name, row_of
from ldm.weights.described import config_of, settings_of
from ldm.weights.detect import class_words, looks_like
from ldm.weights.formats import Config
from ldm.weights.load import arguments_of, load_source
from ldm.weights.pipeline import BETAS, read_settings, read_tokenizer, scales, vocabularies
from ldm.weights.places import NETWORKS, Place, others_of, places_of, system_of
from ldm.weights.sources import Source, components_in, open_source, open_sources, shapes_of, weights_in

Parts = Mapping[str, str | os.PathLike]  # what a path lacks, or has otherwise: "vae", "text_encoder" -> another path
NONE: Parts = {}


@dataclass(frozen=True)
class System:
    """What one path holds, loaded."""

    path: Path
    name: str  # of a file of configs/system
    networks: dict[str, nn.Module]  # by slot: network, autoencoder, clip_l, clip_h, clip_g, t5; in eval mode
    nodes: dict[str, Config]  # by slot: what builds the network without the file
    tokenizer: str | None  # the vocabulary as JSON, where a folder holds one
    settings: Config  # `pipeline.read_settings`


def load_system(
    path: str | os.PathLike,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    name: str | None = None,
    variant: str | None = None,
    ema: bool | None = None,
    parts: Parts = NONE,
    formula: str | None = None,
    has_texts: bool = False,
    strict: bool = True,
) -> System:
    """All networks of a diffusers pipeline or an original file, each read once. Raises WeightsError.

    dtype: None keeps the files'; the autoencoder is float32 otherwise, since SDXL's overflows in float16.
    name: what the path holds, where `identify` cannot tell (SD 2's prediction in a single file, SiT).
    parts: where the networks are that an original file of DiT or PixArt lacks. formula: a DiT's, as in `load_model`.
    has_texts: the caller has what the text encoders give, which then need not be there and are not loaded.
    ema, strict: as in `load_model`.
    """
    path = Path(path)
    sources, settings = _open_system(path, parts, variant=variant, ema=ema, strict=strict)
    system = name_system(path, sources, settings, name, has_texts=has_texts)
    networks, nodes = {}, {}
    for place in needed(system, has_texts):
        keeps = dtype is None or place.slot != "autoencoder"
        own = formula if place.slot == "network" else None
        source = sources[place.folder]
        if place.slot == "clip_h":  # alone in a file of OpenCLIP's it has a block that SD 2 does not read
            source = replace(source, in_system=source.config is None)
        net = load_source(source, dtype if keeps else torch.float32, device, formula=own)
        networks[place.slot], nodes[place.slot] = net, node_of(net)
    texts = [place.folder for place in needed(system, has_texts) if place.folder.startswith("text_encoder")]
    beside = [path, *(Path(parts[folder]) for folder in texts if folder in parts)] if texts else []
    tokenizer = read_tokenizer([folder for where in beside for folder in vocabularies(where)], system)
    return System(path, system, networks, nodes, tokenizer, settings)


def identify(path: str | os.PathLike, parts: Parts = NONE, *, has_texts: bool = False, strict: bool = True) -> str:
    """The name of the system at a path, from names and shapes alone. Raises WeightsError for anything else.

    SD 2 in a single file that does not say what it predicts is taken for its larger model, which predicts v; SiT, whose
    files are like DiT's, for DiT.
    """
    path = Path(path)
    return name_system(path, *_open_system(path, parts, strict=strict), has_texts=has_texts)


def node_of(net: nn.Module) -> Config:
    """The node of a config that builds a network like this one."""
    kind = type(net)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **row_of(net).arguments(net)}


def _open_system(path: Path, parts: Parts, **how: Any) -> tuple[dict[str, Source], Config]:
    """The components at a path, among which is a network that draws, with those given; and the settings.

    how: that of `open_sources`.
    """
    there = components_in(path)
    if not set(NETWORKS) & set(there):
        raise WeightsError(f"{path}: {_words(path, there)} only; expected a whole system: UNet, VAE and text encoders")
    sources, settings = open_sources(path, **how), read_settings(path)
    if path.is_file():
        settings = settings_of(path) | settings
    of_parts = {name: value for name, value in how.items() if name != "variant"}
    for name, part in parts.items():
        sources[name] = open_source(Path(part), name, **of_parts)
        settings |= scales(sources[name].config or {}) if name == "vae" else {}
    return sources, settings


def name_system(
    path: Path, sources: Mapping[str, Source], settings: Config, name: str | None = None, *, has_texts: bool = False
) -> str:
    """The system of these components, if they are all there and fit together. Raises WeightsError.

    name: where the files cannot tell, or are wrong about it; a setting of theirs that it contradicts is then dropped.
    """
    source = next(sources[folder] for folder in NETWORKS if folder in sources)
    network = arguments_of(source)
    try:
        found = system_of(source.kind, network, settings)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    said = "sd21_base" if (found, settings.get("prediction")) == ("sd21", "eps") else found
    if name and name not in others_of(found):
        raise WeightsError(f"{path}: holds the system {said}, not {name}; give another path, or leave the name out")
    _check_parts(path, sources, needed(found, has_texts), found, network)
    if name and name != said:
        for setting in ("prediction", *(BETAS if name.startswith("sit") else ())):
            settings.pop(setting, None)
    return name or said


def needed(system: str, has_texts: bool) -> list[Place]:
    """The networks that a system needs, where its texts are to be read, or have been read before."""
    return [place for place in places_of(system) if not (has_texts and place.folder.startswith("text_encoder"))]


def _check_parts(
    path: Path, sources: Mapping[str, Source], wanted: Iterable[Place], system: str, network: Config
) -> None:
    """WeightsError unless the system is whole, each part is of its kind, and the texts are as wide as it reads them."""
    places = {place.folder: place for place in wanted}
    if missing := [folder for folder in places if folder not in sources]:
        advice = f"give what is missing, as in {missing[0]}=PATH"
        raise WeightsError(
            f"{path}: the system {system} without {', '.join(missing)}; expected {', '.join(places)}: {advice}"
        )
    for folder, place in places.items():
        if sources[folder].kind != place.kind:
            found = f"a {folder} of kind {sources[folder].kind}, expected {place.kind}"
            raise WeightsError(f"{sources[folder].path}: {found}: the system is {system}")
    texts = [arguments_of(sources[folder]) for folder in places if folder.startswith("text_encoder")]
    width = sum(text["width"] for text in texts)
    if texts and width != network["context_dim"]:
        reads = network["context_dim"]
        raise WeightsError(f"{path}: text encoders of width {width}, but its network reads text of {reads}")


def _words(path: Path, there: list[str]) -> str:
    """What is at a path that is no system."""
    if path.is_file():
        return looks_like(shapes_of(index_tensors(path)))
    if there:
        index = path / "model_index.json"
        name = class_words(class_name(config_of(index))) if index.is_file() else ""
        return f"a folder of {', '.join(there)}" + (f" ({name})" if name else "")
    files = weights_in(path)
    return looks_like(shapes_of(index_tensors(files[0]))) if files else "a folder without weights"
