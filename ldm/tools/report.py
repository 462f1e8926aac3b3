"""Runs -> a table (Markdown, CSV), a plot and a sheet of samples: `python -m ldm.tools.report DIR... [--out DIR]`.

A run is any directory at or below DIR that train.py has begun. The settings in which runs differ become columns; runs
that differ only in their seed share a row: the mean over seeds and, in brackets, the least and the greatest value.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.io.files import replacing
from ldm.tools.runs import Run, find_runs, tolerant
from ldm.utils.errors import LdmError

HEADLINES = ("prompt_accuracy", "psnr", "loss")  # the first that a run has is also plotted
BOOKKEEPING = {"step", "lr", "grad_norm", "images", "images_per_second"}
COSTS = {  # summary key -> heading, factor
    "wall_seconds": ("minutes", 1 / 60),
    "images_per_second": ("images/s", 1),
    "peak_memory_bytes": ("GB", 1e-9),
    "parameters": ("M params", 1e-6),
}
CELL = 384  # pixels, the width of one run in the contact sheet


@dataclass
class Row:
    """Runs with the same settings; `cells` has a value for each column of the table."""

    cells: dict[str, str]
    runs: list[Run]

    @property
    def label(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.cells.items() if value) or "default"

    def values(self, *keys: str) -> list[float]:
        """A number of the summaries, of each complete run that has it."""
        found = [run.summary for run in self.runs]
        for key in keys:
            found = [node.get(key) for node in found if isinstance(node, dict)]
        return [value for value in found if isinstance(value, int | float)]


# ------------------------------------------------------------------------------------------------- the table


def group(runs: list[Run]) -> list[Row]:
    """One row for each combination of settings, whatever the seed."""
    columns = differing(runs)
    rows: dict[tuple, Row] = {}
    for run in runs:
        cells = {column: _setting(run, column) for column in columns}
        rows.setdefault(tuple(cells.values()), Row(cells, [])).runs.append(run)
    return list(rows.values())


def differing(runs: list[Run]) -> list[str]:
    """What was typed differently, and every other setting that differs for another reason (an edited config)."""
    typed = [key for key in _ordered(run.overrides for run in runs) if len({_setting(run, key) for run in runs}) > 1]
    known = [run for run in runs if run.settings]
    columns = list(typed)
    for key in _ordered(run.settings for run in known):
        # network=dit changes many keys below it: a key that follows from the typed ones is not a column of its own.
        cases = {(*(_setting(run, column) for column in typed), _setting(run, key)) for run in known}
        if key not in typed and len(cases) > len({case[:-1] for case in cases}):
            columns.append(key)
    return columns


def _setting(run: Run, key: str) -> str:
    return run.overrides.get(key, run.settings.get(key, ""))


def _ordered(tables: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(key for table in tables for key in table))


def metric_names(rows: list[Row]) -> list[str]:
    """Names of all final metrics that are numbers, headlines first, without the bookkeeping of training."""
    names = _ordered(run.summary.get("metrics") or {} for row in rows for run in row.runs)
    names = [name for name in names if name not in BOOKKEEPING and any(row.values("metrics", name) for row in rows)]
    return sorted(names, key=lambda name: HEADLINES.index(name) if name in HEADLINES else len(HEADLINES))


def markdown(rows: list[Row]) -> str:
    """The report as people read it: an aligned table, then the runs that did not end."""
    metrics = metric_names(rows)
    costs = [key for key in COSTS if any(row.values(key) for row in rows)]
    table = [[*rows[0].cells, "runs", *metrics, *(COSTS[key][0] for key in costs)]]
    for row in rows:
        done = sum(bool(run.summary) for run in row.runs)
        count = str(done) if done == len(row.runs) else f"{done} of {len(row.runs)}"
        results = [_spread(row.values("metrics", name)) for name in metrics]
        spent = [_spread([value * COSTS[key][1] for value in row.values(key)], brackets=False) for key in costs]
        table.append([*row.cells.values(), count, *results, *spent])
    return "\n".join(["# Report", "", *_aligned(table), "", *_notes(rows)]).rstrip() + "\n"


def _notes(rows: list[Row]) -> list[str]:
    """What a reader must know before comparing rows."""
    notes = ["Mean over seeds [least, greatest].", ""] if any(len(row.runs) > 1 for row in rows) else []
    runs = [run for row in rows for run in row.runs]
    for run in runs:
        if not run.summary:
            reached = f"step {run.losses[-1][0]}, loss {run.losses[-1][1]:.4g}" if run.losses else "nothing logged"
            notes.append(f"- incomplete: {run.path} ({reached})")
    revisions = _ordered({str(run.summary["git_revision"]): 0} for run in runs if run.summary.get("git_revision"))
    return notes + ([f"- from {len(revisions)} revisions of the code: {', '.join(revisions)}"] * (len(revisions) > 1))


def _aligned(table: list[list[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]


def _spread(values: list[float], brackets: bool = True) -> str:
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):.4g}"
    return f"{mean} [{min(values):.4g}, {max(values):.4g}]" if brackets and len(values) > 1 else mean


def as_csv(rows: list[Row]) -> str:
    """The same numbers for programs, unrounded and in the units of summary.json: mean, min and max of each."""
    names = [("metrics", name) for name in metric_names(rows)] + [(key,) for key in COSTS]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    heads = [f"{keys[-1]}{suffix}" for keys in names for suffix in ("", "_min", "_max")]
    table.writerow([*rows[0].cells, "runs", "incomplete", *heads])
    for row in rows:
        numbers = [n for keys in names for n in _mean_min_max(row.values(*keys))]
        undone = sum(not run.summary for run in row.runs)
        table.writerow([*row.cells.values(), len(row.runs) - undone, undone, *numbers])
    return text.getvalue()


def _mean_min_max(values: list[float]) -> tuple:
    return (sum(values) / len(values), min(values), max(values)) if values else ("", "", "")


# ------------------------------------------------------------------------------------------------- the pictures


def plot(rows: list[Row], path: Path) -> str:
    """Loss over steps, one colour per row, and the first metric of every run. Returns what was done, in one line."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"{path.name} skipped: matplotlib is not installed (pip install matplotlib)"
    metrics = metric_names(rows)[:1]
    figure = Figure(figsize=(6.4 * (1 + len(metrics)), 4.8), layout="constrained")
    axes = figure.subplots(1, 1 + len(metrics), squeeze=False)[0]
    for number, row in enumerate(rows):
        axes[0].plot([], [], color=f"C{number}", label=row.label)
        for run in row.runs:
            axes[0].plot(*_smooth(run.losses), color=f"C{number}", alpha=0.8, linewidth=1)
        for name in metrics:
            values = row.values("metrics", name)
            axes[1].plot(values, [row.label] * len(values), "o", color=f"C{number}")
    lowest = min((loss for row in rows for run in row.runs for _, loss in run.losses), default=1)
    axes[0].set(xlabel="step", ylabel="loss", yscale="log" if lowest > 0 else "linear")
    axes[0].legend(fontsize="x-small")
    for name in metrics:
        axes[1].set(xlabel=name)
        axes[1].yaxis.set_inverted(True)  # the rows in the order of the table
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return str(path)


