"""Prompts and seeds in, images out: the one path by which previews, evaluation, `sample.py` and notebooks sample."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.build import make_listed
from ldm.diffusion import guidance
from ldm.diffusion.objective import DiffusionObjective
from ldm.drawing import Edit, Options, edit_of, hints_of, latent_shape, progress_bar, sampling_of, sides
from ldm.models.codec import LatentCodec
from ldm.rebuild import rebuild
from ldm.samplers.edit import keeping, noised
from ldm.sampling import Sampling
from ldm.training.checkpoint import find, load_weights
from ldm.utils.devices import pick_device
from ldm.utils.errors import ConfigError, DataError
from ldm.utils.finite import check_drawn
from ldm.utils.seeding import Noise

if TYPE_CHECKING:  # most models are drawn from without adapters
    from ldm.adapters.sampling import Attached

SCALE_IMAGES = 1024  # on which the scale of latents is measured


@dataclass
class Enlarging:
    """What a super-resolution model makes larger."""

    image: Tensor  # B 3 h w uint8, one per prompt
    aug_level: float | None = None  # noise it is given, 0 to 1; None: the objective's own


@dataclass
class Refiner:
    """The expert for the cleaner part of the schedule: the base draws until `handover` of it is done."""

    objective: nn.Module
    handover: float = 0.8


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
    refiner: Refiner | None = None,
    enlarging: Enlarging | None = None,
    hints: Tensor | None = None,  # B C H W, one per prompt, of a model trained with objective=control
    attached: "Attached | None" = None,  # to the objective
    batch_size: int = 64,
    progress: bool | None = False,  # a bar; None: after two seconds, where somebody watches
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
    size = sides(image_size)
    times = sampling.times(objective.denoiser.process)
    batches = batches_of([objective.conditioner.length(prompt, negative) for prompt in prompts], batch_size)
    bar = progress_bar(len(batches) * (len(times) - 1), progress)
    images = []
    for batch in batches:
        noise = sampling.dialect.streams([seeds[i] for i in batch])
        small = enlarging and Enlarging(enlarging.image[batch], enlarging.aug_level)
        hint = None if hints is None else hints[batch]
        task = Task([prompts[i] for i in batch], negative, size, sampling, times, noise, edit, small, hint, attached)
        images.append(task.draw(objective, refiner, lambda *_: bar.update()).cpu())
    bar.close()
    return torch.cat(images)[torch.tensor(sum(batches, [])).argsort()]


def batches_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of one length of prompt each: beside a longer one, a prompt would be read as longer too."""
    batches = []
    for length in sorted(set(lengths)):
        same = [i for i, other in enumerate(lengths) if other == length]
        batches += [same[start : start + size] for start in range(0, len(same), size)]
    return batches


