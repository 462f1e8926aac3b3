"""T2I-Adapters in published files: names (tables as in `ledger`) and arguments of our constructor."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ldm.models.t2i_adapter import T2IAdapter
from ldm.utils.errors import WeightsError
from ldm.weights.formats import Config, Shapes
from ldm.weights.ledger import Names, to_ours, to_theirs, translate

CLASS = "T2IAdapter"  # in config.json
LEVELS = 4  # of every published one
XL_HALVED = [2]
BLOCK = [(r"\.conv1\.", ".block1."), (r"\.conv2\.", ".block2.")]
LEVEL = [(r"\.conv_in\.", ".in_conv."), (r"\.conv_out\.", ".out_conv.")]
DIFFUSERS = [
    *BLOCK,
    *LEVEL,
    (r"^levels\.", "adapter.body."),
    (r"^conv_in\.", "adapter.conv_in."),
    (r"\.blocks\.", ".resnets."),
]
LIGHT = [*BLOCK, *LEVEL, (r"^levels\.", "body."), (r"\.blocks\.", ".body.")]


def diffusers_names(keys: Iterable[str]) -> Names:
    return {key: translate(key, DIFFUSERS) for key in keys}


def original_names(keys: Iterable[str]) -> Names:
    """Their keys for each of ours; in a full adapter they count blocks through all levels."""
    keys = list(keys)
    if "conv_in.weight" not in keys:
        return {key: translate(key, LIGHT) for key in keys}
    per_level = 1 + max(int(match[1]) for key in keys if (match := re.match(r"levels\.0\.blocks\.(\d+)", key)))

    def block(match: re.Match) -> str:
        return f"body.{int(match[1]) * per_level + int(match[2])}."

    def counted(key: str) -> str:
        key = re.sub(r"^levels\.(\d+)\.blocks\.(\d+)\.", block, key)
        return re.sub(r"^levels\.(\d+)\.conv_in\.", lambda m: f"body.{int(m[1]) * per_level}.in_conv.", key)

    return {key: translate(counted(key), BLOCK) for key in keys}


def from_original(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """The authors' state dict under our names. WeightsError unless every key is used and none is missing."""
    return to_ours(state, original_names(keys))


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_original`."""
    return to_theirs(state, original_names(state))


def from_diffusers(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """A diffusers state dict under our names. WeightsError as `from_original`."""
    return to_ours(state, diffusers_names(keys))


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`."""
    return to_theirs(state, diffusers_names(state))


def from_config(config: Config) -> Config:
    """Arguments of `T2IAdapter` from the config.json of diffusers' class of that name. Raises WeightsError."""
    kind = config.get("adapter_type", "full_adapter")
    channels = list(config.get("channels", [320, 640, 1280, 1280]))
    if kind not in ("full_adapter", "full_adapter_xl", "light_adapter"):
        raise WeightsError(f"adapter_type={kind}: known are full_adapter, full_adapter_xl, light_adapter")
    if light := kind == "light_adapter":
        channels.append(channels[-1])  # a fourth level that the list does not name
    return {
        "in_channels": config.get("in_channels", 3),
        "channels": channels,
        "num_res_blocks": config.get("num_res_blocks", 2),
        "unshuffle": config.get("downscale_factor", 8),
        "halved": XL_HALVED if kind == "full_adapter_xl" else list(range(1, len(channels))),
        "light": light,
    }


def from_shapes(shapes: Shapes) -> Config:
    """Arguments of `T2IAdapter` from a file of original layout: SDXL's reads squares of 16 pixels, the others of 8."""
    light = "conv_in.weight" not in shapes
    if light:
        width = shapes["body.0.in_conv.weight"][1]
        channels = [shapes[f"body.{i}.out_conv.weight"][0] for i in range(LEVELS)]
        num_res_blocks = sum(bool(re.fullmatch(r"body\.0\.body\.\d+\.block1\.weight", key)) for key in shapes)
    else:
        width = shapes["conv_in.weight"][1]
        num_res_blocks = sum(key.endswith("block1.weight") for key in shapes) // LEVELS
        channels = [shapes[f"body.{i * num_res_blocks}.block1.weight"][0] for i in range(LEVELS)]
    unshuffle = 16 if width % 16**2 == 0 else 8
    return {
        "in_channels": width // unshuffle**2,
        "channels": channels,
        "num_res_blocks": num_res_blocks,
        "unshuffle": unshuffle,
        "halved": XL_HALVED if unshuffle == 16 else list(range(1, LEVELS)),
        "light": light,
    }


def arguments(net: T2IAdapter) -> Config:
    """The arguments that made a network."""
    return {
        "in_channels": net.hint_channels,
        "channels": net.widths,
        "num_res_blocks": len(net.levels[0].blocks),
        "unshuffle": net.unshuffle,
        "halved": net.halved,
        "light": net.light,
    }


def to_config(net: T2IAdapter) -> Config:
    """config.json of diffusers' T2IAdapter that is this network. WeightsError where there is none."""
    a = arguments(net)
    *head, last = a["channels"]
    everywhere = list(range(1, len(a["channels"])))
    kinds = {"light_adapter": a["light"] and a["halved"] == everywhere and head[-1:] == [last]}
    kinds["full_adapter"] = not a["light"] and a["halved"] == everywhere
    kinds["full_adapter_xl"] = not a["light"] and a["halved"] == XL_HALVED and head[2:] == [last]
    if not any(kinds.values()):
        reason = f"halved={a['halved']}, light={a['light']}, channels={a['channels']}"
        raise WeightsError(f"a T2I-Adapter of {reason} has no place in diffusers' layout")
    kind = next(name for name, fits in kinds.items() if fits)
    return {
        "_class_name": CLASS,
        "adapter_type": kind,
        "in_channels": a["in_channels"],
        "channels": head if a["light"] else a["channels"],
        "num_res_blocks": a["num_res_blocks"],
        "downscale_factor": a["unshuffle"],
    }
