"""The ways of the reference programs: their times, their noise, and the golden values that tell them apart."""

import math

import pytest
import torch
from torch import nn

from ldm.build import compose
from ldm.diffusion import process, times
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Eps
from ldm.generate import Sampling
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import TorchNoise, randn_like
from tests.group_files import group

SD = process.scaled_linear()
DIALECTS = [path.stem for path in group("dialect")]


def sampling(dialect, sampler, *overrides):
    return Sampling.from_config(compose("sample", [f"dialect={dialect}", f"sampler={sampler}", "steps=10", *overrides]))


def indices(grid):
    return [1000 * t - 1 for t in grid.tolist()[:-1]]


# --- times ---------------------------------------------------------------------------------------------------------


def test_times_of_four_steps():
    assert indices(times.leading(SD, 4)) == pytest.approx([751, 501, 251, 1])
    assert indices(times.trailing(SD, 4)) == pytest.approx([999, 749, 499, 249])
    assert indices(times.linspace(SD, 4)) == pytest.approx([999, 666, 333, 0])
    assert indices(times.linspace(SD, 7)) == pytest.approx([999 * k / 6 for k in range(6, -1, -1)])  # not whole
    assert indices(times.sgm(SD, 4)) == pytest.approx([999, 749, 499, 249])
    assert indices(times.compvis(SD, 4)) == pytest.approx([751, 501, 251, 1])


def test_times_of_many_steps():
    assert indices(times.leading(SD, 50)) == pytest.approx(range(981, 0, -20))
    assert indices(times.compvis(SD, 50)) == pytest.approx(range(981, 0, -20))
    assert indices(times.sgm(SD, 50)) == pytest.approx(range(999, 0, -20))
    assert indices(times.sgm(SD, 30))[:3] == pytest.approx([999, 965, 932])
    first = times.leading(SD, 30)[0].item()
    assert 1000 * first - 1 == pytest.approx(958) and SD.ratio(first) == pytest.approx(11.477, abs=5e-4)


def test_times_laid_out_for_one_step_more():
    """diffusers' DPM-Solver and UniPC."""
    assert indices(times.leading(SD, 4, extra=1)) == pytest.approx([801, 601, 401, 201])
    assert indices(times.linspace(SD, 4, rounded=True, extra=1)) == pytest.approx([999, 749, 500, 250])


@pytest.mark.parametrize("steps,taken", [(30, 31), (75, 77), (40, 40), (1, 1)])
def test_compvis_may_take_more_steps(steps, taken):
    assert len(times.compvis(SD, steps)) == taken + 1


@pytest.mark.parametrize("steps,near", {300: "250 or 334", 333: "250 or 334", 1000: "500", 9: "8 or 10"}.items())
def test_compvis_names_the_neighbours_of_what_reads_past_the_table(steps, near):
    with pytest.raises(ConfigError, match=f"steps={steps}.* use {near}$"):
        times.compvis(SD, steps)


def test_grids_end_where_they_are_told():
    for grid in (times.leading, times.trailing, times.linspace, times.compvis, times.sgm):
        assert grid(SD, 5)[-1] == grid(SD, 5, final="clean")[-1] == 0
        end = grid(SD, 5, final="alpha0")[-1].item()
        assert SD(end)[0] ** 2 == pytest.approx(0.99915)
    with pytest.raises(ConfigError, match="clean or alpha0"):
        times.sgm(SD, 5, final="sigma_min")


def test_new_grids_need_a_table():
    for grid in (times.compvis, times.sgm):
        with pytest.raises(ConfigError, match=r"EDM.*use times=trailing"):
            grid(process.EDM(), 10)


def test_whole_indices_change_only_what_the_network_sees():
    shown = times.WholeIndices(SD)
    t = torch.tensor([0.5, 0.5004, 0.5006, 1.0, 0.0], dtype=torch.float64)
    assert shown.net_time(t).tolist() == pytest.approx([499, 499, 500, 999, 0])
    assert torch.equal(shown(t)[0], SD(t)[0])


# --- the refiner's share of training -------------------------------------------------------------------------------


def test_uniform_between_low_and_high():
    u = torch.cat([(torch.arange(40_000) + 0.5) / 40_000, torch.tensor([0.0, 1 - 2.0**-53])]).double()
    drawn = (times.uniform(u, SD, high=0.2) * 1000 - 1).round().long()
    assert drawn.unique().tolist() == list(range(200))
    assert drawn[:-2].bincount().unique().tolist() == [200]
    assert (times.uniform(u, SD, low=0.2) * 1000 - 1).round().unique().tolist() == list(range(200, 1000))
    t = times.uniform(u, process.RectifiedFlow(), low=0.25, high=0.5)
    assert 0.25 <= t.min() and t.max() == 0.5
    for low, high in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.2, 0.2004)):
        with pytest.raises(ConfigError, match="density.low"):
            times.uniform(u, SD, low=low, high=high)


