"""The page of wiring: nodes of a config become objects, in the order in which they depend on each other.

data -> codec -> conditioner -> network -> denoiser -> objective. The data and the codec dictate the interface numbers
of the network (`???` in its YAML). Every function takes plain dicts; nothing below this page knows a config.
`networks` are those that are there already, with published weights: "network", "autoencoder", text encoders by name.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.utils.errors import ConfigError, DataError
from ldm.utils.slots import MISSING, fits, targets
from ldm.utils.suggest import explain, nearest

if TYPE_CHECKING:  # torch is imported when the first object is built, not when a config is composed
    from torch import nn

Networks = Mapping[str, "nn.Module"]
NONE: Networks = {}


def config_dir() -> Path:
    """The `configs/` folder: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    beside = package.parent / "configs"
    return beside if beside.is_dir() else package / "configs"


def compose(config_name: str, overrides: Iterable[str] = ()) -> dict:
    """A config as a plain, resolved dict, as the command line would compose it. Raises ConfigError."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # perhaps we are inside a Hydra program
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            return plain(hydra.compose(config_name, overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, lambda: compose(config_name))) from error
    finally:
        GlobalHydra.instance().hydra = outer


def plain(cfg: DictConfig) -> dict:
    """Resolved dict of a config; `???` stays where the wiring will fill a number in."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)


def locate(target: str, slot: str) -> Callable:
    """The function or class that a `_target_` names: one that the YAML files of its slot name, and no other."""
    known = targets(config_dir(), slot)
    if not isinstance(target, str) or target not in known:
        where = f"configs/{slot.partition('.')[0]}"
        hint = nearest(str(target)[:200], known) or f": {', '.join(sorted(known))}"
        raise ConfigError(
            f"{slot} cannot be _target_ {str(target)[:200]!r}: the files of {where} name what can be built there{hint}"
        )
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def make(node: dict, slot: str, **interface: Any) -> Any:
    """Build the object that the node in this slot of a config describes ("codec", "conditioner.encoders", ...).

    `interface` fills the arguments that its YAML leaves open (`???` or absent). `_partial_: true` gives a function with
    its knobs set. Raises ConfigError for what no YAML of the slot names, and for arguments that do not fit.
    """
    if not isinstance(node, Mapping):
        raise ConfigError(f"{slot} is {str(node)[:80]!r}; expected a table with a _target_")
    return assemble(locate(node.get("_target_"), slot), node, **interface)


def assemble(target: Callable, node: Mapping, **interface: Any) -> Any:
    """Call `target` with the arguments of a node and of the interface.

    A key that it does not have is answered with the nearest one; a value of the wrong type, a number that contradicts
    the interface, or stays open, is named.
    """
    node = {name: value for name, value in node.items() if name != "_target_"}
    is_partial = node.pop("_partial_", False)
    label = f"{target.__module__}.{target.__qualname__}"
    accepted = inspect.signature(target).parameters
    for name, value in node.items():
        if name not in accepted:
            hint = nearest(name, accepted) or f"; it takes {', '.join(accepted)}"
            raise ConfigError(f"{label} has no argument '{name}'{hint}")
        offered = interface.get(name, value)
        if value not in (None, MISSING, offered):
            raise ConfigError(f"{label}: {name}={value} in the config, but the rest of the system gives {offered}")
        if not fits(value, accepted[name].annotation):
            raise ConfigError(f"{label}: {name}={repr(value)[:80]} is of the wrong type; expected {accepted[name]}")
    arguments = node | {name: value for name, value in interface.items() if name in accepted}
    open_ = [name for name, value in arguments.items() if isinstance(value, str) and value == MISSING]
    if not is_partial:
        open_ += [name for name, p in accepted.items() if _is_required(p) and name not in arguments]
    if open_:
        raise ConfigError(f"{label}: nothing sets {', '.join(open_)}; give a number in the config")
    return partial(target, **arguments) if is_partial else target(**arguments)


def _is_required(parameter: inspect.Parameter) -> bool:
    is_named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return is_named and parameter.default is parameter.empty


def make_listed(target: Callable, given: Any) -> list:
    """Objects of one kind from what a command lists: settings each, or a path alone; one of them need be no list."""
    given = given if isinstance(given, list | tuple) else [given] if given else []
    nodes = [dict(node) if isinstance(node, dict) else {"path": node} for node in given]
    return [assemble(target, {**node, "path": str(node.get("path", MISSING))}) for node in nodes]


def fill(node: dict, **numbers: Any) -> dict:
    """The node with every open number (`???`) filled in, ready to be stored in a checkpoint's config."""
    return {name: numbers.get(name, value) if value == MISSING else value for name, value in node.items()}


def build_held_out(node: dict, data: Any) -> Any:
    """The images that training never sees; all of them where there are too few to hold any out."""
    try:
        return make({**node, "split": "held_out"}, "data")
    except DataError:
        return data


def build_conditioner(
    node: dict, data: Any = None, tokenizer: str | None = None, networks: Networks = NONE
) -> tuple[Any, dict, dict[str, bytes]]:
    """Conditioner, its completed node, and the files a checkpoint needs to rebuild it.

    The vocabulary and the classes come from the dataset, or, for a checkpoint, from its files and its config.
    """
    from ldm.conditioning.conditioner import Conditioner

    if not node:
        return Conditioner({}), node, {}
    objects, files = {}, {}
    if "tokenizer" in node:
        objects["tokenizer"] = build_tokenizer(node["tokenizer"], data, tokenizer)
        files["tokenizer.json"] = objects["tokenizer"].to_json().encode()
    classes = data.class_names if data else None
    nodes = {
        name: fill(encoder, num_classes=len(classes) if classes else MISSING, class_names=classes)
        for name, encoder in node["encoders"].items()
    }
    encoders = {name: build_encoder(encoder, networks.get(name), objects) for name, encoder in nodes.items()}
    knobs = {name: node[name] for name in ("dropout", "join") if name in node}
    return Conditioner(encoders, **knobs), {**node, "encoders": nodes}, files


