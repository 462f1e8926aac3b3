"""The optimizer, its step, and learning rates as pure functions of the step."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ldm.utils.errors import ConfigError


def adamw(
    module: nn.Module,
    lr: float = 1e-4,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) of the trainable parameters; only matrices and kernels named `weight` decay.

    Norms, biases, embedding tables and free parameters (positions, tokens) do not. Fused is 5x the loop on a CPU.
    """
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decayed, kept = [], []
    for name, p in module.named_parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and name.endswith("weight") and id(p) not in tables
            (decayed if decays else kept).append(p)
    if not decayed and not kept:
        raise ConfigError("there is nothing to train: every parameter of the objective is frozen")
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=fused)


def constant(step: int, total: int, *, warmup: int = 0) -> float:
    """What the learning rate is multiplied by at a step (first = 1): a linear rise over `warmup` steps, then 1."""
    return min(1.0, step / warmup) if warmup else 1.0


def cosine(step: int, total: int, *, warmup: int = 0, final: float = 0.0) -> float:
    """As `constant`, then half a cosine down to `final` at step `total` (arXiv:1608.03983, Eq. 5, one cycle)."""
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> float:
    """Set every group to its own base rate times the multiplier; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * multiplier
    return optimizer.param_groups[0]["lr"]


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip_norm: float,  # 0 = do not clip
    failed: Tensor,  # 0-d bool: the loss was not finite
) -> tuple[Tensor, Tensor]:
    """One step on gradients clipped to a total norm; when that norm or the loss is not finite, nothing moves.

    Returns (norm, skipped), 0-d. A fused optimizer decides this on the device, with the clip folded into its one pass
    over memory, so that the host never waits.
    """
    scaler.unscale_(optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm(grads)
    skipped = failed | ~norm.isfinite()
    if optimizer.defaults.get("fused") and not scaler.is_enabled():
        # The two attributes by which GradScaler itself talks to fused optimizers: gradients are divided by the first.
        optimizer.grad_scale = (norm / clip_norm).clamp(min=1.0) if clip_norm else None
        optimizer.found_inf = skipped.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        return norm, skipped
    if clip_norm:
        clip_grads_with_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm, norm)
    if scaler.is_enabled() or not skipped:
        scaler.step(optimizer)
    scaler.update()
    return norm, skipped
