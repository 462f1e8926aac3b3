"""DreamBooth's class images (arXiv:2208.12242, §3.3): drawn by the base, once, before anything is trained."""

import json
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.build import make
from ldm.data.dreambooth import DreamBooth
from ldm.generate import Run, generate, load_run
from ldm.io.files import sweep_temporaries
from ldm.io.images import write_png
from ldm.published import load_published, parts_of
from ldm.sampling import Sampling
from ldm.utils.errors import ConfigError, DataError

BATCH = 8  # images after which they are written
HOW = ("weights", "base", "sampler", "times", "steps", "guidance", "threshold", "image_size")


def with_class_images(cfg: dict, data: Dataset, path: Path, device: Any, world: Any) -> Dataset:
    """The data as DreamBooth mixes it. Class images that are not there yet are drawn, each rank its share; a run that
    is killed while it draws goes on with the next one."""
    recipe = make(cfg["dreambooth"], "dreambooth")
    folder = Path(recipe.path or path / "class_images")
    world.first(lambda: sweep_temporaries(folder))
    missing = world.first(lambda: recipe.missing(folder))
    if missing:
        share = list(missing.items())[world.rank :: world.size]
        draw_class_images(cfg, recipe, folder, share, device)
        world.wait()
    return recipe.mix(data, folder, cfg["image_size"])


def draw_class_images(cfg: dict, recipe: DreamBooth, folder: Path, share: list[tuple[str, int]], device: Any) -> None:
    """Write these files of a folder, each of which says how it was made, sampled as previews are."""
    objective, sampling = base_of(cfg, folder, len(share), device).objective, Sampling.from_config(cfg)
    check_reads_text(objective)
    settings = json.dumps({name: cfg[name] for name in HOW})
    folder.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(share), BATCH), f"class images in {folder}", unit=f" x {BATCH}"):
        files = share[start : start + BATCH]
        prompts, seeds = zip(*((recipe.prompt(index), recipe.seed + index) for _, index in files), strict=True)
        images = generate(objective, prompts, seeds, sampling, image_size=cfg["image_size"])
        for (name, _), image, prompt, seed in zip(files, images, prompts, seeds, strict=True):
            write_png(folder / name, image, {"prompt": prompt, "seed": str(seed), "settings": settings})


def base_of(cfg: dict, folder: Path, count: int, device: Any) -> Run:
    """The model that training begins from. Raises DataError where there is none."""
    if cfg["weights"]:
        tokenizer = cfg["conditioner"].get("tokenizer", {}).get("path")
        dtype = cfg["trainer"]["precision"]
        return load_published(cfg["weights"], system=cfg["system"], tokenizer=tokenizer, dtype=dtype, device=device,
                              parts=parts_of(cfg))  # fmt: skip
    if cfg["base"]:
        return load_run(cfg["base"], device=device)
    raise DataError(
        f"{folder} lacks {count} of {cfg['dreambooth']['count']} class images and there is no base to draw them; "
        "give weights=PATH or base=RUN, or set dreambooth.path to a folder that has them"
    )


def check_reads_text(objective: Any) -> None:
    """Raises ConfigError for a base that a prompt says nothing to."""
    if "caption" not in objective.conditioner.fields:
        reads = ", ".join(sorted(objective.conditioner.fields)) or "nothing"
        raise ConfigError(f"dreambooth teaches words, but this base reads {reads}; choose a base that reads captions")
