"""Folders of pictures, on disk or in a zip, decoded, cut and resized, with what `layouts` found to be said of each."""

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.buckets import Shape, bucket_shapes, describe, micro_conditions, nearest_bucket
from ldm.data.layouts import Sample, find_layout
from ldm.data.loader import column, facts, groups, summary
from ldm.data.metadata import Folder
from ldm.data.summary import describe_folder
from ldm.data.transforms import resize_crop
from ldm.io.archives import open_folder, readable
from ldm.io.images import MAX_BYTES, MAX_PIXELS, MOST_PIXELS, read_size, read_sized_image
from ldm.utils.errors import ConfigError, DataError
from ldm.utils.seeding import key, keys, uniform

SPLITS = ("train", "held_out")
HELD_OUT = 0.05  # of the pictures, where nobody says how many
FEW = 100  # pictures, of which none is held out then
MEASURED = 1000  # pictures at most, whose sizes the summary tells

logger = logging.getLogger(__name__)


class Picture(NamedTuple):
    """What is shown at a position."""

    image: Tensor  # 3 H W uint8
    size: Tensor  # SDXL's six numbers
    index: int  # of the sample: another one's where that is broken


class ImageFolder(Dataset):
    """The images of a folder or zip with "size" (original, crop, target: six numbers), "index" (which image it is), and
    "caption", "label" and "aesthetic" where there are any: the centre square at image_size, or shapes in `buckets`.

    A broken image is logged, counted in `broken` and replaced by the next good one, so that every position of a run
    still has an image, the same one each time. Raises DataError where too many are broken.
    """

    origin: ClassVar[str] = ""  # where a set that is published comes from, for those who do not have it yet

    def __init__(
        self,
        path: str,  # a directory or a .zip file
        *,
        image_size: int,
        caption_field: str | None = None,  # of metadata; None: text, caption or prompt
        background: Sequence[int] = (255, 255, 255),  # shows where an image is transparent
        split: str | None = None,  # "train" or "held_out"; None is both
        held_out: float | None = None,  # share of images, chosen by their names; None: 0.05, 0 of fewer than 100
        cache: bool = False,  # decode everything at the start and keep it in memory
        max_bad_fraction: float = 0.5,
        buckets: bool = False,  # many aspect ratios of the area image_size^2, instead of the centre square
        bucket_step: int = 64,  # their sides are multiples of this
        max_pixels: int = MAX_PIXELS,  # of one image; larger ones count as broken
    ):
        _check(image_size, background, split, held_out, max_pixels)
        self.folder = self._open(path)
        self.image_size, self.background, self.max_pixels = image_size, tuple(background), max_pixels
        self.shapes = bucket_shapes(image_size, bucket_step) if buckets else [(image_size, image_size)]
        self.max_bad_fraction = max_bad_fraction
        self.broken: dict[str, str] = {}  # name -> reason
        self.layout = find_layout(self.folder, caption_field)
        everything = self.layout.samples
        classes = sorted({sample.group for sample in everything})
        self.class_names = classes if len(classes) > 1 and "" not in classes else None
        self.held_out, held = _held_out(everything, held_out, self.layout.held_out)
        self.samples = [s for s, is_held in zip(everything, held, strict=True) if split in (None, SPLITS[is_held])]
        if not self.samples:
            shown = f"held_out={self.held_out}"
            raise DataError(f"{path}: no image of {len(everything)} is in split {split!r} at {shown}")
        numbers = {name: number for number, name in enumerate(classes)}
        self._labels = [numbers[sample.group] for sample in self.samples]
        self._unseen = [s for s, is_held in zip(everything, held, strict=True) if is_held]
        self._cache: list[Picture] | None = None
        self._find(0, (image_size, image_size))  # a folder of nothing but broken images is found out now
        if cache:
            self._cache = [self._load(index) for index in self._progress("reading")]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        picture = self._cache[index] if self._cache else self._load(index)
        return picture._asdict() | {name: values[0] for name, values in self.facts([picture.index]).items()}

    def facts(self, indices: Sequence[int]) -> dict[str, list]:
        """Captions, labels and scores of samples, without reading their images."""
        samples, known = [self.samples[index] for index in indices], {}
        if samples[0].caption is not None:
            known["caption"] = [sample.caption for sample in samples]
        if self.class_names:
            known["label"] = [self._labels[index] for index in indices]
        if samples[0].aesthetic is not None:
            known["aesthetic"] = [sample.aesthetic for sample in samples]
        return known

    @cached_property
    def groups(self) -> Tensor:
        """The index in `shapes` of every sample's bucket (N,), by the headers of all files."""
        measured = self._sizes([sample.name for sample in self.samples])
        sizes = [measured[sample.name] for sample in self.samples]
        found = [nearest_bucket(size, self.shapes) for size in sizes]
        logger.info("%s", describe(sizes, found, self.shapes))
        return torch.tensor(found)

    def captions(self) -> Iterator[str]:
        """Every caption, without reading an image."""
        return (sample.caption for sample in self.samples if sample.caption is not None)

    def prompts(self, count: int, seed: int = 0) -> list[str]:
        """`count` held-out captions, whichever split this is; different ones as long as there are enough."""
        unseen = self._unseen or self.layout.samples
        texts = sorted({sample.caption for sample in unseen if sample.caption is not None})
        order = keys(seed, "prompts", torch.arange(len(texts))).argsort().tolist()
        return [texts[order[i % len(texts)]] for i in range(count)] if texts else []

    def summary(self) -> str:
        """What was found, what of it is used, and what is not: a few lines. Looks at the headers of 1,000 images."""
        names = list(dict.fromkeys(sample.name for sample in self.samples))
        sizes = self._sizes(names[:: -(-len(names) // MEASURED)])
        good = [size for name, size in sizes.items() if name not in self.broken]
        unseen = sorted({sample.name for sample in self._unseen})
        return describe_folder(str(self.folder.path), self.layout, self.samples, unseen, good, self.broken)

    def _open(self, path: str) -> Folder:
        try:
            return open_folder(path)
        except DataError as error:
            raise DataError(f"{error}; {self.origin}") if self.origin else error from None

    def _load(self, index: int) -> Picture:
        """The image at index, or the next one that is not broken, in the shape of the bucket of index."""
        several = len(self.shapes) > 1
        return self._find(index, self.shapes[self.groups[index]] if several else self.shapes[0])

    def _find(self, index: int, shape: Shape) -> Picture:
        for i in range(index, index + len(self)):
            position = i % len(self)
            name = self.samples[position].name
            if name not in self.broken:
                try:
                    return Picture(*self._decode(name, shape), position)
                except DataError as error:
                    self._count(name, error)
        raise DataError(f"{self.folder.path}: all {len(self.broken)} images are broken")

    def _decode(self, name: str, shape: Shape) -> tuple[Tensor, Tensor]:
        image, size = read_sized_image(
            self.folder.read(name, max_bytes=MAX_BYTES), name=self._where(name), background=self.background,
            max_pixels=self.max_pixels, min_side=2 * min(shape),
        )  # fmt: skip
        return resize_crop(image, *shape), micro_conditions(size, shape)

    def _sizes(self, names: Sequence[str]) -> dict[str, Shape]:
        """Of an image that cannot be read: that of a square, which its replacement will be made to."""
        sizes = {}
        for name in self._progress("measuring", list(dict.fromkeys(names))):
            try:
                data = self.folder.read(name, max_bytes=MAX_BYTES)
                sizes[name] = read_size(data, max_pixels=self.max_pixels, name=self._where(name))
            except DataError as error:
                sizes[name] = self.image_size, self.image_size
                if name not in self.broken:
                    self._count(name, error)
        return sizes

    def _where(self, name: str) -> str:
        return readable(f"{self.folder.path}/{name}")

    def _progress(self, verb: str, items: Sequence | None = None) -> Iterator:
        items = range(len(self)) if items is None else items
        return tqdm(items, f"{verb} {self.folder.path}", unit=" images", delay=2, leave=False)

    def _count(self, name: str, error: DataError) -> None:
        self.broken[name] = str(error)
        logger.warning("%s; skipped (%d broken so far)", error, len(self.broken))
        total = len({sample.name for sample in self.samples})
        if len(self.broken) > self.max_bad_fraction * total:
            raise DataError(
                f"{self.folder.path}: {len(self.broken)} of {total} images are broken so far, "
                f"more than max_bad_fraction={self.max_bad_fraction} allows (the last: {error})"
            ) from error


@groups.register
def _(dataset: ImageFolder) -> Tensor | None:
    return dataset.groups if len(dataset.shapes) > 1 else None


@facts.register
def _(dataset: ImageFolder, items: Tensor) -> dict[str, Any]:
    return {name: column(values) for name, values in dataset.facts(items.tolist()).items()}


@summary.register
def _(dataset: ImageFolder) -> str:
    return dataset.summary()


def _held_out(samples: list[Sample], share: float | None, folders: frozenset[str] | None) -> tuple[float, list[bool]]:
    """The share and which samples are kept from training: those in folders for that, or decided by name, so that it
    stays as it is when images are added."""
    if folders is not None:
        return 0.0, [sample.name in folders for sample in samples]
    if share is None:
        share = HELD_OUT if len({sample.name for sample in samples}) >= FEW else 0.0
    keys_ = torch.tensor([key("held_out", readable(sample.name)) for sample in samples])
    return share, (uniform(keys_) < share).tolist()


def _check(
    image_size: int, background: Sequence[int], split: str | None, held_out: float | None, max_pixels: int
) -> None:
    checks = {
        "image_size": (image_size, image_size >= 1, "at least 1 pixel"),
        "background": (background, len(background) == 3 and all(0 <= c <= 255 for c in background), "3 x 0 to 255"),
        "split": (split, split in (None, *SPLITS), f"null or one of {', '.join(SPLITS)}"),
        "held_out": (held_out, held_out is None or 0 <= held_out < 1, "0 to 1, or null"),
        "max_pixels": (max_pixels, 1 <= max_pixels <= MOST_PIXELS, f"1 to {MOST_PIXELS:,}"),
    }
    for name, (value, good, expected) in checks.items():
        if not good:
            raise ConfigError(f"data.{name}={value!r} cannot be: expected {expected}")
