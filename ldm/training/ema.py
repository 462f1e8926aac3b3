"""Exponential moving average of weights, kept beside them and never swapped into them."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.utils.errors import CheckpointError, ConfigError


def canonical(name: str) -> str:
    """A parameter's name without what DistributedDataParallel and torch.compile put into it."""
    return name.removeprefix("module.").replace("_orig_mod.", "")


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {canonical(name): p for name, p in module.named_parameters() if p.requires_grad}


class EMA:
    """Average of the trainable parameters: average <- d * average + (1 - d) * weights after every step.

    d = decay, or 0.5 ** (batch_size / half_life_images), which stays meaningful when the batch size changes
    (arXiv:2206.00364, appendix F.2). With `warmup`, d = min(d, (1 + n) / (10 + n)) at step n. With `every` = k the
    average moves only on steps divisible by k, by d^k.  d is a function of the step: there is no counter to lose.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        decay: float = 0.9999,
        half_life_images: float | None = None,
        batch_size: int = 1,  # images per step, for half_life_images
        warmup: bool = True,
        every: int = 1,
    ):
        if not 0 <= decay < 1 or every < 1 or (half_life_images is not None and half_life_images <= 0):
            raise ConfigError(
                f"ema.decay={decay} must be in [0, 1), ema.every={every} at least 1, "
                f"ema.half_life_images={half_life_images} positive"
            )
        self.decay = 0.5 ** (batch_size / half_life_images) if half_life_images else decay
        self.warmup, self.every = warmup, every
        self._weights = trainable(module)
        # In float32: the average of bfloat16 weights would stop moving once 1 - d is below their precision.
        self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in self._weights.items()}

    def decay_at(self, step: int) -> float:
        """d of one step (first step = 1), before the power for `every`."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights that optimizer step `step` (from 1) has left."""
        if step % self.every == 0 and self._average:
            weights = [p.detach().float() for p in self._weights.values()]
            torch._foreach_lerp_(list(self._average.values()), weights, 1 - self.decay_at(step) ** self.every)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError unless the names are exactly those of the trainable parameters."""
        if differing := sorted(tensors.keys() ^ self._average.keys()):
            raise CheckpointError(f"the averaged weights differ from the trained ones in {', '.join(differing[:3])}")
        for name, average in self._average.items():
            average.copy_(tensors[name])

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the weights of another module of the same shape with the average."""
        for name, p in trainable(module).items():
            p.copy_(self._average[name])

    def applied(self, module: nn.Module) -> nn.Module:
        """A second `module` in eval mode that holds the average; the first one is not touched.

        It shares memory with the average (trainable parameters) and with `module` (frozen ones): look, do not train.
        """
        averaged = {id(self._weights[name]): average for name, average in self._average.items()}
        shared = {
            id(p): nn.Parameter(averaged.get(id(p), p.detach()).to(p.dtype), requires_grad=False)
            for p in module.parameters()
        }
        return copy.deepcopy(module, shared).eval()
