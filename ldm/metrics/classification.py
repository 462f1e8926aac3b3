"""How well a classifier tells held-out images."""

from torch import nn

from ldm.metrics.held_out import spread_batch


class Accuracy:
    """What the objective says of held-out images."""

    def __init__(self, num_images: int = 1024):
        self.num_images = num_images

    def __call__(self, draw, data, objective: nn.Module) -> dict[str, float]:
        batch = spread_batch(data, self.num_images)
        return objective.evaluate({**batch, "image": batch["image"].to(next(objective.parameters()).device)})
