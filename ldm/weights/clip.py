"""Names of CLIP's parameters in published files, text and vision; tables as in `ledger`."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldm.weights.ledger import Names, changed, to_ours, to_theirs, translate, without

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

    Left out: what is unused, and `position_ids`, which are 0, 1, 2, ... and in old files often corrupt.
    """
    keys = list(keys)
    prefix = any(key.startswith(("text_model.", "vision_model.")) for key in state)
    unused = _unused(state, keys, "text_model.encoder.layers." if prefix else "encoder.layers.")
    known = without(state, lambda key: key.endswith("embeddings.position_ids") or key.startswith(unused))
    return to_ours(known, transformers_names(keys, prefix))


def to_transformers(state: Mapping[str, Tensor], prefix: bool = True) -> dict[str, Tensor]:
    """The inverse of `from_transformers`."""
    return to_theirs(state, transformers_names(state, prefix))


def from_open_clip(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """An OpenCLIP state dict under our names, without what is unused. Raises WeightsError."""
    keys = list(keys)
    unused = _unused(state, keys, "transformer.resblocks.")
    known = without(state, lambda key: key.startswith(unused))
    return to_ours(_transposed(known, ("text_projection", "visual.proj")), open_clip_names(keys))


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_open_clip`; the temperature is that of all published models, 100."""
    published = to_theirs(_transposed(state, ("projection.weight",)), open_clip_names(state))
    if _is_vision(state):
        return published
    return published | {"logit_scale": torch.tensor(LOGIT_SCALE, dtype=state["positions"].dtype)}


def _is_vision(keys: Iterable[str]) -> bool:
    return "class_token" in keys


def _unused(state: Iterable[str], keys: list[str], block: str) -> tuple[str, ...]:
    """Beginnings of names that no diffusion model reads: the temperature, and where a projection of the pooled text is
    in the file but not in our network (SD 2.x), it and the last block."""
    if _is_vision(keys) or "projection.weight" in keys or not any(key.startswith("text_projection") for key in state):
        return ("logit_scale",)
    depth = 1 + max(int(our.split(".")[1]) for our in keys if our.startswith("blocks."))
    return ("logit_scale", "text_projection", f"{block}{depth}.")


def _transposed(state: Mapping[str, Tensor], names: tuple[str, ...]) -> Mapping[str, Tensor]:
    """OpenCLIP multiplies from the left: x P, where a linear layer computes x W^T."""
    return changed(state, lambda key, tensor: tensor.t().contiguous() if key in names else tensor)
