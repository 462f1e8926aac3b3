"""What a sampler costs round a network that costs nothing: 50 steps of ours against diffusers' `scheduler.step`.

Both sides lay out the same 50 times of Stable Diffusion's table, start from the same noise and are handed the same
predicted noise, so that whatever is measured is the sampler's. The images must agree before anything is timed.
"""

from collections.abc import Callable

import diffusers
import torch
from harness import arguments, assert_equal, interleave
from torch import Tensor, nn

from ldm.diffusion import process, times
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Eps
from ldm.samplers import ddim, dpm_solver, euler, unipc

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CASES = {  # name: diffusers' scheduler, our sampler, our grid of the same times, target
    "ddim": (
        diffusers.DDIMScheduler(**SD, clip_sample=False, steps_offset=1),
        ddim.sample,
        times.leading,
        0.25,
    ),
    "euler": (
        diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1),
        euler.sample,
        times.leading,
        0.25,
    ),
    "dpm++2m": (
        diffusers.DPMSolverMultistepScheduler(**SD, timestep_spacing="trailing"),
        dpm_solver.sample,
        times.trailing,
        0.30,
    ),
    "unipc": (
        diffusers.UniPCMultistepScheduler(**SD, timestep_spacing="trailing"),
        unipc.sample,
        times.trailing,
        0.12,
    ),
}


class Free(nn.Module):
    """A network that answers with a tensor it has ready."""

    def __init__(self, eps: Tensor):
        super().__init__()
        self.eps = eps

    def forward(self, x, t):
        return self.eps


def peer_loop(scheduler, eps: Tensor, noise: Tensor, steps: int) -> Callable[[], Tensor]:
    """diffusers as its pipelines drive it; the times of a batch are spread as its UNet does."""
    net = Free(eps)

    def loop() -> Tensor:
        scheduler.set_timesteps(steps)
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            F = net(scheduler.scale_model_input(x, t), t.expand(x.shape[0]))
            x = scheduler.step(F, t, x, return_dict=False)[0]
        return x

    return loop


def our_loop(sample, grid, eps: Tensor, noise: Tensor, steps: int) -> Callable[[], Tensor]:
    sd = process.scaled_linear()
    denoiser = Denoiser(Free(eps), sd, Eps())
    return lambda: sample(denoiser, sd, noise, grid(sd, steps))


def repeat(loop: Callable[[], Tensor], images: int) -> Callable[[], None]:
    def sample_images() -> None:
        for _ in range(images):
            loop()

    return sample_images


def main() -> None:
    args = arguments(__doc__)
    steps, images, rounds = (5, 1, 2) if args.small else (50, 10, args.rounds or 21)
    eps, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, (scheduler, sample, grid, target) in CASES.items():
        if args.only in name:
            ours, peer = our_loop(sample, grid, eps, noise, steps), peer_loop(scheduler, eps, noise, steps)
            error = assert_equal(ours(), peer(), tol=1e-4)
            cases = {"ldm": repeat(ours, images), "diffusers": repeat(peer, images)}
            timed = interleave(cases, rounds=rounds)
            timed.report(f"sampling_loop/{name}", "ldm", ["diffusers"], target=target, images=images, error=error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        main()
