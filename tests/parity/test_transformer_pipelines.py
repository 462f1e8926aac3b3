"""DiT and PixArt pipelines against diffusers: classes or prompts and seeds in, latents and decoded pictures out."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import pytest
import torch

from ldm.build import compose
from ldm.generate import Sampling, generate
from ldm.published import load_published
from ldm.tools.convert import convert
from ldm.weights import load_model, load_system

diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")
pytest.importorskip("transformers", reason="the parity extra is not installed")

from tests.parity import transformer_pipelines as tiny  # noqa: E402
from tests.parity.pipelines import watched  # noqa: E402
from tests.parity.test_systems_weights import networks, same  # noqa: E402

OURS = {
    "ddim": ["sampler=ddim", "times=leading", "times.offset=0", "times.final=clean"],
    "dpm": ["sampler=dpm_solver", "times=linspace", "times.rounded=true", "times.extra=1"],
}
PROMPTS = ("a photo of a <b>RED cat</b>!", "Cat")
LONG = "red cat photo, " * 100
CLASSES = (207, 3)


@dataclass(frozen=True)
class Case:
    """One call of a pipeline."""

    system: str
    layout: str  # folder; file: the authors' own, with the other parts beside it
    scheduler: str = "dpm"
    prompts: tuple = PROMPTS
    negative: str | None = None
    size: tuple[int, int] = (64, 96)
    steps: int = 5
    guidance: float = 4.5
    seeds: tuple[int, ...] = (0, 7)
    formula: str | None = None


class Drawn(NamedTuple):
    latents: torch.Tensor
    images: torch.Tensor  # decoded, in [-1, 1] and beyond


@cache
def their_pipeline(system):
    diffusers.utils.logging.set_verbosity_error()
    return tiny.pipeline(system)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(system) -> its folder, and the authors' file of its network."""
    root = tmp_path_factory.mktemp("published")

    @cache
    def save(system):
        pipe = their_pipeline(system)
        pipe.save_pretrained(root / system)
        file = root / f"{system}.{'pt' if system.startswith('dit') else 'pth'}"
        tiny.save_original(pipe.transformer, file, 300 if "sigma" in system else 120)
        return {"folder": root / system, "file": file}

    return save


def parts(paths):
    """What the authors' file of a network lacks."""
    folders = {name: paths["folder"] / name for name in ("vae", "text_encoder")}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


@pytest.fixture(scope="module")
def load(saved):
    @cache
    def load(system, layout, formula=None):
        paths = saved(system)
        others = parts(paths) if layout == "file" else {}
        run = load_published(paths[layout], parts=others, formula=formula)
        assert run.config["system"] == system
        return run

    return load


@pytest.fixture
def ours(load, monkeypatch):
    """ours(case) -> Drawn, by the way that sample.py goes; what it rounds to bytes is seen before."""
    seen = watched(monkeypatch)

    def draw(case):
        knobs = [f"steps={case.steps}", f"guidance.scale={case.guidance}"]
        cfg = compose("sample", ["dialect=diffusers", *OURS[case.scheduler], *knobs])
        objective = load(case.system, case.layout, case.formula).objective
        sampling, size = Sampling.from_config(cfg), case.size
        generate(objective, case.prompts, case.seeds, sampling, image_size=size, negative=case.negative)
        return Drawn(*seen)

    return draw


def theirs(case, monkeypatch):
    pipe = their_pipeline(case.system)
    pipe.scheduler = tiny.scheduler(case.scheduler)
    arguments = {"num_inference_steps": case.steps, "guidance_scale": case.guidance}
    arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in case.seeds]
    seen, decode = [], pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **_: (seen.append(z), decode(z))[1])
    if case.system.startswith("dit"):
        pipe([label(prompt) for prompt in case.prompts], output_type="pt", **arguments)
    else:
        if case.negative is not None:
            arguments["negative_prompt"] = [case.negative] * len(case.prompts)
        arguments |= {"height": case.size[0], "width": case.size[1], "use_resolution_binning": False}
        pipe(list(case.prompts), output_type="pt", **arguments)
    with torch.no_grad():
        return Drawn(seen[0] * pipe.vae.config.scaling_factor, decode(seen[0]).sample)


def label(prompt):
    return their_pipeline("dit_xl2_256").labels.get(prompt, prompt)


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


