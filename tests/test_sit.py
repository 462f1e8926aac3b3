"""SiT (arXiv:2401.08740): its paths, what is predicted along them, and its stochastic sampler."""

import math

import pytest
import torch
from torch import nn

from ldm.diffusion import interpolant, prediction, process, times
from ldm.diffusion.denoiser import Denoiser, GaussianDenoiser
from ldm.samplers import euler, heun, sde
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import Noise

PATHS = [interpolant.Linear, interpolant.GVP, interpolant.VP]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
MARGIN = 1e-3


def images(n=3, size=4):
    return torch.randn(n, 2, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def predictions(p):
    return [prediction.Velocity(p), prediction.Score(), prediction.Eps(), prediction.X0(), prediction.V()]


class Ideal(nn.Module):
    """The network that predicts F perfectly for data N(0, std^2), in SiT's own time; remembers what it was fed."""

    def __init__(self, p, f, std=0.5):
        super().__init__()
        self.p, self.f, self.judge, self.fed = p, f, GaussianDenoiser(p, std=std), []

    def forward(self, x, t):
        self.fed.append(t)
        alpha, sigma = (a[:, None, None, None] for a in self.p(1 - t.double()))
        x0 = self.judge(x, 1 - t.double())
        return self.f.target(x0, (x - alpha * x0) / sigma, alpha, sigma)


# --- paths and predictions -----------------------------------------------------------------------------------------


@every_path
def test_slopes_are_those_of_the_path(path):
    p, h = path(), 1e-5
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for slope, low, high in zip(p.slope(*p(t)), p(t - h), p(t + h), strict=True):
        torch.testing.assert_close(slope.expand_as(t), (high - low) / (2 * h), rtol=1e-7, atol=1e-7)
    numbers = torch.tensor(p.slope(*p(0.3)), dtype=torch.float64)
    torch.testing.assert_close(numbers, torch.stack(p.slope(*p(torch.tensor(0.3, dtype=torch.float64)))))


def test_published_paths():
    alpha, sigma = interpolant.VP()(1.0)
    assert math.log(alpha) == pytest.approx(-0.25 * 19.9 - 0.05) and sigma == pytest.approx(math.sqrt(1 - alpha**2))
    assert interpolant.GVP()(0.5) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    assert interpolant.Linear()(1.0) == (0.0, 1.0) and interpolant.GVP()(1.0) == (0.0, 1.0)
    assert interpolant.Linear()(0.3) == process.RectifiedFlow()(0.3)


@every_path
def test_to_x0_of_target_is_the_identity_for_every_prediction(path):
    p = path(MARGIN)
    x0, eps = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.cat([torch.linspace(0.01, 0.95, 8, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    alpha, sigma = (a[:, None] for a in p(t))
    for f in predictions(p):
        found = f.to_x0(f.target(x0, eps, alpha, sigma), alpha * x0 + sigma * eps, alpha, sigma)
        torch.testing.assert_close(found, x0, rtol=1e-11, atol=1e-11)
        numbers = f.coefficients(alpha[3].item(), sigma[3].item())
        assert numbers == pytest.approx([c.expand(9, 1)[3].item() for c in f.coefficients(alpha, sigma)], rel=1e-12)


def test_velocities_point_from_noise_to_data():
    x0, eps = images(2), images(2).flip(0)
    linear, gvp = (prediction.Velocity(p()) for p in PATHS[:2])
    torch.testing.assert_close(linear.target(x0, eps, 0.6, 0.4), x0 - eps)  # data - noise, arXiv:2401.08740
    alpha, sigma = interpolant.GVP()(0.3)
    v = prediction.V().target(x0, eps, alpha, sigma)
    torch.testing.assert_close(gvp.target(x0, eps, alpha, sigma), -math.pi / 2 * v)


@every_path
def test_the_score_of_a_velocity(path):
    """s = (alpha / alpha' v - x) / (sigma^2 - alpha / alpha' sigma' sigma), in SiT's own time."""
    p, x, t = path(), images(), 0.4
    alpha, sigma = p(t)
    d_alpha, d_sigma = (-slope for slope in p.slope(alpha, sigma))
    x0 = GaussianDenoiser(p)(x, t)
    v = prediction.Velocity(p).target(x0, (x - alpha * x0) / sigma, alpha, sigma)
    found = (alpha / d_alpha * v - x) / (sigma**2 - alpha / d_alpha * d_sigma * sigma)
    expected = prediction.Score().target(x0, (x - alpha * x0) / sigma, alpha, sigma)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, -x / (alpha**2 / 4 + sigma**2))  # the score of N(0, alpha^2 / 4 + sigma^2)


@every_path
def test_the_network_is_fed_the_papers_time(path):
    p = path(MARGIN)
    for f in predictions(p):
        net = Ideal(p, f)
        d, x = Denoiser(net, p, f), images()
        for t in (1.0, 0.75, 0.04):
            expected = GaussianDenoiser(p)(x, t)
            torch.testing.assert_close(d(x, t), expected, rtol=1e-4, atol=1e-4)  # times are float32
            torch.testing.assert_close(d(x, torch.full((3,), t)), expected, rtol=1e-4, atol=1e-4)
        assert [fed[0].item() for fed in net.fed[::2]] == pytest.approx([MARGIN, 0.25, 0.96])


def test_what_cannot_be_predicted():
    for path in PATHS[:2]:
        for f in (prediction.Score(), prediction.Eps()):
            with pytest.raises(ConfigError, match="alpha = 0"):
                Denoiser(nn.Identity(), path(), f)
            Denoiser(nn.Identity(), path(MARGIN), f)
    with pytest.raises(ConfigError, match="RectifiedFlow is none") as error:
        prediction.Velocity(process.RectifiedFlow())
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="margin=0.5"):
        interpolant.Linear(0.5)


# --- sampling ------------------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("sampler,order", [(euler, 1), (heun, 2)], ids=["euler", "heun"])
def test_order_of_the_ode(path, sampler, order):
    p, errors = path(), []
    judge, x = GaussianDenoiser(p, mean=0.2), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for steps in (64, 128, 256):
        grid = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        errors.append((sampler.sample(judge, p, x, grid) - judge.solve(x, 0.9, 0.1)).abs().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@every_path
@pytest.mark.parametrize("diffusion", sde.DIFFUSIONS)
def test_every_diffusion_keeps_the_marginals_of_the_path(path, diffusion):
    p, x, std, mean = path(MARGIN), images(16, size=32), 0.5, 0.3
    alpha, sigma = p(1.0)
    x_T = alpha * mean + math.hypot(alpha * std, sigma) * x
    found = []

    def callback(step, steps, x, x0):
        found.append((x.mean().item(), x.std().item()))

    judge, grid, knobs = GaussianDenoiser(p, mean, std), times.sit(p, 250), dict(diffusion=diffusion, last="clean")
    sde.sample(judge, p, x_T, grid, generator=Noise(range(16)), callback=callback, **knobs)
    for step in (60, 125, 200, 248):  # the 249th stands at the last time before clean data
        alpha, sigma = p(grid[step + 1].item())
        expected = math.hypot(alpha * std, sigma)
        assert found[step] == pytest.approx((alpha * mean, expected), abs=0.015), step
    expected = alpha * std**2 / expected  # the spread of E[x0 | x] at the last time
    assert found[-1] == pytest.approx((mean, expected), abs=0.015)


@pytest.mark.parametrize("last", ["mean", "clean"])
def test_on_the_line_it_is_the_published_loop(last):
    """Euler-Maruyama on dx = (v + D s) dt + sqrt(2 D) dW from 0 to 0.96 in SiT's time, then 0.04 without noise."""
    p, steps = interpolant.Linear(), 20
    net = Ideal(p, prediction.Velocity(p))
    x_T, noise, own = images(), Noise([1, 2, 3]), torch.linspace(0, 0.96, steps, dtype=torch.float64)
    expected = x_T
    for k, t in enumerate(own):
        v, sigma = net(expected, t.expand(3)), 1 - t
        score = (t * v - expected) / sigma  # sigma^2 + t sigma = sigma
        if k + 1 < steps:
            dt = own[1] - own[0]
            expected = expected + (v + sigma * score) * dt + (2 * sigma * dt).sqrt() * noise(expected)
        else:
            expected = expected + (v + (sigma * score if last == "mean" else 0)) * 0.04
    found = sde.sample(Denoiser(net, p, net.f), p, x_T, times.sit(p, steps), last=last, generator=Noise([1, 2, 3]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the network is fed float32 times


def test_what_the_stochastic_sampler_refuses():
    p = interpolant.Linear()
    for knobs in (dict(diffusion="sbdm"), dict(last="tweedie")):
        with pytest.raises(ConfigError, match="|".join(knobs.values())) as error:
            sde.sample(GaussianDenoiser(p), p, images(), times.sit(p, 5), **knobs)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="last=1.5"):
        times.sit(p, 5, last=1.5)
    assert times.sit(p, 250)[[0, 249, 250]].tolist() == [1.0, 0.04, 0.0] and len(times.sit(p, 250)) == 251
