"""The training loop: whatever learns here is an objective(batch) -> (loss, logs), and `fit` is all that trains it.

A step is a function of (weights, optimizer, step): the order of data, noise and dropout are keyed, the learning rate
and the EMA decay are formulas. So a run that is killed and started again in its directory ends with the same bits.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.training import checkpoint
from ldm.training.distributed import ALONE, World
from ldm.training.ema import EMA
from ldm.training.optim import clip_and_step, constant, set_lr
from ldm.training.report import Hooks, Report
from ldm.training.run import RunDirectory
from ldm.training.signals import Signals
from ldm.utils.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from ldm.utils.seeding import key

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE_HALVINGS = 24  # in a row that float16 may need to find its loss scale, before a bad step counts as one
MAX_FAILED_SAVES = 3  # in a row


@dataclass
class Trainer:
    """How long, how precisely and how often; the knobs of configs/trainer/default.yaml."""

    steps: int  # optimizer steps
    batch_size: int  # images per optimizer step, over all ranks and micro-batches together
    precision: str = "fp32"  # of the forward pass: fp32 | bf16 | fp16 (with a dynamic loss scale)
    accumulate: int = 1  # micro-batches per step
    clip_norm: float = 1.0  # total gradient norm; 0 = do not clip
    max_bad_steps: int = 5  # steps in a row with a non-finite loss or gradient that are skipped before the run stops
    compile: bool = False  # torch.compile of the network
    channels_last: bool = False  # memory layout of images and kernels
    workers: int = 0  # processes that decode data
    log_every: int = 50  # steps; 0 = never, here and below
    sample_every: int = 0
    eval_every: int = 0
    save_every: int = 1000
    keep: int = 2  # newest checkpoints
    timeout: float = 600.0  # seconds that ranks wait in a step for one that hangs

    def __post_init__(self):
        for name, least in {"steps": 1, "batch_size": 1, "accumulate": 1, "keep": 2, "log_every": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"trainer.{name}={getattr(self, name)}: expected at least {least}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"trainer.precision={self.precision}: expected one of {', '.join(PRECISIONS)}")
        self.check_split(ranks=1)

    def check_split(self, ranks: int) -> None:
        if self.batch_size % (self.accumulate * ranks):
            raise ConfigError(
                f"trainer.batch_size={self.batch_size} does not split into accumulate={self.accumulate} "
                f"micro-batches on each of {ranks} ranks"
            )

    def due(self, step: int, every: int) -> bool:
        """Whether something done every n steps, and at the end, is done after this one."""
        return every > 0 and (step % every == 0 or step == self.steps)


def prepare(objective: nn.Module, network: nn.Module, trainer: Trainer, device: torch.device) -> None:
    """Before the optimizer is made: everything on its device, in its layout and mode, the network compiled if asked."""
    layout = torch.channels_last if trainer.channels_last else torch.preserve_format
    objective.to(device, memory_format=layout)
    objective.train()
    rest(objective)
    if trainer.compile:
        network.compile()


def rest(module: nn.Module) -> None:
    """Evaluation mode for what is not trained: no dropout in frozen encoders, nor in a base between its adapters."""
    trained = [p.requires_grad for p in module.parameters()]
    if not any(trained):
        module.eval()
    elif not all(trained):
        for child in module.children():
            rest(child)


def fit(
    objective: nn.Module,
    batches_from: Callable[[int], Iterator[dict]],  # batches_from(n): this rank's share of every step after the n-th
    optimizer: torch.optim.Optimizer,
    trainer: Trainer,
    run: RunDirectory,
    *,
    lr_schedule: Callable[[int, int], float] = constant,  # lr_schedule(step, steps) -> multiplier
    ema: EMA | None = None,
    hooks: Hooks | None = None,
    world: World = ALONE,
    seed: int = 0,
) -> dict:
    """Train from the run's newest checkpoint, if it has one, to trainer.steps; returns what summary.json holds.

    Raises Interrupted after a signal, NonFiniteError, DataError or ConfigError; whatever was finished is saved first.
    """
    with ExitStack() as stack:
        world.first(lambda: stack.enter_context(run.lock()))
        session = Session(objective, optimizer, trainer, run, ema, world)
        state = session.resume()
        signals = stack.enter_context(Signals())
        report = stack.enter_context(Report(run.path, trainer, hooks or Hooks(), signals, state, world))
        model, batches = world.wrap(objective), batches_from(state["step"])
        for step in range(state["step"] + 1, trainer.steps + 1):
            torch.manual_seed(key(seed, "model", step, world.rank))
            lr = set_lr(optimizer, lr_schedule(step, trainer.steps))
            with session.rescue(step - 1, report):
                loss, logs = gradients(model, world.each(lambda: next(batches)), trainer, session.scaler)
                bad = world.any(~loss.isfinite())
            norm, skipped = clip_and_step(optimizer, session.scaler, trainer.clip_norm, bad)
            if ema:
                ema.update(step)
            session.watch(step, skipped, report)
            with session.rescue(step, report):
                report.step(step, {**logs, "loss": loss, "lr": lr, "grad_norm": norm})
                number = world.agree(signals.number)
                session.save(step, report, stop=number > 0)
            signals.leave(number)
        return report.summary(objective)


def gradients(
    model: nn.Module, batch: dict, trainer: Trainer, scaler: torch.amp.GradScaler
) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave the gradients of one batch in the parameters, summed over its micro-batches; returns mean loss and logs."""
    device = next(model.parameters()).device
    loss, logs = torch.zeros((), device=device), {}
    model.zero_grad(set_to_none=True)
    for i in range(trainer.accumulate):
        more = i + 1 < trainer.accumulate
        # Ranks exchange gradients once, in the backward of the last micro-batch.
        with model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext():
            with torch.autocast(device.type, PRECISIONS[trainer.precision], trainer.precision != "fp32"):
                part, part_logs = model(micro_batch(batch, i, trainer.accumulate, device))
            scaler.scale(part / trainer.accumulate).backward()
        loss += part.detach() / trainer.accumulate
        for name, value in part_logs.items():
            logs[name] = logs.get(name, 0.0) + value / trainer.accumulate
    return loss, logs


