"""Runs -> tables, verdicts on papers' claims, curves and pictures: `python -m ldm.tools.report DIR... [--out DIR]`.

A run is any directory at or below DIR that train.py has begun. The settings in which runs differ become columns; runs
that differ only in their seed share a row: the mean over seeds and, in brackets, the least and the greatest value.
Sweeps of sample.py are folders of images there: a table of their settings, and one grid of the same prompts and seeds.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.io.files import replacing
from ldm.io.output import lasting_output
from ldm.tools.claims import claims
from ldm.tools.drawn import Drawn, drawn_grid, drawn_table, find_drawn
from ldm.tools.figures import contact_sheet, plot
from ldm.tools.jobs import LEFT_OUT
from ldm.tools.page import Block, Heading, Picture, Table, Text, markdown, page
from ldm.tools.runs import MARKS, Run, find_runs
from ldm.tools.table import as_csv, group, notes, sampling_table, settings_table
from ldm.utils.errors import DataError, LdmError


def report(directories: list[Path], out: Path) -> None:
    """Print the tables and write report.md, report.html, report.csv and the pictures into `out`."""
    runs = find_runs(directories)
    drawn, failed = find_drawn(directories)
    if not runs and not drawn:
        where = ", ".join(map(str, directories))
        raise DataError(f"no run in {where}; a run holds {', '.join(sorted(MARKS))}, a folder of images samples.json")
    out.mkdir(parents=True, exist_ok=True)
    blocks: list[Block] = [Heading("Report", 1)]
    blocks += about_runs(runs, out) if runs else []
    blocks += about_drawn(drawn, [line for line in failed if line[0] not in {run.path for run in runs}], out)
    text = markdown(blocks)
    print(text)
    _write(out / "report.md", text)
    _write(out / "report.html", page(blocks))


def about_runs(runs: list[Run], out: Path) -> list[Block]:
    """The table of training runs, what claims they were made for, and their pictures."""
    rows, made_for = group(runs), claims(runs)
    blocks: list[Block] = [Table(settings_table(rows))]
    blocks += [Table(ways)] if (ways := sampling_table(rows)) else []
    blocks += [Text("\n".join(lines).strip())] if (lines := notes(rows)) else []
    for claim in made_for:
        table = [["claim, best first", "metric", "verdict", "measured"]]
        table += [[v.order.text, v.order.metric, v.text, v.reason] for v in claim.verdicts()]
        blocks += [Heading(claim.node["paper"]), Text(claim.node["says"] + "."), Table(table)]
    _write(out / "report.csv", as_csv(rows))
    blocks += _picture(plot(rows, made_for, out / "report.png"), out / "report.png", "Curves and results")
    return blocks + _picture(contact_sheet(rows, out / "contact.png"), out / "contact.png", "The last previews")


def about_drawn(drawn: list[Drawn], failed: list[tuple[Path, str]], out: Path) -> list[Block]:
    """The table of folders of images and their grid; jobs of the sweep that failed."""
    blocks: list[Block] = []
    if drawn:
        blocks += [Heading("Images"), Table(drawn_table(drawn))]
        blocks += _picture(drawn_grid(drawn, out / "drawn.png"), out / "drawn.png", "The same prompts and seeds")
    lines = [f"- {'' if error.startswith(LEFT_OUT) else 'failed: '}{path} ({error})" for path, error in failed]
    return blocks + ([Text("\n".join(lines))] if lines else [])


def _picture(done: str, path: Path, caption: str) -> list[Block]:
    """What was written; or why it was not."""
    print(done)
    return [Picture(path, caption)] if done == str(path) else [Text(done)]


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
    print(path)


@lasting_output()
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
