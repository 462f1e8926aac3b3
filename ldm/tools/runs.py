"""What run directories hold, as far as it can be read: a killed run leaves less than a complete one."""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.io.files import read_bytes
from ldm.io.text import parse_json, read_json, read_yaml
from ldm.tools.jobs import outcome
from ldm.utils.errors import DataError

MARKS = {"config.yaml", "metrics.jsonl", "summary.json", ".hydra"}  # any of these makes a directory a run
NOT_COMPARED = {"seed", "resume", "goal"}
MAX_BYTES = 1 << 30


@dataclass
class Run:
    """What one run directory holds; `summary` is empty while a run is not complete."""

    path: Path
    seed: str
    settings: dict[str, str]  # dotted key -> value, without the seed
    overrides: dict[str, str]  # the part of them that was typed
    summary: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]]  # of what metrics.jsonl has: step, value
    grid: Path | None  # the last preview
    claim: dict[str, Any]  # what a paper says of the ablation that this run belongs to
    error: str | None = None  # why the job of a sweep failed

    @property
    def losses(self) -> list[tuple[int, float]]:
        return self.curves.get("loss", [])

    def setting(self, key: str) -> str:
        return self.overrides.get(key, self.settings.get(key, ""))

    def number(self, key: str) -> float | None:
        """Of summary.json: a metric, or a number beside the metrics, such as `parameters`."""
        for node in (self.summary, self.summary.get("metrics")):
            value = node.get(key) if isinstance(node, dict) else None
            if is_number(value):
                return value
        return None


def find_runs(directories: Iterable[Path]) -> list[Run]:
    """Every run at or below the directories, in natural order of their paths. Raises DataError for no directory."""
    found = {}
    for root in directories:
        if not root.is_dir():
            raise DataError(f"{root}: no such directory; give run directories, or directories that hold some")
        for folder, folders, files in os.walk(root):
            if MARKS & {*folders, *files}:
                found[Path(folder).resolve()] = Path(folder)
                folders.clear()
    return [read_run(path) for path in sorted(found.values(), key=natural)]


def read_run(path: Path) -> Run:
    """Whatever can be read of one run, however it ended."""
    config = tolerant(read_yaml, path / "config.yaml") or tolerant(read_yaml, path / ".hydra" / "config.yaml")
    typed = tolerant(read_yaml, path / ".hydra" / "overrides.yaml", kind=list)
    seed = config.get("seed")
    claim = config.pop("claim", None)
    config.pop("scale", None)  # numbers that act where other settings read them
    settings = {key: value for key, value in flat(config) if key not in NOT_COMPARED}
    overrides = dict(split(str(text)) for text in typed)
    return Run(
        path=path,
        seed="" if seed is None else str(seed),
        settings=settings,
        overrides={key: value for key, value in overrides.items() if key.split(".")[0] not in NOT_COMPARED},
        summary=tolerant(_read_summary, path / "summary.json"),
        curves=_curves(path / "metrics.jsonl"),
        grid=max((path / "samples").glob("step_*.png"), key=natural, default=None),
        claim=claim if isinstance(claim, dict) else {},
        error=outcome(path).get("error"),
    )


def _curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """name -> (step, value) of each line that can be read: the last line of a killed run is often half a line."""
    curves: dict[str, list[tuple[int, float]]] = {}
    data = tolerant(read_bytes, path, max_bytes=MAX_BYTES) or b""
    for line in data.splitlines():
        row = tolerant(parse_json, line.decode(errors="replace"), str(path))
        numbers = {k: v for k, v in row.items() if is_number(v)} if isinstance(row, dict) else {}
        step = numbers.pop("step", None)
        for name, value in numbers.items() if isinstance(step, int) else ():
            curves.setdefault(name, []).append((step, value))
    return curves


def is_number(value: Any) -> bool:
    """Whether a value of a file is one that can be drawn and averaged."""
    return type(value) in (int, float) and abs(value) < 1e300


def _read_summary(path: Path) -> dict:
    summary = _expect(read_json(path), dict, path)
    metrics = summary.get("metrics")
    return summary | {"metrics": metrics if isinstance(metrics, dict) else {}}


def _expect(value: Any, kind: type, path: Path) -> Any:
    if not isinstance(value, kind):
        raise DataError(f"{path}: holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


def tolerant(read: Callable, *args: Any, **knobs: Any) -> Any:
    """What `read` gives, or an empty table where the file is absent or damaged."""
    try:
        return read(*args, **knobs)
    except DataError:
        return {}


def flat(node: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted key, value as text) of every leaf; a list is a leaf."""
    if not isinstance(node, dict):
        yield prefix, node if isinstance(node, str) else json.dumps(node)
        return
    for key, value in node.items():
        yield from flat(value, f"{prefix}.{key}" if prefix else str(key))


def split(override: str) -> tuple[str, str]:
    """`+key=value` -> key, value; `~key` -> key, 'removed'."""
    key, equals, value = override.lstrip("+").partition("=")
    return (key.lstrip("~"), "removed") if key.startswith("~") or not equals else (key, value)


def natural(path: Path | str) -> list:
    """A key that sorts 9 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]
