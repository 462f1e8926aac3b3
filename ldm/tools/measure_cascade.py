"""`sample.py cascade=[...] metrics=[...]`: what every stage keeps of what the first one drew, in numbers.

They are printed, and OUT/metrics.json keeps them, as "stage_1/prompt_accuracy" and so on.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ldm.build import build_held_out, make
from ldm.cascade import Cascade
from ldm.io.text import write_json
from ldm.tools.embed import Reader
from ldm.tools.measure import check_no_pictures, sized
from ldm.tools.metrics import build_metrics, once
from ldm.tools.stages import read_stage, report, stage_settings
from ldm.utils.errors import ConfigError


def measure_cascade(cfg: dict, given: Sequence[str], out: Path) -> None:
    """Draw the held-out prompts of the first stage's data through all stages, and judge the images of each.

    Raises ConfigError for settings that metrics have no use for, and for stages that are no runs.
    """
    check_no_pictures(cfg)
    settings = stage_settings(cfg, given)
    if published := [node["weights"] for node in settings if node["weights"]]:
        raise ConfigError(f"metrics of a cascade draw prompts that its runs held out, and {published[0]} is no run")
    cascade = Cascade([read_stage(node, Reader([])) for node in settings])

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Tensor]:
        images = []
        for number, drawn in enumerate(cascade.draw(prompts, seeds, progress=True), 1):
            print(f"stage {number} of {len(settings)}, {drawn.stage.name}: {report(drawn)}", flush=True)
            images.append(drawn.images)
        return images

    draw, found = once(draw), {}
    for number, stage in enumerate(cascade.stages, 1):
        node = stage.config["data"]
        data, objective = build_held_out(node, make(node, "data")), stage.load().objective
        for metric in build_metrics(sized(cfg["metrics"], cfg["num_images"])).values():
            numbers = metric(lambda prompts, seeds, k=number - 1: draw(prompts, list(seeds))[k], data, objective)
            found |= {f"stage_{number}/{name}": value for name, value in numbers.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", {"cascade": cfg["cascade"], "stages": cfg["stages"], "numbers": found})
    print("\n".join(f"{name} {value:.4g}" for name, value in found.items()))
