"""The arguments of `IFUNet`, as three sources tell them: diffusers' config.json, the authors' files, a network."""

import re

from ldm.models.if_unet import IFUNet
from ldm.utils.errors import WeightsError
from ldm.weights.dit import learned_variance
from ldm.weights.formats import Config, Shapes, check_fixed, multiples, per_level
from ldm.weights.if_unet import HEAD_DIM

SKIP_SCALE = 0.7071  # as the authors write 1 / sqrt(2)
FIXED = {  # knobs of diffusers that change the result without changing a key; other values are other networks
    "addition_embed_type": "text", "cross_attention_norm": "group_norm", "resnet_time_scale_shift": "scale_shift",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "norm_num_groups": 32, "norm_eps": 1e-5, "freq_shift": 0,
    "flip_sin_to_cos": True, "center_input_sample": False, "time_embedding_type": "positional",
    "timestep_post_act": None, "time_cond_proj_dim": None, "num_class_embeds": None, "class_embeddings_concat": False,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "dual_cross_attention": False, "attention_type": "default",
}  # fmt: skip
YML_FIXED = {"use_scale_shift_norm": True, "resblock_updown": True}
TYPES = {"SimpleCrossAttn{}Block2D": True, "Resnet{}sampleBlock2D": False}  # of diffusers' blocks; whether they attend


def if_from_config(config: Config) -> Config:
    """Arguments of `IFUNet` from the config.json of a UNet2DConditionModel. Raises WeightsError."""
    check_fixed(config, FIXED)
    widths = config["block_out_channels"]
    attention = [TYPES.get(kind.replace("Down", "{}", 1)) for kind in config["down_block_types"]]
    ups = [kind.replace("Up", "{}", 1) for kind in reversed(config["up_block_types"])]
    if None in attention or [TYPES.get(kind) for kind in ups] != attention:
        raise WeightsError(
            f"config.json has blocks {config['down_block_types']}, {config['up_block_types']}, unknown here"
        )
    embed, only_text = config.get("class_embed_type"), config.get("only_cross_attention", False)
    _check_consistent(config)
    in_channels = config["in_channels"] // (2 if embed else 1)
    encoder_dim, text_dim = config.get("encoder_hid_dim"), config["cross_attention_dim"]
    return {
        "in_channels": in_channels,
        "channels": widths[0],
        "channel_mult": multiples(widths),
        "num_res_blocks": per_level(config.get("layers_per_block", 2), widths),
        "attention": attention,
        "head_dim": config["attention_head_dim"],
        "self_attention": not only_text,
        "context_dim": encoder_dim or text_dim,
        "text_dim": text_dim if encoder_dim else None,
        "text_norm": "group",
        "pool_heads": config.get("addition_embed_type_num_heads", 64),
        "super_resolution": embed is not None,
        "skip_scale": 1 / config.get("resnet_out_scale_factor", 1.0),
        "activation": config.get("act_fn", "silu"),
        "learned_variance": learned_variance(in_channels, config["out_channels"]),
    }


def _check_consistent(config: Config) -> None:
    """WeightsError for knobs of diffusers that IF's networks use in one combination only."""
    activation, only_text = config.get("act_fn", "silu"), config.get("only_cross_attention", False)
    after = config.get("time_embedding_act_fn"), config.get("resnet_skip_time_act", False)
    widths = config["block_out_channels"]
    wrong = {
        "class_embed_type": config.get("class_embed_type") not in (None, "timestep"),
        "time_embedding_act_fn": after not in ((None, False), (activation, True)),  # once, wherever it is
        "time_embedding_dim": (config.get("time_embedding_dim") or 4 * widths[0]) != max(widths),
        "mid_block_scale_factor": config.get("mid_block_scale_factor", 1) != config.get("resnet_out_scale_factor", 1),
        "only_cross_attention": not isinstance(only_text, bool),
        "mid_block_only_cross_attention": config.get("mid_block_only_cross_attention") not in (None, only_text),
    }
    if name := next((name for name, is_wrong in wrong.items() if is_wrong), None):
        raise WeightsError(
            f"config.json has {name}={config.get(name)}, which makes a network that is not DeepFloyd IF's"
        )


def if_from_shapes(shapes: Shapes) -> Config:
    """Arguments of `IFUNet` from the authors' pytorch_model.bin; what no shape tells is as published."""
    widths, counts, attention = [], [0], []
    for i in range(sum(re.fullmatch(r"output_blocks\.\d+\.0\.in_layers\.0\.bias", key) is not None for key in shapes)):
        counts[-1] += 1
        attends = f"output_blocks.{i}.1.qkv.weight" in shapes
        if counts[-1] == 1:
            widths.append(shapes[f"output_blocks.{i}.0.out_layers.3.bias"][0])
            attention.append(attends)
        if f"output_blocks.{i}.{2 if attends else 1}.in_layers.0.bias" in shapes:  # a step up ends the level
            counts.append(0)
    channels = shapes["time_embed.0.weight"][1]
    is_super = "aug_proj.0.weight" in shapes
    in_channels = shapes["input_blocks.0.0.weight"][1] // (2 if is_super else 1)
    rows, columns, _ = shapes["middle_block.1.qkv.weight"]
    return {
        "in_channels": in_channels,
        "channels": channels,
        "channel_mult": multiples([channels, *reversed(widths)])[1:],
        "num_res_blocks": [count - 1 for count in reversed(counts)],
        "attention": attention[::-1],
        "head_dim": HEAD_DIM,
        "self_attention": rows > columns,
        "context_dim": shapes["encoder_pooling.0.weight"][0],
        "text_dim": shapes["encoder_proj.weight"][0] if "encoder_proj.weight" in shapes else None,
        "text_norm": "group",
        "pool_heads": 64,
        "super_resolution": is_super,
        "skip_scale": SKIP_SCALE if is_super else 1.0,
        "activation": "gelu",
        "learned_variance": learned_variance(in_channels, shapes["out.2.weight"][0]),
    }


