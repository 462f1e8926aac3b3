"""Whole pipelines against diffusers: prompts and seeds in, latents and decoded pictures out, from both layouts."""

import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ldm.build import compose
from ldm.generate import Refiner, Sampling, generate
from ldm.models import codec
from ldm.published import load_published
from ldm.tools.gallery import read_edit

diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")

from tests.parity import pipelines  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a photo of a red cat", "CAT, photo 12")
LONG = "red cat photo, " * 40
OURS = {  # the scheduler of theirs -> the overrides of ours
    "pndm": ["sampler=plms", "times=leading"],
    "ddim": ["sampler=ddim", "times=leading"],
    "euler": ["sampler=euler", "times=leading"],
    "euler_trailing": ["sampler=euler", "times=trailing"],
    "euler_ancestral": ["sampler=euler_ancestral", "times=leading"],
    "dpm_karras": ["sampler=dpm_solver", "times=karras"],
    "zero_snr": ["sampler=ddim", "times=trailing"],
}
LAYOUTS = ("folder", "file")


@dataclass(frozen=True)
class Case:
    """One call of a pipeline: what a user of either program says."""

    system: str
    scheduler: str
    task: str = "text"  # to image; image to image; inpaint
    steps: int = 4
    guidance: float = 7.5
    rescale: float = 0.0
    prompts: tuple[str, ...] = PROMPTS
    negative: str | None = None
    size: tuple[int, int] = (64, 96)
    strength: float = 1.0
    seeds: tuple[int, ...] = (0, 7)
    eta: float = 0.0
    handover: float | None = None  # to the refiner


class Drawn(NamedTuple):
    latents: torch.Tensor
    images: torch.Tensor  # decoded, in [-1, 1] and beyond


# ------------------------------------------------------------------------------------------------------------- theirs


@cache
def their_pipeline(system):
    diffusers.utils.logging.set_verbosity_error()
    return pipelines.pipeline(system)


def theirs(case):
    pipe = pipelines.turned(their_pipeline(case.system), case.system, case.task)
    pipe.scheduler = pipelines.scheduler(case.scheduler, case.system)
    arguments = {"height": case.size[0], "width": case.size[1]} if case.task != "image" else {}
    if case.task != "text":
        arguments |= {"image": [pil(picture(case.size))] * len(case.seeds), "strength": case.strength}
    if case.task == "inpaint":
        arguments |= {"mask_image": [pil(mask(case.size))] * len(case.seeds)}
    optional = {"guidance_rescale": case.rescale, "denoising_end": case.handover, "eta": case.eta}
    latents = call(pipe, case, **arguments, **{name: value for name, value in optional.items() if value})
    if case.handover:
        pipe = their_pipeline("sdxl_refiner")
        pipe.scheduler = pipelines.scheduler(case.scheduler)
        latents = call(pipe, case, image=latents, denoising_start=case.handover)
    with torch.no_grad():
        return Drawn(latents, pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample)


def call(pipe, case, **arguments):
    return pipe(
        prompt=list(case.prompts),
        negative_prompt=None if case.negative is None else [case.negative] * len(case.prompts),
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in case.seeds],
        output_type="latent",
        **arguments,
    ).images


def picture(size):
    """3 H W uint8, smooth with some grain."""
    g = torch.Generator().manual_seed(3)
    smooth = F.interpolate(255 * torch.rand(1, 3, 4, 6, generator=g), size, mode="bicubic")[0]
    return (smooth + 20 * torch.randn(3, *size, generator=g)).clamp(0, 255).to(torch.uint8)


def mask(size):
    """1 H W uint8: a rectangle whose edges fall between the pixels of latents, with a border of greys."""
    m = torch.zeros(1, *size, dtype=torch.uint8)
    m[:, 9:47, 17:61] = torch.tensor([100, 127, 128, 200], dtype=torch.uint8).repeat(11)
    m[:, 13:43, 21:57] = 255
    return m


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())


