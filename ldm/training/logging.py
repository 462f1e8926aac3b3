"""Where records go: metrics.jsonl, a progress line, and loggers that may fail without harm."""

import atexit
import json
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ldm.io.files import replacing

BUDGET = 5.0  # seconds a run waits for a logger, once, at its end
PENDING = 1000  # records that may wait for a slow logger


class Logger(Protocol):
    """Somewhere else to send records and pictures; made by a function, so that even its start may fail."""

    def log(self, step: int, record: Mapping[str, float]) -> None: ...
    def image(self, step: int, path: Path) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """metrics.jsonl: one JSON object per logged step. Opening it at a step forgets everything later than that step."""

    def __init__(self, path: Path, step: int):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        records = [_record(line) for line in lines]
        kept = [i for i, record in enumerate(records) if record.get("step", math.inf) <= step]
        self.last = {name: value for i in kept for name, value in records[i].items()}  # of every number
        if len(kept) < len(lines):
            with replacing(path) as file:
                file.writelines(lines[i] for i in kept)
        self.file = open(path, "ab")

    def write(self, record: Mapping[str, Any]) -> None:
        """Raises OSError on a full disk; what could not be written then goes out with the next record."""
        self.last |= record
        self.file.write(f"{json.dumps(record)}\n".encode())
        self.file.flush()


def _record(line: bytes) -> dict:
    """One line as an object; empty for what a killed run left half-written."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, start: int, total: int, visible: bool = True, seconds: float = 5.0):
        hidden = not (visible and sys.stderr.isatty())
        self.bar = tqdm(total=total, initial=start, unit="step", disable=hidden, dynamic_ncols=True)
        self.start, self.total, self.seconds = start, total, seconds
        self.begun = time.monotonic()
        self.printed = -math.inf

    def advance(self) -> None:
        self.bar.update()

    def show(self, step: int, record: Mapping[str, float | None]) -> None:
        names = {"loss": "loss", "img/s": "images_per_second"}
        parts = {short: f"{record[name]:.4g}" for short, name in names.items() if record[name] is not None}
        self.bar.set_postfix(parts)
        now = time.monotonic()
        if self.bar.disable and (now - self.printed >= self.seconds or step == self.total):
            left = (now - self.begun) / max(1, step - self.start) * (self.total - step)
            text = "  ".join(f"{name} {value}" for name, value in parts.items())
            self.say(f"step {step}/{self.total}  {text}  eta {tqdm.format_interval(left)}")
            self.printed = now

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)


class Isolated:
    """A logger on a thread of its own: what it raises is reported once, what it cannot keep up with is dropped."""

    def __init__(self, make: Callable[[], Logger], say: Callable[[str], None] = print):
        self.make, self.say = make, say
        self.calls: queue.Queue = queue.Queue(PENDING)
        self.dropped = 0
        self.exit_handlers: list[Callable] = []
        self.register, atexit.register = atexit.register, self._register
        self.thread = threading.Thread(target=self._work, name="logger", daemon=True)
        self.thread.start()

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self._put("log", step, dict(record))

    def image(self, step: int, path: Path) -> None:
        self._put("image", step, path)

    def close(self) -> None:
        self._put("close")
        self.thread.join(BUDGET)
        atexit.register = self.register
        if self.thread.is_alive():
            for handler in self.exit_handlers:
                atexit.unregister(handler)
            self.say(f"warning: the logger did not finish within {BUDGET:g} s; metrics.jsonl has everything")
        elif self.dropped:
            self.say("warning: the logger missed some records; metrics.jsonl has everything")

    def _register(self, handler: Callable, *arguments: Any, **named: Any) -> Callable:
        """Stands in for atexit.register: what a hanging logger left there would make the whole process wait for it."""
        if threading.current_thread() is self.thread:
            self.exit_handlers.append(handler)
        return self.register(handler, *arguments, **named)

    def _put(self, *call: Any) -> None:
        try:
            self.calls.put_nowait(call)
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        name = ""
        try:
            logger = self.make()
            while name != "close":
                name, *arguments = self.calls.get()
                self._attempt(getattr(logger, name), *arguments)
        except BaseException as error:  # it could not even be made
            self._failed(error)

    def _attempt(self, call: Callable, *arguments: Any) -> None:
        try:
            call(*arguments)
        except BaseException as error:  # even SystemExit, which wandb raises
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        if self.dropped == 0:
            reason = (str(error).splitlines() or [""])[0][:200]
            self.say(f"warning: the logger failed ({type(error).__name__}: {reason}); training goes on")
        self.dropped += 1


class Wandb:
    """Weights & Biases; a run that resumes in the same directory continues the same page."""

    def __init__(self, run_dir: Path, config: dict, *, project: str, entity: str | None, mode: str):
        import wandb  # slow to import, and only some people have an account

        settings = wandb.Settings(init_timeout=60, silent=True)
        identity = f"{Path(run_dir).resolve()}".replace("/", "-").strip("-")[-64:]
        self.wandb = wandb
        self.run = wandb.init(
            project=project, entity=entity, mode=mode, dir=str(run_dir), id=identity, resume="allow",
            config=config, settings=settings,
        )  # fmt: skip

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self.run.log(dict(record), step=step)

    def image(self, step: int, path: Path) -> None:
        self.run.log({"samples": self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()
