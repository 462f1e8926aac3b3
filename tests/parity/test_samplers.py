"""Whole trajectories against diffusers' schedulers: one small nonlinear network, the same noise, every step compared.

Where the reference has a quirk, the test says which grid reaches it: its DDIM steps wrongly on `linspace` (its issue
12633; Euler, which equals DDIM, is compared there), its DPM-Solver and UniPC space `leading` and `linspace` for one
step more (extra=1) and show the network whole indices on Karras' sigmas.
"""

import pytest
import torch
from torch import nn

from ldm.diffusion import prediction, process, times
from ldm.diffusion.denoiser import Denoiser
from ldm.samplers import ddim, ddpm, dpm_solver, edit, euler, heun, plms, unipc
from ldm.utils.seeding import TorchNoise

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


class Still(Net):
    """The same at all times."""

    def forward(self, x, t):
        return super().forward(x, 0 * t)


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


def ours(sample, grid, x_T, p=SD, f=None, net=None, shown=None, **knobs):
    path = []
    denoiser = Denoiser(net or Net(), shown or p, f or prediction.Eps())
    with torch.no_grad():
        sample(denoiser, p, x_T, grid, callback=lambda step, steps, x, x0: path.append(x.clone()), **knobs)
    return path


def scaled(scheduler, grid, p=SD):
    """The noise of a scheduler that works on x / alpha, in our scale; and alpha along the grid to compare its path."""
    scheduler.set_timesteps(STEPS)
    alphas = [p(t)[0] for t in grid.tolist()]
    return noise() * float(scheduler.init_noise_sigma) * alphas[0], alphas[1:]


def rule(spacing):
    return dict(use_karras_sigmas=True) if spacing == "karras" else dict(timestep_spacing=spacing, steps_offset=1)


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
    scheduler = diffusers.EulerDiscreteScheduler(**TABLE, **rule(spacing))
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
    scheduler = diffusers.HeunDiscreteScheduler(**TABLE, **rule(spacing))
    grid = getattr(times, spacing)(SD, STEPS)
    x_T, alphas = scaled(scheduler, grid)
    expected = theirs(scheduler)
    whole = expected[1::2] + expected[-1:]  # every second evaluation ends a step; the last step has but one
    assert_same_path(ours(heun.sample, grid, x_T), whole, alphas)


MULTISTEP_GRIDS = {
    "leading": times.leading(SD, STEPS, extra=1),
    "trailing": times.trailing(SD, STEPS),
    "linspace": times.linspace(SD, STEPS, rounded=True, extra=1),
    "karras": times.karras(SD, STEPS),
}
every_multistep_grid = pytest.mark.parametrize("spacing", MULTISTEP_GRIDS)


def assert_same_multistep_path(scheduler, sample, spacing, **knobs):
    expected, grid, shown = theirs(scheduler), MULTISTEP_GRIDS[spacing], times.WholeIndices(SD)
    net_times = [shown.net_time(t) for t in grid[:-1].tolist()]
    torch.testing.assert_close(torch.tensor(net_times), scheduler.timesteps.float(), rtol=0, atol=1e-4)
    assert_same_path(ours(sample, grid, noise(), shown=shown, **knobs), expected)


@every_multistep_grid
def test_dpm_solver(spacing):
    scheduler = diffusers.DPMSolverMultistepScheduler(**TABLE, **rule(spacing))
    assert_same_multistep_path(scheduler, dpm_solver.sample, spacing)


@every_multistep_grid
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(spacing, order):
    scheduler = diffusers.UniPCMultistepScheduler(**TABLE, **rule(spacing), solver_order=order)
    assert_same_multistep_path(scheduler, unipc.sample, spacing, order=order)


@pytest.mark.parametrize("final", ["clean", "alpha0"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_plms(spacing, final):
    scheduler = diffusers.PNDMScheduler(
        **TABLE,
        skip_prk_steps=True,
        timestep_spacing=spacing,
        steps_offset=1,
        set_alpha_to_one=final == "clean",
    )
    expected = theirs(scheduler)
    actual = ours(plms.sample, getattr(times, spacing)(SD, STEPS, final=final), noise())
    assert_same_path(actual, expected[1:])  # its first two evaluations are our first step


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


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_unipc(shift):
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, timestep_spacing="linspace"
    )
    expected = theirs(scheduler, Still())  # it shows whole times, and begins at sigma = 1 - 1e-6
    p, sigmas = process.RectifiedFlow(shift), scheduler.sigmas.double()
    grid = p.time(sigmas / (1 - sigmas))
    assert_same_path(ours(unipc.sample, grid, noise(), p, prediction.Flow(), Still()), expected)


# --- inpainting with an ordinary network ---------------------------------------------------------------------------


@pytest.mark.parametrize("strength,eta", [(1.0, 0.0), (0.6, 1.0)])
def test_inpainting(strength, eta):
    """The whole pipeline round a tiny network of its own: noise of one generator per image, the same at every step."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=6,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4,
                                  down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    scheduler = diffusers.DDIMScheduler(**TABLE, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    pipe = diffusers.StableDiffusionInpaintPipeline(
        vae, None, None, unet, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    context, image = torch.randn(2, 3, 6), torch.randn(2, 4, 8, 8)
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., 24:] = 1
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = pipe(
        image=image, mask_image=mask, masked_image_latents=torch.zeros_like(image), height=64, width=64,
        strength=strength, num_inference_steps=STEPS, guidance_scale=1.0, eta=eta, generator=generators,
        prompt_embeds=context, output_type="latent",
    ).images  # fmt: skip

    draw, grid = TorchNoise([3, 4]), times.leading(SD, STEPS, final="alpha0")
    eps = x = draw(image)
    if strength < 1:
        x, grid = edit.noised(SD, image, eps, grid, strength=strength)
    denoiser = Denoiser(lambda x, t: unet(x, t, context).sample, SD, prediction.Eps())
    keep = edit.keeping(SD, image, mask[..., ::8, ::8], grid, lambda like: eps)
    with torch.no_grad():
        actual = ddim.sample(denoiser, SD, x, grid, eta=eta, generator=draw, callback=keep)
    assert ((actual - expected).norm() / expected.norm()).item() <= TOLERANCE
    assert torch.equal(actual[..., :3], image[..., :3])
