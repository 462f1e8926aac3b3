"""What `sample.py` reads and leaves behind: a picture to start from; a PNG per image, a contact sheet, samples.json."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ldm.data.transforms import resize_crop
from ldm.generate import Edit
from ldm.io.images import read_image, write_png
from ldm.io.text import write_json
from ldm.utils.errors import ConfigError, DataError
from ldm.utils.images import labelled_grid

HOW = ("weights", "kind", "vae", "text_encoder", "text_encoder_2", "embeddings", "formula", "refiner", "handover",
       "dialect", "sampler", "times", "steps", "guidance", "threshold", "negative", "prompt_weights", "image",
       "mask", "strength", "lora", "controlnet", "t2i_adapter", "composition", "every", "aug_level", "image_size",
       "dtype", "variant", "averaged")  # fmt: skip


def read_pairs(cfg: dict) -> list[tuple[str, int]]:
    """Every prompt with every seed; one of either need not be a list."""
    prompts, seeds = (value if isinstance(value, list) else [value] for value in (cfg["prompts"], cfg["seeds"]))
    if not all(isinstance(seed, int) for seed in seeds) or not seeds:
        raise ConfigError(f"seeds={cfg['seeds']} is not a list of whole numbers, e.g. seeds='[0,1]'")
    return [(str(prompt), seed) for prompt in prompts if prompt is not None for seed in dict.fromkeys(seeds)]


def texts_of(cfg: dict) -> list[str]:
    """All that a text encoder will be given."""
    texts = [prompt for prompt, _ in read_pairs(cfg)]
    return texts if cfg["negative"] is None else [*texts, str(cfg["negative"])]


def check_writable(out: Path) -> None:
    """Before the work is done, not after it."""
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"out={out} cannot be written: {parent} is not a folder that this user may write to")


def read_edit(cfg: dict, size: Sequence[int]) -> Edit | None:
    """The picture and the mask of a config, at the height and width that are sampled."""
    if not cfg["image"]:
        if given := [name for name in ("mask", "strength") if cfg[name] is not None]:
            raise ConfigError(f"{given[0]} is set but image is not; give the picture to change, e.g. image=photo.png")
        return None
    strength = cfg["strength"]
    if not isinstance(strength, int | float | None) or not 0 <= (strength or 0) <= 1:
        raise ConfigError(f"strength={strength} must lie between 0 (keep the picture) and 1 (forget it)")
    image, mask = read_image(cfg["image"]), read_image(cfg["mask"]) if cfg["mask"] else None
    if mask is not None and mask.shape != image.shape:
        found, expected = (f"{width}x{height}" for _, height, width in (mask.shape, image.shape))
        raise DataError(f"mask {cfg['mask']} is {found} pixels, expected {expected}, the size of {cfg['image']}")
    image = resize_crop(image, *size)
    return Edit(image, strength, None if mask is None else (resize_crop(mask, *size)[:1] > 127).float())


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
