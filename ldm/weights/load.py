"""Published weights into our networks and back, every key accounted for and no bit changed."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.io.folders import appearing
from ldm.io.stored import Stored
from ldm.io.tensors import write_tensors
from ldm.io.text import write_json
from ldm.utils.errors import ConfigError, LdmError, WeightsError
from ldm.weights.components import COMPONENTS, Component, component_of
from ldm.weights.detect import looks_like
from ldm.weights.formats import Config, check_bounds
from ldm.weights.ledger import listing
from ldm.weights.sources import Source, open_source, shapes_of

LAYOUTS = ("original", "diffusers")


class Reading(Mapping):
    """The tensors of a file as a state dict: each is read, cast and moved when it is asked for, and not kept."""

    def __init__(self, stored: Mapping[str, Stored], dtype: torch.dtype | None, device: torch.device | str):
        self.stored, self.dtype, self.device = stored, dtype, device

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].read(self.dtype, self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def load_model(
    path: str | os.PathLike,
    component: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    variant: str | None = None,
    ema: bool = True,
) -> nn.Module:
    """A published network in eval mode, from a diffusers folder or an original file. Raises WeightsError.

    component: "unet", "vae"; by default the only one there, of a whole system its UNet. dtype: None keeps the file's.
    variant: of a folder's files, such as "fp16". ema: the averaged weights where a training checkpoint has both.
    """
    return load_source(open_source(Path(path), component, variant=variant, ema=ema), dtype, device)


def load_source(source: Source, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """The network of an opened source. Nothing is read before every name and shape has been found right."""
    component = COMPONENTS[source.component]
    net = _build(source, component)
    translate = component.layouts[source.layout].read
    keys = net.state_dict()
    _check(source, keys, translate)
    net.load_state_dict(translate(Reading(source.stored, dtype, device), keys), assign=True)
    return net.eval()


def _build(source: Source, component: Component) -> nn.Module:
    """The network without memory of its own."""
    try:
        if source.config is not None:
            arguments = component.from_config(source.config)
        else:
            arguments = source.arguments or component.from_shapes(shapes_of(source.stored))
        with torch.device("meta"):
            return component.network(**check_bounds(arguments))
    except LdmError as error:
        raise WeightsError(f"{source.path}: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        what = looks_like(shapes_of(source.stored)) if source.config is None else "its config.json"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise WeightsError(f"{source.path}: {what} describes no {source.component} ({reason})") from error


def _check(source: Source, keys: Mapping[str, Tensor], translate) -> None:
    """Translate tensors that have shapes only, and compare them with the network's."""
    odd = sorted(name for name, stored in source.stored.items() if not stored.dtype.is_floating_point)
    if odd:
        dtype = source.stored[odd[0]].dtype
        raise WeightsError(f"{source.path}: {listing(odd)} are {dtype}, expected floating-point weights (quantised?)")
    shapes = {name: torch.empty(stored.shape, device="meta") for name, stored in source.stored.items()}
    looks = looks_like(shapes_of(source.stored))
    try:
        found = translate(shapes, keys)
    except (WeightsError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        raise WeightsError(f"{source.path}: looks like {looks}, but {text}") from error
    wrong = [key for key, tensor in keys.items() if tensor.shape != found[key].shape]
    if wrong:
        sizes = f"{tuple(found[wrong[0]].shape)}, expected {tuple(keys[wrong[0]].shape)}"
        raise WeightsError(f"{source.path}: looks like {looks}, but shapes differ: {listing(wrong)}: {sizes}")


def save_model(
    net: nn.Module, dst: str | os.PathLike, layout: str = "diffusers", *, config: Config | None = None
) -> None:
    """A network as others read it: a folder with config.json (diffusers), or one .safetensors file (original).

    config: entries of config.json that a network does not know, such as an autoencoder's scaling_factor. `dst` must not
    exist, and does not after a failure. Raises WeightsError, ConfigError.
    """
    if layout == "diffusers":
        with appearing(Path(dst)) as folder:
            write_folder(net, folder, config)
    else:
        write_original({component_of(net): net}, Path(dst), layout)


def write_folder(net: nn.Module, folder: Path, config: Config | None = None) -> None:
    """config.json and weights into an existing folder."""
    component = COMPONENTS[component_of(net)]
    write_json(folder / "config.json", component.to_config(net) | (config or {}))
    write_tensors(folder / f"{component.file}.safetensors", component.layouts["diffusers"].write(net.state_dict()))


def write_original(nets: Mapping[str, nn.Module], dst: Path, layout: str = "original") -> None:
    """One file of one component, or of several under the prefixes of a whole system."""
    if layout != "original" or dst.suffix != ".safetensors":
        raise ConfigError(f"{dst}, layout={layout!r}: expected a .safetensors file and one of {', '.join(LAYOUTS)}")
    if dst.exists():
        raise WeightsError(f"{dst}: already exists; choose another name or delete it")
    state = {}
    for name, net in nets.items():
        component = COMPONENTS[name]
        prefix = component.prefix if len(nets) == 1 else component.system_prefix
        published = component.layouts["original"].write(net.state_dict())
        state |= {prefix + key: tensor for key, tensor in published.items()}
    dst.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(dst, state, {name: COMPONENTS[name].arguments(net) for name, net in nets.items()})