def if_from_yml(params: Config, shapes: Shapes) -> Config:
    """Arguments of `IFUNet` from the authors' config.yml (its `params`) and the shapes of the file beside it.

    What both tell the shapes decide: `disable_self_attentions: true` of a config.yml disables nothing.
    """
    check_fixed(params, YML_FIXED)
    return if_from_shapes(shapes) | {
        "head_dim": params.get("num_head_channels", HEAD_DIM),
        "pool_heads": params["att_pool_heads"],
        "activation": params["activation"],
        "skip_scale": SKIP_SCALE if params.get("scale_skip_connection") else 1.0,
    }


def if_arguments(net: IFUNet) -> Config:
    """The arguments that made a network, as far as they change its keys or its result."""
    embed, levels, attention = net.embed, net.encoder.levels, net.middle[0].attention
    widths = [level.blocks[0].res.conv1.out_channels for level in levels]
    return {
        "in_channels": net.in_channels,
        "channels": embed.channels,
        "channel_mult": multiples([embed.channels, *widths])[1:],
        "num_res_blocks": [len(level.blocks) for level in levels],
        "attention": [level.blocks[0].attention is not None for level in levels],
        "head_dim": attention.head_dim,
        "self_attention": attention.self_attention,
        "context_dim": embed.context_dim,
        "text_dim": embed.text_proj.out_features if embed.text_proj is not None else None,
        "text": embed.text,
        "text_norm": net.text_norm,
        "pool_heads": embed.pool_heads,
        "super_resolution": embed.aug_mlp is not None,
        "skip_scale": net.skip_scale,
        "activation": net.activation,
        "learned_variance": net.learned_variance,
    }


def if_to_config(net: IFUNet) -> Config:
    """config.json of the UNet2DConditionModel that has these weights. WeightsError where there is none."""
    a = _published(net)
    is_super, out_channels = a["super_resolution"], a["in_channels"] * (2 if a["learned_variance"] else 1)
    kinds = [next(kind for kind, attends in TYPES.items() if attends == level) for level in a["attention"]]
    widths = [a["channels"] * mult for mult in a["channel_mult"]]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": {4: 64, 5: 256}.get(len(widths), 1024),  # what pipelines draw when nobody says
        "in_channels": a["in_channels"] * (2 if is_super else 1),
        "out_channels": out_channels,
        "block_out_channels": widths,
        "layers_per_block": a["num_res_blocks"],
        "down_block_types": [kind.format("Down") for kind in kinds],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
        "attention_head_dim": a["head_dim"],
        "only_cross_attention": not a["self_attention"],
        "cross_attention_dim": a["text_dim"] or a["context_dim"],
        "encoder_hid_dim": a["context_dim"] if a["text_dim"] else None,
        "encoder_hid_dim_type": "text_proj" if a["text_dim"] else None,
        "addition_embed_type_num_heads": a["pool_heads"],
        "class_embed_type": "timestep" if is_super else None,
        "time_embedding_dim": max(widths),
        "time_embedding_act_fn": a["activation"] if is_super else None,  # once, or in every block: the same
        "resnet_skip_time_act": is_super,
        "resnet_out_scale_factor": 1 / a["skip_scale"],
        "mid_block_scale_factor": 1 / a["skip_scale"],
        "act_fn": a["activation"],
        **{name: value for name, value in FIXED.items() if value is not None},
    }


def if_to_yml(net: IFUNet) -> Config:
    """`params` of the authors' config.yml of this network. WeightsError where there is none."""
    a = _published(net)
    size = 2 ** (len(a["attention"]) + 2)  # of images; only its ratios to the resolutions count
    resolutions = [size // 2**level for level, attends in enumerate(a["attention"]) if attends]
    is_scaled, numbers = a["skip_scale"] != 1, ",".join
    return {
        "image_size": size,
        "in_channels": a["in_channels"] * (2 if a["super_resolution"] else 1),
        "out_channels": a["in_channels"] * (2 if a["learned_variance"] else 1),
        "model_channels": a["channels"],
        "channel_mult": numbers(map(str, a["channel_mult"])),
        "num_res_blocks": a["num_res_blocks"],
        "attention_resolutions": numbers(map(str, resolutions)),
        "disable_self_attentions": None if a["self_attention"] else numbers(map(str, resolutions)),
        "encoder_dim": a["context_dim"],
        "encoder_channels": a["text_dim"] or a["context_dim"],
        "att_pool_heads": a["pool_heads"],
        "activation": a["activation"],
        "efficient_activation": is_scaled,
        "scale_skip_connection": is_scaled,
        "num_head_channels": a["head_dim"],
        **YML_FIXED,
    }


def _published(net: IFUNet) -> Config:
    """The arguments of a network of DeepFloyd IF's kind. WeightsError for another, such as Imagen's base."""
    a = if_arguments(net)
    if (a["text"], a["text_norm"]) != ("cross_attention", "group") or not a["context_dim"]:
        found = f"text={a['text']}, text_norm={a['text_norm']}, context_dim={a['context_dim']}"
        raise WeightsError(
            f"an IFUNet of {found} has no place in a published layout: only DeepFloyd IF's networks have"
        )
    return a
