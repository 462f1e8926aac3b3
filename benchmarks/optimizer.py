"""AdamW, gradient clipping and the weight average, one training step on 127.5M floats of a UNet's shapes.

Peers: torch's fused AdamW with DiT's loop over the average, which is the best that others run, and what diffusers'
training scripts do by default: AdamW as it comes, `clip_grad_norm_`, `EMAModel`. Floor: 40 bytes a parameter.
"""

import copy
from collections.abc import Callable

import torch
from diffusers.training_utils import EMAModel
from harness import arguments, assert_equal, interleave
from torch import nn

from ldm.training.ema import EMA
from ldm.training.optim import adamw, clip_and_step

DECAY, CLIP = 0.9999, 1.0


def parameters(blocks: int, width: int = 320) -> nn.Module:
    """Kernels, matrices and vectors in about the proportion of a UNet: 4.25M floats in 12 tensors a block."""
    layers = []
    for _ in range(blocks):
        layers += [nn.Conv2d(width, width, 3), nn.Conv2d(width, width, 3), nn.GroupNorm(32, width)]
        layers += [nn.Linear(width, 3 * width), nn.Linear(width, 8 * width), nn.Linear(4 * width, width)]
    return nn.Sequential(*layers)


def our_step(module: nn.Module) -> Callable[[], None]:
    optimizer, ema = adamw(module, weight_decay=0.0), EMA(module, decay=DECAY, warmup=False)
    scaler, failed = torch.amp.GradScaler("cpu", enabled=False), torch.tensor(False)

    def step() -> None:
        clip_and_step(optimizer, scaler, CLIP, failed)
        ema.update(1)

    return step


def fused_step(module: nn.Module) -> Callable[[], None]:
    """The best that others run: torch's fused AdamW and the loop over the average of DiT's train.py."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    average = dict(copy.deepcopy(module).requires_grad_(False).named_parameters())

    def step() -> None:
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        for name, p in module.named_parameters():
            average[name].mul_(DECAY).add_(p.data, alpha=1 - DECAY)

    return step


def default_step(module: nn.Module) -> Callable[[], None]:
    """What diffusers' training scripts do unless told otherwise."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.0)
    average = EMAModel(module.parameters(), decay=DECAY)

    def step() -> None:
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        average.step(module.parameters())

    return step


def main() -> None:
    args = arguments(__doc__)
    torch.manual_seed(0)
    first = parameters(*((2, 32) if args.small else (38,)))
    modules = {"ldm": first, "fused + loop": copy.deepcopy(first), "default + EMAModel": copy.deepcopy(first)}
    gradients = [torch.randn_like(p) for p in first.parameters()]
    for module in modules.values():
        for p, gradient in zip(module.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
    steps = [our_step, fused_step, default_step]
    cases = {name: make(modules[name]) for name, make in zip(modules, steps, strict=True)}
    timed = interleave(cases, rounds=2 if args.small else args.rounds or 11)
    ours, peer = (torch.cat([p.detach().flatten() for p in modules[name].parameters()]) for name in list(modules)[:2])
    facts = {"floats": ours.numel(), "error": assert_equal(ours, peer, tol=1e-5)}
    timed.report("optimizer", "ldm", ["fused + loop"], target=0.90, **facts)
    timed.report("optimizer", "ldm", ["default + EMAModel"], target=0.30, **facts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
