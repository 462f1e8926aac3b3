"""A published checkpoint as a run: the config of its system, filled in from its files, and its networks.

The YAML of a system says what no file does (layers and norms of the text encoders, the process, the sizes that
condition); the files say how large the networks are, and where they differ from the YAML, they are right.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ldm.build import MISSING, build_codec, build_conditioner, build_objective, compose, fill, locate, make
from ldm.conditioning.clip import CLIPTextEncoder
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.stored import KnownTexts
from ldm.generate import Run
from ldm.models.autoencoder import AutoencoderKL
from ldm.told import tell
from ldm.utils.devices import pick_device
from ldm.utils.errors import ConfigError, WeightsError
from ldm.weights.expand import expand_input
from ldm.weights.load import load_model
from ldm.weights.pipeline import PREDICTIONS, read_tokenizer, vocabularies
from ldm.weights.systems import NONE, Parts, System, identify, load_system, node_of

SCHEDULES = {"linear": "ddpm_linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "ddpm_cosine"}
PARTS = ("vae", "text_encoder", "text_encoder_2")  # of a config, beside `weights`
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What a person says of published weights, where their files do not or are wrong; `published` of sample.yaml."""

    prediction: str | None = None  # eps, v, x0
    clip_skip: int | None = None  # 1: CLIP's last layer, 2: the last but one, as A1111 counts
    strict: bool = True  # refuse tensors of no known part
    prompt_2: str | None = None  # of SDXL: what its second text encoder reads instead of the prompt
    negative_2: str | None = None
    original_size: Sequence[int] | None = None  # of SDXL: height and width that the picture is said to have had
    crop: Sequence[int] | None = None  # top and left
    target_size: Sequence[int] | None = None
    negative_original_size: Sequence[int] | None = None
    negative_crop: Sequence[int] | None = None
    negative_target_size: Sequence[int] | None = None
    aesthetic_score: float | None = None  # of SDXL's refiner
    negative_aesthetic_score: float | None = None


UNSAID = Options()


def system_of(
    weights: str | Path, name: str | None = None, parts: Parts = NONE, options: Options = UNSAID
) -> str:
    """The name of the system, a file of configs/system: the one given, or what the weights look like."""
    return name or identify(Path(weights), parts, has_texts=True, strict=options.strict)


def load_published(
    weights: str | Path,
    *,
    system: str | None = None,  # a file of configs/system, where the weights do not show it
    tokenizer: str | None = None,  # a file or folder with the vocabulary, where the weights bring none
    dtype: str = "fp32",
    device: torch.device | str = "auto",
    variant: str | None = None,
    ema: bool | None = None,  # averaged weights where a file has both: `ldm.weights.load_model`
    parts: Parts = NONE,  # "vae", "text_encoder": where they are, if not with the weights
    formula: str | None = None,  # of a DiT: original, diffusers
    texts: KnownTexts | None = None,  # read before (`read_texts`): no text encoder is loaded
    options: Options = UNSAID,
) -> Run:
    """A diffusers folder or an original file as a `Run`. Raises WeightsError."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}")
    name, device = system_of(weights, system, parts, options), pick_device(str(device))
    found = load_system(Path(weights), DTYPES[dtype], device, name=name, variant=variant, ema=ema, parts=parts,
                        formula=formula, has_texts=texts is not None, strict=options.strict)  # fmt: skip
    cfg = config_of(found, name, options)
    if texts is not None:
        check_texts(texts, cfg["conditioner"], found)
        cfg["conditioner"] = without_texts(cfg["conditioner"])
    cfg = complete(cfg, found, tokenizer)
    codec = build_codec(cfg["codec"], found.networks)
    conditioner, cfg["conditioner"], _ = build_conditioner(
        cfg["conditioner"], tokenizer=found.tokenizer, networks=found.networks
    )
    if texts is not None:
        conditioner = Conditioner({**conditioner.encoders, "texts": texts})
    objective, _, cfg["network"] = build_objective(cfg, codec, conditioner, found.networks, training=False)
    objective.denoiser.dtype = None if dtype == "fp32" else DTYPES[dtype]
    if "sample_size" in cfg["network"]:
        cfg["image_size"] = cfg["network"]["sample_size"] * codec.downsample
    for encoder in conditioner.encoders.values():
        if isinstance(encoder, CLIPTextEncoder):
            encoder.chunks = None  # long prompts continue, where training would cut them
    tell(conditioner, name, options)
    return Run(objective.to(device), cfg, step=0)


def config_of(found: System, name: str, options: Options) -> dict:
    """The config of a system with the process that its files say, and with the prediction that a person does."""
    say_prediction(found, options.prediction)
    try:
        return compose("train", [f"system={name}", *overrides(found.settings)])
    except WeightsError as error:
        raise WeightsError(f"{found.path}: {error}") from error


def read_texts(
    texts: Sequence[str],
    weights: str | Path,  # a text encoder, or a system that has one
    system: str,
    *,
    tokenizer: str | None = None,
    dtype: str = "fp32",
    device: torch.device | str = "cpu",
    variant: str | None = None,
) -> KnownTexts:
    """What the one text encoder of a system makes of texts, and of none; it is in memory only while it reads."""
    node = compose("train", [f"system={system}"])["conditioner"]
    (name, encoder), *others = ((name, each) for name, each in node["encoders"].items() if "network" in each)
    if others:
        raise ConfigError(f"{system} has several text encoders; texts are read before for systems of one only")
    network = load_model(weights, "text_encoder", DTYPES[dtype], device, variant=variant)
    vocabulary = read_tokenizer(vocabularies(Path(weights)), system)
    node = {**node, "encoders": {name: {**encoder, "network": node_of(network)}}}
    node["tokenizer"] = {**node["tokenizer"], "path": tokenizer or node["tokenizer"]["path"]}
    conditioner, _, _ = build_conditioner(node, tokenizer=vocabulary, networks={name: network})
    return KnownTexts.read(conditioner.encoders[name], texts, how_read(encoder), device)


def how_read(encoder: dict) -> dict[str, int]:
    """The settings of a text encoder's node that decide what it gives."""
    return {name: encoder[name] for name in ("length", "mask", "context_mask", "clean") if name in encoder}


