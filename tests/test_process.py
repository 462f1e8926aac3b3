"""Processes, predictions, grids, densities and weights against published numbers and their own identities."""

import math

import pytest
import torch

from ldm.build import make
from ldm.diffusion import interpolant, prediction, process, times, weighting
from ldm.utils.errors import ConfigError
from tests.group_files import group, load

PROCESSES = {
    "ddpm_linear": process.linear(),
    "scaled_linear": process.scaled_linear(),
    "zero_snr": process.scaled_linear(zero_terminal_snr=True),
    "cosine": process.cosine(),
    "respaced": process.respaced(process.linear(), 250),
    "vp_cosine": process.VPCosine(),
    "edm": process.EDM(),
    "flow": process.RectifiedFlow(),
    "flow_shift": process.RectifiedFlow(3.0),
    "sit_gvp": interpolant.GVP(),
    "sit_vp": interpolant.VP(),
}
PREDICTIONS = [prediction.Eps(), prediction.X0(), prediction.V(), prediction.Flow(), prediction.EDMPrecond()]
every_process = pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)
every_prediction = pytest.mark.parametrize("f", PREDICTIONS, ids=lambda f: type(f).__name__)


def close(actual, expected, **tolerance):
    actual, expected = (torch.as_tensor(values, dtype=torch.float64) for values in (actual, expected))
    torch.testing.assert_close(actual, expected, **tolerance)


# --- processes -----------------------------------------------------------------------------------------------------


def test_published_tables():
    linear, scaled = process.linear().alpha_bars, process.scaled_linear().alpha_bars
    close(linear[[0, 499, 999]], [0.9999, 0.0785872, 4.03583e-5], rtol=1e-6, atol=0)
    close(scaled[[0, 500, 999]], [0.99915, 0.2763326838, 0.0046600985], rtol=1e-8, atol=0)
    cosine = process.cosine().alpha_bars
    close(cosine[[249, 250, 499, 999]], [0.847012, 0.845888, 0.493844, 2.4288e-9], rtol=2e-5, atol=0)
    for beta_end, last in ((0.018, 4.85278e-4), (0.02, 2.30013e-4), (0.03, 5.67216e-6)):
        close(process.scaled_linear(beta_end=beta_end).alpha_bars[-1], last, rtol=1e-5, atol=0)
    zero = process.scaled_linear(zero_terminal_snr=True).alpha_bars.sqrt()
    close(zero[[0, 500, 999]], [0.9995749, 0.4909366, 0.0], rtol=1e-6, atol=1e-12)
    assert process.scaled_linear().ratio(1.0) == pytest.approx(14.61464123, rel=1e-8)
    assert process.scaled_linear().ratio(1 / 1000) == pytest.approx(0.02916716, rel=1e-6)


def test_a_table_is_read_at_its_indices_and_fed_as_the_paper_counts():
    p = process.linear()
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    alpha, sigma = p(t)
    torch.testing.assert_close(alpha**2, p.alpha_bars, rtol=1e-10, atol=0)
    torch.testing.assert_close(sigma**2, 1 - p.alpha_bars, rtol=1e-10, atol=0)
    assert torch.equal(p.net_time(t).float(), torch.arange(1000.0))
    assert p.net_time(0.5) == pytest.approx(499)


def test_between_indices_log_sigma_is_linear():
    p = process.scaled_linear()
    low, high = p.ratio(500 / 1000), p.ratio(501 / 1000)
    assert p.ratio(500.5 / 1000) == pytest.approx(math.sqrt(low * high), rel=1e-9)


@every_process
def test_ends_inverse_and_agreement_of_numbers_and_tensors(p):
    assert p(0.0) == (1.0, 0.0)
    t = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)
    alpha, sigma = p(t)
    assert (alpha / sigma).diff().max() < 0 and alpha.isfinite().all()
    torch.testing.assert_close(p.time(sigma / alpha), t, rtol=1e-9, atol=1e-9)
    for i, number in enumerate(t.tolist()):
        assert p(number) == pytest.approx((alpha[i].item(), sigma[i].item()), rel=1e-12)
        assert p.net_time(number) == pytest.approx(p.net_time(t)[i].item(), rel=1e-12)
    assert p.time(0.0) == 0.0 and p.time(math.inf) == 1.0
    assert p(t.float())[0].dtype == torch.float32 and p.net_time(t.view(1, -1)).shape == (1, 97)


