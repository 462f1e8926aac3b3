"""The arguments of CLIP's towers, as a transformers config.json, shapes in a file, or a network tell them."""

import json
import math

from torch import nn

from ldm.conditioning.clip import ACTIVATIONS, CLIPText, CLIPVision
from ldm.conditioning.clip_tokenizer import EOS
from ldm.weights.formats import MAX_REPEATS, Config, Shapes, check_fixed

PROJECTED = "CLIPTextModelWithProjection"
WHOLE = "CLIPModel"  # both towers; which of them a source is of, its component says
TEXT_CLASSES = ("CLIPTextModel", PROJECTED)
FIXED = {"layer_norm_eps": 1e-5}
VOCABULARY = 49408  # of every CLIP as published; its last token ends a text
OPEN_CLIP_WIDTHS = (1024, 1280)  # of H and bigG, which have the exact GELU under whatever names
OPENAI_WIDTHS = (512, 768)  # of OpenAI's, which have the quick one under whatever names
HEADS = {1280: 16, 1664: 16}  # of the vision towers H and bigG; heads of all others are 64 wide
HF = {  # names in a file -> what they are for
    "norm": "final_layer_norm.weight", "tokens": "embeddings.token_embedding.weight",
    "positions": "embeddings.position_embedding.weight", "block": "encoder.layers.{}.layer_norm1.weight",
    "mlp": "encoder.layers.0.mlp.fc1.weight",
}  # fmt: skip
OPEN_CLIP = {
    "norm": "ln_final.weight", "tokens": "token_embedding.weight",
    "positions": "positional_embedding", "block": "transformer.resblocks.{}.ln_1.weight",
    "mlp": "transformer.resblocks.0.mlp.c_fc.weight",
}  # fmt: skip


def text_from_config(config: Config) -> Config:
    """Arguments of `CLIPText` from the config.json of a CLIPTextModel, with projection or without. WeightsError."""
    config = tower(config, "text_config")
    width = config.get("hidden_size", 512)
    projected = bool({PROJECTED, WHOLE} & set(config.get("architectures") or ()))
    check_fixed(config, FIXED)
    return {
        "width": width,
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 8),
        "activation": config.get("hidden_act", "quick_gelu"),
        "projected": projected,
        "vocab_size": config.get("vocab_size", 49408),
        "length": config.get("max_position_embeddings", 77),
        **_sizes(width, config.get("intermediate_size", 2048), projected and config.get("projection_dim", 512)),
    }


def tower(config: Config, name: str) -> Config:
    """The config of one tower, in that of a whole CLIP too, whose projections are as wide as it says at its root."""
    if not isinstance(inner := config.get(name), dict):
        return config
    shared = {key: config[key] for key in ("architectures", "projection_dim") if key in config}
    return inner | shared


def _sizes(width: int, mlp_dim: int, projection_dim: int | None) -> Config:
    """Arguments of `CLIPText` that are not as published: there the MLP has 4 width, the projection, if any, width."""
    sizes = {"mlp_dim": (mlp_dim, 4 * width), "projection_dim": (projection_dim, width)}
    return {name: size for name, (size, published) in sizes.items() if size and size != published}


