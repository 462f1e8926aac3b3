"""The denoiser, and what is wrapped around it: guidance and thresholds."""

import pytest
import torch
from torch import nn

from ldm.build import make
from ldm.diffusion import guidance, prediction, process
from ldm.diffusion.denoiser import Denoiser, GaussianDenoiser
from ldm.utils.errors import ConfigError
from tests.group_files import group, load
from tests.test_process import PREDICTIONS, PROCESSES


class Net(nn.Module):
    """A small smooth network of x, t and a context; remembers the batch sizes it was called with."""

    def __init__(self, variance=False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.variance = variance
        self.calls = []

    def forward(self, x, t, *, context, context_mask=None):
        self.calls.append(len(x))
        mask = torch.ones(context.shape[:2]) if context_mask is None else context_mask.float()
        shift = ((context * mask[..., None]).sum((1, 2)) / mask.sum(1) + t / 1000)[:, None, None, None]
        F = torch.tanh(self.scale * x + shift)
        return torch.cat([F, F.sin() + shift], dim=1) if self.variance else F


def images(n=3):
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def context(n=3, length=2, seed=2):
    return {"context": torch.randn(n, length, 4, generator=torch.Generator().manual_seed(seed))}


def denoiser(variance=False, f=None):
    return Denoiser(Net(variance), process.scaled_linear(), f or prediction.V())


# --- the denoiser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("f", PREDICTIONS, ids=lambda f: type(f).__name__)
def test_a_number_and_a_tensor_of_times_agree(p, f):
    if f.needs_signal and p(1.0)[0] == 0:
        with pytest.raises(ConfigError, match="alpha = 0") as error:
            Denoiser(Net(), p, f)
        assert "\n" not in str(error.value)
        return
    d, x = Denoiser(Net(), p, f), images()
    for t in (0.25, 0.5, 0.97):
        batched = d(x, torch.full((3,), t, dtype=torch.float64), **context())
        torch.testing.assert_close(d(x, t, **context()), batched, rtol=1e-5, atol=1e-6 * p.ratio(t) + 1e-6)


def test_a_change_of_process_is_not_missed():
    d, x = denoiser(), images()
    before = d(x, 0.5, **context())
    d.process = process.linear()
    assert not torch.equal(before, d(x, 0.5, **context()))


def test_times_remembered_in_inference_serve_training():
    d, x = denoiser(), images()
    with torch.inference_mode():
        d(x, 0.5, **context())
    d(x, 0.5, **context()).sum().backward()
    assert d.net.scale.grad.isfinite()


def test_the_variance_half_is_split_off_and_given_on_request():
    d, plain, x = denoiser(variance=True), denoiser(), images()
    x0, v = d(x, 0.5, variance=True, **context())
    assert torch.equal(x0, plain(x, 0.5, **context())) and torch.equal(x0, d(x, 0.5, **context()))
    assert v.shape == x.shape and not torch.equal(v, x0)
    with pytest.raises(ConfigError, match="variance"):
        plain(x, 0.5, variance=True, **context())


def test_the_gaussian_denoiser_is_the_posterior_mean():
    p = process.VPCosine()
    g = GaussianDenoiser(p, mean=0.3, std=0.5)
    generator = torch.Generator().manual_seed(0)
    x0 = 0.3 + 0.5 * torch.randn(200_000, generator=generator)
    alpha, sigma = p(0.5)
    x_t = alpha * x0 + sigma * torch.randn(200_000, generator=generator)
    error = x0 - g(x_t, 0.5)
    assert abs(error.mean()) < 3e-3 and abs((error * x_t).mean()) < 3e-3  # orthogonal: no better estimate exists


# --- classifier-free guidance --------------------------------------------------------------------------------------


def test_guidance_is_linear_in_the_scale_and_one_call():
    d, x, cond, null = denoiser(), images(), context(), context(seed=3)
    with_cond, with_null = d(x, 0.5, **cond), d(x, 0.5, **null)
    d.net.calls.clear()
    x0 = guidance.cfg(d, cond, null, scale=4.0)(x, 0.5)
    assert d.net.calls == [6]
    torch.testing.assert_close(x0, with_null + 4 * (with_cond - with_null))


def test_scale_one_and_none_are_exactly_the_conditional():
    d, x, cond, null = denoiser(), images(), context(), context(seed=3)
    expected = d(x, 0.5, **cond)
    d.net.calls.clear()
    assert torch.equal(guidance.cfg(d, cond, null, scale=1.0, rescale=0.7)(x, 0.5), expected)
    assert torch.equal(guidance.none(d, cond, null)(x, 0.5), expected)
    assert d.net.calls == [3, 3]
    with pytest.raises(ConfigError, match="guidance=cfg"):
        guidance.none(d, cond, null, scale=5.0)


def test_outside_the_interval_the_conditional_runs_alone():
    d, x, cond = denoiser(), images(), context()
    denoise = guidance.cfg(d, cond, context(seed=3), scale=4.0, interval=(0.2, 0.8))
    assert torch.equal(denoise(x, 0.9), d(x, 0.9, **cond)) and torch.equal(denoise(x, 0.1), d(x, 0.1, **cond))
    d.net.calls.clear()
    for t in (0.1, 0.2, 0.8, 0.9):
        denoise(x, t)
    assert d.net.calls == [3, 6, 6, 3]


def test_rescale_restores_the_deviation_of_the_networks_output():
    d, x, cond, null = denoiser(), images(), context(), context(seed=3)
    t_net = torch.full((3,), d.process.net_time(0.5))
    F_cond, F_null = d.net(x, t_net, **cond), d.net(x, t_net, **null)
    F = F_null + 6 * (F_cond - F_null)
    F = 0.7 * F * F_cond.std((1, 2, 3), keepdim=True) / F.std((1, 2, 3), keepdim=True) + 0.3 * F
    expected = d.prediction.to_x0(F, x, *d.process(0.5))
    denoise = guidance.cfg(d, cond, null, scale=6.0, rescale=0.7)
    torch.testing.assert_close(denoise(x, 0.5), expected, rtol=1e-5, atol=1e-5)


def test_the_first_channels_alone_can_be_guided():
    """DiT's forward_with_cfg, on F: the others of the cond half stay what the network said."""
    d, x, cond, null = denoiser(f=prediction.Eps(), variance=True), images(), context(), context(seed=3)
    t_net = torch.full((3,), d.process.net_time(0.5))
    (F_cond, v), F_null = d.net(x, t_net, **cond).chunk(2, 1), d.net(x, t_net, **null)[:, :2]
    F = torch.cat([F_null[:, :1] + 4 * (F_cond - F_null)[:, :1], F_cond[:, 1:]], dim=1)
    x0, found = guidance.cfg(d, cond, null, scale=4.0, channels=1)(x, 0.5, variance=True)
    torch.testing.assert_close(x0, d.prediction.to_x0(F, x, *d.process(0.5)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, v)  # not guided
    both = guidance.cfg(d, cond, null, scale=4.0)(x, 0.5)
    torch.testing.assert_close(guidance.cfg(d, cond, null, scale=4.0, channels=2)(x, 0.5), both)
    with pytest.raises(ConfigError, match="channels=0"):
        guidance.cfg(d, cond, null, scale=4.0, channels=0)


def test_contexts_of_different_length_are_padded_and_masked():
    d, x, cond, null = denoiser(), images(), context(length=5), context(length=2, seed=3)
    with_cond, with_null = d(x, 0.5, **cond), d(x, 0.5, **null)
    torch.testing.assert_close(guidance.cfg(d, cond, null, scale=3.0)(x, 0.5), with_null + 3 * (with_cond - with_null))


def test_conditions_must_match_and_lists_are_joined():
    with pytest.raises(ConfigError, match="same conditions"):
        guidance.cfg(denoiser(), context(), {}, scale=2.0)

    class Residual(nn.Module):
        def forward(self, x, t, *, residuals):
            return x + sum(residuals)

    x = images()
    cond, null = {"residuals": [x, x]}, {"residuals": [0 * x, 0 * x]}
    d = Denoiser(Residual(), process.scaled_linear(), prediction.X0())
    torch.testing.assert_close(guidance.cfg(d, cond, null, scale=2.0)(x, 0.5), 5 * x)


def test_the_variance_is_not_guided():
    d, x, cond = denoiser(variance=True), images(), context()
    _, v = d(x, 0.5, variance=True, **cond)
    for denoise in (guidance.cfg(d, cond, context(seed=3), scale=4.0), guidance.none(d, cond, {})):
        for wrapped in (denoise, guidance.static_threshold(denoise), guidance.dynamic_threshold(denoise)):
            x0, found = wrapped(x, 0.5, variance=True)
            torch.testing.assert_close(found, v)
            torch.testing.assert_close(x0, wrapped(x, 0.5))


# --- thresholds ----------------------------------------------------------------------------------------------------


def test_thresholds():
    x = torch.linspace(-4, 4, 101).view(1, 1, 1, 101)
    x = torch.cat([x, x / 8])

    def identity(x, t, *, variance=False):
        return x

    assert torch.equal(guidance.static_threshold(identity)(x, 0.5), x.clamp(-1, 1))
    dynamic = guidance.dynamic_threshold(identity, percentile=0.9)(x, 0.5)
    limit = torch.quantile(x[0].abs(), 0.9)
    torch.testing.assert_close(dynamic[0], x[0].clamp(-limit, limit) / limit)
    assert torch.equal(dynamic[1], x[1])  # below 1 nothing changes
    capped = guidance.dynamic_threshold(identity, percentile=0.9, cap=1.5)(x, 0.5)
    torch.testing.assert_close(capped[0], x[0].clamp(-1.5, 1.5) / 1.5)


@pytest.mark.parametrize("path", group("guidance"), ids=lambda p: p.stem)
def test_every_guidance_file_works(path):
    node = load(path)
    assert "scale" in node
    x0 = make(node, "guidance")(denoiser(), context(), context(seed=3))(images(), 0.5)
    assert x0.shape == images().shape and x0.isfinite().all()


@pytest.mark.parametrize("path", group("threshold"), ids=lambda p: p.stem)
def test_every_threshold_file_works(path):
    node = load(path)
    if path.stem == "none":
        assert node == {}
        return
    wrapped = make(node, "threshold")(guidance.none(denoiser(), context(), {}))
    assert wrapped(images(), 0.5).abs().max() <= 1
