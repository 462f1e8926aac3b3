"""What a file of weights looks like, in words for people: what it is for, or what it is if nothing here reads it."""

from collections.abc import Callable, Iterable

from ldm.weights.controlnet import OTHERS
from ldm.weights.formats import Shapes
from ldm.weights.ledger import first_row, listing
from ldm.weights.parts import find_parts

ADDITIONS: dict[str, str] = {  # a piece of a key -> what has such keys; the first row that matches
    **{key: OTHERS[key] for key in (r"^difference$", r"^lora_controlnet$")},
    r"lora_(up|down|A|B|unet|te)|\.lora[._]|lora_layer|hada_w|lokr_w|oft_": "a LoRA, to be put in a base (lora=FILE)",
    r"^ip_adapter\.|^image_proj\.": "an IP-Adapter, an addition to a base model",
    r"control_model\.|controlnet_|input_hint_block": "a ControlNet, to be put beside a base (controlnet=FILE)",
    r"^(adapter\.)?body\.\d+\.": "a T2I-Adapter, to be put beside a base (t2i_adapter=FILE)",
    r"^emb_params|^string_to_(param|token)|^clip_[lg]$|^<.*>$": "a textual-inversion embedding",
}
LOOKS: dict[str, str] = {  # the same, of what is read here
    r"^(ema\.)?y_embedder\.embedding_table|class_embedder\.embedding_table": "a DiT or a SiT",
    r"^(ema\.)?y_embedder\.y_proj|^caption_projection\.linear_1": "a PixArt",
    r"adaLN_modulation|adaln_single": "a diffusion transformer",
    r"^unet\.|^denoiser\.net\.": "a training run of ours or another's",
    r"^encoder_pooling\.|^add_embedding\.pool": "a U-Net of DeepFloyd IF",
    r"resblocks\.|text_model\.|vision_model\.": "a CLIP encoder",
    r"^encoder\.block\.0\.layer\.": "a T5 encoder",
}
STRANGERS: dict[str, str] = {  # the same, of what nothing here reads: kinds of storage, then systems, then others
    r"scaled_fp8$|\.scale_weight$|\.weight_scale$|\.scale_input$": "weights in scaled fp8, whose scales are not read "
    "here; get the fp16 or bf16 file",
    r"\.quant_state\.bitsandbytes|\.absmax$|\.quant_map$|\.SCB$": "weights quantised by bitsandbytes; get the fp16 or "
    "bf16 file",
    r"\.qweight$|\.qzeros$|\.wscales$|\._data$|\.weight_qdata$|_packed_params": "quantised weights (GPTQ, AWQ, quanto "
    "or torchao); get the fp16 or bf16 file",
    r"cond_proj\.weight$": "a UNet of a latent consistency model (LCM), which is told its guidance "
    "(time_cond_proj_dim); take the LCM-LoRA of its base instead",
    r"^edm_(mean|std)$": "Playground v2.5, an SDXL of the EDM formulation",
    r"^edm_vpred\.": "CosXL, an SDXL of the EDM formulation",
    r"motion_modules\.|motion_module\.": "a motion module of AnimateDiff",
    r"time_stack\.|time_mixer|temporal_transformer_blocks|temporal_res_block": "Stable Video Diffusion",
    r"clip_txt(_pooled)?_mapper\.|^effnet_mapper\.|^clip_mapper\.|vquantizer\.codebook": "Stable Cascade",
    r"distilled_guidance_layer\.": "Chroma",
    r"single_transformer_blocks\..*attn\.norm_added|double_blocks\.\d+\.img_attn_qkv": "HunyuanVideo",
    r"double_blocks\.|single_transformer_blocks\.": "a FLUX transformer",
    r"double_layers\.|joint_transformer_blocks\.": "AuraFlow",
    r"joint_blocks\.|transformer_blocks\.\d+\.attn\.add_q_proj": "a Stable Diffusion 3 transformer",
    r"transformer_blocks\.\d+\.img_mod\.": "Qwen-Image",
    r"default_modulation\.|mlp_t5\.|text_embedding_padding|time_extra_emb\.": "Hunyuan-DiT",
    r"add_embedding\.image_(norm|proj)|encoder_hid_proj\.image_embeds|ln_model_n\.|prd_embedding": "Kandinsky 2",
    r"noise_refiner\.|cap_embedder\.": "Lumina",
    r"(glumb_conv|mlp|ff)\.(inverted_conv|conv_inverted)\.": "Sana",
    r"patchify_proj\.|scale_shift_table_a2v": "LTX-Video",
    r"text_embedding\.0\.weight$|head\.modulation$|condition_embedder\.text_embedder": "Wan",
    r"patch_embed\.text_proj\.": "CogVideoX",
    r"t5_y_embedder\.|t5_yproj\.": "Mochi",
    r"^concept_embeds|^special_care_embeds": "a safety checker",
    r"quantize\.embedding\.weight|quantize\.embed$": "an autoencoder with a codebook (VQ)",
    r"^(taesd_)?(encoder|decoder)\.(layers\.)?\d+\.(conv\.)?\d*\.?(weight|bias)$": "a tiny autoencoder (TAESD)",
    r"RDB\d|^conv_first\.|^body\.\d+\.rdb\d": "an upscaler of ESRGAN's kind",
    r"^(model\.)?layers\.\d+\.self_attn\.|embeddings\.word_embeddings": "a language model",
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
CLASSES = {  # the beginning of a class in config.json or model_index.json -> the system that nothing here draws
    "SD3": "Stable Diffusion 3", "StableDiffusion3": "Stable Diffusion 3", "Flux": "FLUX", "AuraFlow": "AuraFlow",
    "StableCascade": "Stable Cascade", "Wuerstchen": "Wuerstchen", "Paella": "Wuerstchen",
    "HunyuanDiT": "Hunyuan-DiT", "HunyuanVideo": "HunyuanVideo", "Kandinsky": "Kandinsky", "Prior": "Kandinsky",
    "UNetSpatioTemporal": "Stable Video Diffusion", "StableVideo": "Stable Video Diffusion", "UNet3D": "a video model",
    "UNetMotion": "AnimateDiff", "AnimateDiff": "AnimateDiff", "MotionAdapter": "AnimateDiff", "Lumina": "Lumina",
    "Sana": "Sana", "LTX": "LTX-Video", "Wan": "Wan", "CogVideo": "CogVideoX", "CogView": "CogView",
    "Mochi": "Mochi", "Chroma": "Chroma", "QwenImage": "Qwen-Image", "AutoencoderTiny": "a tiny autoencoder (TAESD)",
    "VQModel": "an autoencoder with a codebook (VQ)", "ConsistencyDecoder": "a consistency decoder",
    "LatentConsistency": "a latent consistency model", "OmniGen": "OmniGen", "Cosmos": "Cosmos", "ZImage": "Z-Image",
    "UVit": "aMUSEd", "Amused": "aMUSEd",
}  # fmt: skip


def looks_like(shapes: Shapes) -> str:
    """What a table of tensors seems to be, in words for an error message."""
    parts = find_parts(shapes, ema=False).parts
    is_system = len(parts) > 1  # which has CLIP's keys too
    if words := (not is_system and first_row(ADDITIONS, shapes)) or stranger(shapes):
        return words
    if words := not is_system and first_row(LOOKS, shapes):
        return words
    if not parts:
        return f"nothing known: {listing(sorted(shapes))} tensors" if shapes else "an empty file"
    if "unet" not in parts:
        return " and ".join(WORDS.get(name, f"a {name}") for name in parts)
    words = describe_unet({name: shapes[key] for name, key in parts["unet"].names.items() if key in shapes})
    return f"a checkpoint of {words}" if is_system else f"a UNet of {words}"


def stranger(keys: Iterable[str]) -> str | None:
    """What nothing here reads and these names are of; None for what may be known."""
    return first_row(STRANGERS, keys)


def class_words(name: str) -> str:
    """A class of another program, with the system that it is of where that is known."""
    system = next((words for start, words in CLASSES.items() if name.startswith(start)), None)
    return f"{name}, which is {system}" if system else name


def describe_unet(shapes: Shapes) -> str:
    """The published family a UNet's text width belongs to, and what its input holds; either layout."""
    width = _second(shapes, lambda key: key.endswith("attn2.to_k.weight"))
    channels = _second(shapes, lambda key: key in ("input_blocks.0.0.weight", "conv_in.weight"))
    words = FAMILIES.get(width, f"text width {width}" if width else "no text")
    return words + {9: " for inpainting", 8: " for editing", 5: " with depth"}.get(channels, "")


def _second(shapes: Shapes, wanted: Callable[[str], bool]) -> int | None:
    """The second axis of the first tensor that is wanted: channels coming in."""
    return next((shape[1] for key, shape in shapes.items() if wanted(key) and len(shape) > 1), None)
