"""DreamBooth's data, arXiv:2208.12242: a few images of a subject, and images of its class that the base drew itself.

    L = E |F(instance) - target|^2 + lambda E |F(class) - target|^2          Eq. (2): prior preservation

is the mean of one loss over one dataset: every other image is of the class, and each has a weight. So an image of
either kind may stand anywhere in a batch, however it is split. Deviation: a batch is not half and half but as the
shuffled order has it; an epoch is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.cache import digest, identity, stamp
from ldm.data.images import ImageFolder
from ldm.data.loader import collate, facts, groups, summary
from ldm.io.images import SUFFIXES, read_png_text
from ldm.utils.errors import ConfigError, DataError


@dataclass
class DreamBooth:
    """What is learnt and what is kept; the knobs of configs/dreambooth/prior.yaml. Raises ConfigError."""

    instance_prompt: str | None = None  # of every image of the data; None: each has its own caption
    class_prompt: str | Sequence[str] | None = None  # of the class images, several in turn
    prior_weight: float = 1.0  # lambda; 0: no class images
    count: int = 200  # class images
    path: str | None = None  # where they are, or will be drawn
    seed: int = 0  # of the first one, the next one's is one more

    def __post_init__(self):
        prompts = self.class_prompt or ()
        self.class_prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.prior_weight < 0:
            raise ConfigError(f"dreambooth.prior_weight={self.prior_weight}: expected 0 (no class images) or more")
        if self.prior_weight and not any(self.class_prompts):
            raise ConfigError(
                f"dreambooth.prior_weight={self.prior_weight} keeps a class that no dreambooth.class_prompt names; "
                "set it, e.g. class_prompt='a dog', or prior_weight=0"
            )
        if self.prior_weight and self.count < 1:
            raise ConfigError(f"dreambooth.count={self.count}: expected at least 1 class image, or prior_weight=0")
        self.files = {f"{index:05d}.png": index for index in range(self.count)}  # as they are drawn

    def prompt(self, index: int) -> str:
        """Of one class image."""
        return self.class_prompts[index % len(self.class_prompts)]

    def captions(self, names: Sequence[str]) -> list[str]:
        """Of a folder's images, some of which may be the user's own."""
        return [self.prompt(self.files.get(name, position)) for position, name in enumerate(names)]

    def missing(self, folder: Path) -> dict[str, int]:
        """The files to be drawn yet, and which image each is; raises DataError where one is of another prompt."""
        if not self.prior_weight:
            return {}
        present = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
        for path, prompt in zip(present, self.captions([path.name for path in present]), strict=True):
            drawn = read_png_text(path).get("prompt") if path.suffix == ".png" else None
            if drawn not in (None, prompt):
                raise DataError(
                    f"{path} shows {drawn!r}, dreambooth.class_prompt is {prompt!r}; "
                    f"delete {folder}, or set dreambooth.path to another folder"
                )
        lacking = {name: index for name, index in self.files.items() if folder / name not in present}
        return dict(list(lacking.items())[: max(0, self.count - len(present))])

    def mix(self, instances: Dataset, folder: Path, image_size: int) -> "Mixture":
        """The data with the class images of a folder mixed in. Raises DataError where images have no captions."""
        if not self.instance_prompt and "caption" not in facts(instances, torch.tensor([0])):
            raise DataError("the images have no captions; set dreambooth.instance_prompt, e.g. 'a sks dog'")
        prompts = [self.instance_prompt] if self.instance_prompt else None
        if not self.prior_weight:
            return Mixture([instances], [prompts], [1.0])
        classes = ImageFolder(str(folder), image_size=image_size, held_out=0.0)
        captions = self.captions([sample.name for sample in classes.samples])
        return Mixture([instances, classes], [prompts, captions], [1.0, self.prior_weight])


class Mixture(Dataset):
    """Images of several datasets in turn, the shorter ones again and again, with "caption" and "weight".

    A caption is one of the dataset's `prompts`, in turn, or None: the image's own. A weighted mean over all is the sum,
    over the datasets, of weight times the mean over each.
    """

    class_names = None

    def __init__(self, parts: Sequence[Dataset], prompts: Sequence[Sequence[str] | None], weights: Sequence[float]):
        self.parts, self.given, self.weights = list(parts), list(prompts), list(weights)
        self.shown = {"image", "size"}.intersection(*(part[0] for part in parts))  # the same of every image

    def __len__(self) -> int:
        return len(self.parts) * max(map(len, self.parts))

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part, inner = self._place(index)
        item = self.parts[part][inner]
        return {name: item[name] for name in self.shown} | self.facts(index)

    def facts(self, index: int) -> dict[str, Any]:
        """Caption and weight of an image, without reading it."""
        part, inner = self._place(index)
        prompts = self.given[part]
        own = prompts or facts(self.parts[part], torch.tensor([inner]))["caption"]
        return {"caption": own[inner % len(own)], "weight": len(self.parts) * self.weights[part]}

    def captions(self) -> Iterator[str]:
        return (self.facts(index)["caption"] for index in range(len(self)))

    def prompts(self, count: int, seed: int = 0) -> list[str]:
        """Captions of images as they come: of the subject and the class in turn."""
        return [self.facts(index % len(self))["caption"] for index in range(count)]

    def _place(self, index: int) -> tuple[int, int]:
        inner, part = divmod(index, len(self.parts))
        return part, inner % len(self.parts[part])


@facts.register
def _(dataset: Mixture, items: Tensor) -> dict[str, Any]:
    return collate([dataset.facts(item) for item in items.tolist()])


@groups.register
def _(dataset: Mixture) -> Tensor | None:
    every = [groups(part) for part in dataset.parts]
    if len(every) == 1 or all(part is None for part in every):
        return every[0]
    raise ConfigError("data.buckets=true mixes with no class images, which are squares; set data.buckets=false")


@summary.register
def _(dataset: Mixture) -> str:
    return "\n".join(summary(part) for part in dataset.parts)


@identity.register
def _(dataset: Mixture) -> str:
    return digest(*map(identity, dataset.parts))


@stamp.register
def _(dataset: Mixture) -> str | None:
    stamps = [stamp(part) for part in dataset.parts]
    return None if None in stamps else digest(*stamps)
