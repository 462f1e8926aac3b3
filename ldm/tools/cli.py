"""The command line of `train.py` and `sample.py`: Hydra, answers before torch is imported, errors in one line."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ldm.build import config_dir, plain
from ldm.io.output import lasting_output
from ldm.tools.jobs import Sweep, run_job
from ldm.tools.words import base, groups, options, readable, sort_out
from ldm.utils.errors import ConfigError, LdmError
from ldm.utils.suggest import explain

STOPPED = 128  # an exit code above: by the signal of that number


def entry(config_name: str) -> Callable:
    """Decorator: `main(cfg: dict, run_dir: Path) -> number for a search` becomes a program with one-line errors."""

    full_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

    def decorate(main: Callable[[dict, Path], float | None]) -> Callable[[], None]:
        command = Command()

        def job(cfg: DictConfig) -> float | None:
            return command.run(main, cfg, full_traceback)

        program = hydra.main(config_path=str(config_dir()), config_name=config_name, version_base="1.3")(job)

        @wraps(main)
        @lasting_output()
        def run() -> None:
            if {"--help", "-h"} & set(sys.argv):
                return print(usage(config_name))
            os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us instead of being printed by Hydra
            try:
                command.begin(sys.argv)
                sys.argv[1:] = readable(sys.argv[1:], config_name)
                _adapt_to_torchrun(sys.argv)
                program()
                command.sweep.check()
            except (LdmError, HydraException, OmegaConfBaseException, OSError, KeyboardInterrupt) as error:
                if full_traceback:
                    raise
                _fail(*_line(error, config_name, sys.argv[1:]))
            except SystemExit as stop:
                if isinstance(stop.code, int) and stop.code > STOPPED and command.again:
                    print(command.again, file=sys.stderr)
                raise
            finally:
                os.environ["HYDRA_FULL_ERROR"] = "1" if full_traceback else "0"

        return run

    return decorate


class Command:
    """What was typed, and how it is typed again once it has been stopped."""

    def begin(self, argv: list[str]) -> None:
        self.program, self.words = argv[0], argv[1:]
        self.again: str | None = None
        self.sweep = Sweep([word.partition("=")[0] for word in self.words if "=glob(" in word])

    def run(self, main: Callable, cfg: DictConfig, full_traceback: bool) -> float | None:
        """One job of the command, as Hydra starts it."""
        settings = HydraConfig.get()
        path = Path(settings.runtime.output_dir)
        self.say(path, settings)
        if settings.mode == RunMode.MULTIRUN:  # errors are raised: the sweep goes on, and fails at its end
            return run_job(main, plain(cfg), path, settings.job.num, list(settings.overrides.task), self.sweep)
        try:
            return main(plain(cfg), path)
        except LdmError as error:
            if full_traceback:
                raise
            _fail(error, error.exit_code)

    def say(self, path: Path, settings: DictConfig) -> None:
        """Print where the results go and the command that continues, where there is a directory of its own."""
        several = settings.mode == RunMode.MULTIRUN
        is_first = os.environ.get("RANK", "0") == "0" and not (several and settings.job.num)
        if path == Path.cwd() or not is_first:
            return
        place = f"hydra.{'sweep' if several else 'run'}.dir={_short(path.parent if several else path)}"
        words = [word for word in self.words if word.partition("=")[0] != place.partition("=")[0]]
        words += [] if several and any(word.startswith("out=") for word in words) else [place]  # of sample.py
        python = "python" if shutil.which("python") == sys.executable else _short(Path(sys.executable))
        typed = shlex.join([python, self.program, *words])
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        self.again = f"to continue: {typed}" if alone else f"to continue: the same torchrun command with {place}"
        print(f"{place.partition('=')[2]}; if stopped, {self.again}", flush=True)


def _short(path: Path) -> str:
    """A path as it is typed here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def usage(config_name: str) -> str:
    """What --help prints: the root config with its comments, and every option of every group."""
    root = (config_dir() / f"{config_name}.yaml").read_text()
    intro, _, rest = root.partition("defaults:\n")
    _, _, keys = rest.partition("\n\n")
    listed = [
        f"{group}={name}".ljust(34) + " ".join(option for option in options(group) if option != name)
        for group, name in groups(config_name).items()
    ]
    keys = keys.partition("\nhydra:")[0].strip()
    return "\n".join(
        [
            intro.replace("# ", "").strip(),
            f"\nusage: python {config_name}.py [group=option] [key=value] [group.key=value] [-m key=a,b]",
            "\ngroups, as chosen by default, and their other options (every key of a group: --cfg job):\n",
            *listed,
            "\nkeys:\n",
            keys,
            "\n-m sweeps over comma-separated values; HYDRA_FULL_ERROR=1 shows tracebacks; Hydra's flags: --hydra-help",
        ]
    )


def _adapt_to_torchrun(argv: list[str]) -> None:
    """Under torchrun rank 0 alone owns the run directory; a sweep would hang in its second job, so it is refused."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if {"-m", "--multirun"} & set(argv):
        raise ConfigError("-m under torchrun hangs in the second job: start one torchrun per setting")
    if os.environ.get("RANK", "0") != "0":
        argv[1:] = [a for a in argv[1:] if not a.startswith("hydra.run.dir=")]
        argv += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]


def _line(error: Any, config_name: str, words: list[str]) -> tuple[object, int]:
    if isinstance(error, LdmError):
        return error, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error, lambda: base(*sort_out(words), config_name)), ConfigError.exit_code
    return f"{error.filename}: {error.strerror}", ConfigError.exit_code


def _fail(message: object, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
