"""What a file of weights is, from the names and shapes in it: its parts, and what it looks like in words."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ldm.weights.formats import Shapes
from ldm.weights.ledger import listing
from ldm.weights.places import PREFIXES

BARE = {  # one component alone, without a prefix: a key that only it has -> its folder, kind and layout
    "output_blocks.0.0.in_layers.0.weight": ("unet", "unet", "original"),
    "up_blocks.0.resnets.0.norm1.weight": ("unet", "unet", "diffusers"),
    "encoder_pooling.0.weight": ("unet", "if", "original"),  # which has the key of another UNet too
    "add_embedding.pool.positional_embedding": ("unet", "if", "diffusers"),
    "encoder.down.0.block.0.norm1.weight": ("vae", "vae", "original"),
    "encoder.down_blocks.0.resnets.0.norm1.weight": ("vae", "vae", "diffusers"),
    "text_model.final_layer_norm.weight": ("text_encoder", "clip_text", "original"),
    "final_layer_norm.weight": ("text_encoder", "clip_text", "original"),  # as transformers 5 saves it
    "vision_model.post_layernorm.weight": ("image_encoder", "clip_vision", "diffusers"),
    "ln_final.weight": ("text_encoder_2", "clip_text", "open_clip"),
    "visual.ln_post.weight": ("image_encoder", "clip_vision", "open_clip"),  # OpenCLIP's files hold both towers
    "y_embedder.embedding_table.weight": ("transformer", "dit", "original"),
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": ("transformer", "dit", "diffusers"),
    "y_embedder.y_proj.fc1.weight": ("transformer", "pixart", "original"),
    "caption_projection.linear_1.weight": ("transformer", "pixart", "diffusers"),
    "encoder.final_layer_norm.weight": ("text_encoder", "t5", "original"),
    "input_hint_block.0.weight": ("controlnet", "controlnet", "original"),
    "controlnet_cond_embedding.conv_in.weight": ("controlnet", "controlnet", "diffusers"),
    "body.0.block1.weight": ("t2i_adapter", "t2i_adapter", "original"),
    "body.0.body.0.block1.weight": ("t2i_adapter", "t2i_adapter", "original"),  # a light one
    "adapter.body.0.resnets.0.block1.weight": ("t2i_adapter", "t2i_adapter", "diffusers"),
}
EMA = "model_ema."
BESIDE = "ema."  # before the averaged weights of one network, where a training checkpoint has both (`ldm.io.inert`)
SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
MARKERS = {"v_pred": ("prediction", "v"), "ztsnr": ("zero_terminal_snr", True)}  # empty tensors of community files
EXTRAS = {  # known, and of no use here
    *SCHEDULE, *MARKERS, "logvar", "lvlb_weights", "scale_factor", "denoiser.sigmas",
    "cond_stage_model.logit_scale", "cond_stage_model.text_projection",
    "conditioner.embedders.0.logit_scale", "conditioner.embedders.0.text_projection", "spiece_model",
}  # fmt: skip
TRAINING = ("loss.",)  # an autoencoder's discriminator and perceptual network
LOOKS: dict[str, str] = {  # a piece of a key -> what has such keys; the first row that matches
    r"lora_(up|down|A|B|unet|te)|\.lora[._]|lora_layer|hada_w|lokr_w|oft_": "a LoRA, to be put in a base (lora=FILE)",
    r"^ip_adapter\.|^image_proj\.": "an IP-Adapter, an addition to a base model",
    r"control_model\.|controlnet_|input_hint_block": "a ControlNet, to be put beside a base (controlnet=FILE)",
    r"^(adapter\.)?body\.\d+\.": "a T2I-Adapter, to be put beside a base (t2i_adapter=FILE)",
    r"^emb_params|^string_to_(param|token)|^clip_[lg]$|^<.*>$": "a textual-inversion embedding",
    r"joint_blocks\.": "a Stable Diffusion 3 transformer",
    r"double_blocks\.|single_transformer_blocks\.": "a FLUX transformer",
    r"^(ema\.)?y_embedder\.embedding_table|class_embedder\.embedding_table": "a DiT or a SiT",
    r"^(ema\.)?y_embedder\.y_proj|^caption_projection\.linear_1": "a PixArt",
    r"adaLN_modulation|adaln_single": "a diffusion transformer",
    r"^unet\.|^denoiser\.net\.": "a training run of ours or another's",
    r"^encoder_pooling\.|^add_embedding\.pool": "a U-Net of DeepFloyd IF",
    r"resblocks\.|text_model\.|vision_model\.": "a CLIP encoder",
    r"^encoder\.block\.0\.layer\.": "a T5 encoder",
}
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "SDXL refiner"}  # by text width
WORDS = {
    "transformer": "a diffusion transformer",
    "vae": "an autoencoder",
    "text_encoder": "a text encoder",
    "text_encoder_2": "a text encoder",
    "image_encoder": "an image encoder",
    "controlnet": "a ControlNet",
    "t2i_adapter": "a T2I-Adapter",
}


class Part(NamedTuple):
    """The tensors of one component in a file: their names in its layout -> in the file."""

    kind: str  # of `components.COMPONENTS`
    layout: str  # original | diffusers | open_clip
    names: dict[str, str]


def find_parts(keys: Iterable[str], *, ema: bool) -> tuple[dict[str, Part], list[str]]:
    """Components in a file, and the keys that belong to none and are not known extras.

    ema: the averaged weights of the network, where a training checkpoint holds them beside the others.
    """
    keys = set(keys)
    if averaged := {key for key in keys if key.startswith(BESIDE)}:
        return _beside(averaged, keys - averaged, ema)
    if parts := _bare_parts(keys):
        used = {key for part in parts.values() for key in part.names}
        return parts, sorted(key for key in keys - used if not _is_extra(key))
    rest, places = [], {}
    for key in sorted(keys):
        place = next((place for prefix, place in PREFIXES.items() if key.startswith(prefix)), None)
        if place and places.setdefault(place.folder, place) == place:  # a second one of its kind is of no use
            part = parts.setdefault(place.folder, Part(place.kind, place.layout, {}))
            part.names[key.removeprefix(place.prefix)] = key
        elif not _is_extra(key):
            rest.append(key)
    averaged = {name for name in keys if name.startswith(EMA)}
    if "unet" in parts and ema and averaged:
        names = {name: EMA + f"diffusion_model.{name}".replace(".", "") for name in parts["unet"].names}
        lost = averaged - set(names.values()) - {f"{EMA}decay", f"{EMA}num_updates"}
        parts["unet"] = Part("unet", "original", names)
        rest += sorted(lost)
    return parts, rest if parts else sorted(keys)


def _beside(averaged: set[str], others: set[str], ema: bool) -> tuple[dict[str, Part], list[str]]:
    """`find_parts` among the averaged weights of a training checkpoint, or among the others."""
    if not ema and others:
        return find_parts(others, ema=False)
    parts, rest = find_parts({key.removeprefix(BESIDE) for key in averaged}, ema=False)
    named = {
        name: part._replace(names={their: BESIDE + key for their, key in part.names.items()})
        for name, part in parts.items()
    }
    return named, [BESIDE + key for key in rest]


def _bare_parts(keys: set[str]) -> dict[str, Part]:
    """Components in a file without prefixes: one, or the two towers of OpenCLIP."""
    parts = {}
    for marker, (component, kind, layout) in BARE.items():
        if marker in keys:
            tower = {key for key in keys if key.startswith("visual.") == marker.startswith("visual.")}
            extras = {key for key in tower if layout == "original" and _is_extra(key)}
            parts[component] = Part(kind, layout, {key: key for key in tower - extras})
    return parts


def _is_extra(key: str) -> bool:
    return key in EXTRAS or key.startswith((EMA, *TRAINING))


def looks_like(shapes: Shapes) -> str:
    """What a table of tensors seems to be, in words for an error message."""
    parts, _ = find_parts(shapes, ema=False)
    for pattern, words in LOOKS.items():
        if len(parts) < 2 and any(re.search(pattern, key) for key in shapes):  # a whole system has CLIP's keys too
            return words
    if not parts:
        return f"nothing known: {listing(sorted(shapes))} tensors" if shapes else "an empty file"
    if "unet" not in parts:
        return " and ".join(WORDS.get(name, f"a {name}") for name in parts)
    words = describe_unet({name: shapes[key] for name, key in parts["unet"].names.items()})
    return f"a checkpoint of {words}" if len(parts) > 1 else f"a UNet of {words}"


def describe_unet(shapes: Shapes) -> str:
    """The published family a UNet's text width belongs to, and what its input holds; either layout."""
    width = _second(shapes, lambda key: key.endswith("attn2.to_k.weight"))
    channels = _second(shapes, lambda key: key in ("input_blocks.0.0.weight", "conv_in.weight"))
    words = FAMILIES.get(width, f"text width {width}")
    return words + {9: " for inpainting", 8: " for editing", 5: " with depth"}.get(channels, "")


def _second(shapes: Shapes, wanted: Callable[[str], bool]) -> int | None:
    """The second axis of the first tensor that is wanted: channels coming in."""
    return next((shape[1] for key, shape in shapes.items() if wanted(key) and len(shape) > 1), None)