def check_texts(texts: KnownTexts, conditioner: dict, found: System) -> None:
    """ConfigError unless the network of a system can read what these texts were made into."""
    wanted = next(how_read(node) for node in conditioner["encoders"].values() if "network" in node)
    if texts.how != wanted:
        raise ConfigError(f"{found.path}: the texts were read with {texts.how}, but {found.name} needs {wanted}")
    width, expected = texts.dims["context_dim"], found.nodes["network"]["context_dim"]
    if width != expected:
        raise WeightsError(f"{found.path}: texts of width {width}, but its network reads text of {expected}")


def without_texts(conditioner: dict) -> dict:
    """A conditioner's node without what reads text."""
    encoders = {name: node for name, node in conditioner["encoders"].items() if "network" not in node}
    return {"encoders": encoders, "dropout": 0.0}


def begin(cfg: dict, stored: dict, device: torch.device | str = "cpu") -> tuple[dict, dict[str, nn.Module], str | None]:
    """Config, networks and vocabulary of a run that starts from published weights (`weights=` of train.py, or parts).

    Networks keep the knobs of the config that no file knows: checkpointing, dropout, more input channels. A run that
    continues has all of them in its checkpoint, whose config is `stored`.
    """
    if stored:
        return cfg | {name: stored[name] for name in ("codec", "conditioner", "network")}, {}, None
    if not cfg["weights"]:
        return begin_with_parts(cfg)
    if locate(cfg["network"]["_target_"], "network") is AutoencoderKL:
        net = load_model(cfg["weights"], "vae")
        return cfg | {"network": node_of(net)}, {"network": net}, None
    found = load_system(Path(cfg["weights"]), device=device, parts=parts_of(cfg))
    cfg = complete(cfg, found)
    told, chosen = found.settings.get("prediction"), cfg["prediction"]["_target_"].rpartition(".")[2].lower()
    if told not in (None, chosen):
        print(f"warning: {found.path} predicts {told}, and is trained with prediction={chosen} now", file=sys.stderr)
    node, network = dict(cfg["network"]), found.networks["network"]
    codec = build_codec(cfg["codec"], found.networks)
    node["in_channels"] = codec.channels + locate(cfg["objective"]["_target_"], "objective").image_channels(codec)
    network = remake(node, expand_input(network, node["in_channels"]))
    return cfg | {"network": node}, {**found.networks, "network": network}, found.tokenizer


def begin_with_parts(cfg: dict) -> tuple[dict, dict[str, nn.Module], None]:
    """A network from scratch between published encoders: `vae=` and `text_encoder=` without `weights=`."""
    codec, conditioner = dict(cfg["codec"]), dict(cfg["conditioner"])
    encoders, networks = {name: dict(node) for name, node in conditioner.get("encoders", {}).items()}, {}
    if cfg["vae"]:
        networks["autoencoder"] = load_model(cfg["vae"], "vae")
        codec["autoencoder"] = node_of(networks["autoencoder"])
    readers = [name for name, node in encoders.items() if "network" in node]
    for name, part in zip(readers, ("text_encoder", "text_encoder_2"), strict=False):
        if cfg[part]:
            networks[name] = load_model(cfg[part])
            encoders[name]["network"] = node_of(networks[name])
    return cfg | {"codec": codec, "conditioner": {**conditioner, "encoders": encoders}}, networks, None


