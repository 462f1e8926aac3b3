"""Prompts and seeds in, images out: the one path by which previews, evaluation, `sample.py` and notebooks sample."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm.build import build_codec, build_conditioner, build_objective, compose, make
from ldm.diffusion.objective import DiffusionObjective
from ldm.models.codec import LatentCodec
from ldm.samplers.edit import image_to_image, inpaint
from ldm.training.checkpoint import find, load_config, load_files, load_weights
from ldm.utils.errors import ConfigError, DataError
from ldm.utils.seeding import Noise

SCALE_IMAGES = 1024  # on which the scale of latents is measured


@dataclass
class Sampling:
    """How to sample: the four choices that no checkpoint fixes."""

    sampler: Callable  # sample(denoise, process, x_T, times, *, generator, callback)
    times: Callable  # times(process) -> descending grid
    guidance: Callable  # guidance(denoiser, cond, null) -> denoise
    threshold: Callable | None = None  # threshold(denoise) -> denoise

    @classmethod
    def from_config(cls, cfg: dict) -> "Sampling":
        """The `sampler`, `times`, `guidance` and `threshold` nodes of a config."""
        return cls(*(make(cfg[name]) if cfg[name] else None for name in ("sampler", "times", "guidance", "threshold")))


@dataclass
class Edit:
    """A picture to start from: repainted as a whole to some strength (SDEdit), or only where the mask is 1."""

    image: Tensor  # 3 H W uint8
    strength: float = 0.6
    mask: Tensor | None = None  # 1 H W, 0 or 1


@torch.no_grad()
def generate(
    objective: nn.Module,  # denoiser, codec and conditioner, in evaluation mode
    prompts: Sequence[str],
    seeds: Sequence[int],  # one per prompt
    sampling: Sampling,
    *,
    image_size: int | Sequence[int],  # pixels: a side, or height and width
    negative: str | None = None,
    edit: Edit | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Images, uint8 B 3 H W. Image k depends on prompt k and seed k alone: the batch it is drawn in changes
    its float32 rounding at most, which may turn a grey level."""
    if not isinstance(objective, DiffusionObjective):
        raise ConfigError(f"a run of {type(objective).__name__} draws no images; give the run of a diffusion model")
    if not prompts:
        raise DataError("the list of prompts is empty; give at least one, e.g. prompts='[a red circle]'")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: expected at least 1")
    if len(prompts) != len(seeds):
        raise DataError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed per prompt")
    times = sampling.times(objective.denoiser.process)
    starts = range(0, len(prompts), batch_size)
    bar = tqdm(total=len(starts) * (len(times) - 1), desc="sampling", unit="step", disable=None if progress else True)
    images = []
    for start in starts:
        part = slice(start, start + batch_size)
        denoise = guided(objective, prompts[part], sampling, negative)
        x = _sample(objective, denoise, seeds[part], sampling, times, image_size, edit, lambda *_: bar.update())
        images.append(objective.codec.decode(x).cpu())
    bar.close()
    return torch.cat(images)


def guided(objective: nn.Module, prompts: Sequence[str], sampling: Sampling, negative: str | None) -> Callable:
    """denoise(x, t) -> x0 with prompts, guidance and threshold inside."""
    conditioner, n = objective.conditioner, len(prompts)
    cond = conditioner({field: list(prompts) for field in conditioner.fields})
    null = conditioner({field: [negative] * n for field in conditioner.fields}) if negative else conditioner.null(n)
    denoise = sampling.guidance(objective.denoiser, cond, null)
    if sampling.threshold and not objective.codec.bounded:
        raise ConfigError("threshold clips x0 to [-1, 1], the range of pixels, not of latents; use threshold=none")
    return sampling.threshold(denoise) if sampling.threshold else denoise


