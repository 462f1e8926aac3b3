"""Published weights into our networks and back, every key accounted for and no bit changed."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.io.folders import appearing
from ldm.io.stored import Stored
from ldm.io.tensors import write_tensors
from ldm.io.text import write_json
from ldm.utils.errors import ConfigError, LdmError, WeightsError
from ldm.weights.components import COMPONENTS, row_of
from ldm.weights.described import YML
from ldm.weights.detect import looks_like, stranger
from ldm.weights.formats import Config, check_bounds
from ldm.weights.formats_clip import text_used
from ldm.weights.ledger import Lazy, Mismatch, listing, say
from ldm.weights.parts import MARKERS
from ldm.weights.places import places_of
from ldm.weights.sources import UNUSED, Source, check_unknown, open_source, shapes_of

LAYOUTS = ("original", "diffusers")
GUESSES = {  # kinds whose heads no tensor tells: an argument, and its values in published networks, whose are known
    "unet": ("channels", (320, 384)),
    "if": ("channels", (64, 96, 160, 192, 320, 704)),
    "dit": ("width", (384, 768, 1024, 1152)),
    "pixart": ("width", (1152,)),
    "clip_text": ("width", (512, 768, 1024, 1280)),
    "clip_vision": ("width", (768, 1024, 1280, 1664)),
}
MALFORMED = (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, AttributeError)  # of a table not foreseen


def load_model(
    path: str | os.PathLike,
    component: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    variant: str | None = None,
    ema: bool | None = None,
    formula: str | None = None,
    strict: bool = True,
) -> nn.Module:
    """A published network in eval mode, from a diffusers folder or an original file. Raises WeightsError.

    component: "unet", "transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder"; by default the only one
    there, of a whole system what draws. dtype: None keeps the file's. variant: of a folder's files, such as "fp16".
    ema: the averaged weights where a file has both; None: of a trainer's table of averages those, of any other file its
    own. formula: of a DiT, "original" or "diffusers", which compute different images from the same weights
    (`ldm.weights.dit`); None: original, or what a file of ours says. strict: refuse tensors of no known part; else they
    are left out, and counted in a line.
    """
    source = open_source(Path(path), component, variant=variant, ema=ema, strict=strict)
    return load_source(source, dtype, device, formula=formula)


def load_source(
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    *,
    whole: bool = False,
    formula: str | None = None,
) -> nn.Module:
    """The network of an opened source. Nothing is read before every name and shape has been found right.

    whole: with the last block and projection of a text encoder that no system reads (SD 2.x). formula: `load_model`.
    """
    net = _build(source, whole, formula)
    translate = partial(COMPONENTS[source.kind].read, source.layout, net)
    keys = net.state_dict()
    stored = _check(source, keys, translate)
    _say_guess(source)
    reading = Lazy({name: partial(tensor.read, dtype, device) for name, tensor in stored.items()})
    try:
        net.load_state_dict(translate(reading, keys), assign=True)
    except WeightsError as error:
        raise error if str(source.path) in str(error) else WeightsError(f"{source.path}: {error}") from error
    return net.eval()


def arguments_of(source: Source, *, whole: bool = False) -> Config:
    """The arguments of a source's network, from its config.json, from what we wrote into the file, or from its shapes.

    Raises WeightsError for what describes none; `whole` as in `load_source`.
    """
    component = COMPONENTS[source.kind]
    has_config = source.config is not None and not (whole and source.arguments)
    try:
        if has_config:
            arguments = component.from_config(source.config)
        else:
            arguments = source.arguments or _from_file(source)
            if source.in_system and source.component == "text_encoder" and not whole:
                arguments = text_used(arguments, source.layout)
        return check_bounds(arguments)
    except LdmError as error:
        raise WeightsError(f"{source.path}: {error}") from error
    except MALFORMED as error:
        raise _undescribed(source, error) from error


def _from_file(source: Source) -> Config:
    """From the shapes in an original file, and from what its authors wrote beside it."""
    component, shapes = COMPONENTS[source.kind], shapes_of(source.stored)
    return component.from_shapes(shapes) if source.params is None else component.from_yml(source.params, shapes)


def _build(source: Source, whole: bool, formula: str | None) -> nn.Module:
    """The network without memory of its own."""
    component, arguments = COMPONENTS[source.kind], arguments_of(source, whole=whole)
    if formula is not None and formula not in component.formulas:
        known = " or ".join(component.formulas) or f"none for {source.component}, whose formula no program changed"
        raise ConfigError(f"{source.path}: formula={formula} is not known; expected {known}")
    try:
        with torch.device("meta"):
            return component.make(arguments | component.formulas.get(formula, {}))
    except LdmError as error:
        raise WeightsError(f"{source.path}: {error}") from error
    except MALFORMED as error:
        raise _undescribed(source, error) from error


def _undescribed(source: Source, error: Exception) -> WeightsError:
    if words := stranger(source.stored):
        return WeightsError(f"{source.path}: {words}, which nothing here reads")
    what = looks_like(shapes_of(source.stored)) if source.config is None else "its config.json"
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return WeightsError(f"{source.path}: {what} describes no {source.component} ({reason})")


def _say_guess(source: Source) -> None:
    """A line where the number of heads is only that of other networks of the kind."""
    knob, published = GUESSES.get(source.kind, ("", ()))
    if not knob or source.config or source.arguments or source.params:
        return
    arguments = arguments_of(source)
    if arguments[knob] not in published:
        heads = {name: arguments[name] for name in ("num_heads", "head_dim") if name in arguments}
        told = ", ".join(f"{name}={value}" for name, value in heads.items())
        say(f"{source.path}: no tensor tells the heads of its {source.component}; guessed {told}: "
            "where that is wrong, put the config.yaml or config.json that it was published with beside it")  # fmt: skip


def _check(source: Source, keys: Mapping[str, Tensor], translate) -> Mapping[str, Stored]:
    """Translate tensors that have shapes only, and compare them with the network's: those that are to be read."""
    stored = source.stored
    whole_numbers = (name for name, tensor in stored.items() if not tensor.dtype.is_floating_point)
    if odd := sorted(name for name in whole_numbers if not name.endswith("position_ids")):
        what = f"{listing(odd)} are {stored[odd[0]].dtype}, expected floating-point weights (quantised?)"
        raise WeightsError(f"{source.path}: looks like {looks_like(shapes_of(stored))}, but {what}")
    try:
        found = translate(_hollow(stored), keys)
    except Mismatch as error:
        if error.missing:
            raise _unlike(source, error) from error
        check_unknown(source.path, error.unknown, stored, source.strict)
        stored = {name: tensor for name, tensor in stored.items() if name not in error.unknown}
        found = translate(_hollow(stored), keys)
    except (WeightsError, RuntimeError) as error:
        raise _unlike(source, error) from error
    wrong = [key for key, tensor in keys.items() if tensor.shape != found[key].shape]
    if wrong:
        sizes = f"{tuple(found[wrong[0]].shape)}, expected {tuple(keys[wrong[0]].shape)}"
        raise _unlike(source, f"shapes differ: {listing(wrong)}: {sizes}")
    return stored


