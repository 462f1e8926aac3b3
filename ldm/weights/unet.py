"""Names of the UNet's parameters in published files; tables as in `ledger`."""

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


def from_diffusers(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """A diffusers state dict under our names. Raises WeightsError unless every key is used and none is missing."""
    return to_ours(state, diffusers_names(keys))


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`."""
    return to_theirs(state, diffusers_names(state))
