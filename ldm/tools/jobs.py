"""Jobs of a sweep: each leaves job.json, so that a sweep begun again in its directory repeats only what did not end."""

import copy
import json
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm.io.text import read_json, write_json
from ldm.utils.errors import ConfigError, DataError, LdmError

RECORD = "job.json"  # {"config": ..., "overrides": ..., "error": a line or null, "value": what main returned}
LEFT_OUT = "left out"  # begins the error of an option that glob(*) found and that does not fit


@dataclass
class Sweep:
    """The jobs of a sweep that ran in this process. Of glob(*), options that do not fit the others are left out."""

    globs: Collection[str] = ()  # settings that are swept over all that there is
    ended: int = 0
    left_out: list[ConfigError] = field(default_factory=list)

    def check(self) -> None:
        """Raise the error of a job that was left out where none came to an end."""
        if self.left_out and not self.ended:
            raise self.left_out[-1]


def run_job(
    main: Callable[[dict, Path], float | None],
    cfg: dict,
    path: Path,
    number: int,
    overrides: Sequence[str],
    sweep: Sweep | None = None,
) -> float | None:
    """main(cfg, path), unless a job with these settings has ended in `path` before; what came of it is written down.

    An error is raised again under the job's name; the launcher goes on with the next job. A setting that cannot be is
    no error where the sweep tries all that there is: it is said, and the job is left out.
    """
    sweep = sweep or Sweep()
    name = f"job {number} ({', '.join(overrides)})"
    record = {"config": json.loads(json.dumps(cfg)), "overrides": list(overrides), "error": None, "value": None}
    known = outcome(path)
    if known.get("config") == record["config"] and known.get("error") is None:
        print(f"{name}: finished before, in {path}")
        sweep.ended += 1
        return known.get("value")
    try:
        value = main(copy.deepcopy(cfg), path)
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        is_misfit = isinstance(error, ConfigError) and any(each.partition("=")[0] in sweep.globs for each in overrides)
        line = f"{LEFT_OUT}: {line}" if is_misfit else line
        print(f"{name} {'' if is_misfit else 'failed: '}{line}", file=sys.stderr)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / RECORD, record | {"error": line})
        if is_misfit:
            return sweep.left_out.append(error)
        if isinstance(error, LdmError):
            raise type(error)(f"{name}: {line}") from error
        raise
    write_json(path / RECORD, record | {"value": value})
    sweep.ended += 1
    return value


def outcome(path: Path) -> dict:
    """What job.json of a directory says; empty where there is none that can be read."""
    try:
        known = read_json(path / RECORD)
    except DataError:
        return {}
    return known if isinstance(known, dict) else {}


def reached(goal: str | None, summary: dict) -> float | None:
    """The number that a search improves, of the summary of a run. Raises ConfigError where it has none."""
    if goal is None:
        return None
    found = summary["metrics"].get(goal)
    if not isinstance(found, int | float):
        numbers = [name for name, value in summary["metrics"].items() if isinstance(value, int | float)]
        raise ConfigError(f"goal={goal}: the run has no such number; it has {', '.join(sorted(numbers))}")
    return found
