"""What comes out of a run while it trains: records, previews, evaluation, and the summary at the end."""

import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import ldm
from ldm.io.text import read_json, write_json
from ldm.training.distributed import ALONE, World
from ldm.training.logging import Isolated, Logger, MetricsLog, Progress
from ldm.training.signals import Signals

if TYPE_CHECKING:
    from ldm.training.loop import Trainer


@dataclass
class Hooks:
    """What else happens during training, on rank 0. It must not touch the weights; its failures do not end the run."""

    on_sample: Callable[[int], Path | None] | None = None  # on_sample(step) -> a picture for the logger
    on_eval: Callable[[int], Mapping[str, float]] | None = None  # on_eval(step) -> numbers for the record
    logger: Callable[[], Logger] | None = None
    on_start: Callable[[int], None] | None = None  # on_start(step), once the run is where it left off


class Report:
    """Turns the tensors of a step into one record, runs the hooks that are due, and writes everything down."""

    def __init__(
        self, directory: Path, trainer: "Trainer", hooks: Hooks, signals: Signals, state: dict, world: World = ALONE
    ):
        self.directory, self.trainer, self.hooks = Path(directory), trainer, hooks
        self.signals, self.world = signals, world
        self.start = state["step"]
        self.unreported = state.get("unreported")  # the record of a step whose hooks a signal cut short
        self.seconds_before = state.get("seconds", 0.0)
        self.begun = self.clock = time.monotonic()
        self.measured = self.start  # images up to this step have been counted
        self.images, self.busy = 0, 0.0  # without the steps up to the first record, which warm everything up

    def __enter__(self) -> "Report":
        self.progress = Progress(self.start, self.trainer.steps, visible=self.world.is_main)
        self.logger = None
        if self.world.is_main:
            self.metrics = MetricsLog(self.directory / "metrics.jsonl", self.start - bool(self.unreported))
            self.logger = Isolated(self.hooks.logger, self.say) if self.hooks.logger else None
            if self.hooks.on_start:
                self._call("writing down the settings", self.hooks.on_start, self.start)
            if self.unreported:
                self._publish(self.unreported)
        self.world.wait()
        return self

    def __exit__(self, *_) -> None:
        self.progress.bar.close()
        if self.world.is_main:
            with suppress(OSError):
                self.metrics.file.close()
        if self.logger:
            self.logger.close()

    def say(self, text: str) -> None:
        if self.world.is_main:
            self.progress.say(text)

    def step(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """After every step; only where a record is due are the values read, which waits for the accelerator."""
        self.progress.advance()
        trainer = self.trainer
        often = (trainer.log_every, trainer.sample_every, trainer.eval_every)
        if step != 1 and not any(trainer.due(step, every) for every in often):
            return
        values = {name: self.world.mean(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        record = {"step": step, **{name: finite(float(value)) for name, value in values.items()}}
        record |= {"images": step * trainer.batch_size, "images_per_second": self._rate(step)}
        if self.world.is_main:
            self._publish(record)
        self.world.wait()
        self.clock = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent on anything but training does not count against its speed."""
        begun = time.monotonic()
        yield
        self.clock += time.monotonic() - begun

    def state(self) -> dict:
        """What a checkpoint has to keep of this."""
        return {"seconds": self._seconds(), "unreported": self.unreported}

    def summary(self, objective: nn.Module) -> dict:
        """Write summary.json and return it; a run that had nothing left to do keeps the one it has."""
        path = self.directory / "summary.json"
        if self.start == self.trainer.steps and path.exists():
            return read_json(path)
        last = self.metrics.last if self.world.is_main else {}
        summary = {
            "step": self.trainer.steps,
            "metrics": last,
            "wall_seconds": self._seconds(),
            "images_per_second": self.images / self.busy if self.busy else last.get("images_per_second"),
            **describe(objective),
        }
        if self.world.is_main:
            write_json(path, summary)
        return summary

    def _publish(self, record: dict) -> None:
        step, trainer = record["step"], self.trainer
        evaluate = self.hooks.on_eval if trainer.due(step, trainer.eval_every) else None
        preview = self.hooks.on_sample if trainer.due(step, trainer.sample_every) else None
        numbers = self._call("evaluation", evaluate, step) if evaluate else {}
        picture = self._call("preview", preview, step) if preview else None
        if self.signals.number and (evaluate or preview):
            self.unreported = record  # the checkpoint keeps it, and a resumed run begins with this again
            return
        record = {**record, **{name: finite(float(value)) for name, value in (numbers or {}).items()}}
        try:
            self.metrics.write(record)
        except OSError as error:
            self.say(f"warning: cannot write metrics.jsonl at step {step}: {error.strerror}; training goes on")
        self.progress.show(step, record)
        if self.logger:
            self.logger.log(step, record)
            if picture:
                self.logger.image(step, picture)
        self.unreported = None

    def _call(self, what: str, hook: Callable, step: int) -> Any:
        try:
            return self.signals.call(hook, step)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            self.say(f"warning: {what} at step {step} failed ({type(error).__name__}: {reason}); training goes on")
            return None

    def _rate(self, step: int) -> float:
        """Images per second since the last record."""
        images, seconds = (step - self.measured) * self.trainer.batch_size, time.monotonic() - self.clock
        if self.measured > self.start:
            self.images, self.busy = self.images + images, self.busy + seconds
        self.measured = step
        return images / seconds

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.begun


def finite(number: float) -> float | None:
    """JSON has no NaN."""
    return number if math.isfinite(number) else None


def describe(objective: nn.Module) -> dict:
    """Sizes, memory, versions, and where the code stood."""
    device = next(objective.parameters()).device
    return {
        "parameters": sum(p.numel() for p in objective.parameters() if p.requires_grad),
        "parameters_frozen": sum(p.numel() for p in objective.parameters() if not p.requires_grad),
        "peak_memory_bytes": peak_memory(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"ldm": ldm.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "git_revision": git_revision(),
    }


def peak_memory(device: torch.device) -> int:
    """Most bytes in use at once so far: on the GPU if there is one, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def git_revision() -> str | None:
    """The commit this package runs from, if it is a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        folder = Path(ldm.__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