# --- noise ---------------------------------------------------------------------------------------------------------


def test_torch_noise_is_a_generator_for_each_image():
    like, noise = torch.empty(2, 4, 3, 5), TorchNoise([7, 8])
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    for _ in range(3):  # the streams go on
        expected = torch.cat([torch.randn(1, 4, 3, 5, generator=generator) for generator in generators])
        assert torch.equal(randn_like(like, noise), expected)
    assert torch.equal(TorchNoise([8])(like[:1]), TorchNoise([7, 8])(like)[1:])  # image k alone
    assert TorchNoise([7])(like[:1].half()).dtype == torch.float16
    assert torch.equal(TorchNoise([0])(like[:1]), torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0)))


# --- dialects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_composes_and_the_users_times_win(name):
    path = next(path for path in group("dialect") if path.stem == name)
    assert path.read_text().startswith("# @package _global_\n# ")
    assert compose("sample", [f"dialect={name}"])["times"]["final"] is None
    cfg = compose("sample", ["times=karras", f"dialect={name}", "dialect.start=compvis"])
    assert cfg["times"]["_target_"] == "ldm.diffusion.times.karras" and cfg["dialect"]["start"] == "compvis"
    assert Sampling.from_config(cfg).dialect.start == "compvis"


class Toy(nn.Module):
    """The eps of data ~ N(0, 1/4) as a network of the index it is shown, not of the x it is made of."""

    def forward(self, x, t):
        alpha, sigma = SD((t[0].item() + 1) / 1000)
        return x * sigma / (alpha**2 / 4 + sigma**2)


GOLDEN = {  # x0 after ten steps from the dialect's own unit noise; the exact answer is 0.500876
    ("diffusers", "ddim"): 0.406577,
    ("diffusers", "ddim", "times.final=clean"): 0.404799,
    ("diffusers", "euler"): 0.404799,
    ("diffusers", "ddim", "times=trailing", "times.final=clean"): 0.385286,
    ("diffusers", "euler", "times=trailing"): 0.384387,
    ("diffusers", "euler", "times=linspace"): 0.388806,
    ("diffusers", "plms"): 0.483711,
    ("diffusers", "heun", "times=linspace"): 0.522149,
    ("diffusers", "dpm_solver", "times=linspace", "times.rounded=true", "times.extra=1"): 0.409739,
    ("diffusers", "dpm_solver", "times=karras"): 0.526303,
    ("k_diffusion", "dpm_solver", "times=karras"): 0.525462,
    ("k_diffusion", "euler", "times=karras"): 0.414270,
    ("k_diffusion", "euler"): 0.388806,
    ("compvis", "ddim"): 0.406577,
    ("compvis", "plms"): 0.483711,
    ("native", "ddim"): 0.385286,
}


@pytest.mark.parametrize("row", GOLDEN, ids=" ".join)
def test_golden_values_of_the_dialects(row):
    found = sampling(*row)
    shown = times.WholeIndices(SD) if found.whole_indices else SD
    grid = found.times(SD)
    alpha, sigma = SD(grid[0].item())
    x_T = torch.full((1, 1, 1, 1), math.hypot(alpha, sigma) if found.initial == "prior" else sigma).double()
    x = found.sampler(Denoiser(Toy(), shown, Eps()), SD, x_T, grid)
    assert x.item() == pytest.approx(GOLDEN[row], abs=1.5e-6)


def test_where_the_dialects_differ():
    assert sampling("diffusers", "euler").initial == "prior"  # leading
    assert sampling("diffusers", "ddim", "times=trailing").initial == "prior"
    assert sampling("sgm", "euler").initial == "prior"
    assert sampling("sgm", "euler").times(SD)[-1] == 0
    assert sampling("k_diffusion", "euler_ancestral").initial == "sigma"
    assert not sampling("k_diffusion", "dpm_solver", "times=karras").whole_indices
    starts = {name: (sampling(name, "ddim").dialect.start, sampling(name, "ddim").dialect.known) for name in DIALECTS}
    assert starts["compvis"] == ("compvis", "fresh") and starts["diffusers"] == ("diffusers", "first")
    assert starts["sgm"][0] == "sgm"
