"""AdamW, gradient clipping and the weight average: what follows the backward pass, on the tensors of a UNet.

Peers: torch's fused AdamW with DiT's loop over the average, which is the best that others run, and what diffusers'
training scripts do by default: AdamW as it comes, `clip_grad_norm_`, `EMAModel`. Floor: 40 bytes a parameter.
"""

import copy
from collections.abc import Callable

import torch
from diffusers.training_utils import EMAModel
from harness import arguments, assert_equal, interleave
from torch import nn

from ldm.models.unet import UNet
from ldm.training.ema import EMA
from ldm.training.optim import adamw, clip_and_step

DECAY, CLIP = 0.9999, 1.0
WIDTH_128 = {"channels": 128, "channel_mult": (1, 2, 4, 4), "depth": (1, 1, 1, 0, 1), "context_dim": 512}  # as SD 1.5


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
    small = {"channels": 32, "channel_mult": (1, 2), "depth": (0, 1, 1), "head_dim": 32}
    first = UNet(4, **(small if args.small else WIDTH_128))
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
