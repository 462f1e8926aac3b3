"""A run directory: who may write to it, and where training continues from."""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from ldm.io.checkpoints import latest, point_last, sweep
from ldm.io.files import hold, sweep_temporaries
from ldm.training.checkpoint import find, load_config, load_files
from ldm.utils.errors import CheckpointError, ConfigError


@dataclass
class RunDirectory:
    """Where a run lives and what its checkpoints carry besides tensors."""

    path: Path
    config: dict = field(default_factory=dict)  # resolved
    files: dict[str, bytes] = field(default_factory=dict)  # extra files by name, e.g. {"tokenizer.json": ...}
    resume: Path | None = None  # a run or checkpoint directory to continue from when this one has no checkpoint
    held: bool = field(default=False, init=False)  # by `lock`

    @property
    def checkpoints(self) -> Path:
        return Path(self.path) / "checkpoints"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory: two writers would delete each other's checkpoints.  Raises ConfigError.

        Whoever has it already, as the command that builds what is trained here, may ask again.
        """
        if self.held:
            yield
            return
        with self._claim():
            folders = [path for path in Path(self.path).iterdir() if path.is_dir() and path != self.checkpoints]
            sweep_temporaries(Path(self.path), *folders)
            self.held = True
            try:
                yield
            finally:
                self.held = False

    def _claim(self) -> TextIO:
        """The lock file, which says whose it is, to be closed at the end."""
        lock = Path(self.path) / "run.lock"
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "a+")
            if hold(file):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
        except OSError as error:
            raise ConfigError(f"run directory {self.path} cannot be written: {error.strerror}") from error
        with file:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(f"{self.path} is being written by {holder}; stop it or choose another")

    def last_good(self) -> str:
        """The end of an error message: what is safe."""
        directory, _ = latest(self.checkpoints, content=False)
        return f"the last good checkpoint is {directory}" if directory else "no checkpoint had been written"

    def newest(self) -> tuple[Path | None, list[str]]:
        """The checkpoint to continue from, if any, and what there is to warn about.  For the holder of the lock."""
        sweep(self.checkpoints)
        directory, skipped = latest(self.checkpoints)
        warnings = [f"passed over a checkpoint: {reason}" for reason in skipped]
        if directory is None and skipped:
            raise CheckpointError(
                f"every checkpoint in {self.checkpoints} is damaged ({skipped[0]}); "
                "restore one from a copy, or delete the folder to start again"
            )
        if directory is not None:
            point_last(directory)  # a kill may have come between a checkpoint and its link
        elif self.resume:
            directory = find(self.resume)
        if directory is not None and (changed := _changed(load_config(directory), self.config)):
            warnings.append(f"continuing with other settings than {directory}: {', '.join(changed[:8])}")
        return directory, warnings


def continued(path: Path, resume: str | Path | None) -> tuple[dict, dict[str, str]]:
    """Config and files of the checkpoint that training in `path` will continue from; empty for a new run."""
    directory, _ = latest(Path(path) / "checkpoints")
    if directory is None and resume:
        directory = find(Path(resume))
    return (load_config(directory), load_files(directory)) if directory else ({}, {})


def _changed(old: object, new: object, name: str = "") -> list[str]:
    """name=new value of every setting that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in _changed(old.get(k), new.get(k), f"{name}.{k}" if name else k)]
    return [] if old == new else [f"{name}={new}"]
