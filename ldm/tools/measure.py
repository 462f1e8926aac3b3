"""`sample.py metrics=[...]`: numbers of a trained model, or of published weights, on images of held-out prompts.

What is drawn is kept: a command that was stopped continues, one with more metrics draws nothing again. Under torchrun
every rank draws its share of the images and rank 0 measures.

    OUT/drawn-KEY/000000.png ...   of one list of prompts and seeds drawn in one way
    OUT/metrics.json, metrics.md   the numbers
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.build import build_held_out, make
from ldm.data.cache import digest
from ldm.generate import Refiner, Run, generate, sides
from ldm.io.files import replacing
from ldm.io.images import read_image, write_png
from ldm.io.text import write_json
from ldm.sampling import Sampling
from ldm.tools.gallery import HOW
from ldm.tools.metrics import build_metrics
from ldm.tools.subject import load_subject
from ldm.training.distributed import World, init, local_device
from ldm.utils.devices import pick_device
from ldm.utils.errors import ConfigError

COUNTS = ("num_images", "num_prompts")  # what metrics call the number of images they have drawn


def measure(cfg: dict, out: Path) -> None:
    """Raises ConfigError for settings that metrics have no use for."""
    check_no_pictures(cfg)
    world = init(local_device(pick_device(cfg["device"])))
    try:
        out = world.first(lambda: out)  # the name of a new folder is each rank's own
        run, refiner = load_subject(cfg)
        draw = Draw(cfg, run, refiner, out, world)
        if not world.is_main:
            return draw.follow()
        try:
            report(cfg, run, numbers(cfg, run, draw), out)
        finally:
            draw.end()
    finally:
        world.close()


def check_no_pictures(cfg: dict) -> None:
    """ConfigError for settings of pictures, and for no pictures at all."""
    if cfg["num_images"] is not None and not (type(cfg["num_images"]) is int and cfg["num_images"] > 0):
        raise ConfigError(f"num_images={cfg['num_images']}: metrics need at least 1 image; null is their own number")
    if given := [name for name in ("prompts", "image", "mask") if cfg[name]]:
        raise ConfigError(f"{', '.join(given)} and metrics are both set: metrics draw held-out prompts; leave one out")


def numbers(cfg: dict, run: Run, draw: "Draw") -> dict[str, float]:
    """What every metric says, by name."""
    data, found = held_out_data(cfg, run, draw.size), {}
    for metric in build_metrics(sized(cfg["metrics"], cfg["num_images"])).values():
        found |= metric(draw, data, run.objective)
    return found


def sized(nodes: dict, count: int | None) -> dict:
    """Metrics of `count` images; None leaves each its own number."""
    if count is None:
        return nodes
    return {
        name: sized(node, count) if isinstance(node, dict) and name != "features" else count if name in COUNTS else node
        for name, node in nodes.items()
    }


def held_out_data(cfg: dict, run: Run, size: tuple[int, int]) -> Any:
    """The images a run held out; for published weights, which held out none of them, all of data=folder data.path=DIR.

    Raises ConfigError where there are none.
    """
    if cfg["data"]:
        node = {**cfg["data"], "image_size": cfg["data"]["image_size"] or min(size)}
        return make({**node, "split": None if cfg["weights"] else "held_out"}, "data")
    if cfg["weights"]:
        raise ConfigError("metrics of weights= need images and prompts to compare with: data=folder data.path=DIR")
    node = run.config["data"]
    return build_held_out(node, make(node, "data"))


class Draw:
    """draw(prompts, seeds) for metrics, collective: other ranks `follow` until rank 0 has come to its `end`."""

    def __init__(self, cfg: dict, run: Run, refiner: Refiner | None, out: Path, world: World):
        self.cfg, self.run, self.refiner, self.out, self.world = cfg, run, refiner, out, world
        self.size = sides(run.config["image_size"] if cfg["image_size"] is None else cfg["image_size"])
        self.known: dict[Path, Kept] = {}

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], *pictures, sampling: dict | None = None, **hints
    ) -> "Kept":
        """The images, read when they are sliced; sampling: nodes of a config, instead of the command's own."""
        if pictures or hints:
            raise ConfigError(
                "sample.py draws from prompts alone, and one of these metrics gives pictures; leave it out"
            )
        task = list(prompts), list(seeds), sampling
        folder = self.folder(*task)
        if folder not in self.known:
            self.world.first(lambda: task)
            self._share(*task)
            self.known[folder] = Kept([folder / f"{i:06d}.png" for i in range(len(prompts))])
        return self.known[folder]

    def follow(self) -> None:
        """Draw this rank's share of whatever rank 0 asks for."""
        while (task := self.world.first(lambda: None)) is not None:
            self._share(*task)

    def end(self) -> None:
        self.world.first(lambda: None)

    def folder(self, prompts: list[str], seeds: list[int], sampling: dict | None) -> Path:
        """Named after all that decides what the images are."""
        how = {name: self.cfg[name] for name in ("run", *HOW)} | (sampling or {})
        return self.out / f"drawn-{digest(json.dumps([how, self.run.step, self.size, prompts, seeds]))[:12]}"

    def _share(self, prompts: list[str], seeds: list[int], sampling: dict | None) -> None:
        """Every so-manieth image of those that are not there yet, written batch by batch; then wait for the others."""
        folder, batch = self.folder(prompts, seeds, sampling), self.cfg["batch_size"]
        folder.mkdir(parents=True, exist_ok=True)
        mine = range(self.world.rank, len(prompts), self.world.size)
        missing = [i for i in mine if not (folder / f"{i:06d}.png").exists()]
        how = Sampling.from_config(sampling or self.cfg)
        bar = tqdm(total=len(missing), desc="drawing", unit="image", disable=None if self.world.is_main else True)
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            pairs = [(prompts[i], seeds[i]) for i in part]
            images = generate(
                self.run.objective, *zip(*pairs, strict=True), how, image_size=self.size,
                negative=self.cfg["negative"], refiner=self.refiner, attached=self.run.attached, batch_size=batch,
            )  # fmt: skip
            for i, image, (prompt, seed) in zip(part, images, pairs, strict=True):
                write_png(folder / f"{i:06d}.png", image, {"prompt": prompt, "seed": str(seed)})
            bar.update(len(part))
        bar.close()
        self.world.wait()


class Kept:
    """Images on disk, read when they are sliced: B 3 H W uint8."""

    def __init__(self, files: Sequence[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, part: slice) -> Tensor:
        return torch.stack([read_image(file) for file in self.files[part]])


def report(cfg: dict, run: Run, found: dict[str, float], out: Path) -> None:
    """Print the numbers, and write them down with what they are of."""
    settings = {name: cfg[name] for name in ("run", *HOW, "num_images", "metrics")}
    write_json(out / "metrics.json", {**settings, "step": run.step, "numbers": found})
    width = max(map(len, found))
    lines = [f"| {'metric':{width}} | value      |", f"|{'-' * (width + 2)}|------------|"]
    lines += [f"| {name:{width}} | {value:<10.6g} |" for name, value in found.items()]
    with replacing(out / "metrics.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    print("\n".join(lines))
