"""What training shows of itself: a picture and an evaluation now and then, always from the averaged weights."""

import copy
from collections.abc import Sequence
from functools import singledispatch
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.build import make
from ldm.data.scenes import COLOURS, SHAPES
from ldm.data.shapes import Shapes
from ldm.diffusion.objective import DiffusionObjective
from ldm.generate import Enlarging, generate
from ldm.io.images import write_png
from ldm.metrics.shapes import short_prompts
from ldm.sampling import Sampling
from ldm.tools.metrics import build_metrics, once
from ldm.utils.errors import ConfigError
from ldm.utils.images import labelled_grid


class Previews:
    """The hooks of a run. `preview(draw, data, objective)` gives labelled images, each metric numbers by name."""

    def __init__(self, cfg: dict, path: Path, data: Any, objective: nn.Module, ema: Any):
        self.cfg, self.path, self.data, self.objective, self.ema = cfg, path, data, objective, ema
        self.preview = make(cfg["preview"], "preview") if cfg["preview"] else None
        self.metrics = build_metrics(cfg["metrics"])
        self.sampling = Sampling.from_config(cfg)
        if isinstance(objective, DiffusionObjective):
            self.sampling.times(objective.denoiser.process)  # an impossible grid is an error now, not at a preview

    def sample(self, step: int) -> Path | None:
        """Write samples/step_*.png."""
        if self.preview is None:
            return None
        images, labels = self.preview(*self._subject())
        picture = self.path / "samples" / f"step_{step:08d}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_png(picture, labelled_grid(images, labels))
        return picture

    def evaluate(self, step: int) -> dict[str, float]:
        if not self.metrics:
            return {}
        draw, data, averaged = self._subject()
        draw, numbers = once(draw), {}
        for metric in self.metrics.values():
            numbers |= metric(draw, data, averaged)
        return numbers

    def _subject(self) -> tuple:
        averaged = self.ema.applied(self.objective) if self.ema else copy.deepcopy(self.objective).eval()

        def draw(
            prompts: Sequence[str],
            seeds: Sequence[int],
            small: Tensor | None = None,
            aug_level: float | None = None,
            hints: Tensor | None = None,
            sampling: dict | None = None,  # nodes of a config, instead of the run's own
        ) -> Tensor:
            size, enlarging = self.cfg["image_size"], None if small is None else Enlarging(small, aug_level)
            how = Sampling.from_config(sampling) if sampling else self.sampling
            return generate(averaged, prompts, seeds, how, image_size=size, enlarging=enlarging, hints=hints)

        return draw, self.data, averaged


class Samples:
    """Images of held-out captions, or of every class in turn, each with its own seed, the same throughout the run.

    Or of `prompts`, one image each. Raises ConfigError where the model reads no text.
    """

    def __init__(self, count: int = 16, seed: int = 0, prompts: str | Sequence[str] | None = None):
        self.count, self.seed = count, seed
        self.given = [prompts] if isinstance(prompts, str) else list(prompts or ())

    def __call__(self, draw, data, objective: nn.Module) -> tuple[Tensor, list[str]]:
        prompts = self.given or self._prompts(data, objective.conditioner.fields)
        if self.given and not objective.conditioner.fields & {"caption", "label"}:
            raise ConfigError(
                f"preview.prompts={self.given}: the model reads neither captions nor classes; leave it out"
            )
        return draw(prompts, range(len(prompts))), prompts

    def _prompts(self, data, fields: set[str]) -> list[str]:
        if "caption" in fields:
            return held_out_prompts(data, self.count, self.seed)
        if "label" in fields:
            return [data.class_names[i % len(data.class_names)] for i in range(self.count)]
        return [""] * self.count


@singledispatch
def held_out_prompts(data, count: int, seed: int) -> list[str]:
    """What previews show of a dataset."""
    return data.prompts(count, seed)


@held_out_prompts.register
def _(data: Shapes, count: int, seed: int) -> list[str]:
    """Whole captions; where captions are open, every other prompt is a short one."""
    prompts = data.prompts(count, seed)
    if data.open:
        prompts[1::2] = short_prompts(list(product(SHAPES, COLOURS)), count // 2, seed)
    return prompts
