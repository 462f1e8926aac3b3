"""One process or many under torchrun: who am I, and how do all ranks come to the same decision in the same step."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.utils.errors import ConfigError, RankError

PATIENCE = timedelta(days=30)  # of ranks that wait for rank 0 to draw, evaluate or save


@dataclass(frozen=True)
class World:
    """The ranks of one run; ALONE is a single process, for which nothing here communicates."""

    rank: int = 0
    size: int = 1
    patient: dist.ProcessGroup | None = None  # the same ranks, for what may take rank 0 hours

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The objective, with gradients averaged over ranks; its buffers stay those of each rank's own images."""
        if self.size == 1:
            return objective
        renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # in torch 2.15
        keep = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return DistributedDataParallel(objective, **keep)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise RankError, one line, where another rank died or hangs while this one waits for it."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            silent = "does not answer (trainer.timeout)" if "imed out" in str(error) else "has stopped"
            raise RankError(f"another rank of {self.size} {silent}; look for what it says itself") from error

    def agree(self, number: int) -> int:
        """The largest number any rank brings, a signal for instance; on the host, so no accelerator is waited for."""
        if self.size == 1:
            return number
        shared = torch.tensor(number)
        with self.together():
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def any(self, flag: Tensor) -> Tensor:
        """Whether a 0-d bool is true on any rank; stays on its device."""
        if self.size == 1:
            return flag
        shared = flag.float()
        with self.together():
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared > 0

    def mean(self, value: Tensor) -> Tensor:
        if self.size == 1:
            return value
        shared = value / self.size
        with self.together():
            dist.all_reduce(shared)
        return shared

    def wait(self) -> None:
        """Until every rank is here, however long one of them takes, as rank 0 does to evaluate."""
        if self.size > 1:
            with self.together():
                dist.barrier(group=self.patient)

    def each(self, function: Callable[[], Any]) -> Any:
        """Call on every rank; where one fails, that one raises its error and the others RankError, none waits."""
        if self.size == 1:
            return function()
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        failed = self.agree(0 if error is None else self.rank + 1)
        if error is not None:
            raise error
        if failed:
            raise RankError(f"rank {failed - 1} of {self.size} has stopped; look for what it says itself")
        return result

    def first(self, function: Callable[[], Any]) -> Any:
        """Call on rank 0 only; every rank returns its result or raises its error, so none waits for one that failed."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        with self.together():
            dist.broadcast_object_list(outcome, src=0, group=self.patient, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def close(self) -> None:
        """Leave the group, once gloo's threads have let go of the last tensors.

        They need the interpreter lock for that, which the group's destructor holds while it waits for them (seen with
        torch 2.6): destroyed in the same instant as its last operation, a group can hang for ever.
        """
        if self.size > 1:
            time.sleep(0.2)  # gives the lock away
            dist.destroy_process_group()


ALONE = World()


def local_device(device: str) -> torch.device:
    """This process's own device of a kind: under torchrun "cuda" is the GPU numbered LOCAL_RANK."""
    if device == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(device)


def init(device: torch.device, *, timeout: float = 600.0, rendezvous: str = "env://") -> World:
    """Join the ranks that torchrun started (RANK, WORLD_SIZE); ALONE where it did not.

    timeout: seconds after which a rank gives up on one that hangs in a step. Raises ConfigError, RankError.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if not isinstance(timeout, int | float) or timeout <= 0:
        raise ConfigError(f"trainer.timeout={timeout}: expected seconds, more than 0")
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    with World(rank, size).together():
        wait = timedelta(seconds=timeout)
        dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=size, timeout=wait)
        return World(rank, size, dist.new_group(backend="gloo", timeout=PATIENCE))