def micro_batch(batch: dict, i: int, count: int, device: torch.device) -> dict:
    """The i-th of `count` equal parts; pictures go to the device, what the conditioner reads stays on the host."""
    size = len(batch["position"]) // count
    part = {k: v[i * size : (i + 1) * size] if isinstance(v, Tensor | list) else v for k, v in batch.items()}
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) and v.ndim > 2 else v for k, v in part.items()}


class Session:
    """The state that a checkpoint keeps, and when to give up: on bad steps, failed saves, missing data or memory."""

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        trainer: Trainer,
        run: RunDirectory,
        ema: EMA | None,
        world: World,
    ):
        trainer.check_split(world.size)
        self.objective, self.optimizer, self.trainer = objective, optimizer, trainer
        self.run, self.ema, self.world = run, ema, world
        self.device = next(objective.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=trainer.precision == "fp16")
        self.start = self.saved = 0  # the step this session began after, and the newest that is safe
        self.failed_saves = 0  # in a row
        self.bad_steps = 0  # in a row
        self.unread: list[tuple[int, Tensor]] = []  # (step, skipped) still on the device

    def resume(self) -> dict:
        """Load the newest whole checkpoint of the run, or the one it continues, if there is one; returns its state."""
        directory, warnings = self.world.first(self.run.newest)
        if self.world.is_main:
            for line in warnings:
                print(f"warning: {line}", file=sys.stderr)
        if directory is None:
            return {"step": 0}
        state = checkpoint.load(directory, self.objective, self.ema, self.optimizer, self.scaler)
        self.start = self.saved = state["step"]
        if self.saved > self.trainer.steps:
            raise ConfigError(
                f"{directory} is past trainer.steps={self.trainer.steps}; set it to more than {self.saved}"
            )
        if self.world.is_main:
            print(f"continuing from {directory}", file=sys.stderr)
        return state

    def save(self, step: int, report: Report, *, stop: bool, alone: bool = False) -> None:
        """Write a checkpoint if one is due. A full disk is forgiven a few times, but not at the end of a run.

        alone: the other ranks do not take part.
        """
        last = stop or step == self.trainer.steps
        if step == self.saved or not (last or self.trainer.due(step, self.trainer.save_every)):
            return

        def write() -> None:
            parts = (self.objective, self.ema, self.optimizer, self.scaler)
            checkpoint.save(self.run, step, *parts, state=report.state(), keep=self.trainer.keep)
            self.saved = step

        with report.paused():
            try:
                write() if alone else self.world.first(write)
                self.saved, self.failed_saves = step, 0
                if stop:
                    report.say(f"saved step {step}")
            except CheckpointError as error:
                self.failed_saves += 1
                if last or self.failed_saves == MAX_FAILED_SAVES:
                    raise
                report.say(f"warning: {error}; training goes on")

    def watch(self, step: int, skipped: Tensor, report: Report) -> None:
        """Stop when too many steps in a row had to be skipped; on an accelerator this is read only now and then."""
        self.unread.append((step, skipped))
        if self.device.type != "cpu" and not self.trainer.due(step, self.trainer.log_every or 50):
            return
        limit = self.trainer.max_bad_steps + SCALE_HALVINGS * self.scaler.is_enabled()
        limit = min(limit, self.trainer.steps - self.start - 1)  # a run of nothing but bad steps is a failure
        for bad, (at, _) in zip(torch.stack([flag for _, flag in self.unread]).tolist(), self.unread, strict=True):
            self.bad_steps = self.bad_steps + 1 if bad else 0
            if self.bad_steps > limit:
                raise NonFiniteError(
                    f"loss or gradients are not finite at step {at} and the {limit} before it; "
                    f"{self.run.last_good()}; lower optimizer.lr or look at the data"
                )
            if bad and not self.scaler.is_enabled():
                report.say(f"warning: loss or gradients are not finite at step {at}; the step was skipped")
        self.unread.clear()

    @contextmanager
    def rescue(self, step: int, report: Report) -> Iterator[None]:
        """Keep the finished `step` when the next one cannot be computed: for want of data, memory, another rank."""
        try:
            with self.world.together():
                yield
        except (CheckpointError, NonFiniteError):  # nothing that could be kept
            raise
        except Exception as error:
            self.optimizer.zero_grad(set_to_none=True)
            if self.world.is_main:  # the others need not be here any more
                self.save(step, report, stop=True, alone=True)
            if isinstance(error, StopIteration):
                raise DataError(f"the data ended after step {step} of {self.trainer.steps}") from None
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(
                f"out of memory in step {step + 1} with {self.trainer.batch_size // self.trainer.accumulate} images "
                f"per micro-batch; raise trainer.accumulate from {self.trainer.accumulate} or lower trainer.batch_size"
            ) from error
