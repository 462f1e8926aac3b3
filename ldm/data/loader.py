"""Batches as a pure function of (dataset, seed, step): any number of workers or ranks, any starting point, same images.

Position p is the p-th image drawn in the whole run. Epoch e = p // n shuffles the n items by keys of (seed, e), and
epochs flow into each other, so nothing is dropped and there is no state to save: to resume is to start at that step.
"""

import functools
import itertools
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.transforms import flip as flip_images
from ldm.utils.errors import ConfigError, DataError, LdmError
from ldm.utils.seeding import keys

TIMEOUT = 300  # seconds without a batch after which a worker counts as hung


def batches(
    dataset: Dataset,
    batch_size: int,  # images per step over all ranks together
    *,
    seed: int,
    start_step: int = 0,
    workers: int = 0,  # processes that decode; 0 for datasets held in memory
    rank: int = 0,
    world_size: int = 1,
    flip: bool = False,  # mirror half of the images
) -> Iterator[dict[str, Any]]:
    """This rank's share of every batch from start_step on, without end; adds "position" (B,) and "step" to each."""
    if len(dataset) == 0:
        raise DataError("the dataset is empty: there is nothing to make batches of")
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(f"batch_size={batch_size} must be a positive multiple of the number of ranks, {world_size}")
    if workers < 0:
        raise ConfigError(f"workers={workers} must be 0 (read in this process) or more")
    steps = _Steps(dataset, batch_size, seed, rank, world_size, flip)
    if workers == 0:
        return map(steps.batch, itertools.count(start_step))
    return _from_workers(steps, start_step, workers)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items as one batch: images and labels stacked, captions in a list."""
    batch = {name: [item[name] for item in items] for name in items[0]}
    batch["image"] = torch.stack(batch["image"])  # B 3 H W
    if "label" in batch:
        batch["label"] = torch.tensor(batch["label"])  # B
    return batch


class _Steps:
    """The batch of a step, as an indexable object that can be sent to a worker."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, rank: int, world_size: int, flip: bool):
        self.dataset, self.seed, self.flip = dataset, seed, flip
        self.batch_size, self.share = batch_size, batch_size // world_size
        self.offset = rank * self.share

    def batch(self, step: int) -> dict[str, Any]:
        start = step * self.batch_size + self.offset
        positions = torch.arange(start, start + self.share)  # B
        batch = collate([self.dataset[item] for item in self.items(positions)])
        if self.flip:
            batch["image"] = flip_images(batch["image"], keys(self.seed, "flip", positions))
        return {**batch, "position": positions, "step": step}

    def items(self, positions: Tensor) -> list[int]:
        """Which item of the dataset stands at each position of the run."""
        count = len(self.dataset)
        return [int(_permutation(self.seed, p // count, count)[p % count]) for p in positions.tolist()]

    def __getitem__(self, step: int) -> "dict[str, Any] | LdmError":
        try:
            return self.batch(step)
        except LdmError as error:  # raised in a worker it would arrive wrapped in a traceback
            return error


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    return keys(seed, f"order/{epoch}", torch.arange(count)).argsort(stable=True)


def _from_workers(steps: _Steps, start_step: int, workers: int) -> Iterator[dict[str, Any]]:
    loader = DataLoader(
        steps,
        batch_size=None,  # an item of `steps` is a batch
        sampler=itertools.count(start_step),
        num_workers=workers,
        timeout=TIMEOUT,
        worker_init_fn=_shield,
        generator=torch.Generator(),  # DataLoader draws a seed that nobody uses; not from torch's global generator
    )
    step = start_step
    try:
        for batch in loader:
            if isinstance(batch, LdmError):
                raise batch
            yield batch
            step += 1
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if not reason.startswith("DataLoader"):  # a worker's own exception, not the loss of a worker
            raise
        raise DataError(f"a data worker died or hung before step {step} ({reason}); try fewer workers") from error


def _shield(worker: int) -> None:
    """Signals meant for the trainer reach its whole process group; workers stay until the trainer has saved."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))  # a second one kills
