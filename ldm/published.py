"""A published checkpoint as a run: the config of its system, filled in from its files, and its networks.

The YAML of a system says what no file does (layers and norms of the text encoders, the process, the sizes that
condition); the files say how large the networks are, and where they differ from the YAML, they are right.
"""

from pathlib import Path

import torch
from torch import nn

from ldm.build import build_codec, build_conditioner, build_objective, compose, locate, make
from ldm.generate import Run
from ldm.models.autoencoder import AutoencoderKL
from ldm.utils.errors import ConfigError, WeightsError
from ldm.weights.expand import expand_input
from ldm.weights.load import load_model
from ldm.weights.systems import System, identify, load_system, node_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def system_of(weights: str | Path, name: str | None = None) -> str:
    """The name of the system, a file of configs/system: the one given, or what the weights look like."""
    return name or identify(Path(weights))


def load_published(
    weights: str | Path,
    *,
    system: str | None = None,  # a file of configs/system, where the weights do not show it
    tokenizer: str | None = None,  # a file or folder with CLIP's vocabulary, where the weights bring none
    dtype: str = "fp32",
    device: torch.device | str = "cpu",
    variant: str | None = None,
    ema: bool = True,
) -> Run:
    """A diffusers folder or an original file as a `Run`. Raises WeightsError."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}")
    name = system_of(weights, system)
    found = load_system(Path(weights), DTYPES[dtype], device, name=name, variant=variant, ema=ema)
    cfg = complete(compose("train", [f"system={name}", *overrides(found.settings)]), found, tokenizer)
    codec = build_codec(cfg["codec"], found.networks)
    conditioner, cfg["conditioner"], _ = build_conditioner(
        cfg["conditioner"], tokenizer=found.tokenizer, networks=found.networks
    )
    objective, _, cfg["network"] = build_objective(cfg, codec, conditioner, found.networks, training=False)
    objective.denoiser.dtype = None if dtype == "fp32" else DTYPES[dtype]
    for name in conditioner.encoders.keys() & found.networks.keys():
        conditioner.encoders[name].chunks = None  # long prompts continue, where training would cut them
    return Run(objective.to(device), cfg, step=0)


def begin(cfg: dict, stored: dict, device: torch.device | str = "cpu") -> tuple[dict, dict[str, nn.Module], str | None]:
    """Config, networks and vocabulary of a run that starts from published weights (`weights=` of train.py).

    Networks keep the knobs of the config that no file knows: checkpointing, dropout, more input channels. A run that
    continues has all of them in its checkpoint, whose config is `stored`.
    """
    if stored:
        return cfg | {name: stored[name] for name in ("codec", "conditioner", "network")}, {}, None
    if locate(cfg["network"]["_target_"]) is AutoencoderKL:
        net = load_model(cfg["weights"], "vae")
        return cfg | {"network": node_of(net)}, {"network": net}, None
    found = load_system(Path(cfg["weights"]), device=device)
    cfg = complete(cfg, found)
    node = dict(cfg["network"])
    codec = build_codec(cfg["codec"], found.networks)
    node["in_channels"] = codec.channels + locate(cfg["objective"]["_target_"]).image_channels(codec)
    network = remake(node, expand_input(found.networks["network"], node["in_channels"]))
    return cfg | {"network": node}, {**found.networks, "network": network}, found.tokenizer


def overrides(settings: dict) -> list[str]:
    """What the files say of the process, as a command line would."""
    process = {"T": "num_train_timesteps", "beta_start": "beta_start", "beta_end": "beta_end"}
    chosen = [f"prediction={settings['prediction']}"] if "prediction" in settings else []
    chosen += ["process=zero_snr"] if settings.get("zero_terminal_snr") else []
    return chosen + [f"process.{knob}={settings[name]}" for knob, name in process.items() if name in settings]


def remake(node: dict, network: nn.Module) -> nn.Module:
    """The network of a node, with the weights of another of the same shapes; nothing is copied."""
    with torch.device("meta"):
        made = make(node)
    made.load_state_dict(network.state_dict(), assign=True)
    return made


def complete(cfg: dict, found: System, tokenizer: str | None = None) -> dict:
    """The config of a system with the sizes and the settings that its files give. Raises WeightsError for another's."""
    codec, conditioner = dict(cfg["codec"]), dict(cfg["conditioner"])
    encoders = {name: dict(node) for name, node in conditioner.get("encoders", {}).items()}
    slots = {"network", "autoencoder", *(name for name, node in encoders.items() if "network" in node)}
    if slots != found.networks.keys():
        chosen = f"the config is of system={cfg['system']}" if cfg["system"] else "no system is chosen"
        raise WeightsError(f"{found.path} holds {found.name}, but {chosen}; set system={found.name}")
    for name in encoders.keys() & found.nodes.keys():
        encoders[name]["network"] = found.nodes[name]
        encoders[name]["zero_null"] = found.settings.get("zero_null", encoders[name]["zero_null"])
    codec |= {name: found.settings[name] for name in ("scale", "shift") if name in found.settings}
    codec["autoencoder"] = found.nodes["autoencoder"]
    conditioner["encoders"] = encoders
    conditioner["tokenizer"] = {**conditioner["tokenizer"], "path": tokenizer or conditioner["tokenizer"]["path"]}
    network = {**cfg["network"], **found.nodes["network"]}
    return {**cfg, "codec": codec, "conditioner": conditioner, "network": network}