def _hollow(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    return {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}


def _unlike(source: Source, problem: Exception | str) -> WeightsError:
    text = " ".join(str(problem).split())[:300]
    return WeightsError(f"{source.path}: looks like {looks_like(shapes_of(source.stored))}, but {text}")


def save_model(
    net: nn.Module, dst: str | os.PathLike, layout: str = "diffusers", *, config: Config | None = None
) -> None:
    """A network as others read it: a folder with config.json (diffusers), or one .safetensors file (original).

    config: entries of config.json that a network does not know, such as an autoencoder's scaling_factor. `dst` must not
    exist, and does not after a failure. Raises WeightsError, ConfigError.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"{dst}: layout={layout!r} is not known; expected one of {', '.join(LAYOUTS)}")
    if layout == "original":
        return write_original({row_of(net).folders[0]: net}, Path(dst))
    with appearing(Path(dst)) as folder:
        write_folder(net, folder, config)


def write_folder(net: nn.Module, folder: Path, config: Config | None = None, used: Config | None = None) -> None:
    """config.json and weights into an existing folder.

    used: arguments of the network that a system makes of this one; what else it holds goes into a file of its own.
    """
    component = row_of(net)
    state = component.write("diffusers", net)
    if used:
        arguments = component.arguments(net)
        with torch.device("meta"):
            net = component.make(used)
        names = component.write("diffusers", net).keys()
        unused = {name: tensor for name, tensor in state.items() if name not in names}
        write_tensors(folder / UNUSED, unused, {folder.name: arguments})
        state = {name: state[name] for name in names}
    write_json(folder / "config.json", component.to_config(net) | (config or {}))
    write_tensors(folder / f"{component.files['.safetensors']}.safetensors", state)


def write_original(
    nets: Mapping[str, nn.Module], dst: Path, system: str | None = None, settings: Config | None = None
) -> None:
    """One file of one component, or of several, by their names, where those of the system are; IF's has a config.yml.

    settings: what the networks do not show (`pipeline`), for this program; the markers of SDXL's are for others too.
    """
    check_destination(dst)
    metadata = {name: row_of(net).arguments(net) for name, net in nets.items()}
    metadata |= {"settings": settings} if settings else {}
    state = {}
    for name, net in nets.items():
        component = row_of(net)
        prefix, layout = (component.prefix, "original") if len(nets) == 1 else _place(name, system, dst)
        published = component.write(layout, net) | component.computed(net)
        state |= {prefix + key: tensor for key, tensor in published.items()}
    if system and system.startswith("sdxl"):
        found = (settings or {}).items()
        state |= {name: torch.zeros(0) for name, setting in MARKERS.items() if setting in found}
    params = next((row_of(net).to_yml(net) for net in nets.values() if row_of(net).to_yml), None)
    if params and os.path.lexists(dst.parent / YML):
        raise WeightsError(f"{dst.parent / YML}: describes another file already; choose another folder for {dst.name}")
    dst.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(dst, state, metadata)
    if params:
        write_json(dst.parent / YML, {"params": params})  # JSON is YAML


def check_destination(dst: Path) -> None:
    """ConfigError, WeightsError where no file of original layout can be written."""
    if dst.suffix != ".safetensors":
        raise ConfigError(f"{dst}: expected a .safetensors file for the original layout")
    if os.path.lexists(dst):
        raise WeightsError(f"{dst}: already exists; choose another name or delete it")


def _place(component: str, system: str | None, dst: Path) -> tuple[str, str]:
    """Prefix and layout of a component in the original file of a system."""
    for place in places_of(system) if system else ():
        if place.folder == component and place.prefix:
            return place.prefix, place.layout
    what = f"of system {system}" if system else "without a UNet"
    raise WeightsError(f"{dst}: {component} has no place in an original file {what}; write it alone, with --component")
