"""The command line of `train.py` and `sample.py`: Hydra, answers before torch is imported, errors in one line."""

import os
import re
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

from ldm.build import config_dir, explain, plain
from ldm.io.output import lasting_output
from ldm.tools.jobs import run_job
from ldm.utils.errors import ConfigError, LdmError


def entry(config_name: str) -> Callable:
    """Decorator: `main(cfg: dict, run_dir: Path) -> number for a search` becomes a program with one-line errors."""

    full_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

    def decorate(main: Callable[[dict, Path], float | None]) -> Callable[[], None]:
        def job(cfg: DictConfig) -> float | None:
            settings = HydraConfig.get()
            path = Path(settings.runtime.output_dir)
            if settings.mode == RunMode.MULTIRUN:  # errors are raised: the sweep goes on, and fails at its end
                return run_job(main, plain(cfg), path, settings.job.num, list(settings.overrides.task))
            try:
                return main(plain(cfg), path)
            except LdmError as error:
                if full_traceback:
                    raise
                _fail(error, error.exit_code)

        program = hydra.main(config_path=str(config_dir()), config_name=config_name, version_base="1.3")(job)

        @wraps(main)
        @lasting_output()
        def run() -> None:
            if {"--help", "-h"} & set(sys.argv):
                return print(usage(config_name))
            os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us instead of being printed by Hydra
            try:
                _adapt_to_torchrun(sys.argv)
                program()
            except (LdmError, HydraException, OmegaConfBaseException, OSError, KeyboardInterrupt) as error:
                if full_traceback:
                    raise
                _fail(*_line(error, config_name))
            finally:
                os.environ["HYDRA_FULL_ERROR"] = "1" if full_traceback else "0"

        return run

    return decorate


def usage(config_name: str) -> str:
    """What --help prints: the root config with its comments, and every option of every group."""
    root = (config_dir() / f"{config_name}.yaml").read_text()
    intro, _, rest = root.partition("defaults:\n")
    defaults, _, keys = rest.partition("\n\n")
    chosen = dict(re.findall(r"^  - (\w+): (\w+)", defaults, re.MULTILINE))
    groups = [f"{group}={name}".ljust(34) + _options(group, name) for group, name in chosen.items()]
    keys = keys.partition("\nhydra:")[0].strip()
    return "\n".join(
        [
            intro.replace("# ", "").strip(),
            f"\nusage: python {config_name}.py [group=option] [key=value] [group.key=value] [-m key=a,b]",
            "\ngroups, as chosen by default, and their other options (every key of a group: --cfg job):\n",
            *groups,
            "\nkeys:\n",
            keys,
            "\n-m sweeps over comma-separated values; HYDRA_FULL_ERROR=1 shows tracebacks; Hydra's flags: --hydra-help",
        ]
    )


def _options(group: str, chosen: str) -> str:
    return " ".join(sorted(p.stem for p in (config_dir() / group).glob("*.yaml") if p.stem != chosen))


def _adapt_to_torchrun(argv: list[str]) -> None:
    """Under torchrun rank 0 alone owns the run directory; a sweep would hang in its second job, so it is refused."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if {"-m", "--multirun"} & set(argv):
        raise ConfigError("-m under torchrun hangs in the second job: start one torchrun per setting")
    if os.environ.get("RANK", "0") != "0":
        argv[1:] = [a for a in argv[1:] if not a.startswith("hydra.run.dir=")]
        argv += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]


def _line(error: Any, config_name: str) -> tuple[object, int]:
    if isinstance(error, LdmError):
        return error, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error, config_name), ConfigError.exit_code
    return f"{error.filename}: {error.strerror}", ConfigError.exit_code


def _fail(message: object, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
