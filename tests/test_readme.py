"""What documents tell people to type: every command is one that the programs understand; a newcomer's first hour."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from ldm.build import compose
from ldm.tools.words import groups, options, readable, split

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PLACES = ("README.md", "docs/**/*.md", "benchmarks/*.md", "configs/**/*.yaml", "train.py", "sample.py")
DOCUMENTS = [path for place in PLACES for path in ROOT.glob(place)]
COMMAND = re.compile(r"(?:python|torchrun [^`#]*?) (train|sample)\.py((?: +[^`\s].*)?)")
REMARK = re.compile(r"`.*|\s{2,}[(#].*|\s+then .*|: images of.*| \[experiment=NAME\].*|\s\.\.\. .*")


def commands() -> list[tuple[str, str]]:
    """(train or sample, the words) of every command in the documents; "..." and braces stand for something else."""
    found = set()
    for path in DOCUMENTS:
        for line in path.read_text().splitlines():
            for program, words in COMMAND.findall(line):
                words = REMARK.sub("", words).strip()
                if words and "{node" not in words:
                    found.add((program, words))
    return sorted(found)


@cache
def baseline(program: str) -> dict:
    return compose(program)


def is_plain(program: str, word: str) -> bool:
    """A setting of the root or an option of a group, which needs no composing to be seen to exist."""
    key, _, value = word.partition("=")
    return key in baseline(program) and (key not in groups(program) or value in options(key))


def first_of_a_sweep(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}={split(value)[0]}"


@pytest.mark.parametrize(("program", "line"), commands(), ids=lambda text: text[:70])
def test_commands_of_documents_are_understood(program, line):
    words = [word for word in shlex.split(line, comments=True) if "..." not in word]
    if {"--help", "-h"} & {*words}:
        return
    words = readable(words, program)
    settings = [word for word in words if not word.startswith(("-", "hydra", "job"))]
    if "-m" in words:
        settings = [first_of_a_sweep(word) for word in settings if "=glob(" not in word]
    if not all(is_plain(program, word) for word in settings):
        compose(program, settings)


def test_commands_were_found():
    assert len(commands()) > 60
    assert ("train", "debug=smoke") in commands()


def block(heading: str, language: str, number: int = 0) -> str:
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[number]


DRIVER = """
import runpy, sys
sys.path.insert(0, ".")
import torch
torch.set_num_threads(1)
from ldm.tools import report

def typed(program, *words):
    print("$", program, *words, flush=True)
    sys.argv = [program, *words]
    if program == "report":
        assert report.main(list(words)) == 0
        return
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code

for program, *words in {commands!r}:
    typed(program, *words)
from PIL import Image
Image.open("drawn/0000.png").convert("L").save("mask.png")
for program, *words in {edits!r}:
    typed(program, *words)

def my_sampler(denoise, process, x_T, times):
    return denoise(x_T, float(times[0]))

exec({snippet!r})
assert images[0].size == (32, 32)
print(run)
"""


def newcomer(folder: Path) -> tuple[list, list, str]:
    """README's commands in order, each with what makes it small; photo.png is one of the first pictures."""
    lines = [shlex.split(line, comments=True) for line in block("Use", "bash").splitlines() if "run=runs/mine" in line]
    lines += [shlex.split(block("Use", "bash", 2).splitlines()[0], comments=True)]
    small = {"steps": "steps=2", "num_images": "num_images=4", "metrics": "metrics=[shapes]", "sampler": "sampler=ddim"}
    samples = []
    for line in lines:
        words = [small.get(word.partition("=")[0], word) for word in line[2:] if "glob(" not in word]
        words = [word.replace("image=photo.png", "image=drawn/0000.png") for word in words]
        words += ["steps=2"] * ("steps=2" not in words) + ["sampler=glob(ddpm*)"] * ("-m" in words)
        samples.append(["sample.py", *words])
    train = ["train.py", "debug=smoke", "hydra.run.dir=runs/mine"]
    edits = [words for words in samples if any(word.startswith("image=") for word in words)]
    others = [words for words in samples if words not in edits]
    snippet = re.sub(r"steps=20", "steps=2", block("Use", "python")).replace('"runs/mine"', '"runs/mine", device="cpu"')
    return [train, *others, ["report", "grid"], ["report", "runs/mine"]], edits, snippet


def test_a_newcomer_follows_the_readme(tmp_path):
    for name in ("ldm", "configs", "train.py", "sample.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "prompts.txt").write_text("a red circle\n\na large blue square, at the top\n")
    commands, edits, snippet = newcomer(tmp_path)
    driver = DRIVER.format(commands=commands, edits=edits, snippet=snippet)
    done = subprocess.run([sys.executable, "-c", driver], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert "to continue: " in done.stdout and "hydra.run.dir=runs/mine" in done.stdout
    assert [r["prompt"] for r in json.loads((tmp_path / "drawn" / "samples.json").read_text())] == [
        "a red circle", "a large blue square, at the top"
    ]  # fmt: skip
    folders = [path for path in (tmp_path / "samples").iterdir() if (path / "grid.png").is_file()]
    assert len(folders) == 4, "each command that names no folder has one of its own"
    drawn = [path.parent for path in (tmp_path / "grid").glob("*/grid.png")]
    assert len(drawn) == 4 and (tmp_path / "grid" / "drawn.png").is_file()
    assert "left out: a learned variance" in done.stderr and "left out" in (tmp_path / "grid" / "report.md").read_text()
    numbers = json.loads((tmp_path / "measured" / "metrics.json").read_text())["numbers"]
    assert 0 <= numbers["prompt_accuracy"] <= 1
