"""Where the weights of a component are: a diffusers folder, whole or one component of it, or one file of any layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ldm.io.stored import Stored, index_tensors
from ldm.io.tensors import PICKLES, read_header
from ldm.io.text import read_config, read_yaml
from ldm.utils.errors import DataError, WeightsError
from ldm.weights.components import COMPONENTS, FOLDERS, class_name, kind_of
from ldm.weights.detect import Part, find_parts, looks_like
from ldm.weights.formats import Config
from ldm.weights.ledger import listing
from ldm.weights.places import NETWORKS

SUFFIXES = (".safetensors", ".bin")
YML = "config.yml"  # beside the one file of weights of a network, as DeepFloyd's authors publish theirs
ADDED = "controlnet"  # what a file is about that holds the system beside it too, as ControlNet 1.0's do
UNUSED = "unused.safetensors"  # beside a text encoder: what only its original file has, SD 2's last block


@dataclass(frozen=True)
class Source:
    """One component: its tensors by their names in the layout, none of them read yet."""

    path: Path
    component: str  # by the name of its folder
    kind: str  # of `components.COMPONENTS`
    layout: str  # original | diffusers | open_clip
    stored: Mapping[str, Stored]
    config: Config | None = None  # config.json of a folder
    arguments: Config | None = None  # of our constructor, for all that is stored, where the file was written by us
    in_system: bool = False  # the file holds a whole system
    params: Config | None = None  # of the authors' config.yml beside their file


def open_source(path: Path, component: str | None = None, *, variant: str | None = None, ema: bool = True) -> Source:
    """The component asked for; by default the only one there, of a whole system what draws. Raises WeightsError."""
    _check_exists(path)
    if path.is_dir():
        return _open_folder(path, component, variant)
    contents = _contents(path, ema)
    first = next((name for name in (ADDED, *NETWORKS) if name in contents.parts), next(iter(contents.parts)))
    return _open_part(path, component or first, contents)


def open_sources(path: Path, *, variant: str | None = None, ema: bool = True) -> dict[str, Source]:
    """Every component that can be loaded, by name. Raises WeightsError."""
    _check_exists(path)
    if not path.is_dir():
        contents = _contents(path, ema)
        return {name: _open_part(path, name, contents) for name in contents.parts}
    names = [name for name in components_in(path) if name in FOLDERS]
    return {name: _open_folder(path, name, variant) for name in names}


def components_in(path: Path) -> list[str]:
    """Names of all components, whether this program has a network for them or not."""
    _check_exists(path)
    if not path.is_dir():
        return list(_contents(path, ema=False).parts)
    if (path / "config.json").is_file():
        return [_described(path, _config(path))[0]]
    folders = {folder.parent.name for folder in path.glob("*/config.json") if weights_in(folder.parent)}
    beside = _beside_yml(path)
    return sorted(folders.union(_contents(beside, ema=False).parts if beside else ()))


def weights_in(folder: Path) -> list[Path]:
    """The files of weights in a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix in (*SUFFIXES, *PICKLES))


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")


class Contents(NamedTuple):
    """What one file holds."""

    index: dict[str, Stored]
    parts: dict[str, Part]
    ours: Config  # arguments by component, where we wrote it


def _contents(path: Path, ema: bool) -> Contents:
    index = index_tensors(path)
    parts, unknown = find_parts(index, ema=ema)
    if unknown:
        raise WeightsError(f"{path}: {looks_like(shapes_of(index))}; of no known part: {listing(unknown)}")
    if not parts:
        raise WeightsError(f"{path}: {looks_like(shapes_of(index))}; expected weights of a known layout")
    return Contents(index, parts, read_header(path).ldm if path.suffix == ".safetensors" else {})


