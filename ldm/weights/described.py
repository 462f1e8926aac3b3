"""What stands beside a single file of weights and says what no tensor tells: heads, and how the network was trained.

A YAML of the authors' (`v1-inference.yaml`, sgm's `sd_xl_base.yaml`, DeepFloyd's `config.yml`), or a config.json; of
the name of the file itself, as A1111 has it, or config.yaml, config.yml, config.json, or the only YAML in the folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.io.text import read_config, read_yaml
from ldm.utils.errors import DataError, WeightsError
from ldm.weights.components import class_name, kind_of
from ldm.weights.formats import Config
from ldm.weights.formats_clip import WHOLE
from ldm.weights.ledger import say

YML = "config.yml"  # beside the one file of weights of a network, as DeepFloyd's authors publish theirs
YAMLS = (".yaml", ".yml")
NETWORK = ("unet_config", "network_config")  # CompVis', and sgm's name for it
TARGETS = {"EpsScaling": "eps", "VScaling": "v", "VScalingWithEDMcNoise": "v"}  # of sgm's denoiser
PARAMETERS = {"eps": "eps", "v": "v", "x0": "x0"}
NUMBERS = {"scale_factor": "scale", "linear_start": "beta_start", "linear_end": "beta_end",
           "timesteps": "num_train_timesteps"}  # fmt: skip


def yaml_of(path: Path) -> Path | None:
    """The YAML that describes a file of weights, where there is one."""
    named = [path.with_suffix(suffix) for suffix in YAMLS] + [path.parent / f"config{suffix}" for suffix in YAMLS]
    if there := next((file for file in named if file.is_file()), None):
        return there
    others = [file for file in sorted(path.parent.iterdir()) if file.suffix in YAMLS] if path.parent.is_dir() else []
    return others[0] if len(others) == 1 else None


def json_of(path: Path, kind: str) -> Config | None:
    """The config.json that describes the network of this kind in a file, where there is one."""
    for file in (path.with_suffix(".json"), path.parent / "config.json"):
        config = _perhaps(file, path, config_of) if file.is_file() else {}
        is_whole = kind.startswith("clip_") and class_name(config) == WHOLE
        if config and (is_whole or _kind(config) == kind):
            return config
    return None


def _kind(config: Config) -> str | None:
    """The kind of network that a config.json describes; None for any other."""
    try:
        return kind_of(config)
    except WeightsError:
        return None


def _perhaps(file: Path, weights: Path, read: Callable[[Path], Config]) -> Config:
    """What a file says that may describe the weights beside it: one that is not named after them may be another's."""
    try:
        return read(file)
    except WeightsError as error:
        if file.stem == weights.stem:
            raise
        say(f"{error}; it is left aside")
        return {}


def config_of(file: Path) -> Config:
    try:
        return read_config(file)
    except DataError as error:
        raise WeightsError(str(error)) from error


def if_params(path: Path) -> Config | None:
    """What DeepFloyd's config.yml says of the network in a file."""
    file = path.parent / YML
    if not file.is_file():
        return None
    if not isinstance(params := _yaml(file).get("params"), dict):
        raise WeightsError(f"{file}: says no 'params', which describe the network; delete it to go by the shapes alone")
    return params


def unet_params(path: Path) -> Config | None:
    """What the authors' YAML says of the UNet in a file."""
    model = _model(path)
    node = next((model[name] for name in NETWORK if isinstance(model.get(name), dict)), {})
    return _table(node, "params") or None


def settings_of(path: Path) -> Config:
    """What the authors' YAML says of the process and the latents: settings as of `pipeline.read_settings`."""
    model = _model(path)
    settings = {ours: model[name] for name, ours in NUMBERS.items() if type(model.get(name)) in (int, float)}
    scaling = _table(_table(_table(model, "denoiser_config"), "params"), "scaling_config").get("target")
    said = PARAMETERS.get(str(model.get("parameterization"))) or TARGETS.get(str(scaling).rpartition(".")[2])
    return settings | ({"prediction": said} if said else {})


def _model(path: Path) -> Config:
    """`model.params` of a YAML beside a file; nothing where it is of another program."""
    file = yaml_of(path)
    return _table(_table(_perhaps(file, path, _yaml), "model"), "params") if file else {}


def _table(config: Config, name: str) -> Config:
    return value if isinstance(value := config.get(name), dict) else {}


def _yaml(file: Path) -> dict[str, Any]:
    try:
        return read_yaml(file)
    except DataError as error:
        raise WeightsError(str(error)) from error
