"""Every ablation composes at every scale, names arms that it has, and three of them run from end to end."""

import json
import re
import sys
from itertools import product
from pathlib import Path

import hydra
import pytest
import torch

import train
from ldm.build import compose, config_dir
from ldm.tools.claims import Claim
from ldm.tools.report import main as report

NAMES = sorted(path.stem for path in (config_dir() / "ablation").glob("*.yaml") if path.stem != "none")
SCALES = sorted(path.stem for path in (config_dir() / "scale").glob("*.yaml"))
SINGLE = re.compile(r",(?![^\[]*\])")  # commas that are not inside of a list


def command(*arguments: str) -> None:
    """`python train.py ...` in this process, where torch is already imported."""
    argv, sys.argv = sys.argv, ["train.py", *map(str, arguments)]
    try:
        train.main()
    finally:
        sys.argv = argv


def swept(name: str, scale: str) -> dict[str, list[str]]:
    """The settings that an ablation sweeps over, and their values."""
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra.compose("train", [f"ablation={name}", f"scale={scale}"], return_hydra_config=True)
        assert cfg.hydra.mode.name == "MULTIRUN"
        return {key: SINGLE.split(str(value)) for key, value in cfg.hydra.sweeper.params.items()}


@pytest.mark.parametrize("name", NAMES)
def test_claims_name_arms_that_are_run(name):
    params, cfg = swept(name, "toy"), compose("train", [f"ablation={name}"])
    claim = Claim(cfg["claim"], [])
    assert {"paper", "says", "arms", "metric", "better", "orders"} == set(claim.node)
    assert "arXiv:" in claim.node["paper"] and len(params["seed"]) >= 3
    trained = {"/".join(values) for values in product(*(params[key] for key in claim.node["arms"]))}
    ways = {way for node in cfg["metrics"].values() for way in node.get("arms", {})}
    for order in claim.orders:
        assert order.better in ("lower", "higher") and len(order.arms) >= 2
        for arm in order.arms:
            parts = arm.split("/")
            assert "/".join(parts[: len(claim.node["arms"])]) in trained, f"{arm} of {order.text}"
            way = order.key(arm).rpartition("/")[0]
            assert not ways or way in ways, f"{order.key(arm)}: {way} is no way of sampling"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_every_ablation_composes_at_every_scale(name, scale):
    cfg = compose("train", [f"ablation={name}", f"scale={scale}"])
    assert set(cfg) == set(compose_once()), "an ablation adds no key"
    assert cfg["name"] == name and cfg["trainer"]["steps"] in [v for k, v in cfg["scale"].items() if "steps" in k]


def compose_once(known: dict = {}) -> dict:  # noqa: B006  one composition for all tests
    return known or known.update(compose("train")) or known


@pytest.mark.parametrize("name", NAMES)
def test_ablations_begin_with_a_header(name):
    text = (config_dir() / "ablation" / f"{name}.yaml").read_text()
    header = text.partition("defaults:")[0]
    assert (
        text.startswith("# @package _global_") and "arXiv:" in header and f"python train.py ablation={name}" in header
    )


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    """A classifier that has hardly learned anything."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("features") / "classifier_shapes"
    command("experiment=classifier_shapes", "image_size=16", "trainer.steps=2", "trainer.batch_size=4", "metrics=none",
            f"hydra.run.dir={path}")  # fmt: skip
    return path


@pytest.mark.parametrize(
    "name, fewer",
    [
        ("dit_conditioning", "network.conditioning=adaln,adaln_zero"),
        ("zero_terminal_snr", "process=zero_snr"),
        ("imagen_threshold", "guidance.scale=5"),
    ],
)
def test_an_ablation_runs_and_is_judged(name, fewer, features, tmp_path, capsys):
    command(f"ablation={name}", "scale=smoke", "seed=0", fewer, "preview=none", f"features.run={features}",
            "features.cache=null", "features.device=cpu", f"hydra.sweep.dir={tmp_path}")  # fmt: skip
    assert report([str(tmp_path)]) == 0
    table = (tmp_path / "report.md").read_text()
    claim = compose("train", [f"ablation={name}", "scale=smoke"])["claim"]
    assert f"## {claim['paper']}" in table and claim["says"] in table
    assert "of one seed" in table, "with one seed nothing is decided"
    if name == "zero_terminal_snr":
        assert "no run is of arm scaled_linear/trailing; there are zero_snr" in table
        summary = json.loads((tmp_path / "0" / "summary.json").read_text())["metrics"]
        assert summary["trailing/brightness_gap"] > 0 and "leading5/frechet_distance" in summary
