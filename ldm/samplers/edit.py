"""Changing a given image with any sampler: SDEdit, inpainting with an ordinary model, and DDIM inversion.

    x, times = noised(process, image, eps, times, strength=0.6)
    sample(denoise, process, x, times, callback=keeping(process, image, mask, times, noise))

Images are latents B C H W.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import intervals, move
from ldm.utils.errors import ConfigError

Callback = Callable[[int, int, Tensor, Tensor], None]

# How the reference programs count: by how many points more than steps the strength is multiplied, and how many grid
# steps above the first one taken the image is noised to.
STARTS = {"diffusers": (0, 0), "compvis": (0, 1), "sgm": (1, 0), "pndm": (-1, 0)}


def noised(
    process: Process, image: Tensor, eps: Tensor, times: Tensor, *, strength: float = 0.75, start: str = "diffusers"
) -> tuple[Tensor, Tensor]:
    """(x, times): an image noised part of the way, and the rest of the grid, which samples it back (arXiv:2108.01073).

    The last int(strength * steps) steps of the grid are kept. start: "diffusers" noises to the first kept time,
    "compvis" to the time above it, where strength 1 has no time left; "sgm" takes a share of the points, not the steps;
    "pndm" does not count the time that stands twice.
    """
    if not 0 < strength <= 1:
        raise ConfigError(f"strength={strength} must lie above 0 (the image itself), up to 1 (all steps)")
    if start not in STARTS:
        raise ConfigError(f"start={start} is not known; use one of {', '.join(STARTS)}")
    steps, (points, above) = len(intervals(times)), STARTS[start]
    kept = int(strength * (steps + points)) - points
    if kept < 1:
        raise ConfigError(f"strength={strength} of {steps} steps is less than one step; raise either")
    noised_at = steps - kept - above
    if noised_at < 0:
        raise ConfigError(f"strength={strength} with start={start} begins above the grid; lower the strength")
    alpha, sigma = process(times[noised_at].item())
    return torch.add(alpha * image, eps, alpha=sigma), times[steps - kept :]


def keeping(
    process: Process,
    image: Tensor,
    mask: Tensor,
    times: Tensor,
    noise: Callable[[Tensor], Tensor],
    callback: Callback | None = None,
) -> Callback:
    """A sampler's callback: repaint where mask = 1 (B 1 H W), keep `image` where it is 0, with any model.

    After each step on the grid `times` the kept part becomes `image` with noise of that time, and at the end `image`
    itself. noise(like): fresh noise each time, as in latent diffusion's own script (arXiv:2112.10752), or the first.
    """
    moments = times.tolist()

    def keep(step: int, steps: int, x: Tensor, x0: Tensor) -> None:
        known = image
        if step + 1 < steps:
            alpha, sigma = process(moments[step + 1])
            known = torch.add(alpha * image, noise(x), alpha=sigma)
        x.copy_(torch.lerp(known, x, mask))
        if callback is not None:
            callback(step, steps, x, x0)

    return keep


def invert(
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    image: Tensor,
    times: Tensor,
    *,
    callback: Callback | None = None,
) -> Tensor:
    """The x at times[0] from which DDIM makes `image`: Eq. (12) of arXiv:2010.02502 upwards, eps at the lower time.

    Clean data at t = 0 shows no noise, so there the eps is that of the next time. First-order: the round trip
    is as exact as the steps are small, and less so with guidance.
    """
    x, steps = image, intervals(times.flip(0))
    for step, (s, t) in enumerate(steps):
        if process(s)[1] > 0:
            x0 = denoise(x, s)
            x = move(x, x0, process(s), process(t))
        else:
            alpha, sigma = process(t)
            x0, predicted = x, denoise(x, t)
            eps = torch.sub(x, predicted, alpha=alpha) / sigma
            x = torch.add(alpha * x0, eps, alpha=sigma)
        if callback is not None:
            callback(step, len(steps), x, x0)
    return x
