"""Whole trajectories against diffusers' schedulers: one small nonlinear network, the same noise, every step compared.

Where the reference has a quirk, the test says which grid reaches it: its DDIM steps wrongly on `linspace` (its issue
12633; Euler, which equals DDIM, is compared there), its DPM-Solver spaces `leading` and `linspace` for one step more.
"""

import pytest
import torch
from torch import nn

from ldm.diffusion import prediction, process, times
from ldm.diffusion.denoiser import Denoiser
from ldm.samplers import ddim, ddpm, dpm_solver, euler, heun

diffusers = pytest.importorskip("diffusers")

SD = process.scaled_linear()
TABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
STEPS = 10
TOLERANCE = 2e-5


class Net(nn.Module):
    """A smooth function of x and t, with neighbours mixed in; with `variance`, two halves."""

    def __init__(self, variance=False):
        super().__init__()
        self.variance = variance

    def forward(self, x, t):
        wave = torch.sin(t.float() / 300).view(-1, 1, 1, 1)
        F = 0.8 * torch.tanh(1.3 * x + wave) + 0.15 * x.roll(1, dims=-1)
        return torch.cat([F, 0.9 * torch.cos(3 * x)], dim=1) if self.variance else F


def noise():
    return torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))


def theirs(scheduler, net=None, **step):
    """x after every whole step, in diffusers' own scale, from its own initial noise."""
    net = net or Net()
    scheduler.set_timesteps(STEPS)
    x, path = noise() * float(scheduler.init_noise_sigma), []
    for t in scheduler.timesteps:
        F = net(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(F, t, x, **step).prev_sample
        path.append(x)
    return path


def ours(sample, grid, x_T, p=SD, f=None, net=None, **knobs):
    path = []
    denoiser = Denoiser(net or Net(), p, f or prediction.Eps())
    with torch.no_grad():
        sample(denoiser, p, x_T, grid, callback=lambda step, steps, x, x0: path.append(x.clone()), **knobs)
    return path


def scaled(scheduler, grid, p=SD):
    """The noise of a scheduler that works on x / alpha, in our scale; and alpha along the grid to compare its path."""
    scheduler.set_timesteps(STEPS)
    alphas = [p(t)[0] for t in grid.tolist()]
    return noise() * float(scheduler.init_noise_sigma) * alphas[0], alphas[1:]


def assert_same_path(actual, expected, factors=None):
    factors = factors or [1.0] * len(actual)
    assert len(actual) == len(expected) == len(factors) == STEPS
    for step, (a, b, factor) in enumerate(zip(actual, expected, factors, strict=True)):
        error = ((a - b * factor).norm() / (b * factor).norm()).item()
        assert error <= TOLERANCE, f"step {step}: {error:.1e}"


def generator():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("final", ["clean", "alpha0"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(spacing, final, eta):
    scheduler = diffusers.DDIMScheduler(
        **TABLE, timestep_spacing=spacing, steps_offset=1, set_alpha_to_one=final == "clean", clip_sample=False
    )
    grid = getattr(times, spacing)(SD, STEPS, final=final)
    expected = theirs(scheduler, eta=eta, generator=generator())
    assert_same_path(ours(ddim.sample, grid, noise(), eta=eta, generator=generator()), expected)


def test_ddim_with_v_on_zero_terminal_snr():
    scheduler = diffusers.DDIMScheduler(
        **TABLE,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        clip_sample=False,
    )
    p = process.scaled_linear(zero_terminal_snr=True)
    actual = ours(ddim.sample, times.trailing(p, STEPS), noise(), p, prediction.V())
    assert_same_path(actual, theirs(scheduler))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@pytest.mark.parametrize("table", ["linear", "squaredcos_cap_v2"])
def test_ddpm(table, variance):
    name = "learned_range" if variance == "learned" else variance
    scheduler = diffusers.DDPMScheduler(beta_schedule=table, variance_type=name, clip_sample=False)
    p = process.linear() if table == "linear" else process.cosine()
    net = Net(variance == "learned")
    grid = times.leading(p, STEPS, offset=0)
    expected = theirs(scheduler, net, generator=generator())
    assert_same_path(ours(ddpm.sample, grid, noise(), p, net=net, variance=variance, generator=generator()), expected)


@pytest.mark.parametrize("sample", [euler.sample, ddim.sample], ids=["euler", "ddim"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
def test_euler(spacing, sample):
    rule = dict(use_karras_sigmas=True) if spacing == "karras" else dict(timestep_spacing=spacing, steps_offset=1)
    scheduler = diffusers.EulerDiscreteScheduler(**TABLE, **rule)
    grid = getattr(times, spacing)(SD, STEPS)
    x_T, alphas = scaled(scheduler, grid)
    assert_same_path(ours(sample, grid, x_T), theirs(scheduler), alphas)


def test_euler_ancestral():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**TABLE, timestep_spacing="trailing")
    grid = times.trailing(SD, STEPS)
    x_T, alphas = scaled(scheduler, grid)
    expected = theirs(scheduler, generator=generator())
    assert_same_path(ours(euler.sample_ancestral, grid, x_T, generator=generator()), expected, alphas)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
def test_heun(spacing):
    rule = dict(use_karras_sigmas=True) if spacing == "karras" else dict(timestep_spacing=spacing, steps_offset=1)
    scheduler = diffusers.HeunDiscreteScheduler(**TABLE, **rule)
    grid = getattr(times, spacing)(SD, STEPS)
    x_T, alphas = scaled(scheduler, grid)
    expected = theirs(scheduler)
    whole = expected[1::2] + expected[-1:]  # every second evaluation ends a step; the last step has but one
    assert_same_path(ours(heun.sample, grid, x_T), whole, alphas)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_dpm_solver(spacing):
    scheduler = diffusers.DPMSolverMultistepScheduler(**TABLE, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(STEPS)
    grid = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=torch.float64)])
    if spacing == "trailing":
        torch.testing.assert_close(times.trailing(SD, STEPS), grid)
    assert_same_path(ours(dpm_solver.sample, grid, noise()), theirs(scheduler))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(STEPS)
    p, x, expected = process.RectifiedFlow(shift), noise(), []
    for t in scheduler.timesteps:
        x = scheduler.step(Net()(x, t.expand(2)), t, x).prev_sample
        expected.append(x)
    grid = times.linspace(p, STEPS)
    assert_same_path(ours(euler.sample, grid, noise(), p, prediction.Flow()), expected)
