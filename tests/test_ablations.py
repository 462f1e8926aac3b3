"""Every ablation composes at every scale, names arms that it has and runs; two are judged from end to end."""

import json
import re
import sys
from functools import cache
from itertools import product
from types import SimpleNamespace

import hydra
import pytest
import torch
from omegaconf import OmegaConf

import train
from ldm.build import compose, config_dir, make, plain
from ldm.data.shapes import Shapes
from ldm.metrics.brightness import Brightness, brightness
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


@cache
def composed(name: str, scale: str = "toy") -> tuple[dict, dict[str, list[str]]]:
    """The config of an ablation; and the settings that it sweeps over, with their values."""
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra.compose("train", [f"ablation={name}", f"scale={scale}"], return_hydra_config=True)
    params = cfg.hydra.sweeper.params or {}
    swept = {key: SINGLE.split(str(value)) for key, value in params.items()}
    assert cfg.hydra.mode is None or cfg.hydra.mode.name == "MULTIRUN"
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return plain(cfg), swept


@pytest.mark.parametrize("name", NAMES)
def test_claims_name_arms_that_are_run(name):
    cfg, params = composed(name)
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


@pytest.mark.parametrize("scale", sorted({*SCALES} - {"smoke"}))  # smoke is run below
@pytest.mark.parametrize("name", NAMES)
def test_every_ablation_composes_at_every_scale(name, scale):
    cfg, params = composed(name, scale)
    assert set(cfg) == set(composed("none")[0]), "an ablation adds no key"
    assert cfg["name"] == name and cfg["trainer"]["steps"] in [v for k, v in cfg["scale"].items() if "steps" in k]
    assert params and not any("$" in value for values in params.values() for value in values)


@pytest.mark.parametrize("name", NAMES)
def test_ablations_begin_with_a_header(name):
    text = (config_dir() / "ablation" / f"{name}.yaml").read_text()
    header = text.partition("defaults:")[0]
    assert text.startswith("# @package _global_") and "arXiv:" in header
    assert f"python train.py ablation={name}" in header


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_dir() / "formulation").glob("*.yaml")))
def test_formulations_are_of_parts_that_fit(name):
    cfg = compose("train", [f"formulation={name}"])
    assert set(cfg) == set(composed("none")[0])
    process = make(cfg["process"], "process")
    prediction = make(cfg["prediction"], "prediction", process=process)
    alpha, sigma = (torch.as_tensor(a).double() for a in process(0.5))
    x0, eps = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    rebuilt = prediction.to_x0(prediction.target(x0, eps, alpha, sigma), alpha * x0 + sigma * eps, alpha, sigma)
    torch.testing.assert_close(rebuilt, x0, rtol=1e-6, atol=1e-6)


def test_brightness_is_a_distance_of_mean_intensities():
    data = Shapes(image_size=16, split="held_out", length=32)
    real = torch.stack([data[i]["image"] for i in range(32)])
    objective = SimpleNamespace(conditioner=SimpleNamespace(fields=set()))
    measure = Brightness(num_images=32)
    assert measure(lambda prompts, seeds: real.flip(0), data, objective)["brightness_gap"] < 1e-12
    found = measure(lambda prompts, seeds: torch.zeros_like(real), data, objective)
    assert found["brightness"] == -1 and found["brightness_gap"] == pytest.approx(brightness(real).mean().item() + 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """`scale=smoke` with a classifier and an autoencoder that have hardly learned anything."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("ablations")
    for name, *more in (("classifier_shapes", "image_size=16"), ("shapes_autoencoder",)):
        command(f"experiment={name}", *more, "trainer.steps=2", "trainer.batch_size=4", "metrics=none", "preview=none",
                f"hydra.run.dir={path / name}")  # fmt: skip
    return ["scale=smoke", "seed=0", "preview=none", "cache=null", "features.cache=null", "features.device=cpu",
            f"features.run={path / 'classifier_shapes'}", f"codec.run={path / 'shapes_autoencoder'}"]  # fmt: skip


def fitting(settings: list[str], name: str) -> list[str]:
    """Imagen's U-Nets work on pixels, which no autoencoder has to make."""
    return [setting for setting in settings if "run" in composed(name)[0]["codec"] or not setting.startswith("codec")]


@pytest.mark.parametrize("name", NAMES)
def test_one_arm_of_every_ablation_runs_and_is_measured(name, small, tmp_path):
    cfg, params = composed(name)
    first = [f"{key}={values[0]}" for key, values in params.items() if key != "seed"]
    command(f"ablation={name}", *fitting(small, name), *first, "hydra.mode=RUN", f"hydra.run.dir={tmp_path}")
    found = json.loads((tmp_path / "summary.json").read_text())
    measured = {key.rpartition("/")[2] for key in found["metrics"]} | {"parameters"}
    assert {order.metric.rpartition("/")[2] for order in Claim(cfg["claim"], []).orders} <= measured


@pytest.mark.parametrize(
    "name, fewer",
    [
        ("dit_conditioning", "network.conditioning=adaln,adaln_zero"),
        ("zero_terminal_snr", "process=zero_snr"),
    ],
)
def test_an_ablation_is_judged(name, fewer, small, tmp_path, monkeypatch):
    command(f"ablation={name}", *fitting(small, name), fewer, f"hydra.sweep.dir={tmp_path}")
    assert report([str(tmp_path)]) == 0
    assert "runs of 2 steps show that the sweep runs, and no more" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr("ldm.tools.claims.TRIAL", 1)
    assert report([str(tmp_path)]) == 0
    table, claim = (tmp_path / "report.md").read_text(), composed(name, "smoke")[0]["claim"]
    assert f"## {claim['paper']}" in table and claim["says"] in table
    if name != "zero_terminal_snr":
        assert "of one seed" in table, "with one seed nothing is decided"
        return
    assert "no run is of arm scaled_linear/trailing; there are zero_snr" in table
    summary = json.loads((tmp_path / "0" / "summary.json").read_text())["metrics"]
    assert summary["trailing/brightness_gap"] > 0 and "leading5/frechet_distance" in summary
