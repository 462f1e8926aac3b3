"""Samplers against closed forms, published numbers and one another: no network, no reference library."""

import math

import pytest
import torch

from ldm.build import make
from ldm.diffusion import process, times
from ldm.diffusion.denoiser import GaussianDenoiser
from ldm.samplers import ddim, ddpm, dpm_solver, edit, euler, heun, plms, unipc
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import Noise
from tests.group_files import group, load
from tests.test_process import PROCESSES

SAMPLERS = {path.stem: load(path) for path in group("sampler")}
DETERMINISTIC = {"ddim": (ddim, 1), "euler": (euler, 1), "heun": (heun, 2), "dpm_solver": (dpm_solver, 2),
                 "plms": (plms, 2)}  # 2 where steps grow evenly: its weights are those of equal ones
every_process = pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
SD = process.scaled_linear()


def one():
    return torch.ones(1, 1, 1, 1, dtype=torch.float64)


def images(n=3, size=4):
    return torch.randn(n, 2, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def with_variance(denoise, v=0.3):
    """The same denoiser, answering for a learned variance too."""

    def both(x, t, *, variance=False):
        x0 = denoise(x, t)
        return (x0, torch.full_like(x0, v)) if variance else x0

    return both


def path_of(sample, *arguments, **knobs):
    path = []
    sample(*arguments, callback=lambda step, steps, x, x0: path.append(x.clone()), **knobs)
    return path


def consistent(judge):
    """The whole way to clean data at once: what a consistency model learns of a denoiser."""
    return lambda x, t: judge.solve(x, t, 0.0)


def run(name, p, x_T, grid, **knobs):
    judge = GaussianDenoiser(p)
    sample = make(SAMPLERS[name], "sampler")
    return sample(consistent(judge) if name == "lcm" else with_variance(judge), p, x_T, grid, **knobs)


# --- order of convergence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("p", [SD, PROCESSES["vp_cosine"], PROCESSES["flow_shift"], PROCESSES["edm"]],
                         ids=lambda p: type(p).__name__)
