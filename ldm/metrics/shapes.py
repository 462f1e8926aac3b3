"""Do images show their captions? Decided exactly, of captioned shapes: what `blobs` finds is compared with the caption.

Of whole captions and of short ones, of pairs of shape and colour that training showed and of those that it did not.
"""

from collections.abc import Callable, Sequence
from itertools import permutations, product

import torch
from torch import Tensor

from ldm.data.phrases import parse, phrase
from ldm.data.scenes import ATTRIBUTES, COLOURS, POSITIONS, SHAPES, SIZES, Object, Scene
from ldm.data.shapes import Shapes
from ldm.metrics.blobs import Blob, describe
from ldm.utils.errors import DataError
from ldm.utils.seeding import keys, uniform

PLACES = list(POSITIONS)[:5]  # of one shape alone
Generate = Callable[[list[str], list[int]], Tensor]  # (prompts, seeds) -> B 3 H W uint8


def judge(images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Which attributes of its caption each image (B, 3, H, W) uint8 shows: name -> (B,) bool.

    An attribute that a caption leaves open counts as shown; "all" is the prompt accuracy. DataError for captions
    outside the grammar of `ldm.data.scenes`. Exact on rendered scenes from 24 pixels a side.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) != len(captions):
        raise DataError(
            f"cannot judge images of shape {tuple(images.shape)}, {images.dtype}, against {len(captions)} captions: "
            "expected (B, 3, H, W) uint8 with one caption each"
        )
    return compare(images, [parse(caption) for caption in captions])


def compare(images: Tensor, scenes: Sequence[Scene], shapes: Sequence[str] = SHAPES) -> dict[str, Tensor]:
    """`judge` of scenes instead of captions, which may have other `shapes`."""
    verdicts = [_verdict(scene, blobs) for scene, blobs in zip(scenes, describe(images, shapes), strict=True)]
    table = torch.tensor(verdicts, dtype=torch.bool).view(len(scenes), len(ATTRIBUTES) + 2)
    right = dict(zip((*ATTRIBUTES, "count", "relation"), table.unbind(1), strict=True))
    return right | {"all": table.all(1)}


def stated(captions: Sequence[str]) -> dict[str, Tensor]:
    """Which attributes each caption speaks of: name -> (B,) bool."""
    scenes = [parse(caption) for caption in captions]
    said = {name: [any(getattr(o, name) for o in s.objects) for s in scenes] for name in ATTRIBUTES}
    said["relation"] = [s.relation is not None for s in scenes]
    return {name: torch.tensor(flags, dtype=torch.bool) for name, flags in said.items()}


def _verdict(scene: Scene, blobs: list[Blob]) -> list[bool]:
    """Shape, colour, size, position, count, relation under the most favourable pairing of objects with blobs."""
    count, missing = len(scene.objects), [Blob()] * (len(scene.objects) - len(blobs))
    pairings = [_compare(scene, chosen) for chosen in permutations(blobs + missing, count)]
    *attributes, relation = max(pairings, key=lambda rights: (all(rights), sum(rights)))
    return [*attributes, len(blobs) == count, relation]


def _compare(scene: Scene, blobs: Sequence[Blob]) -> list[bool]:
    pairs = list(zip(scene.objects, blobs, strict=True))
    rights = [all(_agrees(thing, blob, name) for thing, blob in pairs) for name in ATTRIBUTES]
    return [*rights, scene.relation is None or _related(scene.relation, *blobs)]


def _agrees(thing: Object, blob: Blob, name: str) -> bool:
    wanted = getattr(thing, name)
    return wanted is None or wanted == getattr(blob, name)


def _related(relation: str, a: Blob, b: Blob) -> bool:
    """Half the distance between neighbouring places is far enough to be left of, above ..."""
    dx, dy = b.x - a.x, b.y - a.y
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation] > 0.125


