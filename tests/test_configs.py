"""Every config composes, names arguments that exist, and adds no key that nothing reads."""

import inspect
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import yaml

from ldm.build import compose, config_dir, locate, make
from ldm.utils.errors import ConfigError
from ldm.utils.slots import fits, targets

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
        accepted = inspect.signature(locate(found["_target_"], path.parent.name)).parameters
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
            unknown = set(node) - set(inspect.signature(locate(node["_target_"], group)).parameters)
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


def test_the_list_of_what_a_slot_may_be_is_what_its_files_say():
    def wanted(node, part, path=()):
        if isinstance(node, dict):
            yield from [node["_target_"]] if "_target_" in node and part in ("", *path[:1]) else []
            yield from (name for key, value in node.items() for name in wanted(value, part, (*path, key)))

    for slot in [*(path.name for path in CONFIGS.iterdir()), "conditioner.tokenizer", "conditioner.encoders"]:
        group, _, part = slot.partition(".")
        nodes = [yaml.safe_load(path.read_text()) or {} for path in (CONFIGS / group).glob("*.yaml")]
        assert targets(CONFIGS, slot) == {name for node in nodes for name in wanted(node, part)}, slot
    assert targets(CONFIGS, "conditioner.tokenizer").isdisjoint(targets(CONFIGS, "conditioner.encoders"))


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "ldm", "ldm..x", "", None, 3, ["x"], "ldm.io.images.Image", "ldm.io.text.write_json",
     "ldm.generate.load_run", "ldm.diffusion.process.EDM", "ldm.models.codec.to_float"],
)  # fmt: skip
def test_only_what_the_files_of_a_slot_name_can_be_built(target):
    with pytest.raises(ConfigError, match=r"^codec cannot be _target_ .* the files of configs/codec name what can be "):
        make({"_target_": target}, "codec")


@pytest.mark.parametrize("node", [None, 3, "x", ["x"], []])
def test_what_is_no_node_is_said(node):
    with pytest.raises(ConfigError, match="^codec is .*expected a table with a _target_$"):
        make(node, "codec")


def test_make_answers_misspelt_missing_and_contradicting_arguments():
    node = {"_target_": "ldm.models.codec.PixelCodec", "channels": 3}
    assert make(node, "codec").channels == 3
    with pytest.raises(ConfigError, match="did you mean 'ldm.models.codec.PixelCodec'"):
        make({"_target_": "ldm.models.codec.PixelCodex"}, "codec")
    with pytest.raises(ConfigError, match="did you mean 'channels'"):
        make({"_target_": "ldm.models.codec.PixelCodec", "chanels": 3}, "codec")
    with pytest.raises(ConfigError, match="nothing sets channels"):
        make({**node, "channels": "???"}, "codec")
    with pytest.raises(ConfigError, match="nothing sets betas"):
        make({"_target_": "ldm.diffusion.process.from_betas"}, "process")
    with pytest.raises(ConfigError, match="channels=3 in the config, but the rest of the system gives 1"):
        make(node, "codec", channels=1)
    with pytest.raises(ConfigError, match="channels='x' is of the wrong type; expected channels: int"):
        make({**node, "channels": "x"}, "codec")


@pytest.mark.parametrize(
    "annotation, right, wrong",
    [
        (int, [1, "???"], [1.0, True, "1", None, 1 << 63, [1]]),
        (float, [1, 1.5], ["1", None, True]),
        (str | None, ["a", None], [1, ["a"]]),
        (Sequence[int], [[1], (), (1, 2)], [1, "12", [1.5], [[1]], {"a": 1}]),
        (float | Sequence[float], [1.5, [1, 2.5]], ["1", ["1"], None]),
        (dict[str, int], [{}, {"a": 1}], [[], {"a": "b"}, 1]),
        (Sequence[Sequence[int]] | None, [None, [[1], []]], [[1], [["a"]]]),
    ],
    ids=str,
)
def test_types_of_arguments_are_compared(annotation, right, wrong):
    assert all(fits(value, annotation) for value in right)
    assert not any(fits(value, annotation) for value in wrong)