def _open_part(path: Path, name: str, contents: Contents) -> Source:
    index, parts, ours = contents
    if name not in parts:
        raise WeightsError(f"{path}: no component {name!r} that can be loaded; there is {', '.join(parts)}")
    kind, layout, names = parts[name]
    stored = {their: index[key] for their, key in names.items() if key in index}
    if layout == "diffusers":
        if not (path.parent / "config.json").is_file():
            raise WeightsError(f"{path}: of the diffusers layout, which needs its config.json beside the file")
        return Source(path, name, kind, layout, stored, _config(path.parent))
    known = COMPONENTS[kind].from_yml and (path.parent / YML).is_file()
    params = _params(path.parent / YML) if known else None
    return Source(path, name, kind, layout, stored, None, ours.get(name), len(parts) > 1, params)


def _open_folder(path: Path, component: str | None, variant: str | None) -> Source:
    names = [component] if component else NETWORKS
    folder = next((f for f in (path, *(path / name for name in names)) if (f / "config.json").is_file()), None)
    if folder is None and (file := _beside_yml(path)):
        return _open_part(file, component or "unet", _contents(file, ema=True))
    if folder is None:
        there = sorted(inner.parent.name for inner in path.glob("*/config.json"))
        found = f"the components there are: {', '.join(there)}" if there else "expected a diffusers folder or a file"
        raise WeightsError(f"{path / names[0]}: no config.json; {found}")
    config = _config(folder)
    name, kind = _described(folder, config)
    if kind is None:
        raise WeightsError(f"{folder}: holds a {name}; what can be loaded is {', '.join(FOLDERS)}")
    if component not in (None, *COMPONENTS[kind].folders):
        raise WeightsError(f"{folder}: holds the component {name!r}, not {component!r}")
    stored, ours = _index_folder(folder, COMPONENTS[kind].files, variant), None
    if (unused := folder / UNUSED).is_file():
        stored, ours = stored | index_tensors(unused), read_header(unused).ldm.get(name)
    return Source(folder, component or name, kind, "diffusers", stored, config, ours)


def _beside_yml(folder: Path) -> Path | None:
    """The file of weights that a config.yml describes, where there is one."""
    if not (folder / YML).is_file():
        return None
    if len(files := weights_in(folder)) != 1:
        raise WeightsError(f"{folder}: {len(files)} files of weights beside {YML}, expected one; give the file itself")
    return files[0]


def _params(path: Path) -> Config:
    """What an authors' config.yml says of its network."""
    try:
        config = read_yaml(path)
    except DataError as error:
        raise WeightsError(str(error)) from error
    if not isinstance(params := config.get("params"), dict):
        raise WeightsError(f"{path}: says no 'params', which describe the network; delete it to go by the shapes alone")
    return params


def _config(folder: Path) -> Config:
    try:
        return read_config(folder / "config.json")
    except DataError as error:
        raise WeightsError(str(error)) from error


def _described(folder: Path, config: Config) -> tuple[str, str | None]:
    """Name and kind by the class that config.json names, and where a kind has two names by that of the folder.

    A class unknown here is its own name and has no kind. Raises WeightsError.
    """
    try:
        kind = kind_of(config)
    except WeightsError as error:
        raise WeightsError(f"{folder}: {error}") from error
    if kind is None:
        return class_name(config), None
    names = COMPONENTS[kind].folders
    return folder.name if folder.name in names else names[0], kind


def _index_folder(folder: Path, stems: Mapping[str, str], variant: str | None) -> dict[str, Stored]:
    """Of the variant asked for, by default none, else fp16: safetensors before pickles, one file before shards."""
    for choice in [variant] if variant else [None, "fp16"]:
        for suffix, stem in stems.items():
            dotted = f".{choice}" if choice else ""
            if (file := folder / f"{stem}{dotted}{suffix}").is_file():
                return index_tensors(file)
            for index in (f"{stem}{suffix}.index{dotted}.json", f"{stem}{dotted}{suffix}.index.json"):
                if (folder / index).is_file():
                    return _index_shards(folder / index)
    stem = stems[".safetensors"]
    wanted = f"{stem}.{variant}" if variant else stem
    there = [path.name for path in weights_in(folder)]
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