def parts_of(cfg: dict) -> dict[str, str]:
    """The paths that a config gives beside `weights`."""
    return {name: cfg[name] for name in PARTS if cfg[name]}


def overrides(settings: dict) -> list[str]:
    """What the files say of the process, as a command line would."""
    if "process" in settings:
        return other_process(settings)
    chosen = [f"prediction={settings['prediction']}"] if "prediction" in settings else []
    schedule, knobs = settings.get("beta_schedule"), {"T": "num_train_timesteps"}
    if "trained_betas" in settings:
        chosen, knobs = [*chosen, "process=custom_betas"], {"betas": "trained_betas"}
    elif schedule:
        if schedule not in SCHEDULES:
            raise WeightsError(f"beta_schedule={schedule[:60]} is not known; expected {', '.join(SCHEDULES)}")
        chosen += [f"process={SCHEDULES[schedule]}"]
    if "trained_betas" not in settings and schedule != "squaredcos_cap_v2":
        knobs |= {"beta_start": "beta_start", "beta_end": "beta_end"}
    knobs |= {"zero_terminal_snr": "zero_terminal_snr"}
    return chosen + [f"process.{knob}={settings[name]}" for knob, name in knobs.items() if name in settings]


def other_process(settings: dict) -> list[str]:
    """EDM's process (Playground 2.5), or a flow, in place of a table. Raises WeightsError for what is not built."""
    if settings["process"] == "flow":
        return ["prediction=flow", "process=flow", f"process.shift={settings.get('flow_shift', 1.0)}"]
    if settings.get("prediction", "eps") != "eps":
        told = settings["prediction"]
        raise WeightsError(f"its scheduler is EDM's, of a network that predicts {told}; expected epsilon")
    knobs = [f"process.{knob}={settings[knob]}" for knob in ("sigma_min", "sigma_max", "rho") if knob in settings]
    return ["prediction=edm", f"prediction.sigma_data={settings.get('sigma_data', 0.5)}", "process=edm", *knobs]


def say_prediction(found: System, chosen: str | None) -> None:
    """Let what a person says of a network's prediction win over its files; a warning where they say otherwise."""
    if chosen is None:
        return
    if chosen not in PREDICTIONS.values():
        raise ConfigError(f"published.prediction={chosen}: expected one of {', '.join(PREDICTIONS.values())}")
    if "process" in found.settings:
        raise ConfigError(f"published.prediction={chosen}: the process of {found.path} is {found.settings['process']}, "
                          "which fixes what its network predicts; leave it out")  # fmt: skip
    if (told := found.settings.get("prediction")) not in (None, chosen):
        print(f"warning: {found.path} says that it predicts {told}; drawn as {chosen}, as you say", file=sys.stderr)
    found.settings["prediction"] = chosen


def remake(node: dict, network: nn.Module) -> nn.Module:
    """The network of a node, with the weights of another of the same shapes; nothing is copied."""
    with torch.device("meta"):
        made = make(node, "network")
    made.load_state_dict(network.state_dict(), assign=True)
    return made


def complete(cfg: dict, found: System, tokenizer: str | None = None) -> dict:
    """The config of a system with the sizes and the settings that its files give. Raises WeightsError for another's."""
    codec, conditioner = dict(cfg["codec"]), dict(cfg["conditioner"])
    encoders = {name: dict(node) for name, node in conditioner.get("encoders", {}).items()}
    slots = {"network", *(name for name, node in encoders.items() if "network" in node)}
    slots |= {"autoencoder"} & codec.keys()
    if slots != found.networks.keys():
        chosen = f"the config is of system={cfg['system']}" if cfg["system"] else "no system is chosen"
        raise WeightsError(f"{found.path} holds {found.name}, but {chosen}; set system={found.name}")
    for name, node in encoders.items():
        encoders[name] = complete_encoder(node, found.nodes.get(name), found)
    codec |= {name: found.settings[name] for name in ("scale", "shift") if name in found.settings}
    codec |= {"autoencoder": found.nodes["autoencoder"]} if "autoencoder" in codec else {}
    conditioner["encoders"] = encoders
    if "tokenizer" in conditioner:
        conditioner["tokenizer"] = {**conditioner["tokenizer"], "path": tokenizer or conditioner["tokenizer"]["path"]}
    network = {**cfg["network"], **found.nodes["network"]}
    return {**cfg, "codec": codec, "conditioner": conditioner, "network": network}


def complete_encoder(node: dict, network: dict | None, found: System) -> dict:
    """An encoder's node with what the files say of it: its network, the length of its texts, the classes."""
    told = {"zero_null": "zero_null", "length": "text_length", "class_names": "class_names"}
    node |= {knob: found.settings[name] for knob, name in told.items() if knob in node and name in found.settings}
    if network:
        node["network"] = network
    return fill(node, num_classes=found.nodes["network"].get("num_classes", MISSING), class_names=None)
