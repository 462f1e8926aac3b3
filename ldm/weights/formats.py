"""The arguments of our constructors, as three sources tell them: a diffusers config.json, shapes in a file, a network.

Keys are those of the layout named; `Shapes` are those of a file of original layout, its prefix removed.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import SIZE_DIM, TokenConv, UNet
from ldm.utils.errors import WeightsError

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

MAX_NUMBER = 1 << 16  # of any width or count in a config, MAX_REPEATS of any number of blocks: checked before building
MAX_REPEATS = 100
MAX_OF = {"num_res_blocks": MAX_REPEATS, "depth": MAX_REPEATS, "vocab_size": 300_000}
NAMES = ("activation", "conditioning", "modulation", "text", "text_norm")  # constructors take only those they know
FRACTIONS = ("mlp_eps", "interpolation", "skip_scale")
UNET_FIXED = {  # knobs of diffusers that change the result without changing a key; other values are other networks
    "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "center_input_sample": False, "only_cross_attention": False,
    "dual_cross_attention": False, "resnet_time_scale_shift": "default", "time_embedding_type": "positional",
    "class_embed_type": None, "encoder_hid_dim": None, "attention_type": "default", "conv_in_kernel": 3,
    "conv_out_kernel": 3, "time_embedding_act_fn": None, "timestep_post_act": None,
    "reverse_transformer_layers_per_block": None,
}  # fmt: skip
VAE_FIXED = {"act_fn": "silu"}


def unet_from_config(config: Config) -> Config:
    """Arguments of `UNet` from the config.json of a UNet2DConditionModel. Raises WeightsError."""
    check_fixed(config, UNET_FIXED)
    widths = config.get("block_out_channels", [320, 640, 1280, 1280])
    kinds = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    has_text = [{"CrossAttnDownBlock2D": True, "DownBlock2D": False}.get(kind) for kind in kinds]
    ups = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(has_text)]
    mids = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if None in has_text or config.get("up_block_types", ups) != ups or mids != "UNetMidBlock2DCrossAttn":
        raise WeightsError(f"config.json has blocks {kinds}, {mids}, {config.get('up_block_types')}, unknown here")
    heads = per_level(config.get("num_attention_heads") or config.get("attention_head_dim", 8), widths)
    depth = per_level(config.get("transformer_layers_per_block", 1), widths)
    context_dim = config.get("cross_attention_dim", 1280)
    pooled_dim, num_sizes = _vector(config, context_dim)
    classes = config.get("num_class_embeds")
    return {
        "in_channels": config.get("in_channels", 4),
        "out_channels": config.get("out_channels", 4),
        "channels": widths[0],
        "channel_mult": multiples(widths),
        "num_res_blocks": config.get("layers_per_block", 2),
        "depth": [d if attends else 0 for d, attends in zip(depth, has_text, strict=True)] + [depth[-1]],
        # Deviation of the name: `attention_head_dim` of these files is the number of heads.
        "head_dim": [width // count for width, count in zip(widths, heads, strict=True)],
        "context_dim": context_dim,
        "pooled_dim": pooled_dim,
        "num_sizes": num_sizes,
        "num_classes": classes - 1 if classes else None,  # ours has a row for the null class beside them
        "linear_projection": config.get("use_linear_projection", False),
        **_size_dim(config.get("addition_time_embed_dim") if num_sizes else None),
    }


def _vector(config: Config, context_dim: int) -> tuple[int | None, int]:
    """Width of the pooled text and number of sizes, of which the file gives only the sum."""
    if config.get("addition_embed_type") is None:
        return None, 0
    if (kind := config["addition_embed_type"]) != "text_time":
        raise WeightsError(f"config.json has addition_embed_type={str(kind)[:60]}, this network is for text_time only")
    total, size_dim = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    return split_vector(total, context_dim, size_dim)


def split_vector(total: int, context_dim: int, size_dim: int = SIZE_DIM) -> tuple[int, int]:
    """(pooled_dim, num_sizes): the refiner has one text encoder, so both texts are as wide, and 5 sizes; SDXL has 6."""
    num_sizes = 5 if total - 5 * size_dim == context_dim else 6
    return total - num_sizes * size_dim, num_sizes


def _size_dim(size_dim: int | None) -> Config:
    """The argument of `UNet` where it is not that of published models."""
    return {} if size_dim in (None, SIZE_DIM) else {"size_dim": size_dim}


def unet_from_shapes(shapes: Shapes) -> Config:
    """Arguments of `UNet` from a file of original layout; heads, which no shape tells, as Stable Diffusion has them."""
    levels = [[]]  # of (channels, depth) per block
    for i in range(1, 1 + max(int(block[1]) for key in shapes if (block := re.match(r"input_blocks\.(\d+)\.", key)))):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
        else:
            width = shapes[f"input_blocks.{i}.0.in_layers.2.weight"][0]
            levels[-1].append((width, _depth(shapes, f"input_blocks.{i}.1")))
    widths = [level[0][0] for level in levels]
    linear = all(len(shape) == 2 for key, shape in shapes.items() if key.endswith("proj_in.weight"))
    context_dim = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    vector, labels = shapes.get("label_emb.0.0.weight"), shapes.get("label_emb.weight")
    pooled_dim, num_sizes = split_vector(vector[1], context_dim) if vector else (None, 0)
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "channels": widths[0],
        "channel_mult": multiples(widths),
        "num_res_blocks": len(levels[0]),
        "depth": [level[0][1] for level in levels] + [_depth(shapes, "middle_block.1")],
        "head_dim": 64 if linear else [width // 8 for width in widths],
        "context_dim": context_dim,
        "pooled_dim": pooled_dim,
        "num_sizes": num_sizes,
        "num_classes": labels[0] - 1 if labels else None,
        "linear_projection": linear,
    }


def unet_from_yml(params: Config, shapes: Shapes) -> Config:
    """Arguments of `UNet` from the authors' YAML (its `params`) and the shapes of the file beside it."""
    arguments = unet_from_shapes(shapes)
    head_dim, heads = params.get("num_head_channels", -1), params.get("num_heads", -1)
    widths = [arguments["channels"] * mult for mult in arguments["channel_mult"]]
    if type(head_dim) is int and head_dim > 0:
        return arguments | {"head_dim": head_dim}
    if type(heads) is int and heads > 0:
        return arguments | {"head_dim": [width // heads for width in widths]}
    return arguments


def _depth(shapes: Shapes, name: str) -> int:
    return sum(f"{name}.transformer_blocks.{i}.norm1.weight" in shapes for i in range(MAX_REPEATS))


def unet_arguments(net: UNet) -> Config:
    """The arguments that made a network, as far as they change its keys or its result."""
    encoder, conditioning = net.encoder, net.conditioning
    blocks = [level.blocks[0] for level in encoder.levels] + [net.middle[0]]
    widths = [block.res.conv1.out_channels for block in blocks[:-1]]
    found = [block.transformer for block in blocks]
    dims = [t.proj_in.in_features // t.blocks[0].self_attn.num_heads if t else None for t in found]
    for i in reversed(range(len(dims) - 1)):  # a level without attention is as its neighbour: it has no say
        dims[i] = dims[i] or math.gcd(dims[i + 1] or 0, widths[i])
    return {
        "in_channels": net.in_channels,
        "out_channels": net.decoder.conv_out.out_channels,
        "channels": conditioning.channels,
        "channel_mult": multiples(widths),
        "num_res_blocks": len(encoder.levels[0].blocks),
        "depth": [len(t.blocks) if t else 0 for t in found],
        "head_dim": dims[:-1],
        "context_dim": net.context_dim,
        "pooled_dim": conditioning.pooled_dim,
        "num_sizes": conditioning.num_sizes,
        "num_classes": conditioning.num_classes,
        "linear_projection": not any(isinstance(module, TokenConv) for module in net.modules()),
        **_size_dim(conditioning.size_dim),
    }


def unet_to_config(net: UNet) -> Config:
    """config.json of the UNet2DConditionModel that is this network. WeightsError where there is none."""
    a = unet_arguments(net)
    *depth, middle = a["depth"]
    if not middle or depth[-1] not in (0, middle) or not a["context_dim"]:
        reason = f"depth={a['depth']}, context_dim={a['context_dim']}"
        raise WeightsError(f"a UNet of {reason} has no place in diffusers' layout")
    widths = [a["channels"] * mult for mult in a["channel_mult"]]
    is_vector = bool(net.conditioning.vector_mlp)
    vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": net.conditioning.size_dim,
        "projection_class_embeddings_input_dim": (a["pooled_dim"] or 0) + a["num_sizes"] * net.conditioning.size_dim,
    }
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128 if is_vector else 64,  # of latents; what pipelines draw when nobody says
        "in_channels": a["in_channels"],
        "out_channels": a["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": a["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depth],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depth)],
        "transformer_layers_per_block": [d or 1 for d in depth[:-1]] + [middle],
        "attention_head_dim": [width // dim for width, dim in zip(widths, a["head_dim"], strict=True)],
        "cross_attention_dim": a["context_dim"],
        "use_linear_projection": a["linear_projection"],
        "num_class_embeds": a["num_classes"] + 1 if a["num_classes"] else None,
        **{name: value for name, value in UNET_FIXED.items() if value is not None},
        **(vector if is_vector else {}),
    }


def vae_from_config(config: Config) -> Config:
    """Arguments of `AutoencoderKL` from the config.json of diffusers' class of that name. Raises WeightsError."""
    check_fixed(config, VAE_FIXED)
    kinds = set(config.get("down_block_types", ["DownEncoderBlock2D"])) | set(
        config.get("up_block_types", ["UpDecoderBlock2D"])
    )
    if kinds != {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise WeightsError(f"config.json has blocks {sorted(kinds)}, which the autoencoder here has not")
    widths = config.get("block_out_channels", [64])
    return {
        "in_channels": config.get("in_channels", 3),
        "channels": widths[0],
        "channel_mult": multiples(widths),
        "num_res_blocks": config.get("layers_per_block", 1),
        "latent_channels": config.get("latent_channels", 4),
        "attention": config.get("mid_block_add_attention", True),
        "groups": config.get("norm_num_groups", 32),
        "quant_conv": config.get("use_quant_conv", True),
    }


def vae_from_shapes(shapes: Shapes) -> Config:
    """Arguments of `AutoencoderKL` from a file of original layout; groups, which no shape tells, are 32."""
    count = 1 + max(int(level[1]) for key in shapes if (level := re.match(r"encoder\.down\.(\d+)\.", key)))
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(count)]
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "channels": widths[0],
        "channel_mult": multiples(widths),
        "num_res_blocks": sum(f"encoder.down.0.block.{i}.conv1.weight" in shapes for i in range(MAX_REPEATS)),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "attention": "encoder.mid.attn_1.q.weight" in shapes,
        "quant_conv": "quant_conv.weight" in shapes,
    }


def vae_arguments(net: AutoencoderKL) -> Config:
    """The arguments that made a network."""
    encoder = net.encoder
    widths = [level.blocks[0].conv1.out_channels for level in encoder.down]
    return {
        "in_channels": encoder.conv_in.in_channels // net.patch**2,
        "channels": widths[0],
        "channel_mult": multiples(widths),
        "num_res_blocks": len(encoder.down[0].blocks),
        "latent_channels": net.latent_channels,
        "attention": not isinstance(encoder.mid.attention, nn.Identity),
        "groups": encoder.norm_out.num_groups,
        "quant_conv": isinstance(net.quant_conv, nn.Conv2d),
        "patch": net.patch,
    }


def vae_to_config(net: AutoencoderKL) -> Config:
    """config.json of diffusers' AutoencoderKL that is this network. WeightsError where there is none."""
    a = vae_arguments(net)
    if a["patch"] != 1:
        raise WeightsError(f"an autoencoder of patch={a['patch']} has no place in diffusers' layout")
    count = len(a["channel_mult"])
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": 64 * net.downsample,
        "in_channels": a["in_channels"],
        "out_channels": a["in_channels"],
        "latent_channels": a["latent_channels"],
        "block_out_channels": [a["channels"] * mult for mult in a["channel_mult"]],
        "layers_per_block": a["num_res_blocks"],
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "norm_num_groups": a["groups"],
        "mid_block_add_attention": a["attention"],
        "use_quant_conv": a["quant_conv"],
        "use_post_quant_conv": a["quant_conv"],
        **VAE_FIXED,
    }


def per_level(value: Any, widths: list[int]) -> list[int]:
    return list(value) if isinstance(value, list) else [value] * len(widths)


def multiples(widths: list[int]) -> list[int]:
    """Of the first width."""
    if any(width % widths[0] for width in widths):
        raise WeightsError(f"widths {widths} are not multiples of the first, which this network needs")
    return [width // widths[0] for width in widths]


def check_bounds(arguments: Config) -> Config:
    """The arguments, when each is a number in bounds or a short list of them: a file must not build a monster."""
    for name, value in arguments.items():
        if name in NAMES and isinstance(value, str):
            continue
        numbers, most = value if isinstance(value, list) else [value], MAX_OF.get(name, MAX_NUMBER)
        kinds = int | float if name in FRACTIONS else int
        if len(numbers) > MAX_REPEATS or not all(n is None or isinstance(n, kinds) and 0 <= n <= most for n in numbers):
            raise WeightsError(f"{name}={str(value)[:60]} describes no network: expected numbers up to {most}")
    return arguments


def check_fixed(config: Config, fixed: Config) -> None:
    """WeightsError where a knob of another program changes the result and has another value than the one here."""
    for name, expected in fixed.items():
        if (value := config.get(name, expected)) != expected:
            raise WeightsError(f"config.json has {name}={str(value)[:60]}, this network is for {expected!r} only")
