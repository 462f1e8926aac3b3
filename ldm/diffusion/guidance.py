"""Guidance makes one denoise(x, t, *, variance=False) -> x0 of a denoiser and its conditions; thresholds wrap it again.

t is a number and x is B C H W. With `variance`, denoise answers (x0, v): v is the conditional one, never guided.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.diffusion.denoiser import Denoiser
from ldm.utils.errors import ConfigError

Denoise = Callable[..., Tensor | tuple[Tensor, Tensor]]


def none(denoiser: Denoiser, cond: dict, null: dict, *, scale: float = 1.0) -> Denoise:
    """The conditional denoiser alone."""
    if scale != 1:
        raise ConfigError(f"guidance.scale={scale} has no effect with guidance=none; use guidance=cfg")

    def denoise(x, t, *, variance=False):
        return denoiser(x, t, variance=variance, **cond)

    return denoise


def cfg(
    denoiser: Denoiser,
    cond: dict,
    null: dict,  # the empty prompt, or a negative one
    *,
    scale: float,
    rescale: float = 0.0,
    interval: Sequence[float] = (0.0, 1.0),
    channels: int | None = None,
) -> Denoise:
    """Classifier-free guidance, x0 = null + scale (cond - null): Eq. (6), arXiv:2207.12598 with scale = w + 1.

    rescale mixes in the output brought back to the conditional one's deviation (§3.4, arXiv:2305.08891); outside
    interval = (low, high), in t, the conditional denoiser runs alone (arXiv:2404.07724), as it does for scale 1.
    Both conditions run as one batch, `cond` first. channels = 3 guides only the first three, the others stay
    conditional: what the published figures of DiT (arXiv:2212.09748) were drawn with, of 4.
    """
    if channels is not None and channels < 1:
        raise ConfigError(f"guidance.channels={channels}: guide at least 1 channel, or all with null")
    low, high = interval
    if scale == 1:
        return none(denoiser, cond, null)
    return _weighted(denoiser, cond, null, lambda t: scale if low <= t <= high else 1.0, rescale, channels)


def cfg_linear(denoiser: Denoiser, cond: dict, null: dict, *, scale: float, rescale: float = 0.0) -> Denoise:
    """`cfg` whose scale rises evenly from 1 in noise to 2 scale - 1 in clean data: `scale` on average over t.

    The schedule that arXiv:2404.13040 finds better than a constant one.
    """
    return _weighted(denoiser, cond, null, lambda t: 1 + 2 * (scale - 1) * (1 - t), rescale)


def cfg_oscillating(
    denoiser: Denoiser,
    cond: dict,
    null: dict,
    *,
    scale: float,
    low: float = 1.0,
    start: float = 0.9,
    rescale: float = 0.0,
) -> Denoise:
    """`cfg` at full scale down to t = start, then at `low` and at `scale` in turns, step by step.

    For high scales, 15 in §2.6.2 of arXiv:2210.02303: less saturated, with the text as present.
    """
    turns: dict[float, int] = {}  # of the times that were asked for; a solver may ask for one twice

    def weight(t):
        return scale if t >= start or turns.setdefault(t, len(turns)) % 2 else low

    return _weighted(denoiser, cond, null, weight, rescale)


def _weighted(
    denoiser: Denoiser,
    cond: dict,
    null: dict,
    weight: Callable[[float], float],  # the scale at time t
    rescale: float,
    channels: int | None = None,
) -> Denoise:
    alone = none(denoiser, cond, null)
    if not cond:  # an unconditional model has nothing to be guided to
        return alone
    both = stack(cond, null)

    def denoise(x, t, *, variance=False):
        scale = weight(t)
        if scale == 1:
            return alone(x, t, variance=variance)
        out = denoiser(torch.cat([x, x]), t, variance=variance, **both)
        x0_cond, x0_null = (out[0] if variance else out).chunk(2)
        x0 = torch.lerp(x0_null, x0_cond, scale)
        if channels is not None:
            x0 = torch.cat([x0[:, :channels], x0_cond[:, channels:]], dim=1)
        if rescale > 0:
            x0 = _rescale(denoiser, x0, x0_cond, x, t, rescale)
        return (x0, out[1].chunk(2)[0]) if variance else x0

    return denoise


def experts(noisy: Denoise, clean: Denoise, *, switch: float) -> Denoise:
    """One denoiser above the time `switch`, another from there down: the ensemble of experts of arXiv:2211.01324.

    They see one trajectory on one grid: nothing is noised again in between (arXiv:2307.01952, §2.5).
    """

    def denoise(x, t, *, variance=False):
        return (noisy if t > switch + 1e-9 else clean)(x, t, variance=variance)

    return denoise


def _rescale(denoiser: Denoiser, x0: Tensor, x0_cond: Tensor, x: Tensor, t: float, amount: float) -> Tensor:
    """§3.4, arXiv:2305.08891, on the network's output F as published: on x0 it would not be the same."""
    c_skip, c_out = denoiser.prediction.coefficients(*denoiser.process(t))
    F, F_cond = (x0 - c_skip * x) / c_out, (x0_cond - c_skip * x) / c_out
    axes = tuple(range(1, x.ndim))
    ratio = F_cond.std(axes, keepdim=True) / F.std(axes, keepdim=True)
    return c_skip * x + c_out * F * (amount * ratio + 1 - amount)


