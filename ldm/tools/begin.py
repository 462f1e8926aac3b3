"""What a run begins with: nothing, published weights, another run, or its own checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from ldm.generate import Run, load_run
from ldm.io.checkpoints import latest
from ldm.models.codec import LatentCodec
from ldm.published import begin, parts_of
from ldm.training.checkpoint import find, load_config, load_files
from ldm.training.run import continued
from ldm.utils.errors import ConfigError

OF_A_RUN = ("codec", "conditioner", "network", "process", "prediction")  # nodes that another run decides
WAYS = ("weights", "base", "teacher")


@dataclass
class Beginning:
    """What there is already, of which the rest is built around."""

    config: dict = field(default_factory=dict)  # completed nodes, which replace those of the command
    stored: dict = field(default_factory=dict)  # the config of the checkpoint that gives the codec
    networks: dict[str, nn.Module] = field(default_factory=dict)  # by slot
    vocabulary: str | None = None
    state: dict[str, Tensor] | None = None  # of the whole objective, without adapters


def begin_run(cfg: dict, path: Path, resume: str | None) -> Beginning:
    """What the run of this config in `path` begins with. A run that continues has in its checkpoint all but a teacher.

    Raises ConfigError for settings that exclude each other, or when a run would continue with other adapters.
    """
    stored, files = continued(path, resume)
    if len(given := [f"{way}={cfg[way]}" for way in WAYS if cfg[way]]) > 1:
        raise ConfigError(f"{' and '.join(given)}: a run begins with one of them; leave the others out")
    if stored and (before := stored.get("adapters", {})) != cfg["adapters"]:
        source, now = resume or "its checkpoint", _words(cfg["adapters"])
        raise ConfigError(
            f"{path} cannot continue {source} with other adapters: {now}, there {_words(before)}; give the same ones, "
            "or begin another run with base="
        )
    vocabulary = files.get("tokenizer.json")
    if cfg["teacher"] or cfg["base"] and not stored:
        return _with_run(cfg)
    own = path if latest(path / "checkpoints", content=False)[0] else Path(resume or path)
    readers = _readers(load_run(own, device="cpu")) if stored and cfg["cache"] else {}
    if cfg["base"]:
        return Beginning({name: stored[name] for name in OF_A_RUN}, stored, readers, vocabulary)
    if cfg["weights"] or parts_of(cfg):
        found, networks, published = begin(cfg, stored)
        return Beginning(found, stored, networks | readers, vocabulary or published)
    return Beginning({}, stored, readers, vocabulary)


def _with_run(cfg: dict) -> Beginning:
    """The averaged weights of a finished run; a teacher's student is the same system and begins as its copy."""
    directory = find(Path(cfg["teacher"] or cfg["base"]))
    run, stored = load_run(directory, device="cpu"), load_config(directory)
    if adapters := stored.get("adapters"):
        raise ConfigError(f"{directory} is a base and {', '.join(adapters)}; give the base itself")
    config = {name: stored[name] for name in OF_A_RUN}
    own, theirs = cfg["conditioner"], stored["conditioner"]
    if own.get("encoders", {}).keys() == theirs.get("encoders", {}).keys() and "dropout" in own:
        config["conditioner"] = {**theirs, "dropout": own["dropout"]}  # which is of training alone
    networks = _readers(run) | ({"teacher": run.objective.denoiser} if cfg["teacher"] else {})
    vocabulary = load_files(directory).get("tokenizer.json")
    return Beginning(config, stored, networks, vocabulary, run.objective.state_dict())


def _readers(run: Run) -> dict[str, nn.Module]:
    """The networks of a run that read images and captions, by slot. What is cached is made by them, before the
    objective that has them is filled."""
    codec, encoders = run.objective.codec, run.objective.conditioner.encoders.items()
    texts = {name: net for name, encoder in encoders for part, net in encoder.named_children() if part == "network"}
    return texts | ({"autoencoder": codec.autoencoder} if isinstance(codec, LatentCodec) else {})


def _words(adapters: dict) -> str:
    """Adapters and their knobs in a line."""
    nodes = [
        f"{name} ({', '.join(f'{knob}={value}' for knob, value in node.items() if knob != '_target_')})"
        for name, node in adapters.items()
    ]
    return " and ".join(nodes) or "none"