@dataclass
class Task:
    """One batch of `generate`. The order in which noise is drawn is that of diffusers."""

    prompts: list[str]
    negative: str | None
    size: tuple[int, int]  # height, width in pixels
    sampling: Sampling
    times: Tensor
    noise: Callable[[str], Noise]  # by purpose
    edit: Edit | None
    enlarging: Enlarging | None
    hint: Tensor | None
    attached: "Attached | None"

    def draw(self, objective: DiffusionObjective, refiner: Refiner | None, callback: Callable) -> Tensor:
        """uint8 images B 3 H W."""
        codec, process, edit, dialect = objective.codec, objective.denoiser.process, self.edit, self.sampling.dialect
        device = next(objective.denoiser.parameters()).device
        shape = len(self.prompts), *latent_shape(codec, *self.size)
        posterior = self.noise("posterior") if dialect.posterior == "sample" else None
        pictures, masks_itself = self._pictures(device), objective.image_channels(codec) > 0
        from_image = edit and (edit.mask is None or edit.strength < 1 or not masks_itself)
        image = codec.encode(pictures["image"], posterior).expand(shape) if from_image else None  # B C H W
        if edit and edit.strength == 0:
            return codec.decode(image)
        eps, times = self.noise("x_T")(torch.empty(shape, device=device)), self.times
        if edit and (edit.mask is None or edit.strength < 1):
            x, times = noised(process, image, eps, times, strength=edit.strength, start=dialect.start)
        else:
            alpha, sigma = process(float(times[0]))
            x = eps * (math.hypot(alpha, sigma) if self.sampling.initial == "prior" else sigma)
        if self.enlarging:
            extra = objective.image_conditions(vars(self.enlarging), shape, self.noise("low_res"))
        else:
            given = {} if self.hint is None else {"hint": self.hint.to(device)}
            extra = objective.image_conditions(pictures | given, shape, posterior)
        denoise = self._denoise(objective, extra, refiner, times)
        if edit and edit.mask is not None and not masks_itself:
            mask = F.interpolate(pictures["mask"], shape[2:], mode="nearest")
            noise = self.noise("known") if dialect.known == "fresh" else lambda _: eps
            callback = keeping(process, image, mask, times, noise, callback)
        generator = self.noise("sampler")
        x = self.sampling.sampler(denoise, process, x, times, generator=generator, callback=callback)
        return codec.decode(check_drawn(x, objective))

    def _pictures(self, device: torch.device) -> dict[str, Tensor]:
        """The picture and the mask, C H W each: one of them, or as many as there are posteriors to draw from."""
        given = {"image": self.edit.image, "mask": self.edit.mask} if self.edit else {}
        count = len(self.prompts) if self.sampling.dialect.posterior == "sample" else 1
        return {name: p.expand(count, -1, -1, -1).to(device) for name, p in given.items() if p is not None}

    def _denoise(
        self, objective: DiffusionObjective, pictures: dict, refiner: Refiner | None, times: Tensor
    ) -> Callable:
        """denoise(x, t) -> x0 with prompts, guidance, refiner and threshold inside."""
        sampling = self.sampling
        if sampling.threshold and not (objective.codec.bounded or sampling.dialect.clips_latents):
            raise ConfigError("threshold clips x0 to [-1, 1], the range of pixels, not of latents; use threshold=none")
        denoise = self._attached(objective, pictures, times)
        if refiner:
            denoise = guidance.experts(denoise, self._guided(refiner.objective, {}, {}), switch=1 - refiner.handover)
        return sampling.threshold(denoise) if sampling.threshold else denoise

    def _attached(self, objective: DiffusionObjective, pictures: dict, times: Tensor) -> Callable:
        """Guided, with the adapters that are attached to the model."""
        if self.attached is None:
            return self._guided(objective, pictures, pictures)
        with_hints, without = self.attached.conditions(self.size, len(self.prompts))
        guided = partial(self._guided, objective, pictures | with_hints, pictures | without)
        return self.attached.compose(guided, times.tolist(), self.size)

    def _guided(self, objective: DiffusionObjective, pictures: dict, without: dict) -> Callable:
        """With prompts and guidance; `pictures` are conditions too, and `without` those of no prompt."""
        conditioner, count = objective.conditioner, len(self.prompts)
        height, width = self.size
        texts = conditioner.fields & {"caption", "label"}
        batch = {name: self.prompts for name in texts}
        batch["size"] = [(height, width, 0, 0, height, width)] * count  # not cropped: what SDXL draws best
        encoded = self.negative is not None or self.sampling.dialect.empty == "encode"
        instead = {name: [self.negative or ""] * count for name in texts} if encoded else {}
        cond, null = conditioner.pair(batch, **instead)
        return self.sampling.guidance(self.sampling.denoiser(objective), cond | pictures, null | without)