def test_order_of_convergence_on_the_gaussian(p, name):
    sampler, order = DETERMINISTIC[name]
    judge, errors = GaussianDenoiser(p, mean=0.2, std=0.5), []
    for steps in (64, 128, 256):
        grid = times.logsnr(p, steps, sigma_min=0.03, sigma_max=14.0)[:-1]
        start, end = grid[0].item(), grid[-1].item()
        x = one() * p(start)[1]
        errors.append((sampler.sample(judge, p, x, grid) - judge.solve(x, start, end)).abs().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("p", [SD, PROCESSES["flow_shift"]], ids=lambda p: type(p).__name__)
def test_unipc_is_one_order_better_than_its_predictor(p, order):
    """§3 of arXiv:2302.04867; seen before the last steps, in which the order falls back to first."""
    judge, errors = GaussianDenoiser(p, mean=0.2, std=0.5), []
    for steps in (64, 128, 256):
        grid = times.logsnr(p, steps, sigma_min=0.03, sigma_max=14.0)[:-1]
        x, start, end = one() * p(grid[0].item())[1], grid[0].item(), grid[-order].item()
        path = path_of(unipc.sample, judge, p, x, grid, order=order)
        errors.append((path[-order] - judge.solve(x, start, end)).abs().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order + 1, abs=0.1)


def test_plms_evaluates_once_more_than_it_steps():
    shown, judge = [], GaussianDenoiser(SD)
    plms.sample(lambda x, t: shown.append(round(1000 * t - 1)) or judge(x, t), SD, images(), times.leading(SD, 50))
    assert shown == [981, 961, 961, *range(941, 0, -20)] and len(shown) == 51


def test_unipc_is_written_for_three_orders():
    with pytest.raises(ConfigError, match="order=4"):
        unipc.sample(GaussianDenoiser(SD), SD, images(), times.trailing(SD, 5), order=4)


# --- golden values: data N(0, 1/4), ten steps, unit noise unless it is scaled to the grid's first sigma --------------

LINSPACE_2M = torch.cat([(torch.linspace(999, 0, 11, dtype=torch.float64).round()[:-1] + 1) / 1000, torch.zeros(1)])
GOLDEN = {
    "DDIM leading, final alpha_0": (ddim.sample, times.leading(SD, 10, final="alpha0"), False, 0.406577),
    "DDIM leading, final 1": (ddim.sample, times.leading(SD, 10), False, 0.404799),
    "Euler leading": (euler.sample, times.leading(SD, 10), False, 0.404799),
    "DDIM trailing": (ddim.sample, times.trailing(SD, 10), False, 0.385286),
    "Euler trailing": (euler.sample, times.trailing(SD, 10), True, 0.384387),
    "Euler linspace": (euler.sample, times.linspace(SD, 10), True, 0.388806),
    "Heun linspace": (heun.sample, times.linspace(SD, 10), True, 0.522149),
    "DPM++2M linspace": (dpm_solver.sample, LINSPACE_2M, False, 0.409739),
    "DPM++2M Karras": (dpm_solver.sample, times.karras(SD, 10), True, 0.525462),
    "Euler Karras": (euler.sample, times.karras(SD, 10), True, 0.414270),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    sample, grid, scaled, expected = GOLDEN[name]
    x_T = one() * (SD(grid[0].item())[1] if scaled else 1)
    assert sample(GaussianDenoiser(SD), SD, x_T, grid).item() == pytest.approx(expected, abs=1.5e-6)


def test_golden_value_of_karras_with_the_network_at_whole_indices():
    """diffusers steps along the Karras sigmas but shows the network the nearest index."""

    def denoise(x, t):
        alpha_bar = SD.alpha_bars[round(1000 * t) - 1].item()
        eps = x * math.sqrt(1 - alpha_bar) / (alpha_bar / 4 + 1 - alpha_bar)
        alpha, sigma = SD(t)
        return (x - sigma * eps) / alpha

    x = dpm_solver.sample(denoise, SD, one(), times.karras(SD, 10))
    assert x.item() == pytest.approx(0.526303, abs=1.5e-6)


def test_exact_answer():
    assert GaussianDenoiser(SD).solve(one(), 1.0, 0.0).item() == pytest.approx(0.500876, abs=1e-6)


# --- identities between samplers -----------------------------------------------------------------------------------


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@every_process
def test_identities(p):
    judge, x, grid = GaussianDenoiser(p), images(), times.trailing(p, 12)

    def noise():
        return Noise([5, 6, 7])

    stochastic = ddim.sample(judge, p, x, grid, eta=1.0, generator=noise())
    same(stochastic, ddpm.sample(judge, p, x, grid, generator=noise()))
    same(stochastic, euler.sample_ancestral(judge, p, x, grid, generator=noise()))
    same(ddim.sample(judge, p, x, grid), euler.sample(judge, p, x, grid))
    same(ddim.sample(judge, p, x, grid, eta=0.3, generator=noise()),
         euler.sample_ancestral(judge, p, x, grid, eta=0.3, generator=noise()))
    first = grid[:2]
    for multistep in (dpm_solver, plms, unipc):
        same(ddim.sample(judge, p, x, first), multistep.sample(judge, p, x, first))


def test_learned_variance_lies_between_the_fixed_ones():
    judge, x, grid = GaussianDenoiser(SD), images(), times.respaced(SD, 20)
    for v, fixed in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        learned = ddpm.sample(with_variance(judge, v), SD, x, grid, variance="learned", generator=Noise([1, 2, 3]))
        same(learned, ddpm.sample(judge, SD, x, grid, variance=fixed, generator=Noise([1, 2, 3])))
    now, then = SD(0.5), SD(0.45)
    log_small, log_large = 2 * math.log(ddpm.posterior_std(now, then)), 2 * math.log(ddpm.beta_std(now, then))
    _, std = ddpm.PREDICTORS["learned"](with_variance(judge, 0.4), x, 0.5, now, then)
    assert (2 * std.log()).max().item() == pytest.approx(0.7 * log_large + 0.3 * log_small)
    with pytest.raises(ConfigError, match="fixed_large"):
        ddpm.sample(judge, SD, x, grid, variance="fixed_huge")


def test_a_respaced_grid_is_a_respaced_process():
    q, x = process.respaced(SD, 25), images()
    a = ddpm.sample(GaussianDenoiser(SD), SD, x, times.respaced(SD, 25), generator=Noise([1, 2, 3]))
    b = ddpm.sample(GaussianDenoiser(q), q, x, times.trailing(q, 25), generator=Noise([1, 2, 3]))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_flow_euler_is_the_plain_step_along_the_velocity():
    p, x, grid = process.RectifiedFlow(3.0), images(), times.trailing(process.RectifiedFlow(3.0), 9)
    judge, expected = GaussianDenoiser(p), images()
    for t, s in zip(grid.tolist(), grid.tolist()[1:], strict=False):
        velocity = (expected - judge(expected, t)) / p(t)[1]
        expected = expected + (p(s)[1] - p(t)[1]) * velocity
    same(euler.sample(judge, p, x, grid), expected)


# --- every sampler of configs/sampler ------------------------------------------------------------------------------


@every_sampler
@every_process
def test_every_sampler_reaches_the_data_on_every_process(name, p):
    """From noise to N(0, 1/4): also from where there is no signal at all."""
    grid = torch.cat([torch.ones(1), times.karras(p, 60, sigma_max=14.0)])
    x = run(name, p, images(8, size=16) * p(1.0)[1], grid, generator=Noise(range(8)))
    assert x.mean().abs() < 0.06 and x.std().item() == pytest.approx(0.5, rel=0.15)


@every_sampler
def test_image_k_of_a_batch_is_the_image_alone(name):
    grid, x_T = times.trailing(SD, 8), images()
    whole = run(name, SD, x_T, grid, generator=Noise([11, 12, 13]))
    for k in range(3):
        alone = run(name, SD, x_T[k : k + 1], grid, generator=Noise([11 + k]))
        torch.testing.assert_close(alone, whole[k : k + 1], rtol=1e-12, atol=1e-12)
    again = run(name, SD, x_T, grid, generator=Noise([11, 12, 13]))
    assert torch.equal(whole, again) and torch.equal(x_T, images())  # the input is left as it was


@every_sampler
def test_the_callback_sees_and_may_change_every_step(name):
    seen = []

    def callback(step, steps, x, x0):
        seen.append((step, steps))
        assert x0.shape == x.shape
        x.zero_()

    x = run(name, SD, images(), times.trailing(SD, 5), generator=Noise([1, 2, 3]), callback=callback)
    assert seen == [(k, 5) for k in range(5)] and x.abs().max() == 0


@every_sampler
def test_zero_steps_are_refused(name):
    with pytest.raises(ConfigError, match="0 steps"):
        run(name, SD, images(), torch.zeros(1, dtype=torch.float64))


@every_sampler
def test_float32_stays_float32_and_one_step_is_the_denoiser(name):
    x_T, grid = images().float(), times.trailing(SD, 1)
    x = run(name, SD, x_T, grid, generator=Noise([1, 2, 3]))
    assert x.dtype == torch.float32
    if name == "lcm":
        torch.testing.assert_close(x, GaussianDenoiser(SD).solve(x_T, 1.0, 0.0))
    elif name not in ("heun_churn", "sde"):  # which add noise before they ask, or subtract it after
        torch.testing.assert_close(x, GaussianDenoiser(SD)(x_T, 1.0))


def test_churn_raises_the_noise_and_keeps_within_the_process():
    p, x = PROCESSES["edm"], images(4, size=32)
    raised, t_hat = heun._add_noise(p(0.5)[1] * x, p, 0.5, 0.4, 1.0, torch.Generator().manual_seed(1))
    assert p.ratio(t_hat) == pytest.approx(1.4 * p.ratio(0.5))
    assert raised.std().item() == pytest.approx(1.4 * p.ratio(0.5), rel=0.05)
    assert heun._add_noise(x, p, 1.0, 0.4, 1.0, torch.Generator())[1] == 1.0


# --- editing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start,cases", {
    "diffusers": [(0.5, 5, 5), (0.75, 3, 7), (1.0, 0, 10)],
    "compvis": [(0.5, 4, 5), (0.9, 0, 9)],
    "sgm": [(0.5, 6, 4), (0.75, 3, 7), (1.0, 0, 10)],
}.items())  # fmt: skip
def test_image_to_image_starts_where_the_reference_programs_do(start, cases):
    grid, eps = times.leading(SD, 10), Noise([1, 2, 3])(images())
    for strength, noised_at, kept in cases:
        x, found = edit.noised(SD, images(), eps, grid, strength=strength, start=start)
        alpha, sigma = SD(grid[noised_at].item())
        torch.testing.assert_close(x, alpha * images() + sigma * eps)
        assert torch.equal(found, grid[10 - kept :])


