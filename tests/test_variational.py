"""The variational bound in bits and learned variances, against published numbers and closed forms."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from ldm.diffusion import prediction, process, times, variational, weighting
from ldm.diffusion.denoiser import Denoiser, GaussianDenoiser
from ldm.diffusion.objective import DiffusionObjective
from ldm.diffusion.variational import HybridObjective, bound, log_likelihood, log_variance, log_variances
from ldm.models.codec import PixelCodec
from ldm.samplers import ddpm
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import Noise
from tests.test_objective import NoConditions, batch

LINEAR = process.linear()
SHORT = process.linear(T=30, beta_start=1e-3, beta_end=0.3)
TABLES = {"linear": LINEAR, "respaced": process.respaced(LINEAR, 250), "short": SHORT}
every_table = pytest.mark.parametrize("p", TABLES.values(), ids=TABLES)


def at(p, *indices):
    return (torch.tensor(indices, dtype=torch.float64) + 1) / p.num_steps


def images(n=3, size=4, std=0.3):
    return std * torch.randn(n, 2, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(p, std):
    """denoise(x, t, variance=True) -> (x0, v): the reverse of the process itself for data N(0, std^2)."""
    judge = GaussianDenoiser(p, std=std)

    def denoise(x, t, *, variance=True):
        t = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        alpha, sigma = p(t)
        posterior = (std * sigma) ** 2 / ((alpha * std) ** 2 + sigma**2)
        small, large = log_variances(p, t)
        index = (t * p.num_steps).round() - 1
        beta_tilde = torch.where(index == 0, 0.0, small.exp())
        log = (beta_tilde + variational._pull(p, index) ** 2 * posterior).log()
        v = 2 * (log - small) / (large - small) - 1
        return judge(x, t), v.view(-1, 1, 1, 1).expand_as(x)

    denoise.process = p
    return denoise


# --- variances -----------------------------------------------------------------------------------------------------


def test_published_log_variances():
    small, large = log_variances(LINEAR, at(LINEAR, 0, 1, 999))
    assert small.tolist() == pytest.approx([-9.816725, -9.816725, -3.912024], abs=1e-6)
    assert large[0].item() == pytest.approx(-9.210340, abs=1e-6) and large[2].item() == pytest.approx(math.log(0.02))


@every_table
def test_the_ends_of_v_are_the_fixed_variances_exactly(p):
    t = at(p, 0, 1, 7, p.num_steps - 1)
    small, large = (a[:, None, None, None].expand(4, 2, 1, 1) for a in log_variances(p, t))
    v = torch.ones(4, 2, 1, 1, dtype=torch.float64)
    assert torch.equal(log_variance(p, t, -v), small) and torch.equal(log_variance(p, t, v), large)
    torch.testing.assert_close(log_variance(p, t, 0.4 * v), 0.7 * large + 0.3 * small)
    torch.testing.assert_close(log_variance(p, t, 3 * v), 2 * large - small)  # v is not bounded


@every_table
def test_the_sampler_reads_the_same_table(p):
    small, large = log_variances(p, at(p, *range(p.num_steps)))
    for index in {1, 2, p.num_steps // 2, p.num_steps - 1}:
        now, then = p((index + 1) / p.num_steps), p(index / p.num_steps)
        assert 2 * math.log(ddpm.posterior_std(now, then)) == pytest.approx(small[index].item(), abs=1e-8)
        assert 2 * math.log(ddpm.beta_std(now, then)) == pytest.approx(large[index].item(), abs=1e-8)
        x, t = images(), (index + 1) / p.num_steps
        _, std = ddpm._learned(lambda x, t, variance: (x, 0 * x + 0.3), x, t, now, then)
        torch.testing.assert_close(2 * std.log(), log_variance(p, at(p, *[index] * 3), 0 * x + 0.3))


# --- the bound -----------------------------------------------------------------------------------------------------


@every_table
def test_the_true_posterior_costs_nothing(p):
    x0 = images(2)
    assert bound(p, at(p, 1, p.num_steps - 1), x0, x0, 0 * x0 - 1).tolist() == [0, 0]
    assert bound(p, at(p, 1, p.num_steps - 1), x0, x0 + 0.1, 0 * x0 - 1).min() > 0
    assert bound(p, at(p, 1, p.num_steps - 1), x0, x0, 0 * x0).min() > 0


@every_table
def test_a_term_is_the_divergence_of_the_two_steps_down(p):
    x0, x0_hat, x_t = images(3), images(3).flip(0), images(3, std=1.0)
    index = (1, 5, p.num_steps - 1)
    v = images(3).roll(1, 0)
    betas = 1 - p.alpha_bars / torch.cat([torch.ones(1).double(), p.alpha_bars[:-1]])
    for k, i in enumerate(index):  # Eq. (6), (7), arXiv:2006.11239, in its own symbols
        beta, bar, bar_before = betas[i], p.alpha_bars[i], p.alpha_bars[i - 1]
        mean, mean_hat = (
            bar_before.sqrt() * beta / (1 - bar) * x + (1 - beta).sqrt() * (1 - bar_before) / (1 - bar) * x_t[k]
            for x in (x0[k], x0_hat[k])
        )
        small = beta * (1 - bar_before) / (1 - bar)
        std = torch.exp(((v[k] + 1) / 2 * beta.log() + (1 - v[k]) / 2 * small.log()) / 2)
        expected = kl_divergence(Normal(mean, small.sqrt()), Normal(mean_hat, std)).mean() / math.log(2)
        found = bound(p, at(p, *index), x0, x0_hat, v)[k]
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_the_last_term_is_the_likelihood_of_whole_grey_levels():
    grey = torch.arange(256, dtype=torch.float64)[:, None] / 127.5 - 1
    mean = torch.tensor([-1.3, -0.99, 0.0, 0.2039, 1.0], dtype=torch.float64)
    for std in (0.003, 0.05, 1.0):
        log = log_likelihood(grey.expand(256, 5), mean.expand(256, 5), torch.full((256, 5), math.log(std)))
        assert log.exp().sum(0).tolist() == pytest.approx([1.0] * 5, abs=1e-8), "they are probabilities"
        normal = Normal(mean, std)
        expected = normal.cdf(grey[1:-1] + 1 / 255) - normal.cdf(grey[1:-1] - 1 / 255)
        torch.testing.assert_close(log[1:-1].exp(), expected.clamp(min=1e-12), rtol=1e-6, atol=1e-8)
    x = images()
    t, v = at(LINEAR, 0, 0, 0), 0 * x + 0.2
    expected = log_likelihood(x, x + 0.01, log_variance(LINEAR, t, v) / 2).mean((1, 2, 3)) / -math.log(2)
    torch.testing.assert_close(bound(LINEAR, t, x, x + 0.01, v), expected)


def test_the_bound_of_the_exact_reverse_is_the_entropy():
    """For the reverse of the process itself the bound is tight: -E log2 p of the grey level, however few the steps."""
    std, x0 = 0.25, images(16, size=16, std=0.25)
    entropy = (0.5 * math.log(2 * math.pi * math.e * std**2) - math.log(2 / 255)) / math.log(2)
    bits = variational.bits_per_dim(exact(SHORT, std), x0, generator=Noise(range(16)))
    assert bits.shape == (16,) and bits.mean().item() == pytest.approx(entropy, rel=0.005)
    worse = variational.bits_per_dim(exact(SHORT, 0.35), x0, generator=Noise(range(16)))
    assert (worse > bits).all()


def test_few_learned_steps_keep_the_spread_that_fixed_ones_lose():
    p = process.respaced(LINEAR, 10)
    grid = times.trailing(p, 10)[:-1]
    alpha, sigma = p(grid[-1].item())
    x_T = images(8, size=32, std=1.0)
    found = {}
    for variance in ddpm.PREDICTORS:
        denoise = exact(p, 0.5) if variance == "learned" else GaussianDenoiser(p, std=0.5)
        x = ddpm.sample(denoise, p, x_T, grid, variance=variance, generator=Noise(range(8)))
        found[variance] = x.std().item() / math.hypot(0.5 * alpha, sigma)
    assert found["learned"] == pytest.approx(1, abs=0.01)
    assert found["fixed_small"] < 0.95 and found["fixed_large"] > 1.03


# --- the hybrid loss -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, out=6):
        super().__init__()
        self.conv = nn.Conv2d(3, out, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x) + 0.1 * torch.sin(t / 300)[:, None, None, None]


def objective(kind, p=LINEAR, out=6, **knobs):
    torch.manual_seed(0)
    d = Denoiser(Net(out), p, prediction.Eps())
    return kind(d, PixelCodec(), NoConditions(), times.uniform, weighting.unit, **knobs)


@pytest.mark.parametrize("p,factor", [(LINEAR, 1.0), (TABLES["respaced"], 0.25)], ids=["T=1000", "T=250"])
def test_the_hybrid_loss_adds_the_bound_and_trains_v_alone_with_it(p, factor):
    simple, hybrid = objective(DiffusionObjective, p), objective(HybridObjective, p)
    first, second = (o(batch()) for o in (simple, hybrid))
    first[0].backward(), second[0].backward()
    mean, both = (o.denoiser.net.conv.weight.grad for o in (simple, hybrid))
    assert torch.equal(mean[:3], both[:3]) and both[3:].abs().sum() > 0 and mean[3:].abs().sum() == 0
    assert second[1]["mse"] == first[1]["mse"] and set(second[1]) == {"loss", "mse", "vlb"}
    torch.testing.assert_close(second[0], first[0] + second[1]["vlb"])
    t = hybrid.density(hybrid.draws(batch()["position"]), p)
    x0 = hybrid.latents(batch())
    alpha, sigma = (a.float()[:, None, None, None] for a in p(t))
    x_t = alpha * x0 + sigma * hybrid.noise(x0, batch()["position"])
    eps, v = hybrid.denoiser.net(x_t, p.net_time(t).float()).chunk(2, 1)
    bits = bound(p, t, x0, (x_t - sigma * eps) / alpha, v)
    torch.testing.assert_close(second[1]["vlb"], factor * bits.mean(), rtol=1e-4, atol=0)  # T / 1000 of the drawn term


def test_the_variance_that_is_learned_is_that_of_the_reverse():
    """At one time, with the exact mean for data N(0, 1/4): v goes where the closed form is."""
    p, t = SHORT, 11 / 30

    class V(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.zeros(()))

        def forward(self, x, t_net):
            alpha, sigma = p(t)
            eps = (x - alpha * GaussianDenoiser(p)(x, t)) / sigma
            return torch.cat([eps, self.v.expand_as(x)], dim=1)

    d = Denoiser(V(), p, prediction.Eps())
    o = HybridObjective(d, PixelCodec(), NoConditions(), lambda u, p: torch.full_like(u, t), weighting.unit)
    o.latents = lambda batch: images(64, size=8, std=0.5).float()
    optimizer = torch.optim.Adam(o.parameters(), lr=0.1)
    losses = []
    for step in range(60):
        loss, logs = o({"position": torch.arange(64) + 64 * step})
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(logs["vlb"].item())
    assert losses[-1] < losses[0]
    assert d.net.v.item() == pytest.approx(exact(p, 0.5)(images(1), t)[1][0, 0, 0, 0].item(), abs=0.05)


def test_what_has_no_bound_is_refused():
    with pytest.raises(ConfigError, match="VPCosine has none") as error:
        objective(HybridObjective, process.VPCosine())
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="learned_variance"):
        objective(HybridObjective, out=3)(batch())
