"""From the nodes of a config to metrics, with the networks and the ways of sampling that they need."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from ldm.build import compose, make
from ldm.sampling import Sampling
from ldm.utils.errors import ConfigError

COUNTS = ("num_images", "num_prompts", "num_reference")  # of images that metrics draw or look at


def build_metrics(nodes: dict) -> dict[str, Callable]:
    """Metrics of keyed nodes. One may hold `features`, a `perceptual` distance, `metrics` and `arms` of its own."""
    return {name: build_metric(node) for name, node in nodes.items()}


def build_metric(node: dict) -> Callable:
    node, parts = dict(node), {}
    if empty := [name for name in COUNTS if node.get(name) is not None and node[name] < 1]:
        raise ConfigError(f"{node['_target_']}: {empty[0]}={node[empty[0]]} leaves nothing to measure; give 1 or more")
    if "features" in node:
        parts["features"] = extractor(json.dumps(node.pop("features")))
    if "perceptual" in node:
        perceptual = node.pop("perceptual")
        parts["perceptual"] = make(perceptual, "perceptual") if perceptual else None
    if "metrics" in node:
        parts["metrics"] = build_metrics(node.pop("metrics"))
    if "arms" in node:
        parts["arms"] = {name: arm([*node["shared"], *own]) for name, own in node.pop("arms").items()}
        del node["shared"]
    return make(node, "metrics", **parts)


@lru_cache(maxsize=1)
def extractor(node: str) -> Any:
    """That of a node as JSON: the same object for all metrics that share it."""
    return make(json.loads(node), "features")


def arm(overrides: Sequence[str]) -> dict:
    """How to sample, as sample.py would with these settings, of which the last of each name counts."""
    cfg = compose("sample", {line.partition("=")[0]: line for line in overrides}.values())
    Sampling.from_config(cfg)  # what cannot be is an error now
    return {name: cfg[name] for name in ("sampler", "times", "guidance", "threshold", "dialect")}


def once(draw: Callable) -> Callable:
    """`draw`, which images that another metric has had drawn already cost nothing: the same tensor again."""
    known = {}

    def again(prompts: Sequence[str], seeds: Sequence[int], *pictures, **how) -> Any:
        if pictures or not how.keys() <= {"sampling"}:
            return draw(prompts, seeds, *pictures, **how)
        key = json.dumps([list(prompts), list(seeds), how], sort_keys=True)
        if key not in known:
            known[key] = draw(prompts, seeds, **how)
        return known[key]

    return again
