"""Pictures and tables of the notebooks: curves, points, images, maps, shapes of what a network passes on."""

import copy
import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

WIDTH, HEIGHT = 4.2, 3.0  # inches of a panel
INK, PALE = "#222222", "#cccccc"
Curves = Mapping[str, tuple[Sequence, Sequence]]  # label -> (x, y)

plt.rcParams.update({"figure.dpi": 70, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                     "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8})  # fmt: skip


def panels(count: int, columns: int = 4, width: float = WIDTH, height: float = HEIGHT) -> list[Axes]:
    """Axes in rows of at most `columns`."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained")
    figure.set_size_inches(columns * width, rows * height)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return list(axes.flat[:count])


def curves(
    title: str,
    lines: Curves,
    x: str,
    y: str,
    *,
    ax: Axes | None = None,
    log: str = "",  # the axes that are logarithmic, e.g. "xy"
    marker: str = "",
    xlim: tuple[float, float] | None = None,
    ylim: tuple[float, float] | None = None,
    dashed: Sequence[str] = (),
) -> None:
    """Lines with their labels; dashed ones let others be seen below."""
    ax = ax or panels(1)[0]
    for label, (xs, ys) in lines.items():
        style = {"linestyle": "--", "zorder": 3} if label in dashed else {}
        ax.plot(xs, ys, label=label, marker=marker, **style)
    scales = {f"{name}scale": "log" for name in log}
    ax.set(title=title, xlabel=x, ylabel=y, **scales)
    ax.set(xlim=xlim, ylim=ylim)
    ticks = sorted({float(value) for xs, _ in lines.values() for value in xs})
    if "x" in log and len(ticks) < 8:
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        ax.minorticks_off()
    ax.legend()


def histograms(title: str, draws: Mapping[str, Tensor], x: str, *, ax: Axes | None = None, bins: int = 60) -> None:
    """Densities of several sets of numbers over one axis."""
    ax = ax or panels(1)[0]
    low, high = min(float(d.min()) for d in draws.values()), max(float(d.max()) for d in draws.values())
    for label, values in draws.items():
        ax.hist(values.flatten().tolist(), bins=bins, range=(low, high), density=True, histtype="step", label=label)
    ax.set(title=title, xlabel=x, ylabel="density")
    ax.legend()


def bars(title: str, values: Mapping[str, float], y: str, *, ax: Axes | None = None) -> None:
    ax = ax or panels(1)[0]
    ax.bar(list(values), list(values.values()), color=INK)
    ax.tick_params(axis="x", rotation=45, labelsize=8)
    ax.set(title=title, ylabel=y)


def points(clouds: Mapping[str, Tensor], data: Tensor, paths: Mapping[str, Tensor] | None = None) -> None:
    """A panel for each cloud (N 2), over the data in grey; with `paths` (S N 2) how its first points came there."""
    for axis, (title, cloud) in zip(panels(len(clouds), width=3, height=3), clouds.items(), strict=True):
        axis.scatter(*data.T, s=3, color=PALE)
        for path in paths[title][:, :40].unbind(1) if paths else ():
            axis.plot(*path.T, linewidth=0.5, color="tab:blue", alpha=0.6)
        axis.scatter(*cloud.T, s=4, color="tab:red")
        axis.set(title=title, xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xlim=(-1.7, 1.7), ylim=(-1.7, 1.7))


def images(rows: Mapping[str, Tensor], titles: Sequence[str] = (), *, size: float = 1.0) -> None:
    """A labelled row for each batch, (B 3 H W) uint8 or (B H W) float; `size` is the side of one picture in inches."""
    columns = max(len(row) for row in rows.values())
    figure, axes = plt.subplots(len(rows), columns, squeeze=False, layout="constrained")
    figure.set_size_inches(columns * size + 1, len(rows) * size + 0.2 * bool(titles))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for line, (label, row) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        for axis, picture in zip(line, row, strict=False):
            axis.imshow(picture.permute(1, 2, 0) if picture.ndim == 3 else picture, cmap="gray")
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=8)


def maps(values: Mapping[str, Tensor], x: str, y: str, *, colours: str = "viridis") -> None:
    """A panel with a scale of its own for each matrix (H W)."""
    for axis, (title, matrix) in zip(panels(len(values)), values.items(), strict=True):
        axis.grid(False)
        plt.colorbar(axis.imshow(matrix, aspect="auto", cmap=colours, interpolation="nearest"), ax=axis)
        axis.set(title=title, xlabel=x, ylabel=y)


def table(head: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Aligned columns; whole numbers with their thousands apart."""
    cells = [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]))


def shapes(net: nn.Module, names: Sequence[str], *inputs: Tensor, **conditions: Tensor) -> None:
    """Run the network and print what the named submodules give, in the order in which they run."""
    rows = [("x", "", str(tuple(inputs[0].shape)))]

    def note(name: str):
        def hook(module, given, out):
            tensors = [out] if isinstance(out, Tensor) else [part for part in out if isinstance(part, Tensor)]
            found = [str(tuple(tensor.shape)) for tensor in tensors]
            rows.append((name, type(module).__name__, " ".join(found[:2] + ["..."] * (len(found) > 2))))

        return hook

    hooks = [net.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with torch.no_grad():
        net(*inputs, **conditions)
    for hook in hooks:
        hook.remove()
    table(["module", "class", "gives"], rows)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def gmac(net: nn.Module, *inputs: Tensor, **conditions: Tensor) -> dict[str, float]:
    """10^9 multiply-adds by module, half of the FLOPs of products; the papers' "Gflops". "Global" is all of it.

    On the meta device: what runs on a processor, such as oneDNN's products, is not seen.
    """
    if not next(net.parameters()).is_meta:
        net = copy.deepcopy(net).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*(x.to("meta") for x in inputs), **{name: x.to("meta") for name, x in conditions.items()})
    return {name: sum(counts.values()) / 2e9 for name, counts in counter.get_flop_counts().items()}