def _sample(objective, denoise, seeds, sampling, times, image_size, edit, callback) -> Tensor:
    codec, process = objective.codec, objective.denoiser.process
    device = next(objective.denoiser.parameters()).device
    how = {"generator": Noise(seeds, "sampler"), "callback": callback}
    if edit and edit.mask is None:
        image = codec.encode(edit.image[None].to(device)).expand(len(seeds), -1, -1, -1)
        return image_to_image(sampling.sampler, denoise, process, image, times, strength=edit.strength, **how)
    eps = Noise(seeds, "x_T")(torch.empty(len(seeds), *latent_shape(codec, image_size), device=device))  # B C H W
    # The prior: unit variance on variance-preserving paths, sqrt(sigma_max^2 + 1) on variance-exploding ones.
    x_T = eps * math.hypot(*process(float(times[0])))
    if edit is None:
        return sampling.sampler(denoise, process, x_T, times, **how)
    image = codec.encode(edit.image[None].to(device))
    mask = F.interpolate(edit.mask[None].to(image), image.shape[2:], mode="area").ceil()  # all that it touches
    return inpaint(sampling.sampler, denoise, process, x_T, times, image=image, mask=mask, **how)


def latent_shape(codec: Any, image_size: int | Sequence[int]) -> tuple[int, int, int]:
    """C H W of the codec's latents for images of this size. Raises ConfigError where it does not divide."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % codec.downsample or width % codec.downsample:
        raise ConfigError(f"image size {height}x{width} is not divisible by {codec.downsample}, what the codec needs")
    return codec.channels, height // codec.downsample, width // codec.downsample


class Run:
    """A trained model as a run directory holds it: `run.generate(["a red circle"], seeds=[0])`."""

    def __init__(self, objective: nn.Module, config: dict, step: int):
        self.objective, self.config, self.step = objective.eval(), config, step

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] = (0,),
        *,
        sampler: str = "ddim",
        steps: int = 50,
        guidance: float = 5.0,
        times: str = "trailing",
        threshold: str = "none",
        negative: str | None = None,
        batch_size: int = 64,
    ) -> list:
        """PIL images, every prompt with every seed: prompt 0 with each seed first, then prompt 1, ..."""
        from PIL import Image

        groups = [f"sampler={sampler}", f"times={times}", f"threshold={threshold}"]
        cfg = compose("sample", [*groups, f"steps={steps}", f"guidance.scale={guidance}"])
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        images = generate(
            self.objective,
            [prompt for prompt, _ in pairs],
            [seed for _, seed in pairs],
            Sampling.from_config(cfg),
            image_size=self.config["image_size"],
            negative=negative,
            batch_size=batch_size,
        )
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def load_run(path: str | Path, *, device: str = "cpu", ema: bool = True) -> Run:
    """The newest whole checkpoint of a run directory, or one checkpoint directory, with its averaged weights.

    Raises CheckpointError when there is none, or when it is not the network its config describes.
    """
    directory = find(Path(path))
    config = load_config(directory)
    files = load_files(directory)
    conditioner, _, _ = build_conditioner(config["conditioner"], tokenizer=files.get("tokenizer.json"))
    objective, _, _ = build_objective(config, build_codec(config["codec"]), conditioner, training=False)
    step = load_weights(directory, objective, ema=ema)
    return Run(objective.to(device), config, step)


def codec_of_run(node: dict, source: Path, data: Any) -> tuple[LatentCodec, dict]:
    """The latent codec of a finished autoencoder run, and the node that rebuilds it without that run.

    Where the node gives no scale, latents are brought to mean 0 and deviation 1 as measured on images of the dataset.
    """
    run = load_run(source)
    autoencoder = run.objective.autoencoder
    if node["scale"] is None:
        images = torch.stack([data[index]["image"] for index in range(min(len(data), SCALE_IMAGES))])
        codec = LatentCodec.measured(autoencoder, images)
    else:
        codec = LatentCodec(autoencoder, node["scale"], node["shift"] or 0.0)
    numbers = {"scale": codec.scale.flatten().tolist(), "shift": codec.shift.flatten().tolist()}
    return codec, {"_target_": node["_target_"], **numbers, "autoencoder": run.config["network"]}
