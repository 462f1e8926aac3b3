"""Runs -> rows: settings in which runs differ become columns, and runs that differ only in their seed share a row."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ldm.tools.runs import Run, natural

HEADLINES = ("prompt_accuracy", "psnr", "held_out_eps_mse", "loss")  # the first that a run has is also plotted
BOOKKEEPING = {"step", "lr", "grad_norm", "images", "images_per_second"}
COSTS = {  # summary key -> heading, factor
    "wall_seconds": ("minutes", 1 / 60),
    "images_per_second": ("images/s", 1),
    "peak_memory_bytes": ("GB", 1e-9),
    "parameters": ("M params", 1e-6),
}


@dataclass
class Row:
    """Runs with the same settings; `cells` has a value for each column of the table."""

    cells: dict[str, str]
    runs: list[Run]

    @property
    def label(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.cells.items() if value) or "default"

    def values(self, key: str) -> list[float]:
        """A number of the summaries, of each complete run that has it."""
        found = [run.number(key) for run in self.runs]
        return [value for value in found if value is not None]


def group(runs: list[Run]) -> list[Row]:
    """One row for each combination of settings, whatever the seed."""
    columns = differing(runs)
    rows: dict[tuple, Row] = {}
    for run in runs:
        cells = {column: run.setting(column) for column in columns}
        rows.setdefault(tuple(cells.values()), Row(cells, [])).runs.append(run)
    return list(rows.values())


def differing(runs: list[Run]) -> list[str]:
    """What was typed differently, and every other setting that differs for another reason (an edited config)."""
    typed = [key for key in _ordered(run.overrides for run in runs) if len({run.setting(key) for run in runs}) > 1]
    known = [run for run in runs if run.settings]
    columns = list(typed)
    for key in _ordered(run.settings for run in known):
        # network=dit changes many keys below it: a key that follows from the typed ones is not a column of its own.
        cases = {(*(run.setting(column) for column in typed), run.setting(key)) for run in known}
        if key not in typed and len(cases) > len({case[:-1] for case in cases}) and not _follows_seed(key, known):
            columns.append(key)
    return columns


def _follows_seed(key: str, runs: list[Run]) -> bool:
    """Whether a setting was interpolated from the seed, which tells no two experiments apart."""
    return key.endswith(".seed") and all(run.setting(key) == run.seed for run in runs)


def _ordered(tables: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(key for table in tables for key in table))


def metric_names(rows: list[Row]) -> list[str]:
    """Names of all final metrics that are numbers, headlines first, without the bookkeeping of training."""
    names = _ordered(run.summary.get("metrics") or {} for row in rows for run in row.runs)
    names = [name for name in names if name not in BOOKKEEPING and any(row.values(name) for row in rows)]
    return sorted(names, key=lambda name: HEADLINES.index(name) if name in HEADLINES else len(HEADLINES))


def settings_table(rows: list[Row]) -> list[list[str]]:
    """A row for each combination of settings: results and costs. Parts of metrics (name_1, name_2) are left out."""
    names = metric_names(rows)
    metrics = [name for name in names if "/" not in name and re.sub(r"_\d+$", "", name) not in {*names} - {name}]
    costs = [key for key in COSTS if any(row.values(key) for row in rows)]
    table = [[*rows[0].cells, "runs", *metrics, *(COSTS[key][0] for key in costs)]]
    for row in rows:
        done = sum(bool(run.summary) for run in row.runs)
        count = str(done) if done == len(row.runs) else f"{done} of {len(row.runs)}"
        results = [spread(row.values(name)) for name in metrics]
        spent = [spread([value * COSTS[key][1] for value in row.values(key)], brackets=False) for key in costs]
        table.append([*row.cells.values(), count, *results, *spent])
    return table


def sampling_table(rows: list[Row]) -> list[list[str]]:
    """A row for each way of sampling (metrics=sampling_arms) of each of those; empty where there are none."""
    pairs = [name.rsplit("/", 1) for name in metric_names(rows) if "/" in name]
    ways, metrics = (sorted(set(column), key=natural) for column in zip(*pairs, strict=True)) if pairs else ([], [])
    table = [[*rows[0].cells, "sampling", *metrics]] if pairs else []
    for row in rows:
        for way in ways:
            results = [spread(row.values(f"{way}/{metric}")) for metric in metrics]
            table += [[*row.cells.values(), way, *results]] if set(results) != {"-"} else []
    return table


def notes(rows: list[Row]) -> list[str]:
    """What a reader must know before comparing rows."""
    lines = ["Mean over seeds [least, greatest].", ""] if any(len(row.runs) > 1 for row in rows) else []
    runs = [run for row in rows for run in row.runs]
    for run in runs:
        if not run.summary:
            reached = f"step {run.losses[-1][0]}, loss {run.losses[-1][1]:.4g}" if run.losses else "nothing logged"
            lines.append(f"- incomplete: {run.path} ({run.error or reached})")
    revisions = _ordered({str(run.summary["git_revision"]): 0} for run in runs if run.summary.get("git_revision"))
    return lines + ([f"- from {len(revisions)} revisions of the code: {', '.join(revisions)}"] * (len(revisions) > 1))


def spread(values: Sequence[float], brackets: bool = True) -> str:
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):.4g}"
    return f"{mean} [{min(values):.4g}, {max(values):.4g}]" if brackets and len(values) > 1 else mean


def as_csv(rows: list[Row]) -> str:
    """The same numbers for programs, unrounded and in the units of summary.json: mean, min and max of each."""
    names = [*metric_names(rows), *COSTS]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    heads = [f"{name}{suffix}" for name in names for suffix in ("", "_min", "_max")]
    table.writerow([*rows[0].cells, "runs", "incomplete", *heads])
    for row in rows:
        numbers = [n for name in names for n in _mean_min_max(row.values(name))]
        undone = sum(not run.summary for run in row.runs)
        table.writerow([*row.cells.values(), len(row.runs) - undone, undone, *numbers])
    return text.getvalue()


def _mean_min_max(values: list[float]) -> tuple:
    return (sum(values) / len(values), min(values), max(values)) if values else ("", "", "")
