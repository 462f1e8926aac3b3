"""Training a classifier: to find in an image what a conditioner reads of it, its class or the words of its caption."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.utils.errors import ConfigError


def top_one(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Share of images (B K) whose class (B,) has the largest logit."""
    return {"accuracy": (logits.argmax(1) == labels).float().mean()}


def all_words(logits: Tensor, words: Tensor) -> dict[str, Tensor]:
    """Share of images of which every word (B K, 0 or 1) is told, and F1 over all words of all images."""
    found, there = logits > 0, words > 0
    hits = (found & there).sum()
    f1 = 2 * hits / (found.sum() + there.sum()).clamp(min=1)
    return {"accuracy": (found == there).all(1).float().mean(), "f1": f1}


# condition -> loss(logits, target), scores(logits, target)
TARGETS: dict[str, tuple[Callable, Callable]] = {
    "labels": (F.cross_entropy, top_one),
    "words": (F.binary_cross_entropy_with_logits, all_words),  # a question of its own for each word
}


class ClassifierObjective(nn.Module):
    """objective(batch) -> (loss, logs). batch: "image" (B 3 H W uint8) and what the conditioner's encoder reads.

    Raises ConfigError unless the conditioner gives labels or words, and nothing else.
    """

    def __init__(self, classifier: nn.Module, codec: nn.Module, conditioner: nn.Module):
        super().__init__()
        if list(conditioner.dims) != ["num_classes"]:
            raise ConfigError(
                "objective=classifier tells classes or words; use conditioner=labels or conditioner=words"
            )
        self.classifier, self.codec, self.conditioner = classifier, codec, conditioner

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits, (name, target) = self.logits(batch)
        loss_of, scores_of = TARGETS[name]
        loss = loss_of(logits, target)
        return loss, {name: value.detach() for name, value in {"loss": loss, **scores_of(logits, target)}.items()}

    @torch.no_grad()
    def evaluate(self, batch: dict) -> dict[str, float]:
        logits, (name, target) = self.logits(batch)
        return {name: value.item() for name, value in TARGETS[name][1](logits, target).items()}

    def logits(self, batch: dict) -> tuple[Tensor, tuple[str, Tensor]]:
        """What is told, and what is so, with the name of its kind."""
        _, logits = self.classifier(self.codec.encode(batch["image"]))
        ((name, target),) = self.conditioner(batch).items()
        return logits.float(), (name, target)
