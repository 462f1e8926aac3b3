"""What `sample.py` reads and leaves behind: a picture to start from; a PNG per image, a contact sheet, samples.json."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from torch import Tensor

from ldm.drawing import Edit, edit_of
from ldm.io.files import read_bytes
from ldm.io.images import write_png
from ldm.io.text import decode_text, read_json, write_json
from ldm.utils.errors import ConfigError, DataError
from ldm.utils.images import labelled_grid

RECORDS, GRID = "samples.json", "grid.png"
MAX_PROMPTS = 1 << 26  # bytes of a file of them
HOW = ("weights", "kind", "vae", "text_encoder", "text_encoder_2", "embeddings", "formula", "refiner", "handover",
       "dialect", "sampler", "times", "steps", "guidance", "threshold", "negative", "prompt_weights", "image",
       "mask", "strength", "lora", "controlnet", "t2i_adapter", "composition", "every", "aug_level", "image_size",
       "dtype", "variant", "averaged")  # fmt: skip


def read_pairs(cfg: dict) -> list[tuple[str, int]]:
    """Every prompt with every seed; one of either need not be a list, and @FILE has a prompt on each line."""
    prompts, seeds = (value if isinstance(value, list) else [value] for value in (cfg["prompts"], cfg["seeds"]))
    if not all(type(seed) is int for seed in seeds) or not seeds:
        raise ConfigError(f"seeds={cfg['seeds']} is not a list of whole numbers, e.g. seeds='[0,1]'")
    if isinstance(cfg["prompts"], str) and cfg["prompts"].startswith("@"):
        prompts = read_prompts(Path(cfg["prompts"][1:]).expanduser())
    return [(str(prompt), seed) for prompt in prompts if prompt is not None for seed in dict.fromkeys(seeds)]


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises DataError where there is none."""
    lines = decode_text(read_bytes(path, max_bytes=MAX_PROMPTS), str(path)).removeprefix("\ufeff").splitlines()
    if prompts := [line.strip() for line in lines if line.strip()]:
        return prompts
    raise DataError(f"{path} has no prompt; write one on each line")


def texts_of(cfg: dict) -> list[str]:
    """All that a text encoder will be given."""
    texts = [prompt for prompt, _ in read_pairs(cfg)]
    return texts if cfg["negative"] is None else [*texts, str(cfg["negative"])]


def check_writable(out: Path) -> None:
    """Before the work is done, not after it."""
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"out={out} cannot be written: {parent} is not a folder that this user may write to")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder made for one command: `path`, or with a number behind it; gone again where nothing was left in it."""
    for number in count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        break
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()


def own_files(out: Path) -> set[str]:
    """The pictures in a folder that an earlier command has drawn there."""
    try:
        records = read_json(out / RECORDS)
    except DataError:
        return set()
    records = records if isinstance(records, list) else []
    names = [str(record.get("file")) for record in records if isinstance(record, dict)]
    return {name for name in names if re.fullmatch(r"\d+\.png", name)} | {GRID}


def check_own(out: Path, number: int) -> None:
    """ConfigError where pictures would be replaced that no earlier command has drawn."""
    names = {file_name(k) for k in range(number)} | {GRID}
    if strangers := sorted(name for name in names - own_files(out) if (out / name).exists()):
        raise ConfigError(f"out={out} has a {strangers[0]} that was not drawn by sample.py; choose another folder")


def file_name(number: int) -> str:
    return f"{number:04d}.png"


def read_edit(cfg: dict, size: Sequence[int]) -> Edit | None:
    """The picture and the mask of a config, at the height and width that are sampled."""
    return edit_of(cfg["image"] or None, cfg["mask"] or None, cfg["strength"], size)


def write_gallery(out: Path, images: Tensor, pairs: list[tuple[str, int]], cfg: dict, columns: int) -> None:
    """Write images (B 3 H W uint8) of (prompt, seed) pairs below `out`, in place of those drawn there before; each PNG
    says how it was made."""
    check_own(out, len(pairs))
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: cfg[name] for name in ("run", "step", *HOW)}
    records, before = [], own_files(out)
    for number, (image, (prompt, seed)) in enumerate(zip(images, pairs, strict=True)):
        records.append({"file": file_name(number), "prompt": prompt, "seed": seed, **settings})
        text = {"prompt": prompt, "seed": str(seed), "settings": json.dumps(settings)}
        write_png(out / records[-1]["file"], image, text)
    write_png(out / GRID, labelled_grid(images, [prompt for prompt, _ in pairs], columns))
    write_json(out / RECORDS, records)
    for name in before - {GRID} - {record["file"] for record in records}:
        (out / name).unlink(missing_ok=True)