def test_limits_of_strength():
    grid, eps, judge = times.trailing(SD, 10), Noise([1, 2, 3])(images()), GaussianDenoiser(SD)
    with pytest.raises(ConfigError, match="less than one step"):
        edit.noised(SD, images(), eps, grid, strength=0.05)
    starts = [edit.noised(SD, images(), eps, grid, strength=strength) for strength in (0.2, 0.6, 1.0)]
    distances = [(ddim.sample(judge, SD, *start) - images()).norm().item() for start in starts]
    assert distances == sorted(distances)
    for bad in (dict(strength=0.0), dict(strength=1.5), dict(strength=1.0, start="compvis"), dict(start="other")):
        with pytest.raises(ConfigError):
            edit.noised(SD, images(), eps, grid, **bad)


@every_sampler
@pytest.mark.parametrize("final", ["clean", "alpha0"])
def test_inpainting_keeps_the_known_region_exactly(name, final):
    image, mask = images(), torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    mask[..., 2:] = 1
    grid = times.trailing(SD, 6, final=final)
    keep = edit.keeping(SD, image, mask, grid, Noise([4, 5, 6]))
    x = run(name, SD, images().flip(0), grid, generator=Noise([1, 2, 3]), callback=keep)
    assert torch.equal(x[..., :2], image[..., :2]) and x.isfinite().all()
    assert not torch.equal(x[..., 2:], image[..., 2:])