def _smooth(losses: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps and running means over a fiftieth of the curve: single batches of a diffusion loss are mostly noise."""
    window, sums = max(1, len(losses) // 50), [0.0]
    for _, loss in losses:
        sums.append(sums[-1] + loss)
    ends = range(window, len(sums))
    return [losses[end - 1][0] for end in ends], [(sums[end] - sums[end - window]) / window for end in ends]


def contact_sheet(rows: list[Row], path: Path) -> str:
    """The last preview of every run side by side, named. Returns what was done, in one line."""
    import torch  # only here: the table needs none of it

    from ldm.io.images import read_image, write_png
    from ldm.utils.images import labelled_grid

    previews = [(row, run, tolerant(read_image, run.grid)) for row in rows for run in row.runs if run.grid]
    shown = [(row, run, _to_width(image, CELL)) for row, run, image in previews if len(image)]
    if not shown:
        return f"{path.name} skipped: no run has samples/step_*.png"
    height = max(grid.shape[1] for *_, grid in shown)
    pad = torch.nn.functional.pad
    images = torch.stack([pad(grid, (0, 0, 0, height - grid.shape[1]), value=255) for *_, grid in shown])
    labels = [f"{row.label} seed {run.seed}" if len(row.runs) > 1 else row.label for row, run, _ in shown]
    write_png(path, labelled_grid(images, labels))
    return str(path)


def _to_width(image, width: int):
    """uint8 (3, H, W) at another width, the aspect kept."""
    import torch

    height = max(1, round(image.shape[1] * width / image.shape[2]))
    resized = torch.nn.functional.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).byte()


# ------------------------------------------------------------------------------------------------- the command


def report(directories: list[Path], out: Path) -> None:
    """Print the table and write report.md, report.csv, report.png and contact.png into `out`."""
    rows = group(find_runs(directories))
    text = markdown(rows)
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("report.md", text), ("report.csv", as_csv(rows))):
        with replacing(out / name) as file:
            file.write(content.encode())
        print(out / name)
    print(plot(rows, out / "report.png"))
    print(contact_sheet(rows, out / "contact.png"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ldm.tools.report", description="Compare training runs.")
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a run, a sweep, or a folder of them")
    parser.add_argument("--out", type=Path, help="where the report goes; the first DIR unless given")
    chosen = parser.parse_args(arguments)
    try:
        report(chosen.directories, chosen.out or chosen.directories[0])
    except (LdmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, LdmError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
