"""Names of DeepFloyd IF's parameters in published files; tables as in `ledger`.

The authors keep the rows of an attention's projections head by head, q k v of the first, then of the second, and so on;
ours and diffusers' are all heads of q, then of k, then of v.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor

from ldm.weights.ledger import Names, changed, to_ours, to_theirs, translate

HEAD_DIM = 64  # in all that the authors published; no tensor of theirs tells
ORIGINAL = [  # the authors' pytorch_model.bin, after its blocks are counted
    (r"^embed\.time_mlp\.fc1\.", "time_embed.0."),
    (r"^embed\.time_mlp\.fc2\.", "time_embed.2."),
    (r"^embed\.aug_mlp\.fc1\.", "aug_proj.0."),
    (r"^embed\.aug_mlp\.fc2\.", "aug_proj.2."),
    (r"^embed\.pooling\.norm_in\.", "encoder_pooling.0."),
    (r"^embed\.pooling\.pool\.", "encoder_pooling.1."),
    (r"^embed\.pooling\.proj\.", "encoder_pooling.2."),
    (r"^embed\.pooling\.norm_out\.", "encoder_pooling.3."),
    (r"^embed\.text_proj\.", "encoder_proj."),
    (r"^encoder\.conv_in\.", "input_blocks.0.0."),
    (r"^middle\.0\.res\.", "middle_block.0."),
    (r"^middle\.0\.attention\.", "middle_block.1."),
    (r"^middle\.1\.res\.", "middle_block.2."),
    (r"^decoder\.norm_out\.", "out.0."),
    (r"^decoder\.conv_out\.", "out.2."),
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.skip\.", ".skip_connection."),
    (r"\.text_norm\.", ".norm_encoder."),
    (r"\.text_kv\.", ".encoder_kv."),
    (r"(?<=\d)\.out\.", ".proj_out."),
    (r"\.position$", ".positional_embedding"),
    (r"\.1\.q\.", ".1.q_proj."),
    (r"\.1\.kv\.", ".1.k_proj.", ".1.v_proj."),
]
DIFFUSERS = [  # unet/diffusion_pytorch_model.safetensors
    (r"^embed\.time_mlp\.fc", "time_embedding.linear_"),
    (r"^embed\.aug_mlp\.fc", "class_embedding.linear_"),
    (r"^embed\.pooling\.norm_in\.", "add_embedding.norm1."),
    (r"^embed\.pooling\.norm_out\.", "add_embedding.norm2."),
    (r"^embed\.pooling\.", "add_embedding."),
    (r"^embed\.text_proj\.", "encoder_hid_proj."),
    (r"^encoder\.conv_in\.", "conv_in."),
    (r"^encoder\.levels\.", "down_blocks."),
    (r"^middle\.(\d)\.res\.", r"mid_block.resnets.\1."),
    (r"^middle\.0\.attention\.", "mid_block.attentions.0."),
    (r"^decoder\.levels\.", "up_blocks."),
    (r"^decoder\.norm_out\.", "conv_norm_out."),
    (r"^decoder\.conv_out\.", "conv_out."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.blocks\.(\d+)\.res\.", r".resnets.\1."),
    (r"\.blocks\.(\d+)\.attention\.", r".attentions.\1."),
    (r"\.emb_proj\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.norm\.", ".group_norm."),
    (r"\.text_norm\.", ".norm_cross."),
    (r"\.out\.", ".to_out.0."),
    (r"\.position$", ".positional_embedding"),
    (r"\.pool\.q\.", ".pool.q_proj."),
    (r"\.pool\.kv\.", ".pool.k_proj.", ".pool.v_proj."),
    (r"\.text_kv\.", ".add_k_proj.", ".add_v_proj."),
]
QKV = r"\.qkv\."
SELF_ATTENTION = [(QKV, ".to_q.", ".to_k.", ".to_v.")]
TEXT_ONLY = [(QKV, ".to_q.")]


def diffusers_names(keys: Iterable[str], *, self_attention: bool = True) -> Names:
    """Their keys for each of ours in the diffusers layout."""
    table = DIFFUSERS + (SELF_ATTENTION if self_attention else TEXT_ONLY)
    return {key: translate(key, table) for key in keys}


def original_names(keys: Iterable[str]) -> Names:
    """Their keys for each of ours in the original layout, which counts blocks and resamplings through all levels."""
    keys = list(keys)
    places = _places(keys)

    def counted(key: str) -> str:
        match = re.match(r"((?:en|de)coder\.levels\.\d+\.(?:blocks\.\d+\.\w+|downsample|upsample))\.", key)
        return f"{places[match[1]]}.{key[match.end() :]}" if match else key

    return {key: translate(counted(key), ORIGINAL) for key in keys}


def _places(keys: list[str]) -> dict[str, str]:
    """Where every module of the encoder and the decoder is in the original layout."""
    places, number = {}, 1
    for level, count in enumerate(_counts(keys, "encoder")):
        ours = f"encoder.levels.{level}"
        for i in range(count):
            places[f"{ours}.blocks.{i}.res"] = f"input_blocks.{number}.0"
            places[f"{ours}.blocks.{i}.attention"] = f"input_blocks.{number}.1"
            number += 1
        places[f"{ours}.downsample"] = f"input_blocks.{number}.0"
        number += 1
    number = 0
    for level, count in enumerate(_counts(keys, "decoder")):
        ours = f"decoder.levels.{level}"
        for i in range(count):
            places[f"{ours}.blocks.{i}.res"] = f"output_blocks.{number}.0"
            places[f"{ours}.blocks.{i}.attention"] = f"output_blocks.{number}.1"
            number += 1
        attends = f"{ours}.blocks.0.attention.norm.weight" in keys
        places[f"{ours}.upsample"] = f"output_blocks.{number - 1}.{2 if attends else 1}"  # the last block's last module
    return places


def _counts(keys: list[str], coder: str) -> list[int]:
    """Blocks per level."""
    found = {match.groups() for key in keys if (match := re.match(rf"{coder}\.levels\.(\d+)\.blocks\.(\d+)\.", key))}
    levels = [int(level) for level, _ in found]
    return [levels.count(level) for level in range(1 + max(levels))]


def from_diffusers(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """A diffusers state dict under our names. Raises WeightsError unless every key is used and none is missing."""
    return to_ours(state, diffusers_names(keys, self_attention=any(".to_k." in key for key in state)))


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`."""
    width, channels = state["middle.0.attention.qkv.weight"].shape
    return to_theirs(state, diffusers_names(state, self_attention=width > channels))


