"""A cascade: a model that draws small images, then models that enlarge them, each a run of its own (arXiv:2106.15282).

    prompts, seeds -> base, 64 px -> super-resolution, 256 px -> super-resolution, 1024 px

    Cascade([Stage.of_run("runs/64"), Stage.of_run("runs/256", guidance=3.0, aug_level=0.2)]).generate(["a cat"], [0])

One model is in memory at a time. A stage takes each image with its own prompt and seed, so that image k of the last
stage depends on prompt k and seed k alone.
"""

import contextlib
import gc
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.build import locate
from ldm.diffusion.super_resolution import SuperResolutionObjective
from ldm.generate import Enlarging, Run, generate, load_run, sides
from ldm.rebuild import described
from ldm.sampling import Sampling
from ldm.training.checkpoint import find
from ldm.utils.errors import ConfigError, LdmError

Size = tuple[int, int]  # height, width in pixels


@dataclass
class Stage:
    """A model and how it is drawn from. Raises ConfigError for an aug_level that is none."""

    name: str
    config: dict  # of the run, known before its weights are read
    load: Callable[[], Run]
    sampling: Sampling
    aug_level: float | None = None  # noise on what it enlarges, 0 to 1; None: the objective's own
    batch_size: int = 64

    def __post_init__(self):
        level = self.aug_level
        if level is not None and not (isinstance(level, int | float) and 0 <= level <= 1):
            raise ConfigError(f"{self.name}: aug_level={level} must lie between 0 (the image as it is) and 1 (noise)")

    @classmethod
    def of_run(
        cls,
        path: str | Path,
        *,
        sampler: str = "ddim",
        steps: int = 50,
        guidance: float = 5.0,
        threshold: str = "dynamic",
        aug_level: float | None = None,
        batch_size: int = 64,
        device: str = "cpu",
        ema: bool = True,
    ) -> "Stage":
        """A run directory, or one of its checkpoints. Raises CheckpointError where nothing was trained yet."""
        sampling = Sampling.named(sampler, steps, guidance, None, threshold)
        config = described(find(Path(path)))
        return cls(str(path), config, lambda: load_run(path, device=device, ema=ema), sampling, aug_level, batch_size)

    @property
    def size(self) -> Size:
        """Height and width of the images it was trained on."""
        return sides(self.config["image_size"])

    @property
    def factor(self) -> int | None:
        """How much larger its images are than what it is given; None where it needs none."""
        node = self.config["objective"]
        if not issubclass(locate(node.get("_target_"), "objective"), SuperResolutionObjective):
            return None
        if type(factor := node.get("factor")) is not int or factor < 1:
            raise ConfigError(f"{self.name}: objective.factor={factor}, expected a whole number: how much larger")
        return factor

    @property
    def takes(self) -> Size:
        """Height and width of what it enlarges to `size`."""
        height, width = self.size
        return height // self.factor, width // self.factor


@dataclass
class Drawn:
    """What a stage drew."""

    stage: Stage
    images: Tensor  # B 3 H W uint8
    step: int  # of the run
    seconds: float  # to draw; loading is apart
    peak_bytes: int  # memory at most: of the accelerator, or of this process


class Cascade:
    """Stages that follow each other. Raises ConfigError unless the first one draws and the others enlarge that."""

    def __init__(self, stages: Sequence[Stage]):
        if not stages:
            raise ConfigError("a cascade of no stages; give runs from small to large, e.g. cascade=[run64,run256]")
        self.stages = list(stages)
        for number, (before, stage) in enumerate(zip(self.stages, self.stages[1:], strict=False), 2):
            if stage.factor is None:
                raise ConfigError(f"stage {number}, {stage.name}, enlarges nothing: only the first can be such a model")
            if stage.takes != before.size:
                raise ConfigError(
                    f"stage {number}, {stage.name}, enlarges {_text(stage.takes)} pixels, but {before.name} draws "
                    f"{_text(before.size)}; give the stages from small to large, as they were trained"
                )

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], **options) -> Tensor:
        """The images of the last stage, B 3 H W uint8. Options are those of `draw`."""
        *_, last = self.draw(prompts, seeds, **options)
        return last.images

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],  # one per prompt
        *,
        image: Tensor | None = None,  # 3 h w uint8: what the first stage enlarges, if it does
        image_size: int | Sequence[int] | None = None,  # of the first stage; None: as it was trained
        negative: str | None = None,
        progress: bool = False,
    ) -> Iterator[Drawn]:
        """Each stage when it has finished. An error of a later one names it, and takes nothing away."""
        first = self.stages[0]
        if first.factor is None and image is not None:
            raise ConfigError(f"image is to be enlarged, but stage 1, {first.name}, draws images of its own")
        if first.factor is not None and image is None:
            raise ConfigError(
                f"stage 1, {first.name}, enlarges {_text(first.takes)} pixels and has none to enlarge; "
                "begin with a model that draws them, or give image=FILE"
            )
        size = sides(first.size if image_size is None else image_size) if image is None else tuple(image.shape[1:])
        images = None if image is None else image.expand(len(prompts), -1, -1, -1)
        return self._run(list(prompts), list(seeds), size, images, dict(negative=negative, progress=progress))

    def _run(self, prompts: list, seeds: list, size: Size, images: Tensor | None, options: dict) -> Iterator[Drawn]:
        for number, stage in enumerate(self.stages, 1):
            size = tuple(side * (stage.factor or 1) for side in size)
            enlarging = None if images is None else Enlarging(images, stage.aug_level)
            try:
                run = stage.load()
                device = next(run.objective.parameters()).device
                _reset_peak(device)
                start = time.perf_counter()
                images = generate(run.objective, prompts, seeds, stage.sampling, image_size=size, enlarging=enlarging,
                                  attached=run.attached, batch_size=stage.batch_size, **options)  # fmt: skip
            except LdmError as error:
                raise type(error)(f"stage {number} of {len(self.stages)}, {stage.name}: {error}") from error
            drawn = Drawn(stage, images, run.step, time.perf_counter() - start, _peak(device))
            del run  # before the next one is loaded
            gc.collect()
            torch.cuda.empty_cache()
            yield drawn


def _text(size: Size) -> str:
    return "x".join(map(str, size))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # where the system allows it; else the peak is that of the whole program
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
