"""The consistency sampler against diffusers' scheduler: the same network, the same noise, every step."""

import pytest
import torch

from ldm.diffusion import prediction, process, times
from ldm.diffusion.denoiser import Denoiser
from ldm.samplers import lcm

diffusers = pytest.importorskip("diffusers")

SD = process.scaled_linear()


def net(x, t):
    wave = torch.sin(t.float() / 300).view(-1, 1, 1, 1)
    return 0.8 * torch.tanh(1.3 * x + wave) + 0.15 * x.roll(1, dims=-1)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind,f", [("epsilon", prediction.Eps()), ("v_prediction", prediction.V())], ids=["eps", "v"])
def test_trajectory(kind, f, steps):
    scheduler = diffusers.LCMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    scheduler.set_timesteps(steps)
    x_T = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    x, expected, generator = x_T, [], torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.expand(2)), t, x, generator=generator).prev_sample
        expected.append(x)
    grid, found = times.lcm(SD, steps), []
    assert [round(1000 * t - 1) for t in grid[:-1].tolist()] == scheduler.timesteps.tolist()
    lcm.sample(Denoiser(net, SD, f), SD, x_T, grid, generator=torch.Generator().manual_seed(7),
               callback=lambda step, steps, x, x0: found.append(x.clone()))  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        assert ((a - b).norm() / b.norm()).item() <= 2e-5
