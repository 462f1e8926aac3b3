"""Does an image obey its hint? Its edges are compared with those of the image that the hint was made of."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.hints import canny
from ldm.metrics.held_out import spread_batch


def overlap(given: Tensor, found: Tensor, reach: int = 1) -> Tensor:
    """Intersection over union of lines (B C H W) uint8, bright on black, each thicker by `reach` pixels: -> (B,)."""
    a, b = (F.max_pool2d((lines.amax(1) > 127).float(), 2 * reach + 1, 1, reach) > 0 for lines in (given, found))
    union = (a | b).flatten(1).sum(1)
    return torch.where(union > 0, (a & b).flatten(1).sum(1) / union.clamp(min=1), 1.0)


class HintOverlap:
    """Mean overlap of the edges of held-out images and of what is drawn from hints of them, the prompt left empty.

    Without a prompt the hint alone says what to draw; `without_hint` is the same of the base: chance.
    """

    def __init__(self, num_images: int = 64, reach: int = 1):
        self.num_images, self.reach = num_images, reach

    def __call__(self, generate: Callable[..., Tensor], data, objective: nn.Module) -> dict[str, float]:
        """`generate(prompts, seeds, hints=)` -> (B, 3, H, W) uint8, without hints those of the base."""
        truth, hints = held_out(objective, data, self.num_images)
        prompts, seeds = [""] * len(truth), range(len(truth))
        images = {"hint_overlap": generate(prompts, seeds, hints=hints), "without_hint": generate(prompts, seeds)}
        edges = canny(truth)
        return {name: overlap(edges, canny(drawn.cpu()), self.reach).mean().item() for name, drawn in images.items()}


class Steered:
    """Hints of held-out images, what the base draws without them, what it draws with them, and the images, in rows."""

    def __init__(self, count: int = 4):
        self.count = count

    def __call__(self, generate: Callable[..., Tensor], data, objective: nn.Module) -> tuple[Tensor, list[str]]:
        truth, hints = held_out(objective, data, self.count)
        prompts, seeds = [""] * len(truth), range(len(truth))
        drawn = [generate(prompts, seeds).cpu(), generate(prompts, seeds, hints=hints).cpu()]
        shown = hints if hints.dtype == torch.uint8 else (255 * hints.clamp(min=0)).to(torch.uint8)
        rows = torch.stack([shown, *drawn, truth], dim=1).flatten(0, 1)
        return rows, ["hint", "without", "with", "image"] * len(truth)


def held_out(objective: nn.Module, data, count: int) -> tuple[Tensor, Tensor]:
    """Images spread over the dataset (B 3 H W uint8), and their hints."""
    batch = spread_batch(data, count)
    return batch["image"], objective.hints(batch | {"position": torch.arange(len(batch["image"]))})
