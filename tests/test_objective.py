"""The training loss: what it computes, and that its randomness belongs to the image."""

from functools import partial

import pytest
import torch
from torch import nn

from ldm.diffusion import prediction, process, times, weighting
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import DiffusionObjective
from ldm.models.codec import PixelCodec
from ldm.utils.seeding import randn_like


class Net(nn.Module):
    def __init__(self, out=3):
        super().__init__()
        self.conv = nn.Conv2d(3, out, 3, padding=1)
        self.seen = None

    def forward(self, x, t):
        self.seen = x, t
        return self.conv(x) + (t / 1000)[:, None, None, None]


class NoConditions(nn.Module):
    def forward(self, batch, key=None):
        return {}


class GivenLatents(PixelCodec):
    """Moments are latents."""

    def draw(self, moments, generator=None):
        return moments


class NoisyCodec(nn.Module):
    """A codec with a posterior to draw from."""

    def encode(self, images, generator=None):
        mean = images.float() / 255
        return mean + randn_like(mean, generator) + randn_like(mean, generator)


def batch(positions=(0, 1, 2, 3)):
    images = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"image": images[list(positions)], "position": torch.tensor(positions) + 100, "step": 0}


def objective(p=None, f=None, density=times.uniform, weight=weighting.unit, codec=None, out=3, **knobs):
    torch.manual_seed(0)
    d = Denoiser(Net(out), p or process.linear(), f or prediction.Eps())
    return DiffusionObjective(d, codec or PixelCodec(), NoConditions(), density, weight, **knobs)


def test_the_loss_is_the_weighted_error_of_the_network():
    o = objective(weight=partial(weighting.min_snr, gamma=5.0), f=prediction.V())
    loss, logs = o(batch())
    x_t, t_net = o.denoiser.net.seen
    alpha, sigma = o.denoiser.process((t_net.double() + 1) / 1000)
    x0 = o.codec.encode(batch()["image"]).double()
    alpha4, sigma4 = alpha[:, None, None, None], sigma[:, None, None, None]
    eps = (x_t - alpha4 * x0) / sigma4
    error = (o.denoiser.net(x_t, t_net) - (alpha4 * eps - sigma4 * x0)).square().mean((1, 2, 3))
    weight = (alpha / sigma).square().clamp(max=5) * sigma**2
    torch.testing.assert_close(loss.double(), (weight * error).mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(logs["mse"].double(), error.mean(), rtol=1e-4, atol=0)
    assert logs["loss"] == loss and not logs["loss"].requires_grad
    assert not torch.equal(t_net, t_net[0].expand(4))


def test_image_k_draws_the_same_alone_and_in_a_batch():
    o = objective(codec=NoisyCodec(), offset_noise=0.1)
    whole = o(batch())[0]
    x_t = o.denoiser.net.seen[0]
    parts = []
    for k in range(4):
        parts.append(o(batch((k,)))[0])
        assert torch.equal(o.denoiser.net.seen[0], x_t[k : k + 1])
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    assert torch.equal(whole, o(batch())[0])
    assert not torch.equal(whole, objective(codec=NoisyCodec(), offset_noise=0.1, seed=1)(batch())[0])


def test_the_draws_of_one_image_are_independent():
    o = objective(codec=NoisyCodec())
    posterior = o.latents(batch()) - batch()["image"].float() / 255
    eps = o.noise(posterior, batch()["position"])
    both = torch.stack([posterior.flatten(), eps.flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.25 and posterior.std() == pytest.approx(2**0.5, rel=0.2)


def test_offset_noise_shifts_whole_channels():
    plain, offset = objective(), objective(offset_noise=0.5)
    x0, position = torch.zeros(4, 3, 8, 8), torch.arange(4)
    difference = offset.noise(x0, position) - plain.noise(x0, position)
    assert difference.std((2, 3)).max() < 1e-6 and difference.mean((2, 3)).std() == pytest.approx(0.5, rel=0.5)


def test_stored_moments_need_no_image_and_a_variance_half_is_ignored():
    moments = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    o = objective(out=6, codec=GivenLatents())
    loss, _ = o({"moments": moments, "position": torch.arange(4)})
    loss.backward()
    assert o.denoiser.net.conv.weight.grad[:3].abs().sum() > 0 and o.denoiser.net.conv.weight.grad[3:].abs().sum() == 0


@pytest.mark.parametrize("p", [process.linear(), process.VPCosine(), process.EDM(), process.RectifiedFlow(3.0)],
                         ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("f", [prediction.X0(), prediction.V(), prediction.Flow(), prediction.EDMPrecond()],
                         ids=lambda f: type(f).__name__)
def test_every_pair_trains_with_every_density_and_weight(p, f):
    for density in (times.uniform, times.logit_normal, times.mode, times.cosmap, times.log_normal):
        for weight in (weighting.unit, weighting.min_snr, weighting.p2, weighting.edm, weighting.sigmoid):
            assert objective(p, f, density, weight)(batch())[0].isfinite()


def test_parameters_are_named_by_part():
    names = set(objective().state_dict())
    assert names == {"denoiser.net.conv.weight", "denoiser.net.conv.bias"}


def test_a_linear_network_learns_the_gaussian_posterior():
    """Minimising the loss gives the exact denoiser: for data N(0, 1/4) and v, F = (3/4 alpha sigma / n) x."""

    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            return self.gain * x

    def at_half(u, process):
        return torch.full_like(u, 0.5)

    p = process.VPCosine()
    o = DiffusionObjective(Denoiser(Gain(), p, prediction.V()), GivenLatents(), NoConditions(), at_half, weighting.unit)
    optimizer = torch.optim.SGD(o.parameters(), lr=0.1)
    for step in range(60):
        position = torch.arange(16) + 16 * step
        latent = 0.5 * torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        o({"moments": latent, "position": position})[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    alpha, sigma = p(0.5)
    exact = alpha * sigma * (1 - 0.25) / (0.25 * alpha**2 + sigma**2)
    assert o.denoiser.net.gain.item() == pytest.approx(exact, abs=0.03)


def test_stratified_times_are_spread_evenly_however_batches_are_split():
    o = objective(stratified=True)
    for start, count in ((0, 8), (1000, 16), (123_456_789, 64)):
        position = torch.arange(start, start + count)
        u = o.draws(position)
        assert u.sort().values.diff().max() < 2.7 / count, "no gap much wider than 1 / count"
        assert torch.equal(torch.cat([o.draws(part) for part in position.split(3)]), u)
    alone = objective(stratified=False).draws(torch.arange(4096))
    assert alone.sort().values.diff().max() > 4 / 4096 and abs(alone.mean() - 0.5) < 0.02
