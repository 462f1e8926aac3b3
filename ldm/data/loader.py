"""Batches as a pure function of (dataset, seed, step): any number of workers or ranks, any starting point, same images.

Each bucket (all images are one where there are no buckets) is shuffled anew for each of its epochs, by keys of (seed,
epoch), and its epochs flow into each other: its k-th batch holds images k B to (k + 1) B of that endless row. When e
epochs of n images are over, a bucket has given ceil(e n / B) batches: the last one of an epoch is filled up from the
next, which has so much less to give. So nothing is dropped, every image is drawn at least e times in e epochs, a bucket
is never more than a batch ahead, and there is no state to save: to resume is to start at that step.
"""

import itertools
import signal
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

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
    steps = _Steps(dataset, Order(groups(dataset), len(dataset), batch_size, seed), rank, world_size, flip)
    return read(steps, itertools.count(start_step), workers)


# What a dataset can do besides dataset[i], each with an answer for those that do nothing special.


@singledispatch
def groups(dataset: Dataset) -> Tensor | None:
    """The bucket of every item (N,): a batch is of one bucket. None where all can share one."""
    return None


@singledispatch
def fetch(dataset: Dataset, items: Tensor) -> dict[str, Any]:
    """The batch of these items (B,), and as "index" which they are."""
    return {"index": items, **collate([dataset[item] for item in items.tolist()])}


@singledispatch
def facts(dataset: Dataset, items: Tensor) -> dict[str, Any]:
    """What is known of these items (B,) without looking at their images: captions, labels, scores."""
    every = [dataset[item] for item in items.tolist()]
    return collate([{name: value for name, value in item.items() if name not in ("image", "size")} for item in every])


@singledispatch
def summary(dataset: Dataset) -> str:
    """What somebody who is about to train wants to know of it, in a few lines."""
    return f"{len(dataset):,} items of {type(dataset).__name__}"


@groups.register
def _(dataset: Subset) -> Tensor | None:
    every = groups(dataset.dataset)
    return None if every is None else every[list(dataset.indices)]


@fetch.register
def _(dataset: Subset, items: Tensor) -> dict[str, Any]:
    return fetch(dataset.dataset, torch.tensor([dataset.indices[item] for item in items.tolist()]))


@facts.register
def _(dataset: Subset, items: Tensor) -> dict[str, Any]:
    return facts(dataset.dataset, torch.tensor([dataset.indices[item] for item in items.tolist()]))


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items as one batch: images and other tensors stacked, numbers in a tensor, captions and scenes in a list."""
    return {name: column([item[name] for item in items]) for name in items[0]}


def column(values: list) -> Any:
    """What a batch holds of the values of its items."""
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    return values if isinstance(values[0], str | tuple) else torch.tensor(values)


class Order:
    """Which items make the batch of each step."""

    def __init__(self, groups: Tensor | None, count: int, batch_size: int, seed: int):
        groups = torch.zeros(count, dtype=torch.int64) if groups is None else groups
        self.members = [(groups == group).nonzero().flatten() for group in groups.unique().tolist()]
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._shuffled: dict[int, dict[int, Tensor]] = {}  # bucket -> epoch -> its items, for the latest epochs
        self._steps = range(0)  # of the epoch that was last asked for

    def items(self, step: int) -> Tensor:
        """(B,), all from one bucket."""
        if step not in self._steps:
            self._enter(step)
        turn = step - self._steps.start
        return self._batch(int(self._turns[turn]), int(self._numbers[turn]))

    def _enter(self, step: int) -> None:
        """Find the epoch of a step, and draw whose turn it is in each of its steps, and with which of its batches."""
        last = step * self.batch_size // self.count + 1  # epochs are never shorter than this assumes
        epoch = bisect_right(range(last + 1), step, key=lambda e: sum(self._after(e))) - 1
        start, end = self._after(epoch), self._after(epoch + 1)
        self._steps = range(sum(start), sum(end))
        numbers = [torch.arange(*span) for span in zip(start, end, strict=True)]
        turns = torch.arange(len(numbers)).repeat_interleave(torch.tensor([len(part) for part in numbers]))
        self._turns = turns[keys(self.seed, f"turns/{epoch}", torch.arange(len(turns))).argsort(stable=True)]
        self._numbers = torch.cat(numbers)[self._turns.argsort(stable=True).argsort()]  # each bucket's in rising order

    def _after(self, epochs: int) -> list[int]:
        """How many batches each bucket has given when so many epochs are over."""
        return [-(-epochs * len(members) // self.batch_size) for members in self.members]

    def _batch(self, bucket: int, number: int) -> Tensor:
        """The batch of that number of one bucket."""
        count, parts = len(self.members[bucket]), []
        start, end = number * self.batch_size, (number + 1) * self.batch_size
        while start < end:
            epoch, offset = divmod(start, count)
            parts.append(self._epoch(bucket, epoch)[offset : offset + end - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def _epoch(self, bucket: int, epoch: int) -> Tensor:
        kept = self._shuffled.setdefault(bucket, {})
        if epoch not in kept:
            members = self.members[bucket]
            kept[epoch] = members[keys(self.seed, f"order/{epoch}", members).argsort(stable=True)]
            for old in list(kept)[:-2]:
                del kept[old]
        return kept[epoch]


class Source(Protocol):
    """Whatever has numbered batches."""

    def batch(self, number: int) -> dict[str, Any]: ...


class _Steps:
    """This rank's share of the batch of a step."""

    def __init__(self, dataset: Dataset, order: Order, rank: int, world_size: int, flip: bool):
        self.dataset, self.order, self.flip = dataset, order, flip
        self.share = order.batch_size // world_size
        self.offset = rank * self.share

    def batch(self, step: int) -> dict[str, Any]:
        items = self.order.items(step)[self.offset : self.offset + self.share]
        start = step * self.order.batch_size + self.offset
        positions = torch.arange(start, start + self.share)  # B
        batch = fetch(self.dataset, items)
        if self.flip:
            if "image" not in batch:
                raise ConfigError("flip=true mirrors images, but these are stored as latents; set flip=false")
            batch["image"] = flip_images(batch["image"], keys(self.order.seed, "flip", positions))
        return {**batch, "position": positions, "step": step}


def read(source: Source, numbers: Iterable[int], workers: int) -> Iterator[dict[str, Any]]:
    """The batches of these numbers in turn, made in this process or ahead of time by `workers` others."""
    return _from_workers(source, numbers, workers) if workers else map(source.batch, numbers)


class _Indexable:
    """A source as DataLoader wants it; an error of ours comes back whole instead of wrapped in a traceback."""

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, number: int) -> "dict[str, Any] | LdmError":
        try:
            return self.source.batch(number)
        except LdmError as error:
            return error


def _from_workers(source: Source, numbers: Iterable[int], workers: int) -> Iterator[dict[str, Any]]:
    loader = DataLoader(
        _Indexable(source),
        batch_size=None,  # an item is a batch
        sampler=numbers,
        num_workers=workers,
        timeout=TIMEOUT,
        worker_init_fn=_shield,
        generator=torch.Generator(),  # DataLoader draws a seed that nobody uses; not from torch's global generator
    )
    done = 0
    try:
        for batch in loader:
            if isinstance(batch, LdmError):
                raise batch
            yield batch
            done += 1
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if not reason.startswith("DataLoader"):  # a worker's own exception, not the loss of a worker
            raise
        raise DataError(f"a data worker died or hung after {done} batches ({reason}); try fewer workers") from error


def _shield(worker: int) -> None:
    """Signals meant for the trainer reach its whole process group; workers stay until the trainer has saved."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))  # a second one kills
