"""PixArt in published files: names (tables as in `ledger`), the arguments of our constructor, and a start from DiT."""

import math
import re
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.dit import DiT
from ldm.models.pixart import NUM_SIZES, SINUSOID_DIM, AdaLNSingle, PixArt
from ldm.nn.embeddings import sinusoid
from ldm.utils.errors import WeightsError
from ldm.weights.dit import HEADS, learned_variance
from ldm.weights.formats import MAX_REPEATS, Config, Shapes, check_fixed
from ldm.weights.ledger import Names, listing, to_ours, to_theirs, translate, without

ORIGINAL = [  # the authors' PixArt-XL-2-*.pth and PixArt-Sigma-XL-2-*.pth
    (r"^patch_embed\.", "x_embedder.proj."),
    (r"^embed\.time_mlp\.", "t_embedder.mlp."),
    (r"^embed\.size_mlp\.", "csize_embedder.mlp."),
    (r"^embed\.ratio_mlp\.", "ar_embedder.mlp."),
    (r"embedder\.mlp\.fc1\.", "embedder.mlp.0."),
    (r"embedder\.mlp\.fc2\.", "embedder.mlp.2."),
    (r"^text_mlp\.", "y_embedder.y_proj."),
    (r"^modulation\.linear\.", "t_block.1."),
    (r"^final\.", "final_layer."),
    (r"\.modulation\.table$", ".scale_shift_table"),
    (r"\.attn\.compression\.conv\.", ".attn.sr."),
    (r"\.attn\.compression\.norm\.", ".attn.norm."),
    (r"attn\.out\.", "attn.proj."),
    (r"\.cross_attn\.(q|kv)\.", r".cross_attn.\1_linear."),
]
DEAD = ("pos_embed", "y_embedder.y_embedding")  # computed anew; the fixed random caption of training without a text
DIFFUSERS = [  # transformer/diffusion_pytorch_model.safetensors
    (r"^patch_embed\.", "pos_embed.proj."),
    (r"^embed\.time_mlp\.fc", "adaln_single.emb.timestep_embedder.linear_"),
    (r"^embed\.size_mlp\.fc", "adaln_single.emb.resolution_embedder.linear_"),
    (r"^embed\.ratio_mlp\.fc", "adaln_single.emb.aspect_ratio_embedder.linear_"),
    (r"^text_mlp\.fc", "caption_projection.linear_"),
    (r"^modulation\.linear\.", "adaln_single.linear."),
    (r"^final\.modulation\.table$", "scale_shift_table"),
    (r"^final\.linear\.", "proj_out."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.modulation\.table$", ".scale_shift_table"),
    (r"\.attn\.qkv\.", ".attn1.to_q.", ".attn1.to_k.", ".attn1.to_v."),
    (r"\.attn\.out\.", ".attn1.to_out.0."),
    (r"\.cross_attn\.q\.", ".attn2.to_q."),
    (r"\.cross_attn\.kv\.", ".attn2.to_k.", ".attn2.to_v."),
    (r"\.cross_attn\.out\.", ".attn2.to_out.0."),
    (r"\.mlp\.fc1\.", ".ff.net.0.proj."),
    (r"\.mlp\.fc2\.", ".ff.net.2."),
]
FIXED = {  # knobs of diffusers that change the result without changing a key; other values are other networks
    "norm_type": "ada_norm_single", "activation_fn": "gelu-approximate", "attention_bias": True,
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "attention_type": "default",
}  # fmt: skip
ALPHA = {32: 1.0, 64: 1.0, 128: 2.0}  # interpolation by sample_size, which no tensor tells, as published;
SIGMA = {32: 0.5, 64: 1.0, 128: 2.0, 256: 4.0}  # a caption of Sigma's has 300 tokens
SIGMA_TOKENS = 300


def original_names(keys: Iterable[str]) -> Names:
    return {key: translate(key, ORIGINAL) for key in keys}


def diffusers_names(keys: Iterable[str]) -> Names:
    return {key: translate(key, DIFFUSERS) for key in keys}


def from_original(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """The authors' state dict under our names. WeightsError unless every key is used and none is missing."""
    return to_ours(without(state, DEAD.__contains__), original_names(keys))


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_original`, without `DEAD`."""
    return to_theirs(state, original_names(state))


def computed(net: PixArt) -> dict[str, Tensor]:
    """The table of positions, by whose length a file tells its resolution."""
    side = net.sample_size // net.patch_size
    weight = net.patch_embed.weight
    return {"pos_embed": net.positions((side, side), weight.device)[None].to(weight.dtype)}  # 1 N D


def from_diffusers(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """A diffusers state dict under our names. WeightsError as `from_original`."""
    return to_ours(state, diffusers_names(keys))


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`."""
    return to_theirs(state, diffusers_names(state))


def pixart_from_config(config: Config) -> Config:
    """Arguments of `PixArt` from the config.json of a PixArtTransformer2DModel. Raises WeightsError."""
    check_fixed(config, FIXED)
    if config.get("caption_channels") is None:
        raise WeightsError("config.json has no caption_channels, the width of the text: this network projects it")
    in_channels, sample_size = config.get("in_channels", 4), config.get("sample_size", 128)
    interpolation, sizes = config.get("interpolation_scale"), config.get("use_additional_conditions")
    heads = config.get("num_attention_heads", 16)
    return {
        "in_channels": in_channels,
        "context_dim": config["caption_channels"],
        "sample_size": sample_size,
        # alpha's published files leave these two out, and mean what their size implies
        "interpolation": float(max(sample_size // 64, 1) if interpolation is None else interpolation),
        "num_sizes": NUM_SIZES if (sample_size == 128 if sizes is None else sizes) else 0,
        "patch_size": config.get("patch_size", 2),
        "width": heads * config.get("attention_head_dim", 72),
        "depth": config.get("num_layers", 28),
        "num_heads": heads,
        "learned_variance": learned_variance(in_channels, config.get("out_channels", 8) or in_channels),
    }


def pixart_from_shapes(shapes: Shapes) -> Config:
    """Arguments of `PixArt` from a file of original layout; heads and interpolation are those published.

    Raises WeightsError for a file that does not tell its resolution.
    """
    width, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    if "pos_embed" not in shapes:
        raise WeightsError("the file has no pos_embed, so its resolution is unknown: use a diffusers folder")
    sample_size = math.isqrt(shapes["pos_embed"][1]) * patch_size
    is_sigma = shapes.get("y_embedder.y_embedding", (0,))[0] == SIGMA_TOKENS
    layers = [i for i in range(MAX_REPEATS) if f"blocks.{i}.attn.sr.weight" in shapes]
    return {
        "in_channels": in_channels,
        "context_dim": shapes["y_embedder.y_proj.fc1.weight"][1],
        "sample_size": sample_size,
        "interpolation": (SIGMA if is_sigma else ALPHA).get(sample_size, sample_size / 64),
        "num_sizes": NUM_SIZES if "csize_embedder.mlp.0.weight" in shapes else 0,
        "patch_size": patch_size,
        "width": width,
        "depth": sum(f"blocks.{i}.scale_shift_table" in shapes for i in range(MAX_REPEATS)),
        "num_heads": HEADS.get(width) or max(width // 64, 1),
        "kv_ratio": shapes[f"blocks.{layers[0]}.attn.sr.weight"][-1] if layers else 1,
        "kv_layers": layers,
        "learned_variance": learned_variance(in_channels, shapes["final_layer.linear.weight"][0] // patch_size**2),
    }


def pixart_arguments(net: PixArt) -> Config:
    """The arguments that made a network, as far as they change its keys or its result."""
    compressions = {i: block.attn.compression for i, block in enumerate(net.blocks) if block.attn.compression}
    return {
        "in_channels": net.in_channels,
        "context_dim": net.context_dim,
        "sample_size": net.sample_size,
        "interpolation": net.interpolation,
        "num_sizes": net.embed.num_sizes,
        "patch_size": net.patch_size,
        "width": net.patch_embed.out_channels,
        "depth": len(net.blocks),
        "num_heads": net.blocks[0].attn.num_heads,
        "modulation": "single" if isinstance(net.modulation, AdaLNSingle) else "per_block",
        "kv_ratio": max((c.conv.kernel_size[0] for c in compressions.values()), default=1),
        "kv_layers": list(compressions),
        "learned_variance": net.learned_variance,
    }


def pixart_to_config(net: PixArt) -> Config:
    """config.json of the PixArtTransformer2DModel that is this network. WeightsError where there is none."""
    a = pixart_arguments(net)
    if a["modulation"] != "single" or a["kv_layers"]:
        known = f"modulation={a['modulation']}, kv_layers={a['kv_layers']}"
        raise WeightsError(f"a PixArt of {known} has no place in diffusers' layout; write the original one")
    return {
        "_class_name": "PixArtTransformer2DModel",
        "sample_size": a["sample_size"],
        "interpolation_scale": a["interpolation"],
        "use_additional_conditions": bool(a["num_sizes"]),
        "patch_size": a["patch_size"],
        "in_channels": a["in_channels"],
        "out_channels": a["in_channels"] * (2 if a["learned_variance"] else 1),
        "num_layers": a["depth"],
        "num_attention_heads": a["num_heads"],
        "attention_head_dim": a["width"] // a["num_heads"],
        "cross_attention_dim": a["width"],
        "caption_channels": a["context_dim"],
        "num_embeds_ada_norm": 1000,
        "dropout": 0.0,
        **FIXED,
    }


@torch.no_grad()
def from_dit(net: PixArt, dit: DiT, t: float = 500.0) -> PixArt:
    """Start a fresh `net` from a DiT: at time t it computes what the DiT does without a class. §2.3, arXiv:2310.00426.

    Tables get what is missing from the vectors of adaLN-single to DiT's own; text and sizes keep their start. Raises
    WeightsError for networks of other sizes or kinds.
    """
    state = {k: v for k, v in dit.state_dict().items() if not re.search(r"modulation|label_embedding|text_proj", k)}
    own = net.state_dict()
    if wrong := sorted(k for k, v in state.items() if k not in own or own[k].shape != v.shape):
        raise WeightsError(f"this PixArt has no place for {listing(wrong)} of the DiT: give both the same sizes")
    is_single = isinstance(net.modulation, AdaLNSingle)
    if not is_single or dit.conditioning != "adaln_zero" or len(dit.blocks) != len(net.blocks):
        raise WeightsError("a PixArt of modulation=single starts from a DiT of conditioning=adaln_zero, equally deep")
    net.load_state_dict(state, strict=False)
    emb = net.embed.time_mlp(sinusoid(torch.tensor([t], device=net.patch_embed.weight.device), SINUSOID_DIM))  # 1 D
    shared, shared_final = net.modulation(emb)  # 1 6 D, 1 1 D
    pairs = [(ours, theirs, shared) for ours, theirs in zip(net.blocks, dit.blocks, strict=True)]
    for ours, theirs, given in [*pairs, (net.final, dit.final, shared_final)]:
        vectors = theirs.modulation.linear(F.silu(emb)).unflatten(1, (theirs.modulation.count, -1))
        ours.modulation.table.copy_((vectors - given)[0])
    return net
