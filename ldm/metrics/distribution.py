"""Drawn images as a set beside held-out ones, in the features of a network: fidelity, diversity, fit to captions."""

from collections.abc import Callable

from torch import nn

from ldm.data.loader import facts
from ldm.metrics import statistics
from ldm.metrics.features import Extractor, Seen
from ldm.metrics.held_out import prompts_of, spread
from ldm.utils.errors import DataError


class Drawn:
    """Images k = 0, 1, ... are drawn with seed k for what `num_images` held-out items, spread evenly, are told to show.

    Metrics of as many images have the same ones.
    """

    def __init__(self, features: Extractor, num_images: int = 512):
        self.features, self.num_images = features, num_images

    def draw(self, draw: Callable, data, objective: nn.Module) -> Seen:
        prompts = prompts_of(data, spread(data, self.num_images), objective)
        return self.features(draw(prompts, range(self.num_images)))


class Compared(Drawn):
    """They stand beside `num_reference` held-out images, or all of them where there are fewer."""

    def __init__(self, features: Extractor, num_images: int = 512, num_reference: int = 4096):
        super().__init__(features, num_images)
        self.num_reference = num_reference

    def __call__(self, draw: Callable, data, objective: nn.Module) -> dict[str, float]:
        return self.compare(self.features.reference(data, self.num_reference), self.draw(draw, data, objective))

    def compare(self, real: Seen, drawn: Seen) -> dict[str, float]:
        raise NotImplementedError


class Frechet(Compared):
    """Frechet distance; with the features of Inception-v3 the FID. It falls as the number of images grows."""

    def compare(self, real, drawn):
        distance = statistics.frechet_distance(*(statistics.gaussian(seen.features) for seen in (real, drawn)))
        return {"frechet_distance": distance}


class KID(Compared):
    """Kernel distance, unbiased for any number of images."""

    def __init__(self, features: Extractor, num_images: int = 512, num_reference: int = 4096,
                 subsets: int = 100, subset_size: int = 1000, seed: int = 0):  # fmt: skip
        super().__init__(features, num_images, num_reference)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def compare(self, real, drawn):
        values = statistics.kernel_distance(real.features, drawn.features, self.subsets, self.subset_size, self.seed)
        return dict(zip(("kid", "kid_std"), values, strict=True))


class PrecisionRecall(Compared):
    """Are drawn images like real ones (precision), and are real ones like drawn ones (recall)?"""

    def __init__(self, features: Extractor, num_images: int = 512, num_reference: int = 4096, neighbours: int = 3):
        super().__init__(features, num_images, num_reference)
        self.neighbours = neighbours

    def compare(self, real, drawn):
        values = statistics.precision_recall(real.features, drawn.features, self.neighbours)
        return dict(zip(("precision", "recall"), values, strict=True))


class InceptionScore(Drawn):
    """How sure of its class each drawn image is, and how evenly they spread over classes; real ones play no part."""

    def __init__(self, features: Extractor, num_images: int = 512, splits: int = 10):
        super().__init__(features, num_images)
        self.splits = splits

    def __call__(self, draw, data, objective):
        logits = self.draw(draw, data, objective).logits
        if logits is None:
            raise DataError(f"the Inception score needs a network that knows classes, and {self.features.name} does "
                            "not; use features=inception or a classifier of labels")  # fmt: skip
        values = statistics.inception_score(logits, self.splits)
        return dict(zip(("inception_score", "inception_score_std"), values, strict=True))


class ClipScore(Drawn):
    """How well drawn images fit their captions in CLIP's eyes; the network changes the number, so name it.

    clip_score is 100 max(cos, 0), as torchmetrics and most papers; clip_s is 2.5 max(cos, 0), arXiv:2104.08718's own.
    """

    def __call__(self, draw, data, objective):
        captions = facts(data, spread(data, self.num_images)).get("caption")
        if captions is None:
            raise DataError("the CLIP score compares images with their captions, and the data has none; leave it out")
        texts = self.features.texts(captions)
        score = statistics.clip_similarity(self.draw(draw, data, objective).features, texts).mean().item()
        return {"clip_score": 100 * score, "clip_s": 2.5 * score}
