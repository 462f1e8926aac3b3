"""Sweeps of sample.py: which settings differ between folders of drawn images, and those images side by side."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.io.text import read_json
from ldm.tools.jobs import outcome
from ldm.tools.runs import flat, natural, split, tolerant

RECORDS, NUMBERS = "samples.json", "metrics.json"
NO_SETTING = {"file", "prompt", "seed", "numbers"}
TILE = 4  # images of a cell, at most


@dataclass
class Drawn:
    """What one call of sample.py left: its images, or numbers of them, and its settings as name -> value."""

    path: Path
    records: list[dict]  # of images
    typed: dict[str, str]  # in a sweep: its overrides
    settings: dict[str, str]
    numbers: dict[str, float]

    def image(self, prompt: str, seed: int) -> Path | None:
        found = (r["file"] for r in self.records if (r["prompt"], r["seed"]) == (prompt, seed))
        return next((self.path / name for name in found), None)


def find_drawn(directories: Iterable[Path]) -> tuple[list[Drawn], list[tuple[Path, str]]]:
    """Folders of drawn images at or below the directories; and the jobs of sweeps that failed there, and why."""
    drawn, failed = {}, {}
    for root in directories:
        for folder, _, files in os.walk(root):
            path = Path(folder)
            if {RECORDS, NUMBERS} & {*files}:
                drawn[path.resolve()] = read_drawn(path)
            elif error := outcome(path).get("error"):
                failed[path.resolve()] = (path, error)
    return sorted(drawn.values(), key=lambda d: natural(d.path)), sorted(failed.values(), key=lambda f: natural(f[0]))


def read_drawn(path: Path) -> Drawn:
    """Whatever can be read of one folder."""
    records, measured = (tolerant(read_json, path / name) for name in (RECORDS, NUMBERS))
    how = records[0] if records else measured
    settings = {key: value for key, value in how.items() if key not in NO_SETTING}
    typed = dict(split(line) for line in outcome(path).get("overrides", []))
    return Drawn(path, records or [], typed, {**dict(_named(settings)), **typed}, measured.get("numbers", {}))


def _named(settings: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """A node of a group has its name and its knobs: sampler, sampler.eta."""
    for key, value in settings.items():
        if isinstance(value, dict) and "_target_" in value:
            *_, module, function = value["_target_"].split(".")
            yield key, module if function == "sample" else function
            value = {name: knob for name, knob in value.items() if not name.startswith("_")}
        yield from flat(value, key)


def axes(drawn: Sequence[Drawn]) -> list[str]:
    """The settings in which the folders differ: what was typed first, then others that do not follow from it."""
    keys = dict.fromkeys(key for part in ("typed", "settings") for one in drawn for key in getattr(one, part))
    chosen: list[str] = []
    for key in keys:
        cases = {(*(one.settings.get(c, "") for c in chosen), one.settings.get(key, "")) for one in drawn}
        if len(cases) > len({case[:-1] for case in cases}):
            chosen.append(key)
    return chosen


def drawn_table(drawn: Sequence[Drawn]) -> list[list[str]]:
    """A row for each folder: what is its own among the settings, and its numbers."""
    columns, metrics = axes(drawn), list(dict.fromkeys(name for one in drawn for name in one.numbers))
    table = [[*columns, *metrics, "folder"]]
    for one in drawn:
        numbers = [f"{one.numbers[name]:.4g}" if name in one.numbers else "-" for name in metrics]
        table.append([*(one.settings.get(column, "") for column in columns), *numbers, str(one.path)])
    return table


def drawn_grid(drawn: Sequence[Drawn], path: Path) -> str:
    """The same prompts and seeds with every setting: the shortest axis across, the others down. Says what was done."""
    import torch  # only here: the table needs none of it

    from ldm.io.images import read_image, write_png
    from ldm.utils.images import axes_grid, make_grid

    drawn = [one for one in drawn if one.records]
    if not drawn:
        return f"{path.name} skipped: no folder has {RECORDS}"
    chosen = axes(drawn) or ["run"]
    across = min(chosen, key=lambda axis: len({one.settings.get(axis) for one in drawn}))
    down = [axis for axis in chosen if axis != across]
    shared = [(r["prompt"], r["seed"]) for r in drawn[0].records if all(d.image(r["prompt"], r["seed"]) for d in drawn)]
    if not shared:
        return f"{path.name} skipped: no prompt was drawn with the same seed in every folder"
    tiles, sizes = {}, set()
    for one in drawn:
        images = [tolerant(read_image, one.image(*pair)) for pair in shared[:TILE]]
        sizes |= {tuple(image.shape[1:]) for image in images}
        if len(sizes) > 1:
            return f"{path.name} skipped: images of {' and '.join(f'{w}x{h}' for h, w in sorted(sizes))} are mixed"
        named = "{}={}" if len(down) > 1 else "{1}"
        row = ", ".join(named.format(key, one.settings.get(key, "")) for key in down)
        place = row, one.settings.get(across, "")
        tiles[place] = make_grid(torch.stack(images))
    rows, columns = (list(dict.fromkeys(place[axis] for place in tiles)) for axis in (0, 1))
    blank = torch.full_like(next(iter(tiles.values())), 255)
    cells = torch.stack([torch.stack([tiles.get((row, column), blank) for column in columns]) for row in rows])
    write_png(path, axes_grid(cells, rows, [f"{across}={column}" for column in columns]))
    return str(path)