def from_original(state: Mapping[str, Tensor], keys: Iterable[str], *, head_dim: int = HEAD_DIM) -> dict[str, Tensor]:
    """The authors' state dict under our names. WeightsError as `from_diffusers`."""
    return to_ours(changed(state, partial(_by_kind, state, head_dim)), original_names(keys))


def to_original(state: Mapping[str, Tensor], *, head_dim: int = HEAD_DIM) -> dict[str, Tensor]:
    """The inverse of `from_original`."""
    published = to_theirs(state, original_names(state))
    return {name: _by_head(published, head_dim, name, tensor) for name, tensor in published.items()}


def _by_kind(state: Mapping[str, Tensor], head_dim: int, name: str, tensor: Tensor) -> Tensor:
    """A tensor of theirs as ours: rows all of q, then of k, then of v; no third axis of a 1x1 convolution."""
    if re.search(r"\.(qkv|encoder_kv|proj_out)\.weight$", name):
        tensor = tensor.squeeze(2)
    if kinds := _kinds(state, name, tensor):
        tensor = tensor.unflatten(0, (-1, kinds, head_dim)).transpose(0, 1).flatten(0, 2)
    return tensor


def _by_head(state: Mapping[str, Tensor], head_dim: int, name: str, tensor: Tensor) -> Tensor:
    """The inverse of `_by_kind`."""
    if kinds := _kinds(state, name, tensor):
        tensor = tensor.unflatten(0, (kinds, -1, head_dim)).transpose(0, 1).flatten(0, 2)
    return tensor[..., None] if re.search(r"\.(qkv|encoder_kv|proj_out)\.weight$", name) else tensor


def _kinds(state: Mapping[str, Tensor], name: str, tensor: Tensor) -> int:
    """How many of q, k, v are in a fused projection; 0 for another tensor."""
    match = re.match(r"(.*)\.(qkv|encoder_kv)\.(weight|bias)$", name)
    return tensor.shape[0] // state[f"{match[1]}.proj_out.bias"].shape[0] if match else 0
