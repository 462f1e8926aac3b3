"""Names of the UNet's parameters in published files; tables as in `ledger`."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ldm.weights.ledger import Names, to_ours, to_theirs, translate

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
ORIGINAL = [  # model.diffusion_model.* of a single file, after its blocks are counted
    (r"^conditioning\.time_mlp\.fc1\.", "time_embed.0."),
    (r"^conditioning\.time_mlp\.fc2\.", "time_embed.2."),
    (r"^conditioning\.vector_mlp\.fc1\.", "label_emb.0.0."),
    (r"^conditioning\.vector_mlp\.fc2\.", "label_emb.0.2."),
    (r"^conditioning\.label_embedding\.", "label_emb."),
    (r"^encoder\.conv_in\.", "input_blocks.0.0."),
    (r"^middle\.0\.res\.", "middle_block.0.res."),
    (r"^middle\.0\.transformer\.", "middle_block.1."),
    (r"^middle\.1\.res\.", "middle_block.2.res."),
    (r"^decoder\.norm_out\.", "out.0."),
    (r"^decoder\.conv_out\.", "out.2."),
    (r"\.res\.norm1\.", ".in_layers.0."),
    (r"\.res\.conv1\.", ".in_layers.2."),
    (r"\.res\.emb_proj\.", ".emb_layers.1."),
    (r"\.res\.norm2\.", ".out_layers.0."),
    (r"\.res\.conv2\.", ".out_layers.3."),
    (r"\.res\.skip\.", ".skip_connection."),
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


def original_names(keys: Iterable[str]) -> Names:
    """Their keys for each of ours in the original layout, which counts blocks and resamplings through all levels."""
    keys = list(keys)
    firsts = [match for key in keys if (match := re.match(r"encoder\.levels\.0\.blocks\.(\d+)", key))]
    per_level = 2 + max(int(match[1]) for match in firsts)
    transformers = [match for key in keys if (match := re.match(r"decoder\.levels\.(\d+).*\.transformer", key))]
    attending = {match[1] for match in transformers}

    def block(match: re.Match) -> str:
        coder, level, index, kind = match.groups()
        first = int(level) * per_level + int(index)
        name = f"input_blocks.{1 + first}" if coder == "encoder" else f"output_blocks.{first}"
        return f"{name}.0.res." if kind == "res" else f"{name}.1."

    def downsample(match: re.Match) -> str:
        return f"input_blocks.{(int(match[1]) + 1) * per_level}.0.op."

    def upsample(match: re.Match) -> str:  # the last module of the level's last block
        return f"output_blocks.{(int(match[1]) + 1) * per_level - 1}.{2 if match[1] in attending else 1}.conv."

    def counted(key: str) -> str:
        key = re.sub(r"^(\w+)\.levels\.(\d+)\.blocks\.(\d+)\.(res|transformer)\.", block, key)
        key = re.sub(r"^encoder\.levels\.(\d+)\.downsample\.conv\.", downsample, key)
        return re.sub(r"^decoder\.levels\.(\d+)\.upsample\.conv\.", upsample, key)

    return {key: translate(counted(key), ORIGINAL + TRANSFORMER) for key in keys}


def from_diffusers(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """A diffusers state dict under our names. Raises WeightsError unless every key is used and none is missing."""
    return to_ours(state, diffusers_names(keys))


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`."""
    return to_theirs(state, diffusers_names(state))


def from_original(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """An original state dict, its prefix removed, under our names. WeightsError as `from_diffusers`."""
    return to_ours(state, original_names(keys))


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_original`."""
    return to_theirs(state, original_names(state))