def stack(cond: dict, null: dict) -> dict:
    """Both conditions as one batch; the shorter context is padded, and masked so that padding is never attended to."""
    if cond.keys() != null.keys():
        raise ConfigError(f"guidance needs the same conditions twice, got {sorted(cond)} and {sorted(null)}")
    if "context" in cond and cond["context"].shape[1] != null["context"].shape[1]:
        length = max(cond["context"].shape[1], null["context"].shape[1])
        cond, null = _pad_context(cond, length), _pad_context(null, length)
    return {name: _join(cond[name], null[name]) for name in cond}


def _join(a: Tensor | list[Tensor], b: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return torch.cat([a, b]) if isinstance(a, Tensor) else [torch.cat(pair) for pair in zip(a, b, strict=True)]


def _pad_context(cond: dict, length: int) -> dict:
    context = cond["context"]  # B L D
    mask = cond.get("context_mask", context.new_ones(context.shape[:2], dtype=torch.bool))  # B L
    missing = length - context.shape[1]
    return {**cond, "context": pad(context, (0, 0, 0, missing)), "context_mask": pad(mask, (0, missing), value=False)}


# --- thresholds of x0, §2.3 of arXiv:2205.11487 --------------------------------------------------------------------
# Wrapped around guidance, so it is the guided x0 that is clipped. Samplers know nothing but x0: the eps or the mean of
# their step is that of the clipped one.


def static_threshold(denoise: Denoise, *, limit: float = 1.0) -> Denoise:
    """x0 clipped to [-limit, limit]: 1 for models of pixels."""
    return _on_x0(denoise, lambda x0: x0.clamp(-limit, limit))


def dynamic_threshold(denoise: Denoise, *, percentile: float = 0.995, cap: float | None = None) -> Denoise:
    """Each x0 clipped to its own percentile of |x0| (between 1 and `cap`) and scaled back to [-1, 1]."""

    def threshold(x0):
        limit = torch.quantile(x0.float().abs().flatten(1), percentile, dim=1).clamp(min=1, max=cap)
        limit = limit.to(x0.dtype).view(-1, *[1] * (x0.ndim - 1))
        return torch.minimum(torch.maximum(x0, -limit), limit) / limit

    return _on_x0(denoise, threshold)


def _on_x0(denoise: Denoise, change: Callable[[Tensor], Tensor]) -> Denoise:
    def changed(x, t, *, variance=False):
        if not variance:
            return change(denoise(x, t))
        x0, v = denoise(x, t, variance=True)
        return change(x0), v

    return changed