def test_respacing_keeps_alpha_bar_and_the_original_index():
    p, indices = process.respaced(process.linear(), "250"), process.space_indices(1000, "250")
    assert indices[:3] == [0, 4, 8] and indices[-2:] == [995, 999]
    assert process.space_indices(1000, "ddim50") == list(range(0, 1000, 20))
    second = [150 + i for i in process.space_indices(150, 20)]
    assert process.space_indices(300, "10,20") == process.space_indices(150, 10) + second
    betas = 1 - p.alpha_bars / torch.cat([torch.ones(1).double(), p.alpha_bars[:-1]])
    close(betas[[0, 1, 249]], [1e-4, 5.99066e-4, 0.0775193], rtol=1e-5, atol=0)
    t = (torch.arange(250, dtype=torch.float64) + 1) / 250
    assert p.net_time(t).round(decimals=6).tolist() == indices


@pytest.mark.parametrize("spec", ["ddim333", "2000", "x", "0", "600,600", "ddim"])
def test_impossible_respacing(spec):
    with pytest.raises(ConfigError) as error:
        process.respaced(process.linear(), spec)
    assert "\n" not in str(error.value) and spec in str(error.value)


def test_betas_must_make_sense():
    with pytest.raises(ConfigError):
        process.from_betas([0.1, -0.1])
    close(process.from_betas([0.5, 0.5]).alpha_bars, [0.5, 0.25])


# --- predictions ---------------------------------------------------------------------------------------------------


@every_process
@every_prediction
def test_to_x0_of_target_is_the_identity(p, f):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.01, 0.95, 9, dtype=torch.float64)
    alpha, sigma = (a[:, None] for a in p(t))
    x_t = alpha * x0 + sigma * eps
    F = f.target(x0, eps, alpha, sigma)
    limit = dict(rtol=1e-12, atol=1e-12 * (1 + (sigma / alpha).max().item()))  # eps / alpha loses what alpha hides
    torch.testing.assert_close(f.to_x0(F, x_t, alpha, sigma), x0, **limit)
    nudged = f.to_x0(F + 1, x_t, alpha, sigma) - x0
    torch.testing.assert_close(nudged**2, f.gain(alpha, sigma).expand_as(x0), rtol=1e-6, atol=1e-9)


@every_prediction
def test_no_nan_at_the_ends(f):
    x0, eps = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(f.to_x0(f.target(x0, eps, 1.0, 0.0), x0, 1.0, 0.0), x0)
    F = f.target(x0, eps, 0.0, 1.0)
    assert F.isfinite().all()
    if not f.needs_signal:
        assert torch.allclose(f.to_x0(F, eps, 0.0, 1.0), x0, atol=1e-6)


def test_edm_preconditioning_is_the_papers():
    sigma = 3.0
    f, variance = prediction.EDMPrecond(0.5), sigma**2 + 0.25
    assert f.coefficients(1.0, sigma) == pytest.approx((0.25 / variance, sigma * 0.5 / math.sqrt(variance)))
    assert f.net_input(torch.ones(1), 1.0, sigma).item() == pytest.approx(1 / math.sqrt(variance))
    assert process.EDM().net_time(process.EDM().time(3.0)) == pytest.approx(math.log(3) / 4)


# --- grids ---------------------------------------------------------------------------------------------------------


def indices(grid):
    return [round(1000 * t - 1) for t in grid.tolist()[:-1]]


