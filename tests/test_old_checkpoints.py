"""Checkpoints of earlier versions, as tests/make_fixtures.py left them: read, drawn alike, and trained to their end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from make_fixtures import RUNS, STEPS, command, draw

from ldm.io.checkpoints import verify
from ldm.io.images import read_image
from ldm.io.tensors import read_tensors
from ldm.training.distributed import ALONE
from train import train

FIXTURES = Path(__file__).with_name("fixtures")
CASES = [(version.name, name) for version in sorted(FIXTURES.iterdir()) for name in RUNS if (version / name).is_dir()]


@pytest.mark.parametrize("version, name", CASES)
def test_an_old_checkpoint_draws_what_it_drew(version, name):
    folder = FIXTURES / version / name
    images, expected = draw(name, folder), [read_image(path) for path in sorted(folder.glob("*.png"))]
    assert len(images) == len(expected) > 0
    assert (images.int() - torch.stack(expected).int()).abs().max() <= 1


@pytest.mark.parametrize("version, name", CASES)
def test_an_old_checkpoint_is_trained_to_its_end(version, name, tmp_path, capsys):
    run = Path(shutil.copytree(FIXTURES / version / name, tmp_path / name))
    before = read_tensors(run / f"checkpoints/step_{STEPS:08d}/model.safetensors")
    assert train(command(name, STEPS + 2), run, torch.device("cpu"), ALONE)["step"] == STEPS + 2
    assert f"continuing from {run}" in capsys.readouterr().err
    assert verify(run / "checkpoints/last")["step"] == STEPS + 2
    after = read_tensors(run / "checkpoints/last/model.safetensors")
    assert after.keys() == before.keys() and not all(torch.equal(after[key], before[key]) for key in after)


@pytest.mark.parametrize("version, name", CASES)
def test_they_say_nothing_of_the_machine_that_made_them(version, name):
    for path in (FIXTURES / version / name).rglob("*.json"):
        text = path.read_text()
        assert '"/' not in text and "\\\\" not in text and "git_revision" not in text, path
    config = json.loads(next((FIXTURES / version / name).rglob("config.json")).read_text())
    assert "captions" not in config["data"] or version != "0.1"  # which came later
