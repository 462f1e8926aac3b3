"""Names of CLIP's parameters in published files, text and vision; tables as in `ledger`."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldm.weights.ledger import Names, to_ours, to_theirs, translate

TRANSFORMERS = [  # text_encoder/model.safetensors, image_encoder/model.safetensors; also SD 1.x in a single file
    (r"^tokens\.", "embeddings.token_embedding."),
    (r"^class_token$", "embeddings.class_embedding"),
    (r"^patches\.", "embeddings.patch_embedding."),
    (r"^positions$", "embeddings.position_embedding.weight"),
    (r"^norm_in\.", "pre_layrnorm."),  # sic
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attention\.qkv\.", ".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."),
    (r"\.attention\.out\.", ".self_attn.out_proj."),
]
OPEN_CLIP = [  # SD 2.x, SDXL's second encoder and its refiner in a single file; the vision tower of OpenCLIP's own
    (r"^tokens\.", "token_embedding."),
    (r"^class_token$", "class_embedding"),
    (r"^patches\.", "conv1."),
    (r"^positions$", "positional_embedding"),
    (r"^norm_in\.", "ln_pre."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attention\.qkv\.", ".attn.in_proj_"),
    (r"\.attention\.out\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]
TEXT = [(r"^norm\.", "final_layer_norm."), (r"^projection\.", "text_projection.")]
VISION = [(r"^norm\.", "post_layernorm."), (r"^projection\.", "visual_projection.")]
OPEN_TEXT = [(r"^norm\.", "ln_final."), (r"^projection\.weight$", "text_projection")]
OPEN_VISION = [(r"^norm\.", "ln_post."), (r"^projection\.weight$", "proj")]
LOGIT_SCALE = math.log(100)  # where the temperature ends in training, clipped (arXiv:2103.00020, §2.5)


def transformers_names(keys: Iterable[str], prefix: bool = True) -> Names:
    """Their keys for each of ours; `text_model.` or `vision_model.` before all but the projection is optional."""
    keys = list(keys)
    tower, last = ("vision_model.", VISION) if _is_vision(keys) else ("text_model.", TEXT)
    names = {key: translate(key, TRANSFORMERS + last) for key in keys}
    if not prefix:
        return names
    return {
        our: theirs if our.startswith("projection.") else tuple(tower + their for their in theirs)
        for our, theirs in names.items()
    }


def open_clip_names(keys: Iterable[str]) -> Names:
    """Their keys for each of ours in the OpenCLIP layout."""
    keys = list(keys)
    prefix, last = ("visual.", OPEN_VISION) if _is_vision(keys) else ("", OPEN_TEXT)
    return {key: tuple(prefix + their for their in translate(key, OPEN_CLIP + last)) for key in keys}


def from_transformers(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """A transformers state dict, with or without its prefix, under our names. Raises WeightsError.

    `position_ids`, which old files hold, are 0, 1, 2, ...: skipped, they are often corrupt.
    """
    keys = list(keys)
    prefix = any(key.startswith(("text_model.", "vision_model.")) for key in state)
    state = {key: tensor for key, tensor in state.items() if not key.endswith("embeddings.position_ids")}
    return to_ours(state, transformers_names(keys, prefix))


def to_transformers(state: Mapping[str, Tensor], prefix: bool = True) -> dict[str, Tensor]:
    """The inverse of `from_transformers`."""
    return to_theirs(state, transformers_names(state, prefix))


def from_open_clip(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """An OpenCLIP state dict under our names. Raises WeightsError.

    Left out, as no diffusion model uses them: the temperature, and where our network does not project the pooled text
    (SD 2.x), the projection and the last block.
    """
    keys = list(keys)
    names = open_clip_names(keys)
    wanted = {their for theirs in names.values() for their in theirs}
    state = {key: tensor for key, tensor in state.items() if key in wanted or not _is_extra(key, keys)}
    return _transposed(to_ours(state, names), "projection.weight")


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_open_clip`; the temperature is that of all published models, 100."""
    published = to_theirs(_transposed(state, "projection.weight"), open_clip_names(state))
    if _is_vision(state):
        return published
    return published | {"logit_scale": torch.tensor(LOGIT_SCALE, dtype=state["positions"].dtype)}


def _is_vision(keys: Iterable[str]) -> bool:
    return "class_token" in keys


def _is_extra(key: str, keys: list[str]) -> bool:
    depth = 1 + max(int(our.split(".")[1]) for our in keys if our.startswith("blocks."))
    unused = () if "projection.weight" in keys else ("text_projection", f"transformer.resblocks.{depth}.")
    return key == "logit_scale" or key.startswith(unused)


def _transposed(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """OpenCLIP multiplies from the left: x P, where a linear layer computes x W^T."""
    return {key: tensor.t().contiguous() if key == name else tensor for key, tensor in state.items()}
