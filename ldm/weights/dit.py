"""DiT and SiT in published files: names (tables as in `ledger`) and the arguments of our constructor.

Deviation of diffusers: it divides the time's exponents by half - 1 and has 1e-5 in the norm before the MLP, so the same
weights give other images there. What its folders hold was trained by the authors' code, so it is read as that computes,
unless the folder is ours and says otherwise; FORMULAS names both.
"""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldm.models.dit import DiT
from ldm.nn.embeddings import position_table
from ldm.utils.errors import WeightsError
from ldm.weights.formats import MAX_REPEATS, Config, Shapes, check_fixed
from ldm.weights.ledger import Names, equal, to_ours, to_theirs, translate, without

ORIGINAL = [  # the authors' DiT-XL-2-256x256.pt, and SiT's
    (r"^patch_embed\.", "x_embedder.proj."),
    (r"^embed\.time_mlp\.fc1\.", "t_embedder.mlp.0."),
    (r"^embed\.time_mlp\.fc2\.", "t_embedder.mlp.2."),
    (r"^embed\.label_embedding\.", "y_embedder.embedding_table."),
    (r"\.attn\.out\.", ".attn.proj."),
    (r"^final\.", "final_layer."),
    (r"\.modulation\.linear\.", ".adaLN_modulation.1."),
]
EMBEDDERS = "transformer_blocks.{}.norm1.emb."  # of time and class, which diffusers keeps once more in every block
DIFFUSERS = [  # transformer/diffusion_pytorch_model.safetensors
    (r"^patch_embed\.", "pos_embed.proj."),
    (r"^embed\.time_mlp\.fc", EMBEDDERS.format(0) + "timestep_embedder.linear_"),
    (r"^embed\.label_embedding\.", EMBEDDERS.format(0) + "class_embedder.embedding_table."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.attn\.qkv\.", ".attn1.to_q.", ".attn1.to_k.", ".attn1.to_v."),
    (r"\.attn\.out\.", ".attn1.to_out.0."),
    (r"\.mlp\.fc1\.", ".ff.net.0.proj."),
    (r"\.mlp\.fc2\.", ".ff.net.2."),
    (r"^final\.modulation\.linear\.", "proj_out_1."),
    (r"^final\.linear\.", "proj_out_2."),
    (r"\.modulation\.linear\.", ".norm1.linear."),
]
FIXED = {  # knobs of diffusers that change the result without changing a key; other values are other networks
    "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True,
    "norm_elementwise_affine": False,
}  # fmt: skip
FORMULAS = {"original": {"freq_shift": 0, "mlp_eps": 1e-6}, "diffusers": {"freq_shift": 1, "mlp_eps": 1e-5}}
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width, as published; others have heads of 64


def original_names(keys: Iterable[str]) -> Names:
    return {key: translate(key, ORIGINAL) for key in keys}


def diffusers_names(keys: Iterable[str]) -> Names:
    return {key: translate(key, DIFFUSERS) for key in keys}


def from_original(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """The authors' state dict under our names. WeightsError unless every key is used, none is missing, and the table
    of positions, which ours computes, is the one that is meant."""
    if (table := state.get("pos_embed")) is not None and not table.is_meta:
        side = math.isqrt(table.shape[1])
        expected = position_table((side, side), table.shape[2], base=side)
        if not torch.allclose(table[0].float().cpu(), expected, atol=1e-2):  # averaging and half precision move it
            raise WeightsError("pos_embed is not the fixed sin-cos table of DiT: the weights are another network's")
    return to_ours(without(state, lambda key: key == "pos_embed"), original_names(keys))


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_original`, without the table of positions."""
    return to_theirs(state, original_names(state))


def computed(net: DiT) -> dict[str, Tensor]:
    """The table of positions, which the authors' code reads from the file."""
    weight, side = net.patch_embed.weight, net.sample_size // net.patch_size
    table = position_table((side, side), len(weight), base=side, device=weight.device)
    return {"pos_embed": table[None].to(weight.dtype)}  # 1 N D


def from_diffusers(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """A diffusers state dict under our names. WeightsError as `from_original`, or where copies differ."""
    copies = [key for key in state if _first(key) not in (None, key)]
    for key in copies:
        if _first(key) not in state or not equal(state[key], state[_first(key)]):
            raise WeightsError(f"{key} differs from {_first(key)}: DiT has one embedding of time and class for all")
    return to_ours(without(state, set(copies).__contains__), diffusers_names(keys))


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`."""
    published = to_theirs(state, diffusers_names(state))
    embedders = [key for key in published if _first(key) is not None]
    for i in range(1, _depth(published, "transformer_blocks.{}.ff.net.2.bias")):
        for key in embedders:
            published[key.replace(EMBEDDERS.format(0), EMBEDDERS.format(i))] = published[key].clone()
    return published


def _first(key: str) -> str | None:
    """The key of an embedder in block 0; None for what is no embedder."""
    match = re.match(r"transformer_blocks\.\d+\.norm1\.emb\.(.*)", key)
    return EMBEDDERS.format(0) + match[1] if match else None


def _depth(keys: Iterable[str], pattern: str) -> int:
    return sum(pattern.format(i) in keys for i in range(MAX_REPEATS))


def dit_from_config(config: Config) -> Config:
    """Arguments of `DiT` from the config.json of a DiTTransformer2DModel. Raises WeightsError."""
    check_fixed(config, FIXED)
    in_channels = config.get("in_channels", 4)
    heads = config.get("num_attention_heads", 16)
    ours = {"freq_shift": config.get("freq_shift"), "mlp_eps": config.get("norm_eps", 1e-5)}
    return {
        "in_channels": in_channels,
        "sample_size": config.get("sample_size", 32),
        "patch_size": config.get("patch_size", 2),
        "width": heads * config.get("attention_head_dim", 72),
        "depth": config.get("num_layers", 28),
        "num_heads": heads,
        "num_classes": config.get("num_embeds_ada_norm", 1000),
        "learned_variance": learned_variance(in_channels, config.get("out_channels") or in_channels),
        **(ours if "freq_shift" in config else FORMULAS["original"]),  # a key of ours, which diffusers ignores
    }


def dit_from_shapes(shapes: Shapes) -> Config:
    """Arguments of `DiT` from a file of original layout; heads, which no shape tells, as published."""
    width, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    tokens = shapes["pos_embed"][1] if "pos_embed" in shapes else (32 // patch_size) ** 2
    classes = shapes.get("y_embedder.embedding_table.weight")
    return {
        "in_channels": in_channels,
        "sample_size": math.isqrt(tokens) * patch_size,
        "patch_size": patch_size,
        "width": width,
        "depth": _depth(shapes, "blocks.{}.adaLN_modulation.1.weight"),
        "num_heads": HEADS.get(width) or max(width // 64, 1),
        "num_classes": classes[0] - 1 if classes else None,  # ours has a row for the null class beside them
        "learned_variance": learned_variance(in_channels, shapes["final_layer.linear.weight"][0] // patch_size**2),
    }


def learned_variance(in_channels: int, out_channels: int) -> bool:
    """Whether there are channels for it. WeightsError where there are neither as many nor twice as many."""
    if out_channels not in (in_channels, 2 * in_channels):
        raise WeightsError(f"{out_channels} channels come out of {in_channels}, expected as many or twice as many")
    return out_channels != in_channels


def dit_arguments(net: DiT) -> Config:
    """The arguments that made a network, as far as they change its keys or its result."""
    return {
        "in_channels": net.in_channels,
        "sample_size": net.sample_size,
        "patch_size": net.patch_size,
        "width": net.patch_embed.out_channels,
        "depth": len(net.blocks),
        "num_heads": net.blocks[0].attn.num_heads,
        "conditioning": net.conditioning,
        "num_classes": net.embed.num_classes,
        "context_dim": net.embed.context_dim,
        "learned_variance": net.learned_variance,
        "freq_shift": net.embed.freq_shift,
        "mlp_eps": net.mlp_eps,
    }


def dit_to_config(net: DiT) -> Config:
    """config.json of the DiTTransformer2DModel that has these weights. WeightsError where there is none."""
    a = dit_arguments(net)
    if a["conditioning"] != "adaln_zero" or a["context_dim"] or not a["num_classes"]:
        known = "conditioning=adaln_zero, classes and no text"
        raise WeightsError(
            f"a DiT of conditioning={a['conditioning']}, num_classes={a['num_classes']}, "
            f"context_dim={a['context_dim']} has no place in diffusers' layout, which has {known}"
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "sample_size": a["sample_size"],
        "patch_size": a["patch_size"],
        "in_channels": a["in_channels"],
        "out_channels": a["in_channels"] * (2 if a["learned_variance"] else 1),
        "num_layers": a["depth"],
        "num_attention_heads": a["num_heads"],
        "attention_head_dim": a["width"] // a["num_heads"],
        "num_embeds_ada_norm": a["num_classes"],
        "norm_eps": a["mlp_eps"],
        "freq_shift": a["freq_shift"],
        "dropout": 0.0,
        **FIXED,
    }
