"""Small pipelines of diffusers, one per published system, all weights random, saved in both published layouts.

Sizes follow the rules by which files without a config are read: 8 heads where projections are convolutions, heads of
64 channels elsewhere, 32 groups in every norm. Latents are 8 times smaller than images, as those of the real ones.
"""

import json
from pathlib import Path

import diffusers
import torch
import transformers

from ldm.io.tensors import read_tensors, write_tensors
from ldm.models import codec
from ldm.weights import autoencoder, load_model
from ldm.weights import unet as unets
from tests.test_clip import toy_vocabulary

DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
WIDTHS = {"clip_l": 128, "clip_h": 64, "clip_g": 192}  # heads of 64 channels, as the real ones have
CONTEXT = {"sd15": 128, "sd21": 64, "sdxl": 320, "sdxl_refiner": 192}
DEFAULT = {"sd15": "pndm", "sd21": "ddim", "sdxl": "euler", "sdxl_refiner": "euler"}  # the published schedulers
SYSTEMS = ("sd15", "sd15_inpaint", "sd21", "sd21_zero_snr", "sd21_base", "sdxl", "sdxl_inpaint", "sdxl_refiner")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def family(system: str) -> str:
    return system.removesuffix("_inpaint").removesuffix("_base").removesuffix("_zero_snr")