def text_from_shapes(shapes: Shapes) -> Config:
    """Arguments of `CLIPText` from a file without config: heads and activation as the published models have them."""
    is_open = OPEN_CLIP["norm"] in shapes
    prefix = "text_model." if any(key.startswith("text_model.") for key in shapes) else ""
    names = OPEN_CLIP if is_open else {what: prefix + name for what, name in HF.items()}
    (width,) = shapes[names["norm"]]
    projection = shapes.get("text_projection" if is_open else "text_projection.weight")
    exact = is_open and width not in OPENAI_WIDTHS or width in OPEN_CLIP_WIDTHS
    return {
        "width": width,
        "depth": sum(names["block"].format(i) in shapes for i in range(MAX_REPEATS)),
        "num_heads": max(width // 64, 1),
        "activation": "gelu" if exact else "quick_gelu",
        "projected": projection is not None,
        "vocab_size": shapes[names["tokens"]][0],
        "length": shapes[names["positions"]][0],
        **_sizes(width, shapes[names["mlp"]][0], projection and projection[1 if is_open else 0]),
    }


def text_arguments(net: CLIPText) -> Config:
    """The arguments that made a network."""
    return {
        "width": net.width,
        "depth": len(net.blocks),
        "num_heads": net.blocks[0].attention.num_heads,
        "activation": _activation(net.blocks),
        "projected": net.projection is not None,
        "vocab_size": net.tokens.num_embeddings,
        "length": len(net.positions),
        **_sizes(net.width, net.blocks[0].mlp.fc1.out_features, net.pooled_dim),
    }


def text_to_config(net: CLIPText) -> Config:
    """config.json of the transformers model that is this network."""
    a = text_arguments(net)
    return {
        "architectures": [TEXT_CLASSES[a["projected"]]],
        "model_type": "clip_text_model",
        "hidden_size": a["width"],
        "intermediate_size": a.get("mlp_dim", 4 * a["width"]),
        "projection_dim": a.get("projection_dim", a["width"]),
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["num_heads"],
        "hidden_act": a["activation"],
        "vocab_size": a["vocab_size"],
        "max_position_embeddings": a["length"],
        **(ends_of(a) or {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}),  # as published
        **FIXED,
    }


def ends_of(arguments: Config, vocabulary: str | None = None) -> Config:
    """Ids of the ends of a text for config.json, where tokens were added after them; else nothing.

    transformers pools at the first end that config.json names, and for an end of 2, as published, at the largest id of
    a text: that of an added token. vocabulary: JSON, of another size than CLIP's own.
    """
    size = VOCABULARY
    if vocabulary:
        model = json.loads(vocabulary)["model"]["vocab"]
        size = 1 + model[EOS] if EOS in model else size
    if arguments["vocab_size"] <= size:
        return {}
    return {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}


def text_used(arguments: Config, layout: str) -> Config:
    """What a system reads of its first text encoder: nothing projects its pooled text, and OpenCLIP's, which SD 2.x
    has there, stops before the last block."""
    if not arguments["projected"]:
        return arguments
    is_h = layout == "open_clip" or arguments["width"] == OPEN_CLIP_WIDTHS[0]  # under transformers' names too
    return arguments | {"projected": False, "depth": arguments["depth"] - is_h}


def vision_from_config(config: Config) -> Config:
    """Arguments of `CLIPVision` from the config.json of a CLIPVisionModelWithProjection. Raises WeightsError."""
    config = tower(config, "vision_config")
    check_fixed(config, FIXED | {"num_channels": 3})
    return {
        "width": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
        "mlp_dim": config.get("intermediate_size", 3072),
        "projection_dim": config.get("projection_dim", 512),
        "activation": config.get("hidden_act", "quick_gelu"),
        "image_size": config.get("image_size", 224),
        "patch_size": config.get("patch_size", 32),
    }


def vision_from_shapes(shapes: Shapes) -> Config:
    """Arguments of `CLIPVision` from an OpenCLIP file: heads and activation as its published models have them."""
    width, _, patch_size, _ = shapes["visual.conv1.weight"]
    block = "visual.transformer.resblocks.{}."
    return {
        "width": width,
        "depth": sum(f"{block.format(i)}ln_1.weight" in shapes for i in range(MAX_REPEATS)),
        "num_heads": HEADS.get(width, max(width // 64, 1)),
        "mlp_dim": shapes[f"{block.format(0)}mlp.c_fc.weight"][0],
        "projection_dim": shapes["visual.proj"][1],
        "activation": "gelu",
        "image_size": math.isqrt(shapes["visual.positional_embedding"][0] - 1) * patch_size,
        "patch_size": patch_size,
    }


def vision_arguments(net: CLIPVision) -> Config:
    """The arguments that made a network."""
    return {
        "width": net.width,
        "depth": len(net.blocks),
        "num_heads": net.blocks[0].attention.num_heads,
        "mlp_dim": net.blocks[0].mlp.fc1.out_features,
        "projection_dim": net.projection_dim,
        "activation": _activation(net.blocks),
        "image_size": net.image_size,
        "patch_size": net.patches.kernel_size[0],
    }


def vision_to_config(net: CLIPVision) -> Config:
    """config.json of the CLIPVisionModelWithProjection that is this network."""
    a = vision_arguments(net)
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": a["width"],
        "intermediate_size": a["mlp_dim"],
        "projection_dim": a["projection_dim"],
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["num_heads"],
        "hidden_act": a["activation"],
        "image_size": a["image_size"],
        "patch_size": a["patch_size"],
        "num_channels": 3,
        **FIXED,
    }


def _activation(blocks: nn.ModuleList) -> str:
    return next(name for name, function in ACTIVATIONS.items() if function is blocks[0].mlp.activation)
