"""Has a model of captioned shapes learnt one more, and does it still know the old ones? Decided exactly."""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from ldm.data.phrases import caption
from ldm.data.scenes import COLOURS, POSITIONS, SHAPES, SIZES, Object, Scene
from ldm.data.shapes import NewShape, Shapes
from ldm.metrics.shapes import PromptAccuracy, compare
from ldm.utils.seeding import keys


class NewShapeAccuracy:
    """Shares of images that show the new shape: "new_shape" of the instances' captions, "new_shape_in_context" of looks
    that no instance had ("new_prompt_accuracy": and all else that is said). Of old shapes, whole captions
    that are held out: see `PromptAccuracy`."""

    def __init__(self, shape: str = "crescent", num_images: int = 64, num_prompts: int = 256, seed: int = 0):
        self.shape, self.num_images, self.seed = shape, num_images, seed
        self.old = PromptAccuracy(num_prompts, seed)

    def __call__(self, generate: Callable[[list[str], list[int]], Tensor], dataset, objective=None) -> dict[str, float]:
        """`generate(prompts, seeds)` -> (B, 3, H, W) uint8."""
        known, others = (self._judge(generate, looks) for looks in (NewShape.LOOKS, self.other_looks()))
        right = {"new_shape": known["shape"], "new_shape_in_context": others["shape"]}
        right |= {"new_prompt_accuracy": others["all"]}
        return {name: flags.float().mean().item() for name, flags in right.items()} | self.old(generate, Shapes())

    def other_looks(self) -> list[tuple[str, str, str]]:
        """Colours, sizes and places that no instance has together, shuffled."""
        looks = [look for look in product(COLOURS, SIZES, list(POSITIONS)[:5]) if look not in NewShape.LOOKS]
        return [looks[i] for i in keys(self.seed, "looks", torch.arange(len(looks))).argsort().tolist()]

    def _judge(self, generate: Callable, looks: Sequence[tuple[str, str, str]]) -> dict[str, Tensor]:
        scenes = [Scene((Object(self.shape, *looks[i % len(looks)]),)) for i in range(self.num_images)]
        images = generate([caption(scene) for scene in scenes], list(range(self.num_images)))
        return compare(images, scenes, (*SHAPES, self.shape))