def test_published_grids():
    sd = process.scaled_linear()
    assert indices(times.leading(sd, 4)) == [751, 501, 251, 1]
    assert indices(times.trailing(sd, 4)) == [999, 749, 499, 249]
    assert indices(times.linspace(sd, 4)) == [999, 666, 333, 0]
    assert indices(times.leading(sd, 50))[:2] == [981, 961]
    assert times.leading(sd, 50, final="alpha0")[-1] == 1 / 1000 and times.leading(sd, 50)[-1] == 0
    assert indices(times.respaced(sd, "ddim50"))[-1] == 0 and len(times.respaced(sd, 250)) == 251
    karras = [14.61464, 9.10293, 5.47839, 3.16860, 1.74942, 0.91407, 0.44692, 0.20140, 0.08191, 0.02917, 0]
    close([sd.ratio(t) for t in times.karras(sd, 10).tolist()], karras, rtol=0, atol=6e-6)
    edm = process.EDM()
    start = [80, 57.58598, 40.78557, 28.37458, 19.35245, 12.91008, 8.40094, 5.31519, 3.25682, 1.92334]
    close([edm(t)[1] for t in times.karras(edm, 18).tolist()][:10], start, rtol=0, atol=6e-6)
    sd3 = process.RectifiedFlow(3.0)
    sigmas = [sd3(t)[1] for t in times.linspace(sd3, 28).tolist()]
    shifted = [1, 0.987381, 0.974108, 0.960129, 0.199827, 0.110906, 0.008929, 0]
    close(sigmas[:4] + sigmas[-4:], shifted, rtol=0, atol=6e-7)
    flux = process.RectifiedFlow(math.exp(1.15))
    sigmas = [flux(t)[1] for t in times.trailing(flux, 28).tolist()]
    close(sigmas[:3] + sigmas[-3:], [1, 0.988409, 0.976222, 0.195455, 0.104721, 0], rtol=0, atol=6e-7)


@every_process
@pytest.mark.parametrize("grid", [times.trailing, times.linspace, times.karras, times.logsnr], ids=lambda g: g.__name__)
def test_grids_fall_from_one_to_zero(p, grid):
    found = grid(p, 20)
    assert found.shape == (21,) and found.dtype == torch.float64
    assert found[0] == 1 and found[-1] == 0 and found.diff().max() < 0


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "ddim50"])
def test_impossible_steps(steps):
    with pytest.raises(ConfigError, match=f"steps={steps!r}"):
        times.trailing(process.linear(), steps)


def test_grids_that_need_a_table_say_so():
    for grid in (times.leading, times.respaced):
        with pytest.raises(ConfigError, match="RectifiedFlow"):
            grid(process.RectifiedFlow(), 10)
    with pytest.raises(ConfigError, match="offset"):
        times.leading(process.linear(), 1000)


# --- densities -----------------------------------------------------------------------------------------------------

DENSITIES = [times.uniform, times.logit_normal, times.mode, times.cosmap, times.log_normal]


@every_process
@pytest.mark.parametrize("density", DENSITIES, ids=lambda d: d.__name__)
def test_draws_stay_in_time(p, density):
    u = torch.cat([torch.zeros(1), torch.linspace(0, 1, 41)[:-1], torch.tensor([1 - 2.0**-53])]).double()
    t = density(u, p)
    assert t.shape == u.shape and t.min() > 0 and t.max() <= 1
    assert p(t)[0].isfinite().all() and (p(t)[1] > 0).all()
    if p.num_steps:
        torch.testing.assert_close(t * p.num_steps, (t * p.num_steps).round(), rtol=0, atol=1e-9)


def test_densities_have_their_published_shape():
    u, flow = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000, process.RectifiedFlow()
    logits = torch.logit(times.logit_normal(u, flow, mean=0.5, std=0.8))
    assert logits.mean() == pytest.approx(0.5, abs=1e-3) and logits.std() == pytest.approx(0.8, abs=2e-3)
    edm = process.EDM(sigma_max=1e4)
    log_sigma = edm(times.log_normal(u, edm))[1].log()
    assert log_sigma.mean() == pytest.approx(-1.2, abs=1e-3) and log_sigma.std() == pytest.approx(1.2, abs=2e-3)
    counts = torch.bincount((times.uniform(u, process.linear()) * 1000).round().long())
    assert counts[0] == 0 and counts[1:].eq(20).all()
    t = times.cosmap(u, flow)
    density = 2 / (math.pi * (1 - 2 * t + 2 * t**2))  # Eq. (21): its integral up to the k-th draw is u_k
    assert torch.trapezoid(density[:-1].flip(0), t[:-1].flip(0)).abs() == pytest.approx(1, abs=1e-3)