@torch.no_grad()
def randomised(module, seed=0):
    """Every parameter drawn anew, also those that begin as zeros or ones; all of a size that matters."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if p.ndim > 1:  # embeddings large enough for words to differ, layers that keep the variance
            p.copy_(noise * (0.5 if "embedding" in name and "linear" not in name else p[0].numel() ** -0.5))
        else:
            p.copy_(0.2 * noise + name.endswith("weight"))
    return module.eval()


def watched(monkeypatch):
    """What our side decodes, and then what it rounds to bytes, in a list that fills as it draws."""
    seen, decode, rounded = [], codec.LatentCodec.decode, codec.to_uint8
    monkeypatch.setattr(codec.LatentCodec, "decode", lambda self, x: (seen.append(x), decode(self, x))[1])
    monkeypatch.setattr(codec, "to_uint8", lambda x: (seen.append(x), rounded(x))[1])
    return seen


def tokenizer(pad="<|endoftext|>"):
    vocab, merges = toy_vocabulary()
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad)


def text_encoder(name):
    width, projected = WIDTHS[name], name == "clip_g"
    vocab = len(toy_vocabulary()[0])
    config = transformers.CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=width // 64,
        projection_dim=width,
        hidden_act="quick_gelu" if name == "clip_l" else "gelu",
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1 if name == "clip_l" else 0,
    )
    model = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return randomised(model(config), seed=len(name) + width)


def unet(system):
    kind = family(system)
    widths, attends, depth, heads = {
        "sd15": ((32, 64, 64, 64), (1, 1, 1, 0), 1, 8),
        "sd21": ((64, 64, 128, 128), (1, 1, 1, 0), 1, [1, 1, 2, 2]),
        "sdxl": ((64, 64, 128), (0, 1, 1), [1, 1, 2], [1, 1, 2]),  # depth 2 in the last level and the middle
        "sdxl_refiner": ((64, 64, 128, 128), (0, 1, 1, 0), 1, [1, 1, 2, 2]),
    }[kind]
    numbers = {"sdxl": 6, "sdxl_refiner": 5}.get(kind, 0)
    vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": WIDTHS["clip_g"] + numbers * 256,
    }
    model = diffusers.UNet2DConditionModel(
        in_channels=9 if system.endswith("inpaint") else 4,
        out_channels=4,
        sample_size=8,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=[DOWN[bool(a)] for a in attends],
        up_block_types=[UP[bool(a)] for a in reversed(attends)],
        attention_head_dim=heads,
        transformer_layers_per_block=depth,
        cross_attention_dim=CONTEXT[kind],
        use_linear_projection=kind != "sd15",
        **(vector if numbers else {}),
    )
    return randomised(model, seed=2)


def vae(system):
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=32,
        sample_size=64,
        scaling_factor=0.13025 if "sdxl" in system else 0.18215,
        force_upcast="sdxl" in system,
    )
    model = randomised(model, seed=3)
    # A posterior of standard deviation about 0.5: a draw that is left out or doubled shows.
    model.quant_conv.weight.data[4:] *= 0.2
    model.quant_conv.bias.data[4:] = -1.4
    return model


def scheduler(name, system="sd15"):
    """As the published scheduler_config.json have them; "zero_snr" as arXiv:2305.08891 asks."""
    prediction = "v_prediction" if system in ("sd21", "sd21_zero_snr") else "epsilon"
    common = BETAS | {"prediction_type": prediction}
    return {
        "pndm": lambda: diffusers.PNDMScheduler(**common, skip_prk_steps=True, set_alpha_to_one=False),
        "ddim": lambda: diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=False),
        "euler": lambda: diffusers.EulerDiscreteScheduler(**common, timestep_spacing="leading"),
        "euler_trailing": lambda: diffusers.EulerDiscreteScheduler(**common, timestep_spacing="trailing"),
        "euler_ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**common, timestep_spacing="leading"),
        "dpm_karras": lambda: diffusers.DPMSolverMultistepScheduler(**common, use_karras_sigmas=True),
        "zero_snr": lambda: diffusers.DDIMScheduler(
            **common,
            clip_sample=False,
            set_alpha_to_one=False,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        ),
    }[name]()


def parts(system):
    kind = family(system)
    default = "zero_snr" if system.endswith("zero_snr") else DEFAULT[kind]
    networks = {"unet": unet(system), "vae": vae(system), "scheduler": scheduler(default, system)}
    if kind in ("sd15", "sd21"):
        name, pad = {"sd15": ("clip_l", "<|endoftext|>"), "sd21": ("clip_h", "!")}[kind]
        return networks | {"text_encoder": text_encoder(name), "tokenizer": tokenizer(pad)}
    first = {"text_encoder": None, "tokenizer": None}
    if kind == "sdxl":
        first = {"text_encoder": text_encoder("clip_l"), "tokenizer": tokenizer()}
    return networks | first | {"text_encoder_2": text_encoder("clip_g"), "tokenizer_2": tokenizer("!")}


TASKS = {"text": "", "image": "Img2Img", "inpaint": "Inpaint"}


def pipeline(system):
    """The pipeline that the system is published as."""
    task = "inpaint" if system.endswith("inpaint") else "image" if system == "sdxl_refiner" else "text"
    knobs = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if "sdxl" in system:
        is_refiner = system == "sdxl_refiner"
        knobs = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False} if is_refiner else {}
    pipe = pipeline_class(system, task)(**parts(system), **knobs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_class(system, task):
    xl = "XL" if "sdxl" in system else ""
    return getattr(diffusers, f"StableDiffusion{xl}{TASKS[task]}Pipeline")


def turned(pipe, system, task):
    """The same networks in the pipeline of another task."""
    other = pipeline_class(system, task).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other


def save_folder(pipe, folder: Path) -> None:
    """As `save_pretrained` of today; SD 1.5 with the names and the vocabulary files of the published folder."""
    pipe.save_pretrained(folder)
    if system_of(pipe) == "sd15":
        file = folder / "text_encoder" / "model.safetensors"
        write_tensors(file, {f"text_model.{key}": tensor for key, tensor in read_tensors(file).items()})
        (folder / "tokenizer" / "tokenizer.json").unlink()
        save_vocabulary(folder / "tokenizer")


def save_vocabulary(folder: Path) -> None:
    vocab, merges = toy_vocabulary()
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")


def system_of(pipe) -> str:
    """The family of a pipeline, by the width of its text."""
    return next(kind for kind, dim in CONTEXT.items() if dim == pipe.unet.config.cross_attention_dim)


# ------------------------------------------------------------------------------------------------ the original layout

LEGACY = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
LEGACY |= {"self_attn.out_proj": "attn.out_proj"}
TEXT_PARTS = {  # family -> {component: prefix in the single file}
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
    "sd21": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sdxl_refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}


def save_original(pipe, folder: Path, dst: Path) -> None:
    """The networks of a pipeline, saved in `folder`, in one file as the original programs write it, extras included."""
    states = {
        "model.diffusion_model.": unets.to_original(load_model(folder / "unet").state_dict()),
        "first_stage_model.": autoencoder.to_original(load_model(folder / "vae").state_dict()),
    }
    for part, prefix in TEXT_PARTS[system_of(pipe)].items():
        state = {"text_model." + k.removeprefix("text_model."): v for k, v in getattr(pipe, part).state_dict().items()}
        is_open = not prefix.endswith("transformer.")
        states[prefix] = open_clip(state) if is_open else state | {POSITION_IDS: torch.arange(77)[None]}
    file = {prefix + key: tensor for prefix, state in states.items() for key, tensor in state.items()}
    if pipe.scheduler.config.get("rescale_betas_zero_snr"):
        file |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}  # how single files say so
    file["alphas_cumprod"] = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
    write_tensors(dst, {key: tensor.contiguous() for key, tensor in file.items()})


POSITION_IDS = "text_model.embeddings.position_ids"


def open_clip(state):
    """The text tower of transformers under OpenCLIP's names; SD 2's gets the block and projection it never uses."""
    out = {"logit_scale": torch.tensor(4.6)}
    for key, tensor in state.items():
        key = key.removeprefix("text_model.").replace("text_projection.weight", "text_projection")
        key = key.replace("embeddings.token_embedding", "token_embedding").replace("final_layer_norm", "ln_final")
        key = key.replace("embeddings.position_embedding.weight", "positional_embedding")
        key = key.replace("encoder.layers", "transformer.resblocks")
        for theirs, legacy in LEGACY.items():
            key = key.replace(theirs, legacy)
        if ".self_attn.k_proj" in key or ".self_attn.v_proj" in key:
            continue
        if ".self_attn.q_proj" in key:  # fused
            layer, kind = key.split(".self_attn.q_proj.")
            source = layer.replace("transformer.resblocks", "text_model.encoder.layers")
            tensor = torch.cat([state[f"{source}.self_attn.{n}_proj.{kind}"] for n in "qkv"])
            key = f"{layer}.attn.in_proj_{kind}"
        out[key] = tensor.t() if key == "text_projection" else tensor
    if "text_projection" not in out:  # SD 2.x
        width = out["ln_final.weight"].numel()
        last = max(int(key.split(".")[2]) for key in out if key.startswith("transformer."))
        block = {k.replace(f".{last}.", f".{last + 1}."): v for k, v in out.items() if f"resblocks.{last}." in k}
        out |= block | {"text_projection": torch.eye(width)}
    return out