class PromptAccuracy:
    """Shares of images that show their prompts.

    "prompt_accuracy": all of a whole caption of a held-out scene; "colour_accuracy", ...: what it says of that.
    Of data with open captions besides: "seen_pairs_accuracy" and "unseen_pairs_accuracy", the same by whether training
    showed the pair of shape and colour; "short_seen_accuracy", "short_unseen_accuracy", "short_seen_colour_accuracy",
    ...: a quarter as many short prompts of either; "places_drawn" of 5 and "sizes_drawn" of 2, over `num_seeds` seeds
    of the prompt `varied`.
    """

    def __init__(self, num_prompts: int = 256, seed: int = 0, num_seeds: int = 16, varied: str = "a red circle"):
        self.num_prompts, self.seed = num_prompts, seed
        self.num_seeds, self.varied = min(num_seeds, num_prompts), varied

    def __call__(self, generate: Generate, dataset, objective=None) -> dict[str, float]:
        """`dataset.prompts(n, seed)` says what to draw."""
        prompts = dataset.prompts(self.num_prompts, self.seed)
        right = _right(generate, prompts)
        scores = {"prompt_accuracy": _share(right["all"]), "count_accuracy": _share(right["count"])}
        scores |= _by_attribute(right, prompts, "")
        if isinstance(dataset, Shapes) and dataset.open:
            scores |= self._by_pair(right["all"], dataset) | self._short(generate, dataset) | self._variety(generate)
        return scores

    def _by_pair(self, right: Tensor, dataset: Shapes) -> dict[str, float]:
        scenes = dataset.held_out_scenes(self.num_prompts, self.seed)
        unseen = torch.tensor([any(thing[:2] in dataset.unseen for thing in scene.objects) for scene in scenes])
        kinds = {"seen_pairs_accuracy": ~unseen, "unseen_pairs_accuracy": unseen}
        return {name: _share(right[rows]) for name, rows in kinds.items() if rows.any()}

    def _short(self, generate: Generate, dataset: Shapes) -> dict[str, float]:
        seen = [pair for pair in product(SHAPES, COLOURS) if pair not in dataset.unseen]
        scores = {}
        for name, pairs in {"short_seen": seen, "short_unseen": dataset.unseen}.items():
            prompts = short_prompts(pairs, max(1, self.num_prompts // 4), self.seed)
            right = _right(generate, prompts)
            scores |= {f"{name}_accuracy": _share(right["all"])} | _by_attribute(right, prompts, f"{name}_")
        return scores

    def _variety(self, generate: Generate) -> dict[str, float]:
        images = generate([self.varied] * self.num_seeds, list(range(self.num_seeds)))[:]
        blobs = [found[0] for found in describe(images) if found]
        places, sizes = ({getattr(blob, name) for blob in blobs} for name in ("position", "size"))
        return {"places_drawn": len(places.intersection(PLACES)), "sizes_drawn": len(sizes.intersection(SIZES))}


def short_prompts(pairs: Sequence[tuple[str, str]], count: int, seed: int = 0) -> list[str]:
    """Prompts in all phrasings of pairs of shape and colour, half of them with nothing else, else a size or a place."""
    prompts = []
    for u in uniform(keys(seed, "short prompts", torch.arange(count)), (6,)).tolist():
        (shape, colour), size, place = _pick(pairs, u[0]), _pick(list(SIZES), u[1]), _pick(PLACES, u[2])
        more = ({}, {}, {"size": size}, {"position": place})[int(u[3] * 4)]
        prompts.append(phrase(Scene((Object(shape, colour, **more),)), u[4:]))
    return prompts


def _pick(items: Sequence, u: float):
    return items[int(u * len(items))]


def _right(generate: Generate, prompts: list[str]) -> dict[str, Tensor]:
    return judge(generate(prompts, list(range(len(prompts))))[:], prompts)


def _by_attribute(right: dict[str, Tensor], prompts: Sequence[str], prefix: str) -> dict[str, float]:
    """Of those prompts that speak of an attribute."""
    spoken = {name: rows for name, rows in stated(prompts).items() if rows.any()}
    return {f"{prefix}{name}_accuracy": _share(right[name][rows]) for name, rows in spoken.items()}


def _share(flags: Tensor) -> float:
    return flags.float().mean().item()
