"""What a picture is asked for with, in Python as on the command line: pictures to start from, an own sampler, a bar."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.transforms import resize_crop
from ldm.io.images import read_image
from ldm.sampling import Sampling
from ldm.utils.errors import ConfigError, DataError
from ldm.utils.suggest import nearest

SECONDS_UNSEEN = 2  # of a bar that nobody asked for


@dataclass
class Edit:
    """A picture to start from: changed as a whole (SDEdit), or repainted where the mask is 1."""

    image: Tensor  # 3 H W uint8
    strength: float | None = None  # 0 keeps the picture, 1 forgets it; None: 0.6, or 1 with a mask
    mask: Tensor | None = None  # 1 H W, 0 or 1

    def __post_init__(self):
        if self.strength is None:
            self.strength = 0.6 if self.mask is None else 1.0


@dataclass
class Options:
    """What `Run.generate` takes beside what it names."""

    times: str | None = None  # the grid, of configs/times; None: the dialect's
    threshold: str = "none"
    dialect: str = "native"
    image_size: int | Sequence[int] | None = None  # None: what the model was trained at
    batch_size: int = 64
    hint: Any = None  # a picture that a model trained with objective=control follows: the hint itself, of that size
    progress: bool | None = None  # a bar; None: after two seconds, where somebody watches

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "Options":
        """Raises ConfigError for a name that is none of these."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            hint = nearest(unknown[0], known) or f"; it takes {', '.join(known)}"
            raise ConfigError(f"generate has no argument '{unknown[0]}'{hint}")
        return cls(**given)


def sampling_of(sampler: str | Callable, steps: int, scale: float, options: Options) -> Sampling:
    """How to sample, by names of configs/; or with a function of one's own, sample(denoise, process, x_T, times)."""
    name = sampler if isinstance(sampler, str) else "euler"
    sampling = Sampling.named(name, steps, scale, options.times, options.threshold, options.dialect)
    if name is not sampler:
        sampling.sampler = _own(sampler)
    return sampling


def _own(sampler: Callable) -> Callable:
    """A sampler that need not take the two arguments in which others differ."""
    if not callable(sampler):
        raise ConfigError(f"sampler={sampler!r}: expected a name, or a function sample(denoise, process, x_T, times)")
    accepted = inspect.signature(sampler).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted)
    names = {p.name for p in accepted}

    def sample(denoise, process, x_T, times, **more):
        return sampler(denoise, process, x_T, times, **{k: v for k, v in more.items() if takes_all or k in names})

    return sample


def edit_of(image: Any, mask: Any, strength: float | None, size: Sequence[int]) -> Edit | None:
    """The picture and the mask to start from, at the height and width that are drawn. Raises ConfigError, DataError."""
    if image is None:
        if given := [name for name, value in {"mask": mask, "strength": strength}.items() if value is not None]:
            raise ConfigError(f"{given[0]} is set but image is not; give the picture to change, e.g. image=photo.png")
        return None
    if not isinstance(strength, int | float | None) or not 0 <= (strength or 0) <= 1:
        raise ConfigError(f"strength={strength} must lie between 0 (keep the picture) and 1 (forget it)")
    picture, where = as_picture(image), None if mask is None else as_picture(mask)
    if where is not None and where.shape != picture.shape:
        found, expected = (f"{width}x{height}" for _, height, width in (where.shape, picture.shape))
        raise DataError(f"mask {_name(mask)} is {found} pixels, expected {expected}, the size of {_name(image)}")
    where = None if where is None else (resize_crop(where, *size)[:1] > 127).float()
    return Edit(resize_crop(picture, *size), strength, where)


def hints_of(hint: Any, size: Sequence[int], count: int) -> Tensor:
    """B 3 H W uint8 of the one hint that all pictures follow. Raises DataError for one of another size."""
    picture = as_picture(hint)
    if tuple(picture.shape[1:]) != tuple(size):
        raise DataError(f"hint {_name(hint)} is {list(picture.shape[1:])} pixels, but what is drawn is {list(size)}")
    return picture.expand(count, -1, -1, -1)


def as_picture(source: Any) -> Tensor:
    """3 H W uint8 of a file, of a tensor of that shape, or of what PIL has opened."""
    if isinstance(source, str | Path):
        return read_image(Path(source).expanduser())
    if isinstance(source, Tensor):
        if source.dtype == torch.uint8 and source.dim() == 3 and len(source) == 3:
            return source
        raise DataError(f"a picture of {source.dtype} {tuple(source.shape)}: expected uint8 of (3, height, width)")
    import numpy as np
    from PIL.Image import Image

    if isinstance(source, Image):
        return torch.from_numpy(np.array(source.convert("RGB"))).permute(2, 0, 1).contiguous()
    raise DataError(f"a picture of type {type(source).__name__}: expected a path, a PIL image or a uint8 tensor")


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "given"


def sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width. Raises ConfigError for what is no size."""
    size = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ConfigError(f"image_size={image_size}: expected pixels, one whole number or [height, width]")
    return size


def latent_shape(codec: Any, height: int, width: int) -> tuple[int, int, int]:
    """C H W of the codec's latents for images of this size. Raises ConfigError where it does not divide."""
    if height % codec.downsample or width % codec.downsample:
        raise ConfigError(f"image size {height}x{width} is not divisible by {codec.downsample}, what the codec needs")
    return codec.channels, height // codec.downsample, width // codec.downsample


def progress_bar(steps: int, visible: bool | None) -> tqdm:
    """A bar of sampling steps; None: after two seconds, in a terminal or a notebook."""
    if visible is None and "ipykernel" not in sys.modules:
        return tqdm(total=steps, desc="sampling", unit="step", disable=None, delay=SECONDS_UNSEEN)
    hidden = visible is False
    return tqdm(total=steps, desc="sampling", unit="step", disable=hidden, delay=0 if visible else SECONDS_UNSEEN)
