"""What a person says of published weights, told to encoders of SDXL's kind."""

import pytest
import torch
from torch import nn

from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.sizes import AestheticScore, Sizes
from ldm.diffusion import process, times
from ldm.published import Options, overrides
from ldm.told import tell, tell_clip_skip
from ldm.utils.errors import ConfigError, WeightsError
from ldm.weights.pipeline import process_of, scales


class Reader:
    def __init__(self, skip, blocks=4):
        self.skip, self.network = skip, nn.Module()
        self.network.blocks = nn.ModuleList(nn.Identity() for _ in range(blocks))


@pytest.mark.parametrize("system, own, clip_skip, skip", [
    ("sd15", 0, 1, 0), ("sd15", 0, 2, 1), ("sd15_inpaint", 0, 3, 2), ("sdxl", 1, 2, 1), ("sdxl", 1, 1, 0),
    ("sdxl", 1, 3, 2), ("sd21", 0, 2, 0), ("sd21", 0, 3, 1),
])  # fmt: skip
def test_clip_skip_counts_the_layers_of_the_published_clip(system, own, clip_skip, skip):
    reader = Reader(own)
    tell_clip_skip([reader], system, clip_skip)
    assert reader.skip == skip


@pytest.mark.parametrize("system, own, clip_skip", [("sd15", 0, 0), ("sd15", 0, 6), ("sd21", 0, 1), ("sdxl", 1, "2")])
def test_clip_skip_of_layers_that_are_not_there_is_refused(system, own, clip_skip):
    with pytest.raises(ConfigError, match=f"^published.clip_skip={clip_skip}: expected [12] to "):
        tell_clip_skip([Reader(own)], system, clip_skip)


def test_sizes_are_said_with_and_without_a_prompt():
    conditioner = Conditioner({"size": Sizes()})
    tell(conditioner, "sdxl", Options(original_size=[512, 640], crop=[8, 16], negative_target_size=[64, 80]))
    cond, null = conditioner.pair({"size": [(1, 2, 0, 0, 5, 6)] * 2})
    assert cond["size"].tolist() == [[512, 640, 8, 16, 5, 6]] * 2
    assert null["size"].tolist() == [[512, 640, 8, 16, 64, 80]] * 2


def test_the_refiners_scores():
    conditioner = Conditioner({"score": AestheticScore(), "size": Sizes(4)}, join=["size"])
    tell(conditioner, "sdxl_refiner", Options(aesthetic_score=7, negative_aesthetic_score=1))
    cond, null = conditioner.pair({"size": [(1, 2, 3, 4, 5, 6)]})
    assert torch.equal(cond["size"], torch.tensor([[7.0, 1, 2, 3, 4]])) and null["size"][0, 0] == 1


@pytest.mark.parametrize("options, match", [
    ({"original_size": [512, 512]}, r"published.original_size=\[512, 512\] is of SDXL, and this is sd15"),
    ({"prompt_2": "a cat"}, "published.prompt_2 and negative_2 are of SDXL, and this is sd15"),
    ({"aesthetic_score": 6}, "published.aesthetic_score=6 is of SDXL's refiner, and this is sd15"),
    ({"clip_skip": 2}, "published.clip_skip=2 is for CLIP, which sd15 does not read; leave it out"),
])  # fmt: skip
def test_what_a_system_has_not_is_one_line(options, match):
    with pytest.raises(ConfigError, match=match):
        tell(Conditioner({}), "sd15", Options(**options))


@pytest.mark.parametrize("pair", ["512", [512], [0, 512], [512.0, 512], [1, 2, 3]])
def test_a_wrong_size_is_one_line(pair):
    with pytest.raises(ConfigError, match="^published.target_size=.* expected two numbers of pixels"):
        tell(Conditioner({"size": Sizes()}), "sdxl", Options(target_size=pair))


def test_times_one_by_one():
    p = process.scaled_linear()
    assert torch.equal(times.listed(p, [999, 749, 499, 249]), times.trailing(p, 4))
    sigmas = [p.ratio(t) for t in times.leading(p, 5).tolist()]
    torch.testing.assert_close(times.listed(p, sigmas=sigmas), times.leading(p, 5))
    assert times.listed(process.EDM(), sigmas=[80, 1, 0]).shape == (3,)
    for wrong in ({}, {"timesteps": [1], "sigmas": [1]}, {"timesteps": [1, 2]}, {"timesteps": [1000]},
                  {"sigmas": "abc"}, {"sigmas": [float("nan")]}, {"timesteps": []}, {"sigmas": [True]}):  # fmt: skip
        with pytest.raises(ConfigError, match="times[.=]"):
            times.listed(p, **wrong)


def test_the_process_that_a_scheduler_says():
    assert overrides(process_of({"_class_name": "DDIMScheduler"}))[0] == "process=ddpm_linear"
    cosine = overrides(process_of({"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}))
    assert cosine == ["process=ddpm_cosine", "process.T=1000"]
    assert "process=custom_betas" in overrides({"trained_betas": [0.1, 0.2]})
    assert "process=edm" in overrides(process_of({"_class_name": "EDMDPMSolverMultistepScheduler"}))
    flow = overrides(process_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    assert "process.shift=3.0" in flow
    with pytest.raises(WeightsError, match="beta_schedule=sigmoid is not known"):
        overrides(process_of({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}))


def test_latents_with_a_mean_and_a_deviation():
    told = scales({"latents_mean": [1, 2, 3, 4], "latents_std": [1, 2, 4, 8], "scaling_factor": 0.5})
    assert told == {"scale": [0.5, 0.25, 0.125, 0.0625], "shift": [1, 2, 3, 4]}
    with pytest.raises(WeightsError, match="latents_mean, latents_std"):
        scales({"latents_mean": [1, 2], "latents_std": [1, 2, 4, 8]})
