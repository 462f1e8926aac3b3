"""Held-out images, and what a model is told to draw them."""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.loader import facts, fetch, groups
from ldm.utils.errors import DataError


def spread(data, count: int) -> Tensor:
    """(count,) items evenly over a dataset, of its commonest bucket; over again from the start where it has fewer."""
    items = _alike(data)
    return items[torch.arange(count) * max(1, len(items) // count) % len(items)]


def spread_batch(data, count: int) -> dict[str, Any]:
    """The batch of `count` items spread over a dataset, or of all where it has fewer; "index" says which they are."""
    return fetch(data, spread(data, min(count, len(_alike(data)))))


def _alike(data) -> Tensor:
    """The items whose images can share a batch: all, or those of the commonest bucket."""
    buckets = groups(data)
    return torch.arange(len(data)) if buckets is None else (buckets == buckets.mode().values).nonzero().flatten()


def prompts_of(data, items: Tensor, objective: nn.Module) -> list[str]:
    """What a model reads of these items: captions, names of classes, nothing. Raises DataError where they lack it."""
    fields = objective.conditioner.fields
    known = facts(data, items) if fields & {"caption", "label"} else {}
    for field in ("caption", "label"):
        if field in fields and field not in known:
            raise DataError(f"the model draws from a {field}, and the data has only {', '.join(known) or 'images'}")
    if "caption" in fields:
        return known["caption"]
    if "label" in fields:
        return [data.class_names[label] for label in known["label"].tolist()]
    return [""] * len(items)