# --- weights -------------------------------------------------------------------------------------------------------


def weight(function, f, t, p=PROCESSES["ddpm_linear"], **knobs):
    alpha, sigma = p(torch.tensor([t], dtype=torch.float64))
    return function((alpha / sigma) ** 2, f.gain(alpha, sigma) + torch.zeros(1), **knobs).item()


def test_min_snr_is_the_published_one_for_every_prediction():
    eps, v, x0 = prediction.Eps(), prediction.V(), prediction.X0()
    assert weight(weighting.min_snr, eps, 0.101) == pytest.approx(0.585709, rel=1e-5)
    assert weight(weighting.min_snr, v, 0.101) == pytest.approx(0.524292, rel=1e-5)
    assert weight(weighting.min_snr, x0, 0.101) == pytest.approx(5.0)
    assert weight(weighting.min_snr, eps, 0.301) == pytest.approx(1.0)
    assert weight(weighting.min_snr, v, 0.301) == pytest.approx(0.394011, rel=1e-5)
    assert weight(weighting.min_snr, v, 0.501) == pytest.approx(0.077797, rel=1e-4)


@every_prediction
def test_a_weight_means_the_same_for_every_prediction(f):
    """The weighted error of one mistaken x0 does not depend on what the network predicts."""
    t = 0.4
    alpha, sigma = PROCESSES["ddpm_linear"](t)
    for function in (weighting.snr, weighting.min_snr, weighting.p2, weighting.edm, weighting.sigmoid):
        of_x0 = weight(function, prediction.X0(), t)
        assert weight(function, f, t) / float(f.gain(alpha, sigma)) == pytest.approx(of_x0, rel=1e-9)


def test_weights_reduce_to_plain_losses():
    assert weight(weighting.snr, prediction.Eps(), 0.3) == pytest.approx(1)
    assert weight(weighting.p2, prediction.Eps(), 0.3, gamma=0.0) == pytest.approx(1)
    assert weight(weighting.edm, prediction.EDMPrecond(), 0.3, PROCESSES["edm"]) == pytest.approx(1)
    assert weight(weighting.unit, prediction.V(), 0.3) == 1


@pytest.mark.parametrize("length", [0, -1, 10**7, 10**12])
def test_tables_and_grids_of_impossible_lengths_take_no_memory(length):
    for table in (process.linear, process.scaled_linear, process.cosine):
        with pytest.raises(ConfigError, match=f"process.T={length}: expected 1 to 1,000,000"):
            table(length)
    with pytest.raises(ConfigError, match=f"steps={length}: "):
        times.trailing(process.VPCosine(), length)


# --- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", group("process") + group("prediction"), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_process_and_prediction_file_builds(path):
    node = load(path)
    if path.stem == "custom_betas":
        node["betas"] = [0.1, 0.2]
    assert make(node, path.parent.name, process=interpolant.Linear()) is not None


@pytest.mark.parametrize("path", group("times"), ids=lambda p: p.stem)
def test_every_times_file_makes_a_grid(path):
    own = {"timesteps": [999, 800, 600, 500, 400, 200, 99, 0]} if path.stem == "list" else {"steps": 8}
    assert make({**load(path), **own}, "times")(process.scaled_linear()).shape == (9,)


@pytest.mark.parametrize("path", group("density") + group("weighting"), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_density_and_weighting_file_works(path):
    u = torch.full((3,), 0.4, dtype=torch.float64)
    arguments = (u, process.VPCosine()) if path.parent.name == "density" else (u, u)
    assert make(load(path), path.parent.name)(*arguments).isfinite().all()
