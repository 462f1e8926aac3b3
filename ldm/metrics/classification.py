"""How well a classifier tells held-out images."""

from torch import nn

from ldm.data.loader import fetch
from ldm.metrics.held_out import spread


class Accuracy:
    """What the objective says of held-out images."""

    def __init__(self, num_images: int = 1024):
        self.num_images = num_images

    def __call__(self, draw, data, objective: nn.Module) -> dict[str, float]:
        batch = fetch(data, spread(data, min(self.num_images, len(data))))
        return objective.evaluate({**batch, "image": batch["image"].to(next(objective.parameters()).device)})