def build_tokenizer(node: dict, data: Any, stored: str | None) -> Any:
    """Read back by the class that the node's function returns, or made by it: of captions, or of a published file."""
    if stored:
        return get_type_hints(locate(node.get("_target_"), "conditioner.tokenizer"))["return"].from_json(stored)
    return make(node, "conditioner.tokenizer", captions=data.captions() if data else None)


def build_encoder(node: dict, network: "nn.Module | None", objects: dict) -> Any:
    """Encoder of a completed node; a published one is a rule around a `network` with a node of its own."""
    if "network" not in node:
        return make(node, "conditioner.encoders", **objects)
    node = dict(node)
    inner, frozen = node.pop("network"), node.pop("frozen", True)
    network = (network or make(inner, "network")).requires_grad_(not frozen).eval()
    return make(node, "conditioner.encoders", network=network, **objects)


def hollow_encoders(node: dict) -> dict[str, "nn.Module"]:
    """The published networks of a completed conditioner without values, where a checkpoint's will follow."""
    import torch

    nodes = {name: encoder["network"] for name, encoder in node.get("encoders", {}).items() if "network" in encoder}
    with torch.device("meta"):
        networks = {name: make(inner, "network") for name, inner in nodes.items()}
    return {name: network.to_empty(device="cpu") for name, network in networks.items()}


def build_codec(node: dict, networks: Networks = NONE) -> Any:
    """Codec of a completed node: a pixel codec, or a latent codec whose `autoencoder` is a network node."""
    node = dict(node)
    if "autoencoder" not in node:
        return make(node, "codec")
    inner = node.pop("autoencoder")
    return make(node, "codec", autoencoder=networks.get("autoencoder") or make(inner, "network"))


def build_network(
    node: dict, codec: Any, conditioner: Any, image_channels: int = 0, network: "nn.Module | None" = None
) -> "tuple[nn.Module, dict]":
    """Network and its completed node; a condition that the network has no place for is an error, not ignored."""
    for name in conditioner.dims:
        if name not in node:
            raise ConfigError(f"{node['_target_']} has no '{name}', so it cannot take what this conditioner gives")
    node = fill(node, in_channels=codec.channels + image_channels, out_channels=codec.channels, **conditioner.dims)
    known = {name: None if value == MISSING else value for name, value in node.items()}
    return network or make(known, "network"), node


def build_objective(
    cfg: dict, codec: Any, conditioner: Any, networks: Networks = NONE, *, training: bool = True
) -> "tuple[nn.Module, nn.Module, dict]":
    """The objective, made of the parts that its constructor asks for by name; the network; the network's node.

    Without `training`, what only training needs (densities, weights, perceptual files) is left out, and so are knobs
    that the objective no longer has, so that a checkpoint can be sampled from whatever became of those.
    """
    import torch

    from ldm.diffusion.denoiser import Denoiser

    kind = locate(cfg["objective"].get("_target_"), "objective")
    wanted = inspect.signature(kind).parameters
    image_channels = kind.image_channels(codec) if "denoiser" in wanted else 0
    network, node = build_network(cfg["network"], codec, conditioner, image_channels, networks.get("network"))
    with torch.device("cpu"):  # where its table stands, also while networks are made on `meta`
        process = make(cfg["process"], "process")
    parts: dict[str, Callable[[], Any]] = {
        "autoencoder": lambda: network,
        "classifier": lambda: network,
        "denoiser": lambda: Denoiser(network, process, make(cfg["prediction"], "prediction", process=process)),
        "codec": lambda: codec,
        "conditioner": lambda: conditioner,
        "discriminator": lambda: make(cfg["discriminator"], "discriminator") if cfg["discriminator"] else None,
    }
    only_training: dict[str, Callable[[], Any]] = {
        "density": lambda: make(cfg["density"], "density"),
        "weighting": lambda: make(cfg["weighting"], "weighting"),
        "masks": lambda: make(cfg["masks"], "masks"),
        "annotate": lambda: make(cfg["hint"], "hint"),
        "teacher": lambda: networks["teacher"],
        "reconstruction": lambda: make(cfg["reconstruction"], "reconstruction"),
        "perceptual": lambda: make(cfg["perceptual"], "perceptual") if cfg["perceptual"] else None,
    }
    objects = {name: part() for name, part in parts.items() if name in wanted}
    objects |= {name: part() if training else None for name, part in only_training.items() if name in wanted}
    own = cfg["objective"] if training else {k: v for k, v in cfg["objective"].items() if k in {"_target_", *wanted}}
    return make(own, "objective", **objects), network, node


def build_adapters(nodes: dict, objective: "nn.Module") -> dict[str, Any]:
    """Adapters by name, put around an objective, whose own parameters are frozen from then on; none leave it alone."""
    if not nodes:  # most models have none, and need not wait for what adapters are made of
        return {}
    from ldm.adapters.training import attach, base_of

    base = {"net": base_of(objective), "downsample": objective.codec.downsample}
    adapters = {name: make(node, "adapters", name=name, **base) for name, node in nodes.items()}
    attach(objective, adapters)
    return adapters


def write_config(path: Path, cfg: dict) -> None:
    """The resolved config as YAML, for people; programs read the checkpoint's config.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(cfg), path)
