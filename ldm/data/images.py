"""Folders of images, on disk or in a zip, with captions and classes found the way people lay them out.

- Hugging Face "imagefolder": `metadata.jsonl` files whose lines name an image beside them and its caption;
- sidecars: `cat.txt` beside `cat.png`;
- one folder per class: the folder's name is the label, and the caption too.
"""

import logging
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.transforms import resize_crop
from ldm.io.archives import DiskFolder, ZipFolder, open_folder
from ldm.io.images import MAX_BYTES, SUFFIXES, read_image
from ldm.io.text import MAX_TABLE, MAX_TEXT, decode_text, parse_jsonl
from ldm.utils.errors import ConfigError, DataError
from ldm.utils.seeding import key, keys, uniform

METADATA = "metadata.jsonl"
SPLITS = ("train", "held_out")
Sample = tuple[str, str | None]  # name of the image in its folder, caption

logger = logging.getLogger(__name__)


class ImageFolder(Dataset):
    """The images of a folder or zip: centre square at image_size, with "caption" and "label" where there are any.

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
    ):
        _check(image_size, background, split, held_out)
        self.folder = open_folder(path)
        self.image_size, self.background = image_size, tuple(background)
        self.max_bad_fraction = max_bad_fraction
        self.broken: dict[str, str] = {}  # name -> reason
        everything = find_samples(self.folder, caption_field)
        classes = sorted({_class(name) for name, _ in everything})
        self.class_names = classes if len(classes) > 1 else None
        held = _held_out(everything, held_out)
        self.samples = [s for s, is_held in zip(everything, held, strict=True) if split in (None, SPLITS[is_held])]
        if not self.samples:
            raise DataError(f"{path}: no image of {len(everything)} is in split {split!r} at held_out={held_out}")
        self._labels = [classes.index(_class(name)) for name, _ in self.samples]
        self._unseen = [s for s, is_held in zip(everything, held, strict=True) if is_held] or everything
        self._cache: tuple[Tensor, list[int]] | None = None  # all images, and which sample each one shows
        if cache:
            self._cache = self._decode_all()
        self._load(0)  # a folder of nothing but broken images is found out now

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image, index = self._load(index)
        caption = self.samples[index][1]
        item = {"image": image}
        if caption is not None:
            item["caption"] = caption
        if self.class_names:
            item["label"] = self._labels[index]
        return item

    def captions(self) -> Iterator[str]:
        """Every caption, without reading an image."""
        return (caption for _, caption in self.samples if caption is not None)

    def prompts(self, count: int, seed: int = 0) -> list[str]:
        """`count` held-out captions, whichever split this is; different ones as long as there are enough."""
        texts = sorted({caption for _, caption in self._unseen if caption is not None})
        order = keys(seed, "prompts", torch.arange(len(texts))).argsort().tolist()
        return [texts[order[i % len(texts)]] for i in range(count)] if texts else []

    def _load(self, index: int) -> tuple[Tensor, int]:
        """The image at index, or the next one that is not broken, and where it stands."""
        if self._cache is not None:
            images, shown = self._cache
            return images[index], shown[index]
        for i in range(index, index + len(self)):
            position = i % len(self)
            name = self.samples[position][0]
            if name not in self.broken:
                try:
                    return self._decode(name), position
                except DataError as error:
                    self._count(name, error)
        raise DataError(f"{self.folder.path}: all {len(self.broken)} images are broken")

    def _decode(self, name: str) -> Tensor:
        data = self.folder.read(name, max_bytes=MAX_BYTES)
        where = f"{self.folder.path}/{name}"
        image = read_image(data, background=self.background, min_side=2 * self.image_size, name=where)
        return resize_crop(image, self.image_size)  # 3 S S

    def _decode_all(self) -> tuple[Tensor, list[int]]:
        images, shown = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8), []
        for index in tqdm(range(len(self)), f"reading {self.folder.path}", unit=" images", delay=2, leave=False):
            images[index], position = self._load(index)
            shown.append(position)
        return images, shown

    def _count(self, name: str, error: DataError) -> None:
        self.broken[name] = str(error)
        logger.warning("%s; skipped (%d broken so far)", error, len(self.broken))
        if len(self.broken) > self.max_bad_fraction * len(self):
            raise DataError(
                f"{self.folder.path}: {len(self.broken)} of {len(self)} images are broken so far, "
                f"more than max_bad_fraction={self.max_bad_fraction} allows (the last: {error})"
            ) from error


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
            samples.append((name, _caption(caption, where)))
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
        samples.append((name, _caption(decode_text(folder.read(file, max_bytes=MAX_TEXT), where), where)))
    return samples


def from_classes(images: list[str]) -> list[Sample]:
    """Images captioned by the folder they lie in, without captions where all lie in one."""
    several = len({_class(name) for name in images}) > 1
    return [(name, _class(name).replace("_", " ") if several else None) for name in images]


def _class(name: str) -> str:
    return posixpath.basename(posixpath.dirname(name))


def _caption(text: str, where: str) -> str:
    text = " ".join(text.split())
    if not text:
        raise DataError(f"{where}: the caption is empty; write one, or leave the image out")
    return text


def _held_out(samples: list[Sample], fraction: float) -> list[bool]:
    """Which samples are kept from training: decided by name, so it stays as it is when images are added."""
    return (uniform(torch.tensor([key("held_out", name) for name, _ in samples])) < fraction).tolist()


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
