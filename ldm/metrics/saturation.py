"""How much of what a model draws is driven to the ends of the range: what thresholds of x0 are to prevent."""

from torch import nn

from ldm.models.codec import to_float


class Saturation:
    """Share of the values of pixels with |x| > limit in images of held-out prompts, as §2.3 of arXiv:2205.11487 counts
    saturated pixels. At 0.98 that of true captioned shapes is 0: their colours and background stay inside.

    The prompts and seeds are those of `PromptAccuracy`, so that both share their images.
    """

    def __init__(self, num_prompts: int = 256, seed: int = 0, limit: float = 0.98):
        self.num_prompts, self.seed, self.limit = num_prompts, seed, limit

    def __call__(self, draw, data, objective: nn.Module) -> dict[str, float]:
        images = draw(data.prompts(self.num_prompts, self.seed), list(range(self.num_prompts)))[:]
        return {"saturation": (to_float(images).abs() > self.limit).float().mean().item()}
