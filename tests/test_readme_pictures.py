"""The prompts of README, notebooks and help are of what the default run learns; of a finished one, which LDM_BASE names
(LDM_BASE=RUN pytest tests/test_readme_pictures.py), README's own commands are drawn and the pictures judged."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.build import compose, make
from ldm.conditioning.tokenizers import train_words
from ldm.data.phrases import parse
from ldm.data.scenes import Object, Scene
from ldm.data.shapes import render
from ldm.generate import load_run
from ldm.io.images import read_image, read_png_text, write_png
from ldm.metrics.shapes import judge

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TEXTS = [ROOT / "README.md", ROOT / "sample.py", *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/**/*.yaml"),
         *ROOT.glob("ldm/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]  # fmt: skip
BASE = os.environ.get("LDM_BASE")
needs_base = pytest.mark.skipif(not BASE, reason="draws from a finished default run: LDM_BASE=RUN")


def listed(text: str) -> list[str]:
    return [prompt.strip(" '\"\\") for prompt in text.split(",")]


def prompts_of_runs() -> list[tuple[str, str]]:
    """(file, prompt) of every command that draws from a run by itself."""
    found = []
    for path in TEXTS:
        for line in path.read_text().splitlines():
            if re.search(r"\brun=(DIR|RUN|runs/)", line) and "cascade=" not in line:
                lists = re.findall(r"prompts=\\?\"?'?\[([^\]]*)\]", line)
                found += [(path.name, prompt) for text in lists for prompt in listed(text)]
            for text in re.findall(r"run\.generate\(\[?(\"[^\])]*?\")[\],)]", line):
                found += [(path.name, prompt) for prompt in listed(text)]
    return found


def test_prompts_of_readme_and_help_are_of_what_the_default_run_learns():
    prompts = prompts_of_runs()
    assert len([prompt for name, prompt in prompts if name == "README.md"]) >= 5
    data = make(compose("train", [])["data"], "data")
    vocabulary = train_words(data.captions()).backend.get_vocab()
    for name, prompt in prompts:
        for thing in parse(prompt).objects:
            assert thing[:2] not in data.unseen, f"{name}: {prompt}"
        assert set(prompt.replace(",", " ").split()) <= set(vocabulary), f"{name}: {prompt}"


def commands() -> list[str]:
    """README's `sample.py run=runs/mine prompts=` commands of one picture set each."""
    lines = [
        line.partition("  #")[0] for line in README.splitlines() if line.startswith("python sample.py run=runs/mine")
    ]
    return [line for line in lines if "prompts=" in line and "prompts=@" not in line and "lora=" not in line]


def test_readme_draws_edits_and_repaints():
    found = commands()
    assert len(found) >= 3 and any("image=" in line for line in found) and any("mask=" in line for line in found)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A blue square, and a mask of the side where it is not."""
    folder = tmp_path_factory.mktemp("photos")
    write_png(folder / "photo.png", render([Scene((Object("square", "blue", "large", "left"),))], 32)[0])
    mask = torch.zeros(3, 32, 32, dtype=torch.uint8)
    mask[..., 14:] = 255
    write_png(folder / "mask.png", mask)
    return folder


@needs_base
@pytest.mark.parametrize("command", commands() or ["none"])
def test_pictures_of_readmes_commands_show_their_prompts(command, photos, tmp_path):
    words = shlex.split(
        command.replace("runs/mine", BASE).replace("=photo", f"={photos}/photo").replace("=mask", f"={photos}/mask")
    )
    run = subprocess.run([sys.executable, *words[1:], f"out={tmp_path}", "device=cpu"], cwd=ROOT)
    assert run.returncode == 0
    files = sorted(tmp_path.glob("0*.png"))
    images, prompts = (
        torch.stack([read_image(file) for file in files]),
        [read_png_text(file)["prompt"] for file in files],
    )
    right = judge(images, prompts)
    # What is kept outside a mask is an object too, more than training shows of them, and the new one is paler.
    names = ["shape", "position"] if "mask=" in command else ["all"]
    for name in names:
        assert right[name].all(), [prompt for prompt, good in zip(prompts, right[name], strict=True) if not good]


@needs_base
def test_pictures_of_readmes_python_show_their_prompts():
    line = next(line for line in README.splitlines() if line.startswith("images = run.generate("))
    names = {"run": load_run(BASE, device="cpu")}
    exec(line.partition("  #")[0], names)
    images = torch.stack([torch.frombuffer(bytearray(i.convert("RGB").tobytes()), dtype=torch.uint8)
                          .view(i.height, i.width, 3).permute(2, 0, 1) for i in names["images"]])  # fmt: skip
    assert judge(images, ["a red circle"] * len(images))["all"].all()
