"""Does an image obey its hint? Its own hint is made again, and compared with the one that was given."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.scenes import draw
from ldm.data.shapes import render


def overlap(given: Tensor, found: Tensor, reach: int = 1) -> Tensor:
    """Intersection over union of lines (B C H W) uint8, bright on black, each thicker by `reach` pixels: -> (B,)."""
    a, b = (F.max_pool2d((lines.amax(1) > 127).float(), 2 * reach + 1, 1, reach) > 0 for lines in (given, found))
    union = (a | b).flatten(1).sum(1)
    return torch.where(union > 0, (a & b).flatten(1).sum(1) / union.clamp(min=1), 1.0)


class HintOverlap:
    """Mean overlap of the hints of held-out scenes and those of what is drawn from them, the prompt left empty.

    Without a prompt the hint alone says what to draw; `without_hint` is the same of the base: chance.
    """

    def __init__(self, num_scenes: int = 64, seed: int = 0, reach: int = 1):
        self.num_scenes = num_scenes
        self.seed = seed
        self.reach = reach

    def __call__(self, generate: Callable[..., Tensor], dataset, objective: nn.Module) -> dict[str, float]:
        """`generate(prompts, seeds, hints=)` -> (B, 3, H, W) uint8, without hints those of the base."""
        count = self.num_scenes
        scenes = draw(self.seed, "held_out", range(count), dataset.objects, dataset.jitter)
        hints = objective.annotate(render(scenes, dataset.image_size))
        prompts, seeds = [""] * count, range(count)
        images = {"hint_overlap": generate(prompts, seeds, hints=hints), "without_hint": generate(prompts, seeds)}
        found = {name: objective.annotate(drawn.cpu()) for name, drawn in images.items()}
        return {name: overlap(hints, lines, self.reach).mean().item() for name, lines in found.items()}
