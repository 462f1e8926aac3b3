"""What a frozen network sees in images: the space in which sets of images are compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.cache import digest, identity, stamp
from ldm.data.loader import fetch, groups
from ldm.io.tensors import read_tensors, write_tensors
from ldm.metrics.held_out import spread
from ldm.utils.errors import DataError


class Seen(NamedTuple):
    """Of N images, float32 on the CPU."""

    features: Tensor  # N D
    logits: Tensor | None  # N K, of classes that exclude each other, where the network knows such


class Extractor:
    """extractor(images) -> Seen, for uint8 images N 3 H W: a tensor, or whatever gives one when it is sliced.

    see: pixels (B 3 H W uint8) -> features (B D), logits (B K) or None, resizing and all.
    read: texts -> embeddings (N D) beside those of images, of a network that has such.
    name: the network, its weights and its resizing; together with the data it names what is kept in the folder `cache`.
    """

    def __init__(
        self,
        see: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        name: str,
        *,
        read: Callable[[list[str]], Tensor] | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
        cache: str | None = None,
    ):
        self.see, self.name, self.read = see, name, read
        self.device, self.batch_size, self.cache = device, batch_size, cache
        self._last: tuple[Any, Seen] = None, None

    @torch.no_grad()
    def __call__(self, images: Any) -> Seen:
        """Several metrics of the same images look at them once."""
        if self._last[0] is not images:
            starts = tqdm(range(0, len(images), self.batch_size), "looking", unit=" batches", delay=2, leave=False)
            parts = [self.see(images[start : start + self.batch_size].to(self.device)) for start in starts]
            features, logits = zip(*parts, strict=True)
            logits = None if logits[0] is None else torch.cat(logits).float().cpu()
            self._last = images, Seen(torch.cat(features).float().cpu(), logits)
        return self._last[1]

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Embeddings of texts (N D) on the CPU. Raises DataError where the network reads none."""
        if self.read is None:
            raise DataError(f"{self.name} reads no texts; use features=clip with features.texts=PATH")
        starts = range(0, len(texts), self.batch_size)
        return torch.cat([self.read(texts[start : start + self.batch_size]).float().cpu() for start in starts])

    def reference(self, data: Any, count: int) -> Seen:
        """Of `count` images spread over a dataset, or of all where it has fewer; kept in `cache` for the next time."""
        count = min(count, len(data))
        key = digest(self.name, identity(data), stamp(data) or "", str(count))[:24]
        path = Path(self.cache) / f"{key}.safetensors" if self.cache else None
        if path and path.exists():
            tensors = read_tensors(path)
            return Seen(tensors["features"], tensors.get("logits"))
        seen = self(Items(data, spread(data, count)))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: value for name, value in seen._asdict().items() if value is not None}
            write_tensors(path, tensors, {"features": self.name, "data": identity(data), "count": count})
        return seen


class Items:
    """Images of a dataset, read when they are sliced. Raises DataError where they are of several sizes."""

    def __init__(self, data: Any, items: Tensor):
        buckets = groups(data)
        if buckets is not None and len(buckets.unique()) > 1:
            raise DataError("metrics compare images of one size, and the data has many; set data.buckets=false")
        self.data, self.items = data, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, part: slice) -> Tensor:
        return fetch(self.data, self.items[part])["image"]
