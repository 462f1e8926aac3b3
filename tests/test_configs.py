"""Every config composes, names arguments that exist, and adds no key that nothing reads."""

import inspect
import json
from functools import cache
from pathlib import Path

import pytest
import yaml

from ldm.build import compose, config_dir, locate, make
from ldm.utils.errors import ConfigError

CONFIGS = config_dir()
GROUPS = sorted(p.name for p in CONFIGS.iterdir() if p.is_dir())
ROOTLESS = {"experiment", "ablation", "formulation", "debug", "system"}
NODES = sorted(p for p in CONFIGS.glob("*/*.yaml") if p.parent.name not in ROOTLESS)
OPTIONS = {name: sorted(p.stem for p in (CONFIGS / name).glob("*.yaml")) for name in GROUPS if name not in ROOTLESS}
SYSTEMS = sorted(p.stem for p in (CONFIGS / "system").glob("*.yaml") if p.stem != "none")
EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
WIRED = {"run", "experiment", "overrides", "autoencoder", "shared"}  # keys the wiring takes out of a node first


@cache
def composed(root: str, *overrides: str) -> dict:
    """Half a second each, and asked for by several tests: to be read, not changed."""
    return compose(root, overrides)


def with_option(path: Path) -> dict:
    """A config with this file of its group; with it one file of every other group that the same root has."""
    group = path.parent.name
    root = "train" if group in composed("train") else "sample"
    number = OPTIONS[group].index(path.stem)
    choices = {name: options[number % len(options)] for name, options in OPTIONS.items() if name in composed(root)}
    return composed(root, *(f"{name}={choice}" for name, choice in choices.items()))


@pytest.fixture(scope="module")
def baseline():
    return composed("train")


@pytest.mark.parametrize("path", NODES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_group_files_name_arguments_that_exist(path):
    node = with_option(path)[path.parent.name]
    targets = [node] if "_target_" in node else [n for n in node.values() if isinstance(n, dict) and "_target_" in n]
    for found in targets:
        accepted = inspect.signature(locate(found["_target_"])).parameters
        unknown = set(found) - set(accepted) - {"_target_", "_partial_"} - WIRED
        assert not unknown, f"{path}: {unknown}"


@pytest.mark.parametrize("path", NODES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_setting_can_be_stored_in_a_checkpoint(path):
    json.dumps(with_option(path), allow_nan=False)  # no .inf, no .nan


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_add_no_unknown_key(name, baseline):
    """A typo at an experiment's root merges silently in Hydra; nodes with a _target_ are checked when built."""
    cfg = compose("train", [f"experiment={name}"])
    assert set(cfg) == set(baseline)
    for group, node in cfg.items():
        if isinstance(node, dict) and "_target_" in node:
            unknown = set(node) - set(inspect.signature(locate(node["_target_"])).parameters)
            assert unknown <= {"_target_", "_partial_"} | WIRED, f"{name}: {group} has {unknown}"


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_name_themselves_their_files_and_how_they_are_drawn_from(name, baseline):
    cfg = compose("train", [f"system={name}"])
    assert set(cfg) == set(baseline) and cfg["system"] == name
    assert "# Files: " in (CONFIGS / "system" / f"{name}.yaml").read_text()
    assert compose("sample", cfg["sampling"])["guidance"]["scale"] >= 4


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if n != "none"])
def test_experiments_begin_with_a_header(name):
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any("python train.py" in line for line in header), "the header gives the command"


def test_every_yaml_is_ours():
    for path in CONFIGS.rglob("*.yaml"):
        for target in _targets(yaml.safe_load(path.read_text()) or {}):
            assert target.startswith("ldm."), f"{path}: {target}"


def _targets(node):
    if isinstance(node, dict):
        yield from ([node["_target_"]] if "_target_" in node else [])
        for value in node.values():
            yield from _targets(value)


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "ldm", "ldm..x", "", "ldm.utils.seeding.hashlib", "ldm.utils.seeding.math.exp",
     "ldm.io.images.Image", "ldm.build.partial"],
)  # fmt: skip
def test_only_our_own_code_can_be_built(target):
    with pytest.raises(ConfigError, match="only those can be built"):
        locate(target)


def test_make_answers_misspelt_missing_and_contradicting_arguments():
    node = {"_target_": "ldm.models.codec.PixelCodec", "channels": 3}
    assert make(node).channels == 3
    with pytest.raises(ConfigError, match="did you mean 'channels'"):
        make({"_target_": "ldm.models.codec.PixelCodec", "chanels": 3})
    with pytest.raises(ConfigError, match="nothing sets channels"):
        make({**node, "channels": "???"})
    with pytest.raises(ConfigError, match="channels=3 in the config, but the rest of the system gives 1"):
        make(node, channels=1)
    with pytest.raises(ConfigError, match="channels='x' is of the wrong type; expected channels: int"):
        make({**node, "channels": "x"})
