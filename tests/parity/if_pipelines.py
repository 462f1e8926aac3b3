"""Small DeepFloyd IF pipelines of diffusers, all weights random, saved in both published layouts."""

import diffusers
import torch
import yaml

from tests.parity.pipelines import randomised
from tests.parity.test_if_unet import BASE, COMMON, ENLARGES
from tests.parity.transformer_pipelines import text_encoder, tokenizer

TEXT_WIDTH, HEAD_DIM = 64, 64  # the pooling has 64 heads, attention heads of 64 channels: what no shape tells
SYSTEMS = ("if_i_m", "if_ii_m")
WIDTHS = {"if_i_m": (32, 64), "if_ii_m": (32, 32, 64)}
BLOCKS = {"if_i_m": (1, 2), "if_ii_m": (1, 2, 1)}  # of each level, on the way down
ATTENDS = {"if_i_m": (False, True), "if_ii_m": (False, False, True)}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
CAP = {"if_i_m": 1.5, "if_ii_m": 1.0}


def unet(system):
    attends = ATTENDS[system]
    sizes = dict(
        sample_size=64,
        block_out_channels=WIDTHS[system],
        layers_per_block=list(BLOCKS[system]),
        down_block_types=["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        up_block_types=["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
        time_embedding_dim=max(WIDTHS[system]),
        encoder_hid_dim=TEXT_WIDTH,
        cross_attention_dim=96,
        attention_head_dim=HEAD_DIM,
        addition_embed_type_num_heads=64,
    )
    model = diffusers.UNet2DConditionModel(**COMMON | sizes | (BASE if system == "if_i_m" else ENLARGES))
    randomised(model, seed=len(system)).conv_out.weight.data *= 0.3  # else steps of a random network grow roundings
    return model


def scheduler(system, **knobs):
    return diffusers.DDPMScheduler(
        **COSINE, variance_type="learned_range", thresholding=True, dynamic_thresholding_ratio=0.95,
        sample_max_value=CAP[system], **knobs,
    )  # fmt: skip


def pipeline(system):
    """The pipeline that a stage is published as."""
    absent = dict.fromkeys(["safety_checker", "feature_extractor", "watermarker"])
    parts = tokenizer(), text_encoder(TEXT_WIDTH), unet(system), scheduler(system)
    if system == "if_i_m":
        pipe = diffusers.IFPipeline(*parts, **absent, requires_safety_checker=False)
    else:
        noising = diffusers.DDPMScheduler(**COSINE)
        pipe = diffusers.IFSuperResolutionPipeline(*parts, noising, **absent, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -------------------------------------------------------------------------------------------- the authors' own files

WHOLE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "aug_proj.0", "class_embedding.linear_2": "aug_proj.2",
    "add_embedding.norm1": "encoder_pooling.0", "add_embedding.pool": "encoder_pooling.1",
    "add_embedding.proj": "encoder_pooling.2", "add_embedding.norm2": "encoder_pooling.3",
    "encoder_hid_proj": "encoder_proj", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
PARTS = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection", "group_norm": "norm", "norm_cross": "norm_encoder",
    "to_out.0": "proj_out",
}  # fmt: skip


def blocks(model):
    """Their modules on the way down and up -> the numbers of the authors' blocks."""
    places, number = {}, 1
    for i, level in enumerate(model.down_blocks):
        for j in range(len(level.resnets)):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        places[f"down_blocks.{i}.downsamplers.0"] = f"input_blocks.{number}.0"
        number += 1
    number = 0
    for i, level in enumerate(model.up_blocks):
        for j in range(len(level.resnets)):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        places[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{number - 1}.{2 if hasattr(level, 'attentions') else 1}"
    return places


def authors(model):
    """The state of a U-Net as its authors store it: one table of q, k, v, head by head, as a convolution."""
    state, places, out = model.state_dict(), WHOLE | blocks(model), {}
    for key, tensor in state.items():
        module = max((name for name in places if key.startswith(f"{name}.")), key=len)
        rest = key.removeprefix(f"{module}.")
        fused = {"to_q": ("qkv", "qkv"), "add_k_proj": ("encoder_kv", "kv")}
        if (first := rest.partition(".")[0]) in fused:
            name, letters = fused[first]
            keys = [key.replace("to_q", f"to_{c}").replace("add_k_proj", f"add_{c}_proj") for c in letters]
            rows = [state[k].unflatten(0, (-1, HEAD_DIM)) for k in keys if k in state]  # each heads, their rows
            tensor, rest = torch.cat(rows, dim=1).flatten(0, 1), f"{name}.{rest.rpartition('.')[2]}"
        elif first in ("to_k", "to_v", "add_v_proj"):
            continue
        for theirs, ours in PARTS.items():
            rest = ours + rest.removeprefix(theirs) if rest.startswith(f"{theirs}.") else rest
        is_conv = rest in ("qkv.weight", "encoder_kv.weight", "proj_out.weight")
        out[f"{places[module]}.{rest}"] = tensor[..., None] if is_conv else tensor
    return out


def save_original(model, folder, system):
    """pytorch_model.bin and config.yml, as the authors publish a stage."""
    folder.mkdir()
    torch.save(authors(model), folder / "pytorch_model.bin")
    params = {
        "image_size": 64, "in_channels": model.config.in_channels, "out_channels": 6, "model_channels": 32,
        "num_head_channels": HEAD_DIM, "att_pool_heads": 64, "activation": "gelu", "use_scale_shift_norm": True,
        "resblock_updown": True, "scale_skip_connection": system != "if_i_m",
    }  # fmt: skip
    (folder / "config.yml").write_text(yaml.safe_dump({"params": params}))
