"""Where the weights of a component are: a diffusers folder, whole or one component of it, or one file of any layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ldm.io.magic import PICKLES, format_of, is_program
from ldm.io.stored import Stored, index_tensors
from ldm.io.tensors import read_header
from ldm.io.text import read_config
from ldm.utils.errors import DataError, WeightsError
from ldm.weights.components import COMPONENTS, FOLDERS, class_name, kind_of
from ldm.weights.described import YML, config_of, if_params, json_of, unet_params
from ldm.weights.detect import class_words, looks_like, stranger
from ldm.weights.formats import Config
from ldm.weights.formats_clip import WHOLE
from ldm.weights.ledger import listing, say
from ldm.weights.parts import VISION, Part, find_parts
from ldm.weights.places import NETWORKS

SUFFIXES = (".safetensors", ".bin")
ADDED = "controlnet"  # what a file is about that holds the system beside it too, as ControlNet 1.0's do
UNUSED = "unused.safetensors"  # beside a text encoder: what only its original file has, SD 2's last block
PARAMS = {"unet": unet_params, "if": if_params}  # by kind: how what the authors wrote beside a file is read
LENIENT = "published.strict=false leaves them out"


@dataclass(frozen=True)
class How:
    """How a path is read, where there is a choice."""

    variant: str | None = None  # of a folder's files, such as "fp16"
    ema: bool | None = None  # averaged weights where a file has both: `parts.find_parts`
    strict: bool = True  # refuse tensors of no known part; else they are left out, and counted


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
    params: Config | None = None  # of the authors' YAML beside their file
    strict: bool = True


def open_source(
    path: Path,
    component: str | None = None,
    *,
    variant: str | None = None,
    ema: bool | None = None,
    strict: bool = True,
) -> Source:
    """The component asked for; by default the only one there, of a whole system what draws. Raises WeightsError."""
    _check_exists(path)
    how = How(variant, ema, strict)
    if path.is_dir():
        return _open_folder(path, component, how)
    contents = _contents(path, how)
    first = next((name for name in (ADDED, *NETWORKS) if name in contents.parts), next(iter(contents.parts)))
    return _open_part(path, component or first, contents, how)


def open_sources(
    path: Path, *, variant: str | None = None, ema: bool | None = None, strict: bool = True
) -> dict[str, Source]:
    """Every component that can be loaded, by name. Raises WeightsError."""
    _check_exists(path)
    how = How(variant, ema, strict)
    if not path.is_dir():
        contents = _contents(path, how)
        return {name: _open_part(path, name, contents, how) for name in contents.parts}
    names = [name for name in components_in(path) if name in FOLDERS]
    return {name: _open_folder(path, name, how) for name in names}


def components_in(path: Path) -> list[str]:
    """Names of all components, whether this program has a network for them or not."""
    _check_exists(path)
    if not path.is_dir():
        return list(find_parts(index_tensors(path), ema=None).parts)
    if (path / "config.json").is_file():
        return [_described(path, config_of(path / "config.json"))[0]]
    folders = {folder.parent.name for folder in path.glob("*/config.json") if weights_in(folder.parent)}
    beside = _beside_yml(path)
    return sorted(folders.union(find_parts(index_tensors(beside), ema=None).parts if beside else ()))


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


def _contents(path: Path, how: How) -> Contents:
    index = index_tensors(path)
    parts, unknown, averages = find_parts(index, ema=how.ema)
    if not index and is_program(path):
        raise WeightsError(f"{path}: a TorchScript program, which is not run; get the .safetensors of the same weights")
    if not parts:
        raise WeightsError(f"{path}: {looks_like(shapes_of(index))}; expected weights of a known layout")
    if unknown:
        check_unknown(path, unknown, index, how.strict)
    if averages:
        _check_averages(path, index, parts)
        say(f"{path}: {averages}")
    return Contents(index, parts, read_header(path).ldm if format_of(path) == "safetensors" else {})


def _check_averages(path: Path, index: Mapping[str, Stored], parts: Mapping[str, Part]) -> None:
    """WeightsError where the averaged weights that are used have other shapes than the network's own: a parent's."""
    own = find_parts(index, ema=False).parts
    for name in own.keys() & parts.keys():
        pairs = ((key, own[name].names.get(their)) for their, key in parts[name].names.items())
        both = [(key, index[key], index[known]) for key, known in pairs if key in index and known in index]
        if other := [key for key, used, known in both if used.shape != known.shape]:
            sizes = f"{listing(sorted(other))} have other shapes than the network's own weights"
            raise WeightsError(f"{path}: averaged weights of another model: {sizes}; use its own, averaged=false")


def check_unknown(path: Path, unknown: list[str], stored: Mapping[str, Stored], strict: bool) -> None:
    """WeightsError for tensors of no known part; where that is not strict, a line that says how many are left out.

    What makes another network of the others cannot be left out: scales of quantised weights, say.
    """
    is_other = stranger([*stored, *unknown]) is not None
    if strict or is_other:
        advice = "" if is_other else f"; {LENIENT}"
        raise WeightsError(f"{path}: {looks_like(shapes_of(stored))}; of no known part: {listing(unknown)}{advice}")
    say(f"{path}: tensors of no known part, left out: {listing(unknown)}")


def _open_part(path: Path, name: str, contents: Contents, how: How) -> Source:
    index, parts, ours = contents
    is_system = bool(parts.keys() & {*NETWORKS, ADDED}) and len(parts) > 1
    others = [] if is_system else parts.values()  # a text encoder alone may be a system's first or second
    part = parts.get(name) or next((part for part in others if name in COMPONENTS[part.kind].folders), None)
    if part is None:
        raise WeightsError(f"{path}: no component {name!r} that can be loaded; there is {', '.join(parts)}")
    kind, layout, names = part
    stored = {their: index[key] for their, key in names.items() if key in index}
    if layout == "diffusers":
        if not (path.parent / "config.json").is_file():
            raise WeightsError(f"{path}: of the diffusers layout, which needs its config.json beside the file")
        return Source(path, name, kind, layout, stored, config_of(path.parent / "config.json"), strict=how.strict)
    written = ours.get(name)
    config = None if written or is_system else json_of(path, kind)
    read_params = PARAMS.get(kind)
    params = read_params(path) if read_params and not written else None
    return Source(path, name, kind, layout, stored, config, written, is_system, params, how.strict)


def _open_folder(path: Path, component: str | None, how: How) -> Source:
    names = [component] if component else NETWORKS
    folder = next((f for f in (path, *(path / name for name in names)) if (f / "config.json").is_file()), None)
    if folder is None and (file := _beside_yml(path)):
        return _open_part(file, component or "unet", _contents(file, how), how)
    if folder is None:
        there = sorted(inner.parent.name for inner in path.glob("*/config.json"))
        found = f"the components there are: {', '.join(there)}" if there else "expected a diffusers folder or a file"
        raise WeightsError(f"{path / names[0]}: no config.json; {found}")
    config = config_of(folder / "config.json")
    name, kind = _described(folder, config)
    if name == WHOLE:  # of CLIP: one of its towers
        name = component or "text_encoder"
        kind = "clip_vision" if name == "image_encoder" else "clip_text"
    if kind is None:
        raise WeightsError(f"{folder}: holds a {class_words(name)}; what can be loaded is {', '.join(FOLDERS)}")
    if component not in (None, *COMPONENTS[kind].folders):
        raise WeightsError(f"{folder}: holds the component {name!r}, not {component!r}")
    stored, ours = _index_folder(folder, COMPONENTS[kind].files, how.variant), None
    if (unused := folder / UNUSED).is_file():
        stored, ours = stored | index_tensors(unused), read_header(unused).ldm.get(name)
    if kind.startswith("clip_"):
        stored = {key: each for key, each in stored.items() if key.startswith(VISION) == (kind == "clip_vision")}
    return Source(folder, component or name, kind, "diffusers", stored, config, ours, strict=how.strict)


def _beside_yml(folder: Path) -> Path | None:
    """The file of weights that a config.yml describes, where there is one."""
    if not (folder / YML).is_file():
        return None
    if len(files := weights_in(folder)) != 1:
        raise WeightsError(f"{folder}: {len(files)} files of weights beside {YML}, expected one; give the file itself")
    return files[0]


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
