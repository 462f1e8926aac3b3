"""Names of the autoencoder's parameters in published files; tables as in `ledger`."""

import re
from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor

from ldm.weights.ledger import Lazy, Names, changed, to_ours, to_theirs, translate

DIFFUSERS = [  # vae/diffusion_pytorch_model.safetensors
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.up\.(\d+)\.", r".up_blocks.\1."),
    (r"(down_blocks.*)\.resample\.", r"\1.downsamplers.0."),
    (r"(up_blocks.*)\.resample\.", r"\1.upsamplers.0."),
    (r"\.blocks\.(\d+)\.", r".resnets.\1."),
    (r"\.mid\.block1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attention\.", ".mid_block.attentions.0."),
    (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"\.attention\.qkv\.", ".to_q.", ".to_k.", ".to_v."),
    (r"\.attention\.out\.", ".to_out.0."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"(coder)\.norm_out\.", r"\1.conv_norm_out."),
]
ORIGINAL = [  # first_stage_model.* of a single file
    (r"\.(down|up)\.(\d+)\.blocks\.", r".\1.\2.block."),
    (r"(\.down\.\d+)\.resample\.", r"\1.downsample."),
    (r"(\.up\.\d+)\.resample\.", r"\1.upsample."),
    (r"\.mid\.block(\d)\.", r".mid.block_\1."),
    (r"\.mid\.attention\.", ".mid.attn_1."),
    (r"\.attention\.qkv\.", ".q.", ".k.", ".v."),
    (r"\.attention\.out\.", ".proj_out."),
    (r"\.skip\.", ".nin_shortcut."),
]
OLD_DIFFUSERS = [  # the attention of files saved before diffusers 0.17
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
]


def diffusers_names(keys: Iterable[str]) -> Names:
    """Their keys for each of ours in the diffusers layout."""
    return {key: translate(key, DIFFUSERS) for key in keys}


def original_names(keys: Iterable[str]) -> Names:
    """Their keys for each of ours in the original layout, whose decoder counts its levels from the full resolution."""
    keys = list(keys)
    last = max(int(level[1]) for key in keys if (level := re.match(r"decoder\.up\.(\d+)\.", key)))

    def from_top(level: re.Match) -> str:
        return f"decoder.up.{last - int(level[1])}."

    return {key: translate(re.sub(r"^decoder\.up\.(\d+)\.", from_top, key), ORIGINAL) for key in keys}


def from_diffusers(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """A diffusers state dict under our names. Raises WeightsError unless every key is used and none is missing."""
    renamed = Lazy({translate(key, OLD_DIFFUSERS)[0]: partial(state.__getitem__, key) for key in state})
    return to_ours(_reshaped(renamed, (".to_q.", ".to_k.", ".to_v.", ".to_out."), 2), diffusers_names(keys))


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`."""
    return to_theirs(state, diffusers_names(state))


def from_original(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """An original state dict, its prefix removed, under our names; its attention is 1x1 convolutions. WeightsError."""
    return to_ours(_reshaped(state, (".attn_1.",), 2), original_names(keys))


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_original`."""
    return dict(_reshaped(to_theirs(state, original_names(state)), (".attn_1.",), 4))


def _reshaped(state: Mapping[str, Tensor], parts: tuple[str, ...], ndim: int) -> Lazy:
    """Weights of the layers named as matrices (ndim=2) or 1x1 convolutions (ndim=4); biases and norms as they are."""

    def reshape(key: str, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2 or not any(part in key for part in parts):
            return tensor
        return tensor.reshape(tensor.shape[:2] + (1,) * (ndim - 2))

    return changed(state, reshape)
