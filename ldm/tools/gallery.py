"""What `sample.py` reads and leaves behind: a picture to start from; a PNG per image, a contact sheet, samples.json."""

import json
import os
from pathlib import Path

from torch import Tensor

from ldm.data.transforms import resize_crop
from ldm.generate import Edit
from ldm.io.images import read_image, write_png
from ldm.io.text import write_json
from ldm.utils.errors import ConfigError
from ldm.utils.images import labelled_grid

HOW = ("sampler", "times", "steps", "guidance", "threshold", "negative", "image", "mask", "strength")


def read_pairs(cfg: dict) -> list[tuple[str, int]]:
    """Every prompt with every seed; one of either need not be a list."""
    prompts, seeds = (value if isinstance(value, list) else [value] for value in (cfg["prompts"], cfg["seeds"]))
    if not all(isinstance(seed, int) for seed in seeds) or not seeds:
        raise ConfigError(f"seeds={cfg['seeds']} is not a list of whole numbers, e.g. seeds='[0,1]'")
    return [(str(prompt), seed) for prompt in prompts if prompt is not None for seed in dict.fromkeys(seeds)]


def check_writable(out: Path) -> None:
    """Before the work is done, not after it."""
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"out={out} cannot be written: {parent} is not a folder that this user may write to")


def read_edit(cfg: dict, image_size: int) -> Edit | None:
    """The picture and the mask of a config, at the size that is sampled."""
    if not cfg["image"]:
        if cfg["mask"]:
            raise ConfigError("mask is set but image is not; give the picture to repaint, e.g. image=photo.png")
        return None
    if not isinstance(image_size, int):
        raise ConfigError(f"image_size={image_size} with a picture to start from: give one number, it is cut square")
    if not isinstance(cfg["strength"], int | float) or not 0 <= cfg["strength"] <= 1:
        raise ConfigError(f"strength={cfg['strength']} must lie between 0 (keep the picture) and 1 (forget it)")
    image = resize_crop(read_image(cfg["image"]), image_size)
    mask = resize_crop(read_image(cfg["mask"]), image_size)[:1] > 127 if cfg["mask"] else None
    return Edit(image, cfg["strength"], mask)


def write_gallery(out: Path, images: Tensor, pairs: list[tuple[str, int]], cfg: dict, columns: int) -> None:
    """Write images (B 3 H W uint8) of (prompt, seed) pairs below `out`; each PNG says how it was made."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: cfg[name] for name in ("run", "step", *HOW)}
    records = []
    for number, (image, (prompt, seed)) in enumerate(zip(images, pairs, strict=True)):
        records.append({"file": f"{number:04d}.png", "prompt": prompt, "seed": seed, **settings})
        text = {"prompt": prompt, "seed": str(seed), "settings": json.dumps(settings)}
        write_png(out / records[-1]["file"], image, text)
    write_png(out / "grid.png", labelled_grid(images, [prompt for prompt, _ in pairs], columns))
    write_json(out / "samples.json", records)
