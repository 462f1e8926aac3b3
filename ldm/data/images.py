"""Folders of images, on disk or in a zip, with captions and classes found the way people lay them out.

- Hugging Face "imagefolder": `metadata.jsonl` files whose lines name an image beside them and its caption;
- sidecars: `cat.txt` beside `cat.png`;
- one folder per class: the folder's name is the label, and the caption too.

Lines of metadata.jsonl may also hold "aesthetic", a number.
"""

import logging
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.buckets import Shape, bucket_shapes, describe, micro_conditions, nearest_bucket
from ldm.data.loader import column, facts, groups
from ldm.data.transforms import resize_crop
from ldm.io.archives import DiskFolder, ZipFolder, open_folder
from ldm.io.images import MAX_BYTES, SUFFIXES, read_size, read_sized_image
from ldm.io.text import MAX_TABLE, MAX_TEXT, decode_text, parse_jsonl
from ldm.utils.errors import ConfigError, DataError
from ldm.utils.seeding import key, keys, uniform

METADATA = "metadata.jsonl"
SPLITS = ("train", "held_out")

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One image of a folder and what is said of it."""

    name: str  # in its folder
    caption: str | None
    aesthetic: float | None = None


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

    def __init__(
        self,
        path: str,  # a directory or a .zip file
        *,
        image_size: int,
        caption_field: str = "text",  # of metadata.jsonl
        background: Sequence[int] = (255, 255, 255),  # shows where an image is transparent
        split: str | None = None,  # "train" or "held_out"; None is both
        held_out: float = 0.05,  # share of images, chosen by their names
        cache: bool = False,  # decode everything at the start and keep it in memory
        max_bad_fraction: float = 0.5,
        buckets: bool = False,  # many aspect ratios of the area image_size^2, instead of the centre square
        bucket_step: int = 64,  # their sides are multiples of this
    ):
        _check(image_size, background, split, held_out)
        self.folder = open_folder(path)
        self.image_size, self.background = image_size, tuple(background)
        self.shapes = bucket_shapes(image_size, bucket_step) if buckets else [(image_size, image_size)]
        self.max_bad_fraction = max_bad_fraction
        self.broken: dict[str, str] = {}  # name -> reason
        everything = find_samples(self.folder, caption_field)
        classes = sorted({_class(sample.name) for sample in everything})
        self.class_names = classes if len(classes) > 1 else None
        held = _held_out(everything, held_out)
        self.samples = [s for s, is_held in zip(everything, held, strict=True) if split in (None, SPLITS[is_held])]
        if not self.samples:
            raise DataError(f"{path}: no image of {len(everything)} is in split {split!r} at held_out={held_out}")
        self._labels = [classes.index(_class(sample.name)) for sample in self.samples]
        self._unseen = [s for s, is_held in zip(everything, held, strict=True) if is_held] or everything
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
        sizes = [self._size(sample.name) for sample in self._progress("measuring", self.samples)]
        found = [nearest_bucket(size, self.shapes) for size in sizes]
        logger.info("%s", describe(sizes, found, self.shapes))
        return torch.tensor(found)

    def captions(self) -> Iterator[str]:
        """Every caption, without reading an image."""
        return (sample.caption for sample in self.samples if sample.caption is not None)

    def prompts(self, count: int, seed: int = 0) -> list[str]:
        """`count` held-out captions, whichever split this is; different ones as long as there are enough."""
        texts = sorted({sample.caption for sample in self._unseen if sample.caption is not None})
        order = keys(seed, "prompts", torch.arange(len(texts))).argsort().tolist()
        return [texts[order[i % len(texts)]] for i in range(count)] if texts else []

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
        data, where = self.folder.read(name, max_bytes=MAX_BYTES), f"{self.folder.path}/{name}"
        image, size = read_sized_image(data, background=self.background, min_side=2 * min(shape), name=where)
        return resize_crop(image, *shape), micro_conditions(size, shape)

    def _size(self, name: str) -> Shape:
        """Of an image that cannot be read: that of a square, which its replacement will be made to."""
        try:
            return read_size(self.folder.read(name, max_bytes=MAX_BYTES), name=f"{self.folder.path}/{name}")
        except DataError as error:
            self._count(name, error)
            return self.image_size, self.image_size

    def _progress(self, verb: str, items: Sequence | None = None) -> Iterator:
        items = range(len(self)) if items is None else items
        return tqdm(items, f"{verb} {self.folder.path}", unit=" images", delay=2, leave=False)

    def _count(self, name: str, error: DataError) -> None:
        self.broken[name] = str(error)
        logger.warning("%s; skipped (%d broken so far)", error, len(self.broken))
        if len(self.broken) > self.max_bad_fraction * len(self):
            raise DataError(
                f"{self.folder.path}: {len(self.broken)} of {len(self)} images are broken so far, "
                f"more than max_bad_fraction={self.max_bad_fraction} allows (the last: {error})"
            ) from error


@groups.register
def _(dataset: ImageFolder) -> Tensor | None:
    return dataset.groups if len(dataset.shapes) > 1 else None


@facts.register
def _(dataset: ImageFolder, items: Tensor) -> dict[str, Any]:
    return {name: column(values) for name, values in dataset.facts(items.tolist()).items()}


def find_samples(folder: DiskFolder | ZipFolder, caption_field: str = "text") -> list[Sample]:
    """All images with their captions, in the first of the three layouts that applies. Raises DataError."""
    images = [name for name in folder.names if posixpath.splitext(name)[1].lower() in SUFFIXES]
    if not images:
        kinds = Counter(posixpath.splitext(name)[1].lower() or "no suffix" for name in folder.names)
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
        raise DataError(f"{folder.path}: no images ({' '.join(SUFFIXES)}) in it; found {found}")
    return from_metadata(folder, caption_field) or from_sidecars(folder, images) or from_classes(images)


def from_metadata(folder: DiskFolder | ZipFolder, caption_field: str) -> list[Sample]:
    """The lines of every metadata.jsonl; an image may have several. Empty where there is no such file."""
    samples, present = [], set(folder.names)
    for table in (name for name in folder.names if posixpath.basename(name) == METADATA):
        data = folder.read(table, max_bytes=MAX_TABLE)
        for where, row in parse_jsonl(data, f"{folder.path}/{table}"):
            file, caption = row.get("file_name"), row.get(caption_field)
            if not isinstance(file, str) or not isinstance(caption, str):
                raise DataError(f"{where}: needs texts 'file_name' and {caption_field!r}, has fields {sorted(row)}")
            name = posixpath.normpath(posixpath.join(posixpath.dirname(table), file))
            if name not in present:
                raise DataError(f"{where}: there is no image {name!r} in {folder.path}")
            samples.append(Sample(name, _caption(caption, where), _score(row.get("aesthetic"), where)))
    if 0 < sum(sample.aesthetic is None for sample in samples) < len(samples):
        first = next(sample.name for sample in samples if sample.aesthetic is None)
        raise DataError(f"{folder.path}: {first!r} has no 'aesthetic', other images do; give it to all or to none")
    return samples


def from_sidecars(folder: DiskFolder | ZipFolder, images: list[str]) -> list[Sample]:
    """Images with the text file of the same name beside each. Empty where no image has one; then all must."""
    present = set(folder.names)
    files = {name: posixpath.splitext(name)[0] + ".txt" for name in images}
    missing = [name for name in images if files[name] not in present]
    if len(missing) == len(images):
        return []
    if missing:
        problem = f"no caption file {files[missing[0]]!r} for {missing[0]!r}"
        raise DataError(f"{folder.path}: {problem} ({len(missing)} of {len(images)} images lack theirs); add it")
    samples = []
    for name, file in files.items():
        where = f"{folder.path}/{file}"
        samples.append(Sample(name, _caption(decode_text(folder.read(file, max_bytes=MAX_TEXT), where), where)))
    return samples


def from_classes(images: list[str]) -> list[Sample]:
    """Images captioned by the folder they lie in, without captions where all lie in one."""
    several = len({_class(name) for name in images}) > 1
    return [Sample(name, _class(name).replace("_", " ") if several else None) for name in images]


def _class(name: str) -> str:
    return posixpath.basename(posixpath.dirname(name))


def _caption(text: str, where: str) -> str:
    text = " ".join(text.split())
    if not text:
        raise DataError(f"{where}: the caption is empty; write one, or leave the image out")
    return text


def _score(value: Any, where: str) -> float | None:
    if value is None or type(value) in (int, float):
        return None if value is None else float(value)
    raise DataError(f"{where}: 'aesthetic' is {value!r}, expected a number such as 6.5")


def _held_out(samples: list[Sample], fraction: float) -> list[bool]:
    """Which samples are kept from training: decided by name, so it stays as it is when images are added."""
    return (uniform(torch.tensor([key("held_out", sample.name) for sample in samples])) < fraction).tolist()


def _check(image_size: int, background: Sequence[int], split: str | None, held_out: float) -> None:
    checks = {
        "image_size": (image_size, image_size >= 1, "at least 1 pixel"),
        "background": (background, len(background) == 3 and all(0 <= c <= 255 for c in background), "3 x 0 to 255"),
        "split": (split, split in (None, *SPLITS), f"null or one of {', '.join(SPLITS)}"),
        "held_out": (held_out, 0 <= held_out < 1, "0 to 1"),
    }
    for name, (value, good, expected) in checks.items():
        if not good:
            raise ConfigError(f"data.{name}={value!r} cannot be: expected {expected}")