DIT = {"scheduler": "ddim", "prompts": CLASSES, "size": (64, 64), "formula": "diffusers"}
CASES = {
    "dit": Case("dit_xl2_256", "folder", **DIT),
    "dit file": Case("dit_xl2_256", "file", guidance=2.0, **DIT),
    "dit, no guidance": Case("dit_xl2_256", "folder", guidance=1.0, steps=7, **DIT),
    "dit dpm": Case("dit_xl2_256", "file", **DIT | {"scheduler": "dpm"}),
    "dit by name": Case("dit_xl2_256", "folder", **DIT | {"prompts": ("Tinca tinca", "class 999")}),
    "dit, the authors' formula": Case("dit_xl2_256", "file", **DIT | {"formula": None}),
    "dit folder, the authors' formula": Case("dit_xl2_256", "folder", **DIT | {"formula": None}),
    "dit 512": Case("dit_xl2_512", "file", steps=2, **DIT | {"size": (512, 512), "prompts": (5,), "seeds": (3,)}),
    "alpha": Case("pixart_512", "folder"),
    "alpha file": Case("pixart_512", "file", size=(96, 64), negative="red", guidance=7.0),
    "alpha ddim": Case("pixart_512", "file", "ddim", prompts=("", LONG), steps=4),
    "alpha, no guidance": Case("pixart_256", "folder", guidance=1.0, prompts=PROMPTS[:1], seeds=(5,)),
    "alpha 256, one size": Case("pixart_256", "file", size=(256, 256), steps=2, prompts=PROMPTS[:1], seeds=(5,)),
    "alpha 1024": Case("pixart_1024", "folder", size=(64, 96)),
    "alpha 1024 file": Case("pixart_1024", "file", "ddim", size=(96, 80), negative=LONG),
    "sigma 512": Case("pixart_sigma_512", "folder", prompts=(LONG, "cat")),
    "sigma 1024 file": Case("pixart_sigma_1024", "file", size=(80, 64), negative="photo", steps=6),
}


@pytest.fixture
def as_authors(monkeypatch):
    """Their DiT with the two numbers that diffusers changed put back."""
    for block in their_pipeline("dit_xl2_256").transformer.transformer_blocks:
        monkeypatch.setattr(block.norm1.emb.time_proj, "downscale_freq_shift", 0)
        monkeypatch.setattr(block.norm3, "eps", 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_pipeline(name, ours, request, monkeypatch):
    case = CASES[name]
    if case.system.startswith("dit") and case.formula is None:
        request.getfixturevalue("as_authors")
    mine, expected = ours(case), theirs(case, monkeypatch)
    errors = {what: error(getattr(mine, what), getattr(expected, what)) for what in Drawn._fields}
    assert max(errors.values()) <= 2e-4, errors


def test_the_two_formulas_of_dit_differ(ours, monkeypatch):
    case = Case("dit_xl2_256", "folder", **DIT | {"formula": None})
    assert error(ours(case).latents, theirs(case, monkeypatch).latents) > 1e-3


@pytest.mark.parametrize("system", tiny.SYSTEMS)
def test_layouts_hold_the_same(system, load):
    folder, file = (load(system, layout).objective.state_dict() for layout in ("folder", "file"))
    assert same(folder, file)


@pytest.mark.parametrize("system", tiny.SYSTEMS)
def test_ours_is_theirs_bit_for_bit(system, saved, tmp_path):
    """Theirs -> ours -> both layouts -> theirs; a folder keeps its vocabulary, its scheduler and its classes."""
    pipe, folder = their_pipeline(system), saved(system)["folder"]
    convert(folder, tmp_path / "again", "diffusers")
    back = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(back) is type(pipe) and type(back.scheduler) is type(tiny.pipeline(system).scheduler)
    found, expected = ({"transformer": p.transformer} | networks(p) for p in (back, pipe))
    assert found.keys() == expected.keys()
    assert all(same(found[name].state_dict(), expected[name].state_dict()) for name in found)
    ours, theirs = load_system(folder), load_system(tmp_path / "again")
    assert ours.settings == theirs.settings and ours.nodes == theirs.nodes
    if not system.startswith("dit"):
        assert back.tokenizer(LONG).input_ids == pipe.tokenizer(LONG).input_ids and ours.tokenizer == theirs.tokenizer
    for component in found.keys() - {"vae"}:
        file = tmp_path / f"{component}.safetensors"
        convert(folder, file, "original", component)
        assert same(load_model(file).state_dict(), load_model(folder, component).state_dict())
    convert(tmp_path / "transformer.safetensors", tmp_path / "net", "diffusers")
    again = type(pipe.transformer).from_pretrained(tmp_path / "net")
    assert same(again.state_dict(), pipe.transformer.state_dict())
