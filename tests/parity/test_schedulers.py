"""What a scheduler_config.json says, against diffusers: its schedulers step by step, and whole pipelines from folders.

Ours is told `dialect=diffusers` and the config, nothing else.
"""

import copy
import inspect
import json
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import yaml

from ldm.build import compose
from ldm.diffusion import prediction, process
from ldm.diffusion.denoiser import Denoiser
from ldm.generate import Sampling, generate
from ldm.published import load_published
from ldm.tools.gallery import read_edit
from ldm.tools.subject import as_published
from ldm.utils.errors import WeightsError
from ldm.weights.schedulers import NEAREST, drawn_by
from tests.parity.test_samplers import Net, noise

diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD, ZERO = process.scaled_linear(), process.scaled_linear(zero_terminal_snr=True)
V = {"prediction_type": "v_prediction"}
FREE = {"clip_sample": False}
PLMS = {"skip_prk_steps": True}
SIGMAS = ({}, *({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")))
SPACINGS = ("leading", "trailing", "linspace")
MIN = {"final_sigmas_type": "sigma_min"}


def said(name, **config):
    return {"_class_name": f"{name}Scheduler", **TABLE, **config}


def spaced(name, *others, **config):
    """A config for each spacing, of leading with two offsets, and each of the others."""
    places = [{"timestep_spacing": s, "steps_offset": o} for s, o in zip((*SPACINGS, "leading"), (0, 0, 0, 1))]  # noqa: B905
    return [said(name, **place, **other, **config) for place in places for other in others or ({},)]


ENDS = ({"set_alpha_to_one": True}, {"set_alpha_to_one": False})
LEARNED = {"variance_type": "learned_range"}
CONFIGS = {
    "ddim": spaced("DDIM", *ENDS, **FREE),
    "pndm": spaced("PNDM", *ENDS, **PLMS),
    "ddpm": spaced("DDPM", {}, LEARNED, *({"variance_type": f"fixed_{k}"} for k in ("large", "small_log")), **FREE),
    "euler": spaced("EulerDiscrete", *SIGMAS),
    "euler ancestral": spaced("EulerAncestralDiscrete"),
    "heun": spaced("HeunDiscrete", *SIGMAS),
    "dpm-solver": spaced("DPMSolverMultistep", *SIGMAS, MIN, {"use_lu_lambdas": True}, {"lambda_min_clipped": -1.0}),
    "unipc": spaced("UniPCMultistep", *SIGMAS, MIN, MIN | SIGMAS[1]),
    "orders of dpm-solver": [
        said("DPMSolverMultistep", solver_order=order, solver_type=solver, algorithm_type=algorithm, **final)
        for order in (1, 2, 3)
        for solver in ("midpoint", "heun")
        for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
        for final in ({} if "++" in algorithm else MIN,)
        if order < 3 or "sde" not in algorithm
    ],
    "ends of dpm-solver": [said("DPMSolverMultistep", solver_order=3, lower_order_final=False),
                           said("DPMSolverMultistep", euler_at_final=True, **MIN)],
    "orders of unipc": [said("UniPCMultistep", solver_order=order, **ends) for order in (1, 2, 3)
                        for ends in ({}, MIN | {"lower_order_final": False})],
    "lcm": [said("LCM"), said("LCM", original_inference_steps=40)],
    "clipped": [said(name, clip_sample=True, clip_sample_range=0.7) for name in ("DDIM", "DDPM", "LCM", "HeunDiscrete")],  # noqa: E501
    "thresholded": [said(name, thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.8)
                    for name in ("DDIM", "DDPM", "LCM", "DPMSolverMultistep", "UniPCMultistep")],
    "v": [said("DDIM", **V, **FREE), said("PNDM", **V, **PLMS), *(said(name, **V) for name in (
        "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete"))],
    "zero terminal SNR": [said(name, **V, **FREE, rescale_betas_zero_snr=True, timestep_spacing=spacing, **sigmas)
                          for name in ("DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep",
                                       "UniPCMultistep")
                          for spacing in ("trailing", "linspace") for sigmas in SIGMAS[:2]],
}  # fmt: skip


def theirs(config, steps):
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    x, net = noise() * float(scheduler.init_noise_sigma), Net(config.get("variance_type") == "learned_range")
    draws = "generator" in inspect.signature(scheduler.step).parameters
    knobs = {"generator": torch.Generator().manual_seed(7)} if draws else {}
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t.expand(2)), t, x, **knobs).prev_sample
    return x


@cache
def base(*groups):
    return compose("sample", ["dialect=diffusers", *groups])


def with_lines(lines, steps):
    """The config of these overrides; groups are composed once."""
    groups = [line for line in lines if line.partition("=")[0] in ("sampler", "times", "threshold")]
    cfg = copy.deepcopy(base(*groups))
    for line in [*lines, "times.steps=${steps}"]:
        if line not in groups:
            (group, knob), value = line.partition("=")[0].split("."), line.partition("=")[2]
            assert knob in cfg[group]
            cfg[group][knob] = steps if value == "${steps}" else yaml.safe_load(value)
    return cfg


def ours(config, steps):
    p = ZERO if config.get("rescale_betas_zero_snr") else SD
    predicts = prediction.V() if config.get("prediction_type") else prediction.Eps()
    sampling = Sampling.from_config(with_lines(drawn_by(config, "a folder"), steps))
    net = Net(config.get("variance_type") == "learned_range")
    denoise, grid = sampling.denoiser(SimpleNamespace(denoiser=Denoiser(net, p, predicts))), sampling.times(p)
    denoise = sampling.threshold(denoise) if sampling.threshold else denoise
    alpha, sigma = p(grid[0].item())
    x = noise() * (math.hypot(alpha, sigma) if sampling.initial == "prior" else sigma)
    with torch.no_grad():
        return sampling.sampler(denoise, p, x, grid, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", CONFIGS)
def test_schedulers(name):
    """Final sigmas of 0.03 are left with alpha in ours, without it in theirs: 4e-4."""
    errors = {}
    for config in CONFIGS[name]:
        steps = 4 if name in ("lcm", "clipped", "thresholded") else 7
        expected = theirs(config, steps)
        errors[json.dumps(config)] = ((ours(config, steps) - expected).abs().max() / expected.abs().max()).item()
    wrong = {config: error for config, error in errors.items() if not error <= 6e-4}
    assert not wrong


@pytest.mark.parametrize("name, nearest", NEAREST.items())
def test_a_scheduler_without_an_equivalent_is_named_with_the_nearest(name, nearest):
    with pytest.raises(WeightsError, match=f"^a folder: its scheduler {name} .*sampler={nearest} is the nearest$"):
        drawn_by({"_class_name": name}, "a folder")
    assert drawn_by({"_class_name": name, "timestep_spacing": "trailing"}, "a folder", nearest)


@pytest.mark.parametrize("config, match", [
    (said("PNDM"), "skip_prk_steps=false.*sampler=plms"),
    (said("DDPM", variance_type="fixed_large_log"), "variance_type=fixed_large_log; expected fixed_small"),
    (said("EulerDiscrete", interpolation_type="log_linear"), "interpolation_type=log_linear"),
    (said("UniPCMultistep", solver_type="bh1"), "solver_type=bh1; expected bh2"),
    (said("UniPCMultistep", predict_x0=False), "predict_x0=False"),
    (said("DPMSolverMultistep", algorithm_type="dpmsolver"), "final_sigmas_type=sigma_min"),
    (said("DPMSolverMultistep", timestep_spacing="cubic"), "timestep_spacing=cubic"),
    (said("DDIM", steps_offset="${oc.env:HOME}"), "steps_offset"),
    (said("LMS"), "LMSScheduler has no equivalent here; choose one"),
])  # fmt: skip
def test_words_that_are_not_built_are_named(config, match):
    with pytest.raises(WeightsError, match=match):
        drawn_by(config, "a folder")


# --- whole pipelines -------------------------------------------------------------------------------------------------

PROMPT, SEEDS, SIZE = "a photo of a red cat", (0, 7), (64, 64)


@cache
def their_pipeline(system):
    pytest.importorskip("transformers", reason="the parity extra is not installed")
    from tests.parity import pipelines

    diffusers.utils.logging.set_verbosity_error()
    return pipelines.pipeline(system)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(system, config) -> its pipeline with another scheduler_config.json; the networks are links."""
    from tests.parity import pipelines

    root = tmp_path_factory.mktemp("folders")

    @cache
    def saved(system):
        pipelines.save_folder(their_pipeline(system), root / system)
        return root / system

    def make(system, config, number):
        made = root / f"{system}_{number}"
        (made / "scheduler").mkdir(parents=True)
        for part in saved(system).iterdir():
            if part.name != "scheduler":
                (made / part.name).symlink_to(part)
        (made / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        return made

    return make


PIPELINES = {
    "sd15 pndm": ("sd15", said("PNDM", **PLMS), {}),
    "sd15 pndm, from a picture": ("sd15", said("PNDM", **PLMS), {"strength": 0.6}),
    "sd15 dpm-solver, v, karras": ("sd15", said("DPMSolverMultistep", **V, **SIGMAS[1]), {}),
    "sdxl unipc, cosine": ("sdxl", said("UniPCMultistep") | {"beta_schedule": "squaredcos_cap_v2"}, {}),
    "sdxl euler, karras": ("sdxl", said("EulerDiscrete", timestep_spacing="leading", steps_offset=1, **SIGMAS[1]), {}),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_folder(name, folder, tmp_path):
    system, config, how = PIPELINES[name]
    from tests.parity.test_pipelines import picture, pil, pipelines

    pipe = pipelines.turned(their_pipeline(system), system, "image" if how else "text")
    knobs = {"requires_safety_checker": False} if system == "sd15" else {}
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    pipe = type(pipe)(**pipe.components | {"scheduler": scheduler}, **knobs)
    pipe.set_progress_bar_config(disable=True)
    given = ["dialect=diffusers", "steps=5"]
    call = {"height": SIZE[0], "width": SIZE[1]}
    if how:
        pil(picture(SIZE)).save(tmp_path / "image.png")
        call = how | {"image": [pil(picture(SIZE))] * len(SEEDS)}
        given += [f"image={tmp_path / 'image.png'}", f"strength={how['strength']}"]
    expected = pipe([PROMPT] * len(SEEDS), num_inference_steps=5, output_type="pt", **call,
                    generator=[torch.Generator().manual_seed(seed) for seed in SEEDS]).images  # fmt: skip
    expected = (expected * 255).round().to(torch.uint8)
    path = folder(system, config, list(PIPELINES).index(name))
    given = [*given, f"weights={path}", f"kind={system}"]
    cfg = as_published(compose("sample", given), given)
    drawn = generate(load_published(path).objective, [PROMPT] * len(SEEDS), SEEDS, Sampling.from_config(cfg),
                     image_size=SIZE, edit=read_edit(cfg, list(SIZE)))  # fmt: skip
    assert expected.float().std() > 20
    assert (drawn.int() - expected.int()).abs().max() <= 1
