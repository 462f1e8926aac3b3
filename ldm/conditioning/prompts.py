"""Prompts in which some words count more: "a (red:1.3) cat on a [mat]".

(x) weighs x by 1.1, [x] by 1/1.1, (x:1.3) by 1.3; nested weights multiply. A bracket after \\ is a character like any
other, and so is one without its partner.
Deviation: the programs that read this notation differ in corner cases; ComfyUI has no [x], and its (x:1.3) is 1.3
inside other brackets too.

What a weight does is named after the program it comes from. Each takes z (... L D), chunks of encoded text; empty
(L D), the empty text encoded; weights (... L), 1 at BOS, EOS and padding. Pooled vectors are not weighed.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.utils.errors import DataError

MAX_WEIGHT = 100.0  # what is larger is a slip of the keyboard, and infinite in half precision
FACTORS = {"(": 1.1, "[": 1 / 1.1}
PARTNERS = {")": "(", "]": "["}
_PIECES = re.compile(r"\\[()\[\]\\]|[(\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\)|[^\\()\[\]:]+|.", re.DOTALL)

Emphasis = Callable[[Tensor, Tensor, Tensor], Tensor]


def parse(prompt: str) -> list[tuple[str, float]]:
    """Parts of a prompt, each with its weight. Raises DataError for no text, for weights above MAX_WEIGHT."""
    if not isinstance(prompt, str):
        raise DataError(f"prompt {prompt!r} is {type(prompt).__name__}, expected text; use '' where there is none")
    pieces = _PIECES.findall(prompt)
    factors = _match(pieces)
    parts: list[tuple[str, float]] = []
    weights = [1.0]
    for index, piece in enumerate(pieces):
        if index in factors and piece in FACTORS:
            weights.append(weights[-1] * factors[index])
        elif index in factors:
            weights.pop()
        else:
            text = piece[1:] if piece[0] == "\\" and len(piece) > 1 else piece
            _append(parts, text, weights[-1])
    return parts


def _match(pieces: list[str]) -> dict[int, float]:
    """Indices of the brackets that have a partner, with the factor of what is between."""
    factors: dict[int, float] = {}
    open_: dict[str, list[int]] = {"(": [], "[": []}
    for index, piece in enumerate(pieces):
        if piece in FACTORS:
            open_[piece].append(index)
        elif piece[0] != "\\" and open_.get(kind := PARTNERS.get(piece[-1], "")):
            start = open_[kind].pop()
            factors[start] = factors[index] = _factor(piece, kind)
            for others in open_.values():  # brackets between the two have lost their partner
                while others and others[-1] > start:
                    others.pop()
    return factors


def _factor(closing: str, kind: str) -> float:
    return float(closing[1:-1]) if len(closing) > 1 else FACTORS[kind]


def _append(parts: list[tuple[str, float]], text: str, weight: float) -> None:
    if not abs(weight) <= MAX_WEIGHT:
        raise DataError(f"prompt: {text[:40]!r} has weight {weight:g}, expected at most {MAX_WEIGHT:g}; lower it")
    if parts and parts[-1][1] == weight:
        text = parts.pop()[0] + text
    parts.append((text, weight))


def a1111(z: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Scaled, then back to its mean.

    Deviation: the mean of a chunk, not of a whole batch; an image must not depend on those drawn with it.
    """
    return _with_mean_of(z, z * weights[..., None])


def comfy(z: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Away from the empty text, or towards it."""
    return torch.where(weights[..., None] == 1, z, empty + weights[..., None] * (z - empty))


def fooocus(z: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """As `comfy`, then back to the mean."""
    return _with_mean_of(z, comfy(z, empty, weights))


def _with_mean_of(z: Tensor, weighted: Tensor) -> Tensor:
    before, after = (x.mean((-2, -1), keepdim=True) for x in (z, weighted))
    return weighted * torch.where(after == 0, 1, before / after)


EMPHASIS: dict[str, Emphasis] = {"a1111": a1111, "comfy": comfy, "fooocus": fooocus}


def emphasise(z: Tensor, empty: Tensor, weights: Tensor, name: str) -> Tensor:
    """z weighed as `name` does, in float32; a chunk in which all weighs 1 stays as it is, bit for bit."""
    weighted = EMPHASIS[name](z.float(), empty.float(), weights).to(z.dtype)
    return torch.where((weights == 1).all(-1)[..., None, None], z, weighted)
