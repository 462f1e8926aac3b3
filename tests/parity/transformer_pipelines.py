"""Small DiT and PixArt pipelines of diffusers, all weights random, saved in both published layouts."""

import diffusers
import torch
import transformers

from tests.parity.pipelines import randomised, vae
from tests.test_t5_tokenizer import toy_vocabulary

GAPS = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
TEXT_WIDTH = 32
PIXART = {  # heads of 64 channels, as files without a config are read
    "pixart_256": {"sample_size": 32},
    "pixart_512": {"sample_size": 64},
    "pixart_1024": {"sample_size": 128},  # its file says no more: micro-conditions, interpolation 2
    "pixart_sigma_512": {"sample_size": 64, "interpolation_scale": 1, "use_additional_conditions": False},
    "pixart_sigma_1024": {"sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": False},
}
SYSTEMS = ("dit_xl2_256", "dit_xl2_512", *PIXART)


def dit(side):
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=64, num_layers=2, sample_size=side, out_channels=8
    )
    randomised(model, seed=side)
    for block in model.transformer_blocks:  # their embedders are copies of the first block's
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def pixart(system):
    sizes = {"num_attention_heads": 3, "attention_head_dim": 64, "num_layers": 2, "cross_attention_dim": 192}
    model = diffusers.PixArtTransformer2DModel(**sizes, caption_channels=TEXT_WIDTH, **PIXART[system])
    return randomised(model, seed=len(system))


def text_encoder(width=TEXT_WIDTH):
    config = transformers.T5Config(
        vocab_size=len(toy_vocabulary()) + len(GAPS),
        d_model=width,
        num_layers=2,
        num_heads=4,
        d_kv=8,
        d_ff=48,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    return randomised(transformers.T5EncoderModel(config), seed=5)


def tokenizer():
    return transformers.T5Tokenizer([*toy_vocabulary(), *GAPS])


def scheduler(name):
    kinds = {"ddim": diffusers.DDIMScheduler, "dpm": diffusers.DPMSolverMultistepScheduler}
    knobs = {"clip_sample": False} if name == "ddim" else {}
    return kinds[name](**LINEAR, **knobs)


def pipeline(system):
    """The pipeline that the system is published as."""
    autoencoder = vae("sdxl" if "sigma" in system else "sd15")
    if system.startswith("dit"):
        names = {0: "tench, Tinca tinca", 1: "cock", **{i: f"class {i}" for i in range(2, 1000)}}
        net = dit(8 if system == "dit_xl2_256" else 64)
        pipe = diffusers.DiTPipeline(net, autoencoder, scheduler("ddim"), id2label=names)
        # their constructor keeps the table for its own use alone; in published folders it is in the index
        pipe.register_to_config(id2label={str(i): name for i, name in names.items()})
    else:
        kind = diffusers.PixArtSigmaPipeline if "sigma" in system else diffusers.PixArtAlphaPipeline
        pipe = kind(tokenizer(), text_encoder(), autoencoder, pixart(system), scheduler("dpm"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -------------------------------------------------------------------------------------------- the authors' own files

SHARED = {
    "pos_embed.proj": "x_embedder.proj",
    "transformer_blocks": "blocks",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
DIT = SHARED | {
    "norm1.linear": "adaLN_modulation.1",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
    "blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "blocks.0.norm1.emb.class_embedder": "y_embedder",
}
ALPHA = SHARED | {
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
    "adaln_single.emb.resolution_embedder.linear_2": "csize_embedder.mlp.2",
    "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
    "adaln_single.emb.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_": "y_embedder.y_proj.fc",
    "proj_out": "final_layer.linear",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
}
FUSED = {"attn1.to_": ("qkv", "attn.qkv"), "attn2.to_": ("kv", "cross_attn.kv_linear")}


def authors(model):
    """The state of a transformer as its authors store it."""
    is_dit = isinstance(model, diffusers.DiTTransformer2DModel)
    state, out = model.state_dict(), {}
    for key, tensor in state.items():
        name = key
        for theirs, parts in FUSED.items():
            letters, ours = parts
            head, found, tail = key.partition(theirs)
            if found and tail[0] in letters:
                tensor = torch.cat([state[f"{head}{theirs}{letter}{tail[1:]}"] for letter in letters])
                name = f"{head}{ours}{tail[1:]}"
        for theirs, ours in (DIT if is_dit else ALPHA).items():
            name = name.replace(theirs, ours)
        name = "final_layer.scale_shift_table" if name == "scale_shift_table" else name
        if "norm1.emb" not in name:  # the copies of the other blocks
            out[name] = tensor
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    side, width = model.config.sample_size // 2, model.config.num_attention_heads * model.config.attention_head_dim
    scale = 1 if is_dit else model.pos_embed.interpolation_scale
    table = get_2d_sincos_pos_embed(width, side, base_size=side, interpolation_scale=scale, output_type="pt")
    return out | {"pos_embed": table[None].float()}


def save_original(model, path, length=120):
    """As its authors do: DiT alone, PixArt in a table beside others, with its caption of training without text."""
    state = authors(model)
    if isinstance(model, diffusers.DiTTransformer2DModel):
        return torch.save(state, path)
    state["y_embedder.y_embedding"] = torch.randn(length, TEXT_WIDTH)
    torch.save({"state_dict": state, "epoch": 3}, path)
