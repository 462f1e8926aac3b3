"""Reading stored latents: batches as training gets them, a bare gather from the mapped file, and a .npy per image.

A row is the 16 KB of an image of 256 pixels: 4 x 32 x 32 means and log-variances in float16, which is as much as its
latents in float32. "ldm" is all that `batches` does: whose turn it is in the shuffled epoch, the rows, captions, sizes.
The million rows lie in a sparse file. The last line is the share of a training step that is spent waiting for a batch.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import arguments, assert_equal, interleave
from torch.utils.data import Dataset

from ldm.data.cache import StoredLatents, Table
from ldm.data.loader import batches, facts
from ldm.models.unet import UNet

SHAPE, BATCH = (8, 32, 32), 256
COLUMNS = {"moments": (torch.float16, SHAPE), "item": (torch.int64, ()), "index": (torch.int64, ()),
           "size": (torch.int64, (6,)), "content": (torch.uint8, (16,))}  # fmt: skip


class Captions(Dataset):
    """The words of images that are not looked at any more."""

    def __init__(self, count: int):
        self.captions = [f"image number {i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.captions)


@facts.register
def _(dataset: Captions, items: torch.Tensor) -> dict:
    return {"caption": [dataset.captions[i] for i in items.tolist()]}


def table_of(path: Path, count: int, filled: bool) -> Table:
    """A table of `count` images, with random latents or, sparse, with zeros."""
    table = Table(path)
    for start in range(0, count if filled else 1, 1024):
        n, items = min(1024, count - start) if filled else 1, torch.arange(start, start + 1024)
        rows = {name: torch.zeros(n, *shape, dtype=dtype) for name, (dtype, shape) in COLUMNS.items()}
        table.append(rows | {"moments": torch.randn(n, *SHAPE).half(), "item": items[:n], "index": items[:n]})
    table.commit()
    if not filled:
        for name, (dtype, shape) in COLUMNS.items():
            with open(path / f"{name}.bin", "r+b") as file:
                file.truncate(count * dtype.itemsize * int(np.prod(shape)))
        for name in ("item", "index"):
            np.arange(count).tofile(path / f"{name}.bin")
        header = json.loads((path / "header.json").read_text())
        (path / "header.json").write_text(json.dumps(header | {"count": count}))
    return Table(path)


def gather(path: Path, count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What cannot be beaten: the rows of a mapped array, by number."""
    mapped = np.memmap(path / "moments.bin", np.float16, "r", shape=(count, *SHAPE))
    return lambda rows: torch.from_numpy(mapped[rows.numpy()])


def per_file(folder: Path, table: Table) -> Callable[[torch.Tensor], torch.Tensor]:
    """fast-DiT's way: one .npy for each image."""
    folder.mkdir()
    for i, row in enumerate(table.column("moments")):
        np.save(folder / f"{i}.npy", row.numpy())
    return lambda rows: torch.stack([torch.from_numpy(np.load(folder / f"{i}.npy")) for i in rows.tolist()])


def compare(root: Path, count: int, filled: bool, rounds: int) -> None:
    path = root / f"latents-{count}"
    table = table_of(path, count, filled)
    start = time.perf_counter()
    stored = StoredLatents(Captions(0), [Table(path)])
    opened = time.perf_counter() - start
    stored.dataset = Captions(count)
    stream, bare = batches(stored, BATCH, seed=0), gather(path, count)
    order = itertools.cycle(torch.randperm(count)[: count // BATCH * BATCH].split(BATCH))  # for nothing, and as ours is
    first = next(stream)  # shuffles the epoch: once in `count` images
    error = assert_equal(first["moments"], bare(first["index"]), tol=0.0) if filled else 0.0

    def ours(times: int) -> None:
        for _ in range(times):
            next(stream)

    def theirs(read: Callable, times: int) -> None:
        for _ in range(times):
            read(next(order))

    def report(name: str, read: Callable, target: float | None, times: int) -> None:
        timed = interleave({"ldm": lambda: ours(times), name: lambda: theirs(read, times)}, rounds=rounds)
        more = {"us_an_image": round(timed.median("ldm") / times / BATCH * 1e6, 2), "open_ms": round(opened * 1e3, 1)}
        timed.report("stored_latents", "ldm", [name], target=target, images=count, **more, error=error)

    report("gather", bare, 1.4, times=200)
    if filled:
        report(".npy", per_file(root / f"npy-{count}", table), None, times=10)


def waiting(root: Path, rounds: int, small: bool) -> None:
    """A step of a small UNet on batches of 32, and the time in which its batch is made."""
    stored = StoredLatents(Captions(2048), [Table(root / "latents-2048")])
    stream = batches(stored, 32, seed=0)
    sizes = {"channels": 32, "channel_mult": (1, 2), "depth": (0, 1, 1), "head_dim": 32}
    net = UNet(4, **(sizes if small else {"channels": 64, "channel_mult": (1, 2, 4), "depth": (0, 1, 1, 1)}))
    batch = next(stream)["moments"][:, :4].float()

    def step() -> None:
        net(batch, torch.zeros(len(batch))).square().mean().backward()

    timed = interleave({"wait": lambda: next(stream), "step": step}, rounds=rounds)
    size = sum(map(torch.numel, net.parameters()))
    timed.report("stored_latents", "wait", ["step"], target=0.02, batch=32, parameters=size)


def main() -> None:
    args = arguments(__doc__)
    torch.manual_seed(0)
    rounds = 2 if args.small else args.rounds or 11
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for count in (2048,) if args.small else (2048, 32768, 1_000_000):
            compare(root, count, count < 1_000_000, rounds)
        waiting(root, rounds, args.small)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