# --------------------------------------------------------------------------------------------------------------- ours


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(system) -> the paths of its layouts, and of a vocabulary, which single files lack."""
    root = tmp_path_factory.mktemp("published")
    pipelines.save_vocabulary(root / "vocabulary")

    @cache
    def save(system):
        folder, file = root / system, root / f"{system}.safetensors"
        pipelines.save_folder(their_pipeline(system), folder)
        pipelines.save_original(their_pipeline(system), folder, file)
        return {"folder": folder, "file": file, "vocabulary": root / "vocabulary"}

    return save


@pytest.fixture(scope="module")
def load(saved):
    """load(system, layout) -> our run of it, found out from its files where they say."""

    @cache
    def load(system, layout):
        paths = saved(system)
        vocabulary = None if layout == "folder" else str(paths["vocabulary"])
        name = "sd21_base" if system == "sd21_base" else None  # no single file of SD 2 says what it predicts
        run = load_published(paths[layout], system=name, tokenizer=vocabulary)
        assert run.config["system"] == system.removesuffix("_zero_snr")
        return run

    return load


@pytest.fixture
def ours(load, monkeypatch, tmp_path):
    """ours(case, layout) -> Drawn, by the way that sample.py goes; what it rounds to bytes is seen before."""
    seen = pipelines.watched(monkeypatch)

    def pictures(case):
        paths = {"image": tmp_path / "image.png"} if case.task != "text" else {}
        paths |= {"mask": tmp_path / "mask.png"} if case.task == "inpaint" else {}
        for path, image in zip(paths.values(), (picture, mask), strict=False):
            pil(image(case.size)).convert("RGB").save(path)
        return paths

    def draw(case, layout):
        run = load(case.system, layout)
        knobs = [f"steps={case.steps}", f"guidance.scale={case.guidance}", f"guidance.rescale={case.rescale}"]
        knobs += [f"sampler.eta={case.eta}"] if case.eta else []
        knobs += [f"{name}={path}" for name, path in pictures(case).items()]
        knobs += [f"strength={case.strength}"] if "image" in pictures(case) else []
        cfg = compose("sample", ["dialect=diffusers", *OURS[case.scheduler], *knobs])
        generate(
            run.objective,
            case.prompts,
            case.seeds,
            Sampling.from_config(cfg),
            image_size=case.size,
            negative=case.negative,
            edit=read_edit(cfg, list(case.size)),
            refiner=Refiner(load("sdxl_refiner", layout).objective, case.handover) if case.handover else None,
        )
        return Drawn(*seen)

    return draw


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


# ---------------------------------------------------------------------------------------------------------- pipelines

CASES = {
    # Stable Diffusion 1.5
    "sd15 pndm": Case("sd15", "pndm", steps=6),
    "sd15 ddim": Case("sd15", "ddim", size=(64, 64), guidance=3, negative="red photo"),
    "sd15 euler": Case("sd15", "euler", size=(96, 64), rescale=0.7),
    "sd15 pndm, odd latents": Case("sd15", "pndm", size=(72, 88), steps=10, negative="", guidance=12),
    "sd15 ddim, no guidance": Case("sd15", "ddim", steps=7, guidance=1, prompts=PROMPTS[:1], seeds=(5,)),
    "sd15 ddim, eta": Case("sd15", "ddim", eta=1.0, steps=5),
    "sd15 dpm karras": Case("sd15", "dpm_karras", steps=6, negative="cat"),
    # ... image to image
    "sd15 image ddim": Case("sd15", "ddim", "image", steps=6, strength=0.5),
    "sd15 image euler": Case("sd15", "euler", "image", steps=5, strength=0.75, size=(96, 64), negative="photo"),
    "sd15 image ddim, all": Case("sd15", "ddim", "image", strength=1.0, size=(64, 64), guidance=4),
    "sd15 image euler, little": Case("sd15", "euler", "image", steps=10, strength=0.2, seeds=(2,), prompts=PROMPTS[1:]),
    "sd15 image ddim, cut": Case("sd15", "ddim", "image", steps=9, strength=0.45, size=(88, 72), negative=""),
    "sd15 image dpm karras": Case("sd15", "dpm_karras", "image", steps=8, strength=0.6),
    # ... inpainting with an ordinary model
    "sd15 mask ddim": Case("sd15", "ddim", "inpaint"),
    "sd15 mask euler": Case("sd15", "euler", "inpaint", size=(96, 64), negative="cat", steps=5),
    "sd15 mask pndm": Case("sd15", "pndm", "inpaint", steps=5),
    "sd15 mask ddim, part": Case("sd15", "ddim", "inpaint", steps=6, strength=0.7, guidance=3),
    "sd15 mask euler, odd": Case(
        "sd15", "euler", "inpaint", size=(72, 88), strength=0.9, seeds=(4,), prompts=PROMPTS[:1]
    ),
    "sd15 mask ddim, eta": Case("sd15", "ddim", "inpaint", eta=0.5),
    # ... and with nine channels
    "inpaint ddim": Case("sd15_inpaint", "ddim", "inpaint"),
    "inpaint pndm": Case("sd15_inpaint", "pndm", "inpaint", steps=7, negative="photo"),
    "inpaint euler": Case("sd15_inpaint", "euler", "inpaint", size=(96, 64), guidance=3),
    "inpaint ddim, part": Case("sd15_inpaint", "ddim", "inpaint", steps=6, strength=0.7),
    "inpaint euler, odd": Case("sd15_inpaint", "euler", "inpaint", size=(72, 88), seeds=(9,), prompts=PROMPTS[:1]),
    # Stable Diffusion 2
    "sd21 ddim": Case("sd21", "ddim"),
    "sd21 euler": Case("sd21", "euler", size=(96, 64), negative="red", guidance=5),
    "sd21 ddim, more guidance": Case("sd21", "ddim", steps=6, guidance=9, rescale=0.4, size=(88, 64)),
    "sd21 zero terminal SNR": Case("sd21_zero_snr", "zero_snr", steps=5, rescale=0.7, negative="cat"),
    "sd21 zero terminal SNR, odd": Case(
        "sd21_zero_snr", "zero_snr", steps=8, size=(72, 88), seeds=(3,), prompts=PROMPTS[1:]
    ),
    "sd21 base": Case("sd21_base", "ddim", negative="", size=(64, 64)),
    "sd21 base pndm": Case("sd21_base", "pndm", steps=6, guidance=9),
    # SDXL
    "sdxl euler": Case("sdxl", "euler"),
    "sdxl euler, negative": Case("sdxl", "euler", negative="photo", size=(96, 64), steps=5),
    "sdxl euler, empty negative": Case("sdxl", "euler", negative="", guidance=5),
    "sdxl ddim, rescaled": Case("sdxl", "ddim", size=(72, 88), rescale=0.6),
    "sdxl euler trailing": Case("sdxl", "euler_trailing", steps=5, negative="", size=(96, 64)),
    "sdxl euler ancestral": Case("sdxl", "euler_ancestral", steps=5),
    "sdxl dpm karras": Case("sdxl", "dpm_karras", steps=7, size=(72, 88), negative="red"),
    "sdxl image": Case("sdxl", "euler", "image", steps=6, strength=0.5),
    "sdxl image, negative": Case("sdxl", "ddim", "image", steps=5, strength=0.8, size=(96, 64), negative="red cat"),
    "sdxl mask": Case("sdxl", "euler", "inpaint", strength=0.9999),
    "sdxl inpaint": Case("sdxl_inpaint", "euler", "inpaint", steps=5),
    "sdxl inpaint, part": Case(
        "sdxl_inpaint", "euler", "inpaint", steps=5, strength=0.6, negative="photo", size=(96, 64)
    ),
    "sdxl inpaint, dpm karras": Case("sdxl_inpaint", "dpm_karras", "inpaint", steps=6),
    # its refiner on pictures
    "refiner": Case("sdxl_refiner", "euler", "image", steps=8, strength=0.3),
    "refiner, negative": Case("sdxl_refiner", "euler", "image", steps=5, strength=0.6, negative="cat", size=(96, 64)),
    "refiner ddim": Case("sdxl_refiner", "ddim", "image", steps=6, strength=0.5, guidance=3),
    # base and refiner
    "handover": Case("sdxl", "euler", steps=10, handover=0.8),
    "handover, negative": Case("sdxl", "euler", steps=7, handover=0.7, negative="photo", size=(96, 64), guidance=5),
    "handover ddim": Case("sdxl", "ddim", steps=10, handover=0.8, seeds=(3,), prompts=PROMPTS[:1]),
}


DIFFERS = {
    "sd15 mask pndm": "diffusers re-noises what a mask keeps also in the guess of PLMS' first step, ours after a step",
    "sd15 mask ddim, eta": "diffusers draws a posterior that it does not use before the sampler's first noise",
}


@pytest.mark.parametrize("name", CASES)
def test_pipeline(name, ours, request):
    if name in DIFFERS:
        request.applymarker(pytest.mark.xfail(reason=DIFFERS[name], strict=True))
    case, layout = CASES[name], LAYOUTS[list(CASES).index(name) % 2]
    mine, expected = ours(case, layout), theirs(case)
    errors = {what: error(getattr(mine, what), getattr(expected, what)) for what in Drawn._fields}
    assert max(errors.values()) <= 2e-4, errors


@pytest.mark.parametrize("system", pipelines.SYSTEMS)
def test_layouts_hold_the_same(system, load):
    folder, file = (load(system, layout).objective.state_dict() for layout in LAYOUTS)
    assert folder.keys() == file.keys()
    assert all(torch.equal(folder[key], file[key]) for key in folder)


# --------------------------------------------------------------------------------------------------------- conditions

TEXTS = {  # prompts, negative
    "no negative": (PROMPTS, None),
    "negative": (PROMPTS, "red photo, 1"),
    "empty negative": (("cat", "", "photo"), ""),
    "empty prompt": (("",), None),
    "long": ((LONG, "cat", LONG + "cat"), LONG[4:]),
}
FAMILIES = ("sd15", "sd21", "sdxl", "sdxl_refiner")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("system", FAMILIES)
@torch.no_grad()
def test_conditions(system, text, load, monkeypatch):
    """What the network is told, with and without: context, pooled text, sizes and scores."""
    prompts, negative = TEXTS[text]
    conditioner = load(system, LAYOUTS[len(text) % 2]).objective.conditioner
    for encoder in conditioner.encoders.values():
        if encoder.field == "caption":
            monkeypatch.setattr(encoder, "chunks", 1)  # as diffusers cuts a prompt that is too long
    sizes = [(64, 96, 8, 16, 128, 80)] * len(prompts)
    instead = {} if negative is None else {"caption": [negative] * len(prompts)}
    cond, null = conditioner.pair({"caption": list(prompts), "size": sizes}, **instead)
    expected = their_conditions(system, list(prompts), instead.get("caption"))
    for ours, theirs in zip((cond, null), expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].shape == value.shape
            assert (ours[name] - value).abs().max() <= 2e-5 * value.abs().max(), name  # zeros are zeros


def their_conditions(system, prompts, negative, **knobs):
    """(with, without), each a dict under our names."""
    pipe = their_pipeline(system)
    if "sdxl" not in system:
        both = pipe.encode_prompt(prompts, "cpu", 1, True, negative, **knobs)
        return [{"context": context} for context in both]
    cond, null, pooled, null_pooled = pipe.encode_prompt(prompts, negative_prompt=negative, **knobs)
    width = pooled.shape[1]
    if system == "sdxl":
        ids = [pipe._get_add_time_ids((64, 96), (8, 16), (128, 80), torch.float32, width)] * 2
    else:
        at = ((64, 96), (8, 16), (128, 80))
        ids = pipe._get_add_time_ids(*at, 6.0, 2.5, *at, torch.float32, width)
    ids = [row.expand(len(prompts), -1) for row in ids]
    return [
        {"context": cond, "pooled": pooled, "size": ids[0]},
        {"context": null, "pooled": null_pooled, "size": ids[1]},
    ]


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("system", FAMILIES)
@torch.no_grad()
def test_clip_skip(system, clip_skip, load, monkeypatch):
    """Layers left out beyond those that the system leaves out; theirs does so for the prompt alone."""
    monkeypatch.setattr(transformers.CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    conditioner = load(system, "folder").objective.conditioner
    for encoder in conditioner.encoders.values():
        if encoder.field == "caption":
            monkeypatch.setattr(encoder, "skip", encoder.skip + clip_skip)
    cond = conditioner({"caption": list(PROMPTS), "size": [(64, 96, 0, 0, 64, 96)] * 2})
    expected, _ = their_conditions(system, list(PROMPTS), None, clip_skip=clip_skip)
    assert error(cond["context"], expected["context"]) <= 2e-5


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sample_py(layout, saved, tmp_path):
    """`python sample.py weights=...` writes the picture that diffusers draws, grey level by grey level."""
    system, scheduler = {"folder": ("sdxl", "euler"), "file": ("sd15", "pndm")}[layout]
    case = Case(system, scheduler, prompts=PROMPTS[:1], seeds=(3,), negative="photo")
    paths = saved(case.system)
    command = [
        *(sys.executable, "sample.py", f"weights={paths[layout]}", "dialect=diffusers"),
        *OURS[case.scheduler],
        *(f"prompts=[{case.prompts[0]}]", f"seeds=[{case.seeds[0]}]", f"negative={case.negative}"),
        *(f"steps={case.steps}", f"guidance.scale={case.guidance}", f"image_size=[{case.size[0]},{case.size[1]}]"),
        *(f"out={tmp_path}", "device=cpu"),
        *([f"tokenizer={paths['vocabulary']}"] if layout == "file" else []),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    picture = next(path for path in sorted(tmp_path.glob("*.png")) if path.name != "grid.png")
    ours = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)
    expected = codec.to_uint8(theirs(case).images)[0]
    assert (ours.int() - expected.int()).abs().max() <= 1
