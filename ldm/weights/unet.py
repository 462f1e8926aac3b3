"""Names of the UNet's parameters in published files.

A row is (pattern of ours, theirs), or (pattern of ours, theirs, theirs, ...) where a fused projection of ours is
several tensors of theirs, stacked along the first axis. Values are never changed: a round trip is bit-exact.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldm.utils.errors import WeightsError

Names = dict[str, tuple[str, ...]]  # our key -> their keys

DIFFUSERS = [  # unet/diffusion_pytorch_model.safetensors
    (r"^conditioning\.time_mlp\.fc", "time_embedding.linear_"),
    (r"^conditioning\.vector_mlp\.fc", "add_embedding.linear_"),
    (r"^conditioning\.label_embedding\.", "class_embedding."),
    (r"^encoder\.conv_in\.", "conv_in."),
    (r"^encoder\.levels\.", "down_blocks."),
    (r"^middle\.", "mid_block.blocks."),
    (r"^decoder\.levels\.", "up_blocks."),
    (r"^decoder\.norm_out\.", "conv_norm_out."),
    (r"^decoder\.conv_out\.", "conv_out."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.blocks\.(\d+)\.res\.", r".resnets.\1."),
    (r"\.emb_proj\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.blocks\.(\d+)\.transformer\.", r".attentions.\1."),
]
TRANSFORMER = [  # the inside of a SpatialTransformer, the same in every published layout
    (r"\.blocks\.(\d+)\.", r".transformer_blocks.\1."),
    (r"\.self_attn\.qkv\.", ".attn1.to_q.", ".attn1.to_k.", ".attn1.to_v."),
    (r"\.self_attn\.out\.", ".attn1.to_out.0."),
    (r"\.cross_attn\.q\.", ".attn2.to_q."),
    (r"\.cross_attn\.kv\.", ".attn2.to_k.", ".attn2.to_v."),
    (r"\.cross_attn\.out\.", ".attn2.to_out.0."),
    (r"\.ff\.proj\.", ".ff.net.0.proj."),
    (r"\.ff\.out\.", ".ff.net.2."),
]


def diffusers_names(keys: Iterable[str]) -> Names:
    """Their keys for each of ours in the diffusers layout."""
    return {key: translate(key, DIFFUSERS + TRANSFORMER) for key in keys}


def translate(key: str, table: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Apply each row of the table, top to bottom, at most once."""
    theirs = (key,)
    for pattern, *names in table:
        if re.search(pattern, theirs[0]):
            theirs = tuple(re.sub(pattern, name, theirs[0], count=1) for name in names)
    return theirs


def to_ours(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """A published state dict under our names. WeightsError names keys that are missing or left over."""
    expected = {their for theirs in names.values() for their in theirs}
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unknown:
        raise WeightsError(f"weights made for another network: missing {listing(missing)}; unknown {listing(unknown)}")
    return {
        our: state[theirs[0]] if len(theirs) == 1 else torch.cat([state[their] for their in theirs])
        for our, theirs in names.items()
    }


def to_theirs(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Our state dict under published names: the inverse of `to_ours`. Parts of a fused tensor are copies."""
    published = {}
    for our, theirs in names.items():
        parts = [part.clone() for part in state[our].chunk(len(theirs))] if len(theirs) > 1 else [state[our]]
        published |= zip(theirs, parts, strict=True)
    return published


def listing(keys: list[str]) -> str:
    """The first three keys and how many there are."""
    return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "none"
