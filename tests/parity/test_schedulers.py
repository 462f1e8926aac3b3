"""Whole pipelines from folders whose scheduler_config.json says this and that: diffusers' picture, grey level by level.

Networks are one random Stable Diffusion, one SDXL and one DiT; what varies is the file. `dialect=diffusers` and nothing
else is said to ours.
"""

import json
from functools import cache

import pytest
import torch

from ldm.build import compose
from ldm.generate import Sampling, generate
from ldm.published import load_published
from ldm.tools.gallery import read_edit
from ldm.tools.subject import as_published

diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")

from tests.parity import pipelines  # noqa: E402

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPT, SEEDS, SIZE = "a photo of a red cat", (0, 7), (64, 64)
V = {"prediction_type": "v_prediction"}


@cache
def their_pipeline(system):
    diffusers.utils.logging.set_verbosity_error()
    return pipelines.pipeline(system)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(system, config) -> its pipeline with another scheduler_config.json; the networks are links."""
    root = tmp_path_factory.mktemp("folders")

    @cache
    def saved(system):
        pipelines.save_folder(their_pipeline(system), root / system)
        return root / system

    def make(system, config):
        made = root / f"{system}_{abs(hash(json.dumps(config)))}"
        if not made.exists():
            made.mkdir()
            for part in saved(system).iterdir():
                if part.name != "scheduler":
                    (made / part.name).symlink_to(part)
            (made / "scheduler").mkdir()
            (made / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        return made

    return make


def theirs(system, config, steps, **call):
    pipe = their_pipeline(system)
    cls = getattr(diffusers, config["_class_name"])
    knobs = {"requires_safety_checker": False} if system == "sd15" else {}
    pipe = type(pipe)(**pipe.components | {"scheduler": cls.from_config(config)}, **knobs)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompt=[PROMPT] * len(SEEDS), num_inference_steps=steps, height=SIZE[0], width=SIZE[1], output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], **call,
    ).images  # fmt: skip
    return (images * 255).round().to(torch.uint8)


@cache
def run_of(make, system, process):
    """The run of a system on the process of a config; those of one process share it."""
    return load_published(make(system, dict(process)))


PROCESS = ("_class_name", "beta_schedule", "prediction_type", "trained_betas", "rescale_betas_zero_snr")


def ours(make, system, config, steps, *given):
    path = make(system, config)
    given = ["dialect=diffusers", f"steps={steps}", *given, f"weights={path}", f"kind={system}"]
    cfg = as_published(BARE | {"weights": str(path), "kind": system}, given)
    run = run_of(make, system, tuple((word, v) for word, v in config.items() if word in (*SD, *PROCESS[1:])))
    return generate(run.objective, [PROMPT] * len(SEEDS), SEEDS, Sampling.from_config(cfg), image_size=SIZE,
                    edit=read_edit(cfg, list(SIZE)))  # fmt: skip


BARE = compose("sample")


def levels(a, b):
    assert a.shape == b.shape and b.float().std() > 20
    return (a.int() - b.int()).abs().max().item()


def said(name, **config):
    return {"_class_name": f"{name}Scheduler", **SD, **config}


CASES = {
    "pndm": (said("PNDM", skip_prk_steps=True, steps_offset=1), 6),
    "ddim": (said("DDIM", steps_offset=1, set_alpha_to_one=False, clip_sample=False), 5),
    "euler": (said("EulerDiscrete"), 6),
    "dpm": (said("DPMSolverMultistep"), 6),
    "unipc": (said("UniPCMultistep"), 6),
}


@pytest.mark.parametrize("name", CASES)
def test_folder(name, folder):
    config, steps = CASES[name]
    found = levels(ours(folder, "sd15", config, steps), theirs("sd15", config, steps))
    assert found <= 1, found
