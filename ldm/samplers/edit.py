"""Changing a given image with any sampler: SDEdit, inpainting with an ordinary model, and DDIM inversion.

`sample` is a sampler, `sample(denoise, process, x, times, *, generator, callback)`; images are latents B C H W.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.samplers.common import intervals, move
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import Noise, randn_like

Callback = Callable[[int, int, Tensor, Tensor], None]

# How many grid steps above the first denoised one each reference program noises the image to.
STARTS = {"diffusers": 0, "compvis": 1}


def image_to_image(
    sample: Callable[..., Tensor],
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    image: Tensor,
    times: Tensor,
    *,
    strength: float = 0.75,
    start: str = "diffusers",
    generator: torch.Generator | Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Noise an image part of the way and sample it back: SDEdit, arXiv:2108.01073.

    The last int(strength * steps) steps of the grid are kept. start: "diffusers" noises to the first kept time,
    "compvis" to the time above it, where strength 1 has no time left. strength 0 returns the image.
    """
    if not 0 <= strength <= 1:
        raise ConfigError(f"strength={strength} must lie between 0 (the image itself) and 1 (all steps)")
    if start not in STARTS:
        raise ConfigError(f"start={start} is not known; use one of {', '.join(STARTS)}")
    steps = len(intervals(times))
    kept = int(strength * steps)
    if strength == 0:
        return image.clone()
    if kept == 0:
        raise ConfigError(f"strength={strength} of {steps} steps is less than one step; raise either")
    noised_at = steps - kept - STARTS[start]
    if noised_at < 0:
        raise ConfigError(f"strength={strength} with start={start} begins above the grid; lower the strength")
    alpha, sigma = process(times[noised_at].item())
    x = torch.add(alpha * image, randn_like(image, generator), alpha=sigma)
    return sample(denoise, process, x, times[steps - kept :], generator=generator, callback=callback)


def inpaint(
    sample: Callable[..., Tensor],
    denoise: Callable[[Tensor, float], Tensor],
    process: Process,
    x_T: Tensor,
    times: Tensor,
    *,
    image: Tensor,
    mask: Tensor,
    generator: torch.Generator | Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Repaint where mask = 1 (B 1 H W) and keep `image` where it is 0, with a model that knows nothing of masks.

    After each step the kept part becomes `image` with fresh noise of that time, as in latent diffusion's own script
    (arXiv:2112.10752); in the result it is `image` exactly.
    """
    moments = times.tolist()

    def keep_known(step: int, steps: int, x: Tensor, x0: Tensor) -> None:
        alpha, sigma = process(moments[step + 1])
        known = torch.add(alpha * image, randn_like(image, generator), alpha=sigma) if sigma > 0 else image
        x.copy_(mask * x + (1 - mask) * known)
        if callback is not None:
            callback(step, steps, x, x0)

    x = sample(denoise, process, x_T, times, generator=generator, callback=keep_known)
    return mask * x + (1 - mask) * image  # a grid may end above t = 0


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
