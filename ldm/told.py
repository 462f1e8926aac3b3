"""What a person says of published weights, told to their text encoders and sizes: `published` of sample.yaml."""

from collections.abc import Sequence
from typing import Any

from ldm.conditioning.clip import CLIPTextEncoder
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.sizes import AestheticScore, Sizes
from ldm.utils.errors import ConfigError

SIZES = {"original_size": 0, "crop": 2, "target_size": 4}  # their first places in `conditioning.sizes.NAMES`


def tell(conditioner: Conditioner, system: str, options: Any) -> None:
    """Tell what `options`, a `ldm.published.Options`, say.

    Raises ConfigError for a value that cannot be, or of a system that has no such thing.
    """
    encoders = list(conditioner.encoders.values())
    texts = [encoder for encoder in encoders if isinstance(encoder, CLIPTextEncoder)]
    if options.clip_skip is not None:
        tell_clip_skip(texts, system, options.clip_skip)
    if options.prompt_2 is not None or options.negative_2 is not None:
        tell_second_prompt(texts, system, options.prompt_2, options.negative_2)
    tell_sizes([encoder for encoder in encoders if type(encoder) is Sizes], system, options)
    scores = {name: getattr(options, name) for name in ("aesthetic_score", "negative_aesthetic_score")}
    judges = [encoder for encoder in encoders if isinstance(encoder, AestheticScore)]
    for name, score in scores.items():
        if score is None:
            continue
        if not judges:
            raise ConfigError(f"published.{name}={score} is of SDXL's refiner, and this is {system}; leave it out")
        if type(score) not in (int, float):
            raise ConfigError(f"published.{name}={score}: expected a number, such as 6")
        for judge in judges:
            judge.default, judge.null = (judge.default, score) if "negative" in name else (score, judge.null)


def tell_clip_skip(encoders: Sequence[CLIPTextEncoder], system: str, clip_skip: int) -> None:
    """1 is the last layer of the published CLIP. What a system reads by itself: 1 in SD 1.x, 2 in SD 2.x and SDXL,
    of which SD 2.x has no last one in its files."""
    if not encoders:
        raise ConfigError(f"published.clip_skip={clip_skip} is for CLIP, which {system} does not read; leave it out")
    for encoder in encoders:
        usual = 1 if system.startswith("sd15") else 2
        lowest, highest = usual - encoder.skip, usual - encoder.skip + len(encoder.network.blocks)
        if type(clip_skip) is not int or not lowest <= clip_skip <= highest:
            expected = f"{lowest} to {highest}, of which {usual} is what {system} reads by itself"
            raise ConfigError(f"published.clip_skip={clip_skip}: expected {expected}")
        encoder.skip += clip_skip - usual


def tell_second_prompt(
    encoders: Sequence[CLIPTextEncoder], system: str, prompt: str | None, negative: str | None
) -> None:
    if len(encoders) != 2:
        raise ConfigError(f"published.prompt_2 and negative_2 are of SDXL, and this is {system}; leave them out")
    encoders[1].texts = (prompt, negative)
    chunks = max(encoders[1].length(text) for text in (prompt, negative) if text is not None)
    for encoder in encoders:  # both are joined word by word
        encoder.chunks = chunks


def tell_sizes(encoders: Sequence[Sizes], system: str, options: Any) -> None:
    rows: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for half, prefix in enumerate(("", "negative_")):
        for name, place in SIZES.items():
            pair = getattr(options, prefix + name)
            if pair is None:
                continue
            if not encoders:
                raise ConfigError(f"published.{prefix}{name}={pair} is of SDXL, and this is {system}; leave it out")
            lowest = 0 if name == "crop" else 1
            is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
            if not is_pair or not all(type(side) is int and side >= lowest for side in pair):
                raise ConfigError(f"published.{prefix}{name}={pair}: expected two numbers of pixels, as in [1024,1024]")
            rows[half].update({place: pair[0], place + 1: pair[1]})
    for encoder in encoders:  # without a prompt the sizes are the same, unless they are said to be others
        encoder.rows = (rows[0], rows[0] | rows[1])