class Run:
    """A trained model as a run directory holds it: `run.generate("a red circle", seeds=0)`."""

    def __init__(self, objective: nn.Module, config: dict, step: int):
        self.objective, self.config, self.step = objective.eval(), config, step
        self.attached: Attached | None = None

    def attach(self, *, lora: Any = (), controlnet: Any = (), t2i_adapter: Any = (), **composition) -> list[str]:
        """Put adapters from files around the model, instead of those that are; a line for each says what it changes.

        Each is a path or a list of paths or of settings, {"path": ..., "scale": 0.8}: those of `ldm.adapters.sampling`,
        Patch for a LoRA and Hint for the others, and how LoRAs are composed (Attached). Raises LdmError, and then the
        model is as it was without any.
        """
        from ldm.adapters.sampling import Attached, Hint, Patch

        self.detach()
        hints = {"controlnet": make_listed(Hint, controlnet), "t2i_adapter": make_listed(Hint, t2i_adapter)}
        self.attached = Attached(self.objective, make_listed(Patch, lora), hints, **composition)
        return self.attached.report

    def detach(self) -> None:
        """Leave the model as it was before `attach`, bit for bit."""
        if self.attached:
            self.attached.detach()
        self.attached = None

    def generate(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        *,
        sampler: str | Callable = "euler",  # or a function, sample(denoise, process, x_T, times)
        steps: int = 20,
        guidance: float = 5.0,
        negative: str | None = None,
        image: Any = None,  # to start from: a path, a PIL image or a tensor, 3 H W uint8
        mask: Any = None,  # where that is white, it is repainted
        strength: float | None = None,  # 0 keeps the image, 1 forgets it; None: 0.6, or 1 with a mask
        **options: Any,
    ) -> list:
        """PIL images, every prompt with every seed: prompt 0 with each seed first, then prompt 1, ...

        options: times, threshold, dialect, image_size, batch_size, hint, progress: see `ldm.drawing.Options`.
        """
        from PIL import Image

        more = Options.read(options)
        texts, numbers = ([value] if isinstance(value, str | int) else list(value) for value in (prompts, seeds))
        pairs = [(prompt, seed) for prompt in texts for seed in numbers]
        size = sides(self.config["image_size"] if more.image_size is None else more.image_size)
        images = generate(
            self.objective,
            [prompt for prompt, _ in pairs],
            [seed for _, seed in pairs],
            sampling_of(sampler, steps, guidance, more),
            image_size=size,
            negative=negative,
            edit=edit_of(image, mask, strength, size),
            hints=None if more.hint is None else self._hints(more.hint, size, len(pairs)),
            attached=self.attached,
            batch_size=more.batch_size,
            progress=more.progress,
        )
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]

    def _hints(self, hint: Any, size: Sequence[int], count: int) -> Tensor:
        from ldm.adapters.control_objective import ControlObjective

        if not isinstance(self.objective, ControlObjective):
            raise ConfigError("hint is for runs with objective=control; with others, run.attach(controlnet=...)")
        return hints_of(hint, size, count)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.objective.parameters())
        kind = type(self.objective).__name__.removesuffix("Objective").lower()
        about = f"Run: {kind}, {count / 1e6:.3g}M parameters, step {self.step}, {self.config['image_size']} pixels"
        if not isinstance(self.objective, DiffusionObjective):
            return about
        fields = self.objective.conditioner.fields
        prompt = "a red circle" if "caption" in fields else self._classes()[0] if "label" in fields else ""
        return f"{about}; draws with run.generate({prompt!r}, seeds=0)"

    def _classes(self) -> list[str]:
        encoders = self.config["conditioner"]["encoders"].values()
        return next((node["class_names"] for node in encoders if node.get("class_names")), ["0"])


def load_run(path: str | Path, *, device: str = "auto", ema: bool = True) -> Run:
    """The newest whole checkpoint of a run directory, or one checkpoint directory, with its averaged weights.

    Raises CheckpointError when there is none, or when it is not the network its config describes.
    """
    directory, device = find(Path(path).expanduser()), pick_device(str(device))
    objective, config = rebuild(directory, ema=ema)
    step = load_weights(directory, objective, ema=ema)
    return Run(objective.to(device), config, step)


def codec_of_run(node: dict, source: Path, data: Any) -> tuple[LatentCodec, dict]:
    """The latent codec of a finished autoencoder run, and the node that rebuilds it without that run.

    Where the node gives no scale, latents are brought to mean 0 and deviation 1 as measured on images of the dataset.
    """
    run = load_run(source, device="cpu")
    autoencoder = run.objective.autoencoder
    if node["scale"] is None:
        images = [data[index]["image"] for index in range(min(len(data), SCALE_IMAGES))]
        sizes = {image.shape: None for image in images}  # several with data.buckets=true
        batches = [torch.stack([image for image in images if image.shape == size]) for size in sizes]
        codec = LatentCodec.measured(autoencoder, batches)
    else:
        codec = LatentCodec(autoencoder, node["scale"], node["shift"] or 0.0)
    numbers = {"scale": codec.scale.flatten().tolist(), "shift": codec.shift.flatten().tolist()}
    return codec, {"_target_": node["_target_"], **numbers, "autoencoder": run.config["network"]}