def test_inpainting_completes_what_it_is_shown():
    """Two equal pixels, one shown: the other follows."""

    def denoise(x, t):  # data (z, z), z ~ N(0, 1): the exact posterior mean
        alpha, sigma = SD(t)
        both = x.sum(-1, keepdim=True)
        return (alpha * both / (2 * alpha**2 + sigma**2)).expand_as(x)

    image = torch.full((1, 1, 1, 2), 0.8, dtype=torch.float64)
    mask = torch.tensor([0.0, 1.0]).double().view(1, 1, 1, 2)
    grid = times.trailing(SD, 500)
    keep = edit.keeping(SD, image, mask, grid, Noise([1], "known"))
    x = ddpm.sample(denoise, SD, torch.zeros_like(image) - 1, grid, generator=Noise([1]), callback=keep)
    assert x[..., 1].item() == pytest.approx(0.8, abs=0.1)


@every_process
def test_inversion_is_undone_by_ddim(p):
    judge, image = GaussianDenoiser(p, std=0.5), 0.5 * images()
    errors = []
    for steps in (100, 200):
        grid = times.logsnr(p, steps, sigma_min=0.01, sigma_max=10.0)
        x_T = edit.invert(judge, p, image, grid)
        errors.append((ddim.sample(judge, p, x_T, grid) - image).abs().max().item())
        exact = judge.solve(image, 0.0, grid[0].item())
        assert (x_T - exact).abs().max() < 0.06 * exact.abs().max()
    assert errors[1] < 0.06 and errors[1] < 0.65 * errors[0]
