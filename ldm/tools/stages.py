"""The stages of `sample.py cascade=[...]`: each a run or published weights, with the command's settings and its own."""

import json
from collections.abc import Sequence
from pathlib import Path

from ldm.build import compose
from ldm.cascade import Cascade, Drawn, Stage
from ldm.io.images import read_image
from ldm.sampling import Sampling
from ldm.tools.embed import Reader, share_text_encoder
from ldm.tools.gallery import read_pairs, texts_of, write_gallery
from ldm.tools.subject import as_published, load_subject
from ldm.training.checkpoint import find, load_config
from ldm.utils.errors import ConfigError

GIB = 2**30


def draw_cascade(cfg: dict, given: Sequence[str], out: Path) -> None:
    """Draw every prompt with every seed through all stages; the images of stage 1 are in out/stage_1, and so on."""
    settings, pairs = share_text_encoder(stage_settings(cfg, given)), read_pairs(cfg)
    reader = Reader(texts_of(cfg))
    cascade = Cascade([read_stage(node, reader) for node in settings])
    image = read_image(cfg["image"]) if cfg["image"] else None
    prompts, seeds = zip(*pairs, strict=True)
    options = dict(image=image, image_size=cfg["image_size"], negative=cfg["negative"], progress=True)
    for number, drawn in enumerate(cascade.draw(prompts, seeds, **options), 1):
        folder = out / f"stage_{number}"
        how = {**settings[number - 1], "step": drawn.step, "image_size": list(drawn.images.shape[2:])}
        write_gallery(folder, drawn.images, pairs, how, columns=len(set(seeds)))
        print(f"stage {number} of {len(settings)}, {drawn.stage.name}: {report(drawn)}, in {folder}/", flush=True)


def report(drawn: Drawn) -> str:
    height, width = drawn.images.shape[2:]
    count, memory = len(drawn.images), drawn.peak_bytes / GIB
    return f"{count} images of {height}x{width} in {drawn.seconds:.1f} s, {memory:.2f} GiB at most"


def stage_settings(cfg: dict, given: Sequence[str]) -> list[dict]:
    """The config of each stage: the command's, with the settings that `stages` has for it."""
    sources = cfg["cascade"] or [cfg["run"] or cfg["weights"]]
    own = cfg["stages"] or [{} for _ in sources]
    if len(own) != len(sources) or not all(isinstance(settings, dict) for settings in own):
        raise ConfigError(
            f"stages={own} has {len(own)} entries for {len(sources)} stages; give the settings of each, "
            "e.g. stages='[{},{steps:20,aug_level:0.2}]'"
        )
    if cfg["cascade"] and (cfg["run"] or cfg["weights"]):
        raise ConfigError("both cascade and run or weights are set; list every stage in cascade")
    lines = ([f"{name}={json.dumps(value)}" for name, value in settings.items()] for settings in own)
    return [_settings(str(source), [*given, *more]) for source, more in zip(sources, lines, strict=True)]


def _settings(source: str, lines: list[str]) -> dict:
    key = "weights" if _is_published(Path(source)) else "run"
    cfg = {**compose("sample", lines), key: source}
    return {**as_published(cfg, lines), key: source}


def _is_published(path: Path) -> bool:
    """Not a run, nor one of its checkpoints: a file, or a folder of weights."""
    ours = ("config.yaml", "checkpoints", "manifest.json")
    return path.exists() and not any((path / name).exists() for name in ours)


def enlarges(cfg: dict) -> bool:
    """Whether the one model of a command is a stage that enlarges, so that it is drawn from as a cascade of one."""
    return bool(cfg["run"] or cfg["weights"]) and config_of(cfg)["objective"].get("factor") is not None


def config_of(cfg: dict) -> dict:
    """The config of what is drawn from, before its weights are read."""
    return load_config(find(Path(cfg["run"]))) if cfg["run"] else compose("train", [f"system={cfg['kind']}"])


def read_stage(cfg: dict, reader: Reader) -> Stage:
    return Stage(
        cfg["run"] or cfg["weights"],
        config_of(cfg),
        lambda: load_subject(cfg, reader(cfg))[0],
        Sampling.from_config(cfg),
        cfg["aug_level"],
        cfg["batch_size"],
    )
