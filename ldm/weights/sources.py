"""Where the weights of a component are: a diffusers folder, whole or one component of it, or one file of any layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.io.stored import Stored, index_tensors
from ldm.io.tensors import PICKLES, read_header
from ldm.io.text import read_config
from ldm.utils.errors import DataError, WeightsError
from ldm.weights.components import COMPONENTS
from ldm.weights.detect import find_parts, looks_like
from ldm.weights.formats import Config
from ldm.weights.ledger import listing

DEFAULT = "unet"  # of a whole system
SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class Source:
    """One component: its tensors by their names in the layout, none of them read yet."""

    path: Path
    component: str
    layout: str  # original | diffusers
    stored: Mapping[str, Stored]
    config: Config | None  # config.json of a folder
    arguments: Config | None  # of our constructor, where the file was written by us


def open_source(path: Path, component: str | None = None, *, variant: str | None = None, ema: bool = True) -> Source:
    """The component asked for; by default the only one there, of a whole system its UNet. Raises WeightsError."""
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    return _open_folder(path, component, variant) if path.is_dir() else _open_file(path, component, ema)


def components_in(path: Path) -> list[str]:
    """Names of all components, whether this program has a network for them or not."""
    if not path.is_dir():
        return list(_parts(path, ema=False)[1])
    if (path / "config.json").is_file():
        return [_component_of_config(path, _config(path))]
    return sorted(folder.parent.name for folder in path.glob("*/config.json") if _weights_of(folder.parent))


def _weights_of(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in (*SUFFIXES, *PICKLES)]


def _open_file(path: Path, component: str | None, ema: bool) -> Source:
    index, parts = _parts(path, ema)
    name = component or (DEFAULT if DEFAULT in parts else next(iter(parts)))
    if name not in parts or name not in COMPONENTS:
        there = [part for part in parts if part in COMPONENTS]
        raise WeightsError(f"{path}: no component {name!r} that can be loaded; there is {', '.join(there) or 'none'}")
    layout, names = parts[name]
    stored = {their: index[key] for their, key in names.items() if key in index}
    if layout == "diffusers":
        if not (path.parent / "config.json").is_file():
            raise WeightsError(f"{path}: of the diffusers layout, which needs its config.json beside the file")
        return Source(path, name, layout, stored, _config(path.parent), None)
    ours = read_header(path).ldm.get(name) if path.suffix == ".safetensors" else None
    return Source(path, name, layout, stored, None, ours)


def _parts(path: Path, ema: bool) -> tuple[dict[str, Stored], dict]:
    index = index_tensors(path)
    parts, unknown = find_parts(index, ema=ema)
    if unknown:
        raise WeightsError(f"{path}: {looks_like(shapes_of(index))}; of no known part: {listing(unknown)}")
    if not parts:
        raise WeightsError(f"{path}: {looks_like(shapes_of(index))}; expected weights of a known layout")
    return index, parts


def _open_folder(path: Path, component: str | None, variant: str | None) -> Source:
    folder = path if (path / "config.json").is_file() else path / (component or DEFAULT)
    if not (folder / "config.json").is_file():
        there = sorted(inner.parent.name for inner in path.glob("*/config.json"))
        found = f"the components there are: {', '.join(there)}" if there else "expected a diffusers folder or a file"
        raise WeightsError(f"{folder}: no config.json; {found}")
    config = _config(folder)
    name = _component_of_config(folder, config)
    if component not in (None, name) and folder == path:
        raise WeightsError(f"{path}: holds the component {name!r}, not {component!r}")
    if name not in COMPONENTS:
        raise WeightsError(f"{folder}: holds a {name}; what can be loaded is {', '.join(COMPONENTS)}")
    return Source(folder, name, "diffusers", _index_folder(folder, COMPONENTS[name].file, variant), config, None)


def _config(folder: Path) -> Config:
    try:
        return read_config(folder / "config.json")
    except DataError as error:
        raise WeightsError(str(error)) from error


def _component_of_config(folder: Path, config: Config) -> str:
    """By the class that config.json names; that of a class unknown here is its own name."""
    kind = config.get("_class_name") or next(iter(config.get("architectures") or ["?"]))
    return next((name for name, row in COMPONENTS.items() if row.class_name == kind), str(kind)[:80])


def _index_folder(folder: Path, stem: str, variant: str | None) -> dict[str, Stored]:
    """Of the variant asked for, by default none, else fp16: safetensors before pickles, one file before shards."""
    for choice in [variant] if variant else [None, "fp16"]:
        for suffix in SUFFIXES:
            dotted = f".{choice}" if choice else ""
            if (file := folder / f"{stem}{dotted}{suffix}").is_file():
                return index_tensors(file)
            for index in (f"{stem}{suffix}.index{dotted}.json", f"{stem}{dotted}{suffix}.index.json"):
                if (folder / index).is_file():
                    return _index_shards(folder / index)
    there = sorted(path.name for path in _weights_of(folder))
    wanted = f"{stem}.{variant}" if variant else stem
    raise WeightsError(f"{folder}: no {wanted} weights; there are {', '.join(there[:5]) or 'none'}")


def _index_shards(path: Path) -> dict[str, Stored]:
    """All tensors of the files an index names, each where the index says. Raises WeightsError."""
    try:
        table: Any = read_config(path).get("weight_map")
    except DataError as error:
        raise WeightsError(str(error)) from error
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise WeightsError(f"{path}: no 'weight_map' of tensors to files")
    stored = {}
    for shard in sorted(set(table.values())):
        if shard != Path(shard).name or Path(shard).suffix not in SUFFIXES:
            raise WeightsError(f"{path}: names the file {shard[:80]!r}; only files beside it are read")
        if not (path.parent / shard).is_file():
            raise WeightsError(f"{path}: the shard {shard} is missing; copy it beside the index")
        found = index_tensors(path.parent / shard)
        if wrong := sorted(found.keys() ^ {key for key, file in table.items() if file == shard}):
            raise WeightsError(f"{path}: {shard} does not hold what the index says: {listing(wrong)}")
        stored |= found
    return stored


def shapes_of(stored: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in stored.items()}
