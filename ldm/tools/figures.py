"""The pictures of a report: curves and dots, and the last preview of every run."""

from collections.abc import Sequence
from pathlib import Path

from ldm.io.files import replacing
from ldm.tools.claims import Claim
from ldm.tools.runs import tolerant
from ldm.tools.table import Row, metric_names

CELL = 384  # pixels, the width of one run in the contact sheet
DECADE = 10  # a panel whose positive values span more than this is logarithmic
PANELS = 5  # at most
LEGEND = 16  # rows, at most: more hide the curves
LINE = 0.2  # inches, of a row of dots
COLOURS = ("#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf "
           "#aec7e8 #ffbb78 #98df8a #ff9896 #c5b0d5 #c49c94 #f7b6d2 #c7c7c7 #dbdb8d #9edae5").split()  # fmt: skip


def plot(rows: list[Row], claims: Sequence[Claim], path: Path) -> str:
    """The loss over steps, one colour per row, and metrics: those that claims name, else the first one.

    Returns what was done, in one line.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"{path.name} skipped: matplotlib is not installed (pip install matplotlib)"
    panels = panels_of(rows, claims)[: PANELS - 1]
    height = max([4.2, *(LINE * len(dots) for _, dots in panels)])
    figure = Figure(figsize=(5.2 * (1 + len(panels)), height), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    colours = colours_of(rows, claims, panels)
    _curves(first, rows, "loss", colours)
    for axis, (metric, dots) in zip(others, panels, strict=True):
        if any(len(run.curves.get(metric, [])) > 2 for row in rows for run in row.runs):
            _curves(axis, rows, metric, colours)
        else:
            _dots(axis, metric, dots, colours)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=80)
    return str(path)


def panels_of(rows: list[Row], claims: Sequence[Claim]) -> list[tuple[str, dict[str, list[float]]]]:
    """(metric, {arm: one value per seed}) of each metric that claims name, or of the headline for all rows."""
    panels: dict[str, dict[str, list[float]]] = {}
    for claim in claims:
        for order in claim.orders:
            arms = {arm: tolerant(order.values, arm, claim.runs) for arm in order.arms}
            panels.setdefault(order.metric, {}).update({arm: [*seeds.values()] for arm, seeds in arms.items() if seeds})
    if found := [panel for panel in panels.items() if panel[1]]:
        return found
    return [(name, {row.label: row.values(name) for row in rows}) for name in metric_names(rows)[:1]]


def colours_of(rows: list[Row], claims: Sequence[Claim], panels: Sequence[tuple[str, dict]]) -> dict[str, str]:
    """A colour for every row and every arm, in all panels: an arm that is a row has its colour, a way of sampling one
    of its own."""
    owner = {id(run): row.label for row in rows for run in row.runs}
    same: dict[str, str] = {}
    orders = [(order, claim.runs) for claim in claims for order in claim.orders]
    for order, runs in orders:
        for arm in order.arms:
            labels = {owner[id(run)] for run in order.runs(arm, runs)}
            if len(labels) == 1 and len(arm.split("/")) == len(order.settings):
                same[arm] = labels.pop()
    names = dict.fromkeys([row.label for row in rows] + [arm for _, dots in panels for arm in dots if arm not in same])
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    return colours | {arm: colours[label] for arm, label in same.items()}


def _curves(axis, rows: list[Row], name: str, colours: dict[str, str]) -> None:
    """A metric over steps; a loss as a running mean."""
    for row in rows:
        axis.plot([], [], color=colours[row.label], label=row.label)
        for run in row.runs:
            curve = run.curves.get(name, [])
            points = smooth(curve) if name == "loss" else tuple(zip(*curve, strict=True)) or ([], [])
            axis.plot(*points, color=colours[row.label], alpha=0.8, linewidth=1)
    values = [value for row in rows for run in row.runs for _, value in run.curves.get(name, [])]
    axis.set(xlabel="step", ylabel=name, yscale=_scale(values))
    if len(rows) <= LEGEND:
        axis.legend(fontsize="x-small")


def _dots(axis, name: str, arms: dict[str, list[float]], colours: dict[str, str]) -> None:
    for arm, values in arms.items():
        axis.plot(values, [arm] * len(values), "o", color=colours[arm])
    axis.set(xlabel=name, xscale=_scale([value for values in arms.values() for value in values]))
    axis.yaxis.set_inverted(True)  # in the order of the table
    axis.grid(axis="x", alpha=0.3)


def _scale(values: Sequence[float]) -> str:
    """Of an axis: logarithmic where positive values span more than a decade."""
    return "log" if values and min(values) > 0 and max(values) > DECADE * min(values) else "linear"


def smooth(curve: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps and running means over a fiftieth of the curve: single batches of a diffusion loss are mostly noise."""
    window, sums = max(1, len(curve) // 50), [0.0]
    for _, value in curve:
        sums.append(sums[-1] + value)
    ends = range(window, len(sums))
    return [curve[end - 1][0] for end in ends], [(sums[end] - sums[end - window]) / window for end in ends]


def contact_sheet(rows: list[Row], path: Path) -> str:
    """The last preview of every run: a row for each of the table, a column for each seed. Says what was done."""
    import torch  # only here: the table needs none of it

    from ldm.io.images import read_image, write_png
    from ldm.utils.images import axes_grid

    seeds = list(dict.fromkeys(run.seed for row in rows for run in row.runs))
    places = {(r, seeds.index(run.seed)): run.grid for r, row in enumerate(rows) for run in row.runs if run.grid}
    grids = {place: tolerant(read_image, grid) for place, grid in places.items()}
    shown = {place: _to_width(image, CELL) for place, image in grids.items() if len(image)}
    if not shown:
        return f"{path.name} skipped: no run has samples/step_*.png"
    height = max(image.shape[1] for image in shown.values())
    cells = torch.full((len(rows), len(seeds), 3, height, CELL), 255, dtype=torch.uint8)
    for (r, c), image in shown.items():
        cells[r, c, :, : image.shape[1]] = image
    write_png(path, axes_grid(cells, [row.label for row in rows], [f"seed {seed}" for seed in seeds]))
    return str(path)


def _to_width(image, width: int):
    """uint8 (3, H, W) at another width, the aspect kept."""
    import torch

    height = max(1, round(image.shape[1] * width / image.shape[2]))
    resized = torch.nn.functional.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).byte()
