"""Imports point only down (the layers of the design), foreign bytes enter through `ldm.io`, and the judges stay out."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    {"io", "utils"},
    {"nn", "diffusion", "samplers"},
    {"models", "conditioning", "data"},
    {"training", "adapters", "weights", "metrics"},
    {"build", "rebuild", "drawing", "sampling", "generate", "published", "told", "cascade"},
    {"tools"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SIDEWAYS = {("samplers", "diffusion"), ("generate", "drawing"), ("drawing", "sampling"),
             ("training", "adapters"), ("adapters", "weights"), ("sampling", "build"),
            ("generate", "build"), ("generate", "sampling"), ("published", "build"), ("published", "generate"),
            ("published", "told"), ("cascade", "build"), ("cascade", "sampling"), ("cascade", "generate"),
            ("cascade", "rebuild"), ("generate", "rebuild"), ("rebuild", "build"), ("io", "utils")}  # fmt: skip
FOREIGN = {"pickle", "tarfile", "zipfile", "yaml"}
JUDGES = {"diffusers", "transformers", "peft", "lightning", "accelerate"}
FILES = sorted((ROOT / "ldm").rglob("*.py")) + [ROOT / "train.py", ROOT / "sample.py"]


def imported(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def package(path: Path) -> str | None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "ldm" and parts[1] != "__init__" else None


def violations(path: Path) -> list[str]:
    own, found = package(path), []
    for name in imported(path):
        parts = name.split(".")
        other = parts[1] if parts[0] == "ldm" and len(parts) > 1 else None
        if parts[0] in JUDGES:
            found.append(f"{path.name} imports {name}")
        if parts[0] in FOREIGN and own != "io":
            found.append(f"{path.name} opens foreign bytes with {name}")
        if parts[0] in {"hydra", "omegaconf"} and own not in {None, "tools", "build"}:
            found.append(f"{path.name} imports {name}")
        if own and other in LEVEL and other != own:
            allowed = LEVEL[other] < LEVEL[own] or (own, other) in SIDEWAYS
            found += [] if allowed else [f"ldm.{own} ({path.name}) imports ldm.{other}"]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    assert violations(path) == []


def test_models_do_not_import_each_other():
    """But for the codec, an autoencoder between pixels and latents, and ControlNets, parts of another network again."""
    composed = {ROOT / "ldm" / "models" / f"{name}.py" for name in ("codec", "controlnet", "controlnet_transformer")}
    for path in set((ROOT / "ldm" / "models").glob("*.py")) - composed:
        others = {n for n in imported(path) if n.startswith("ldm.models.")}
        assert not others, f"{path.name} imports {others}"


def test_the_rules_catch_violations(tmp_path, monkeypatch):
    """The test above can fail: planted violations of each kind are found."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "ldm" / "diffusion").mkdir(parents=True)
    bad = tmp_path / "ldm" / "diffusion" / "bad.py"
    bad.write_text("import pickle\nimport diffusers\nimport hydra\nfrom ldm.models import unet\n")
    assert len(violations(bad)) >= 4
