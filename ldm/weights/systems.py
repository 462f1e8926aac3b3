"""A published system: the UNet, the autoencoder and the text encoders that belong together, from one path."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ldm.io.stored import index_tensors
from ldm.utils.errors import WeightsError
from ldm.weights.components import COMPONENTS, component_of
from ldm.weights.detect import looks_like
from ldm.weights.formats import Config
from ldm.weights.load import arguments_of, load_source
from ldm.weights.pipeline import CLASSES, read_settings, read_tokenizer
from ldm.weights.places import places_of, system_of
from ldm.weights.sources import Source, components_in, open_sources, shapes_of, weights_in


@dataclass(frozen=True)
class System:
    """What one path holds, loaded."""

    path: Path
    name: str  # of a file of configs/system
    networks: dict[str, nn.Module]  # by slot: network, autoencoder, clip_l, clip_h, clip_g; in eval mode
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
    ema: bool = True,
) -> System:
    """All networks of a diffusers pipeline or an original file, each read once. Raises WeightsError.

    dtype: None keeps the files'; the autoencoder is float32 otherwise, since SDXL's overflows in float16.
    name: what the path holds, where `identify` cannot tell (SD 2's prediction in a single file).
    """
    path = Path(path)
    sources, settings = _open_system(path, variant, ema), read_settings(path)
    system = name_system(path, sources, settings, name)
    networks, nodes = {}, {}
    for place in places_of(system):
        keeps = dtype is None or place.slot != "autoencoder"
        net = load_source(sources[place.folder], dtype if keeps else torch.float32, device)
        networks[place.slot], nodes[place.slot] = net, node_of(net)
    tokenizer = read_tokenizer(path) if path.is_dir() else None
    return System(path, system, networks, nodes, tokenizer, settings)


def identify(path: str | os.PathLike) -> str:
    """The name of the system at a path, from names and shapes alone. Raises WeightsError for anything else.

    SD 2 in a single file that does not say what it predicts is taken for its larger model, which predicts v.
    """
    path = Path(path)
    return name_system(path, _open_system(path, None, True), read_settings(path))


def node_of(net: nn.Module) -> Config:
    """The node of a config that builds a network like this one."""
    kind = type(net)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **COMPONENTS[component_of(net)].arguments(net)}


def _open_system(path: Path, variant: str | None, ema: bool) -> dict[str, Source]:
    """The components at a path, which are a UNet and others."""
    there = components_in(path)
    if "unet" not in there or len(there) == 1:
        raise WeightsError(f"{path}: {_words(path, there)} only; expected a whole system: UNet, VAE and text encoders")
    return open_sources(path, variant=variant, ema=ema)


def name_system(path: Path, sources: Mapping[str, Source], settings: Config, name: str | None = None) -> str:
    """The system of these components, if they are all there and fit together. Raises WeightsError.

    name: where the files cannot tell what SD 2 predicts, or are wrong about it; their setting is then dropped.
    """
    unet = arguments_of(sources["unet"])
    try:
        found = system_of(unet)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    folders = [place.folder for place in places_of(found)]
    if missing := [folder for folder in folders if folder not in sources]:
        raise WeightsError(f"{path}: the system {found} without {', '.join(missing)}; expected {', '.join(folders)}")
    texts = [arguments_of(sources[folder]) for folder in folders if folder.startswith("text_encoder")]
    if (width := sum(text["width"] for text in texts)) != unet["context_dim"]:
        raise WeightsError(f"{path}: text encoders of width {width}, but its UNet reads text of {unet['context_dim']}")
    said = "sd21_base" if (found, settings.get("prediction")) == ("sd21", "eps") else found
    if name and (name not in CLASSES or name.removesuffix("_base") != found):
        raise WeightsError(f"{path}: holds the system {said}, not {name}; give another path, or leave the name out")
    if name and name != said:
        settings.pop("prediction", None)
    return name or said


def _words(path: Path, there: list[str]) -> str:
    """What is at a path that is no system."""
    if path.is_file():
        return looks_like(shapes_of(index_tensors(path)))
    if there:
        return f"a folder of {', '.join(there)}"
    files = weights_in(path)
    return looks_like(shapes_of(index_tensors(files[0]))) if files else "a folder without weights"
