"""The components in a file of weights, from the names in it, whatever trainers wrapped them in or left beside them."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

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
WRAPPED = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|module|_forward_module|_fsdp_wrapped_module"
                     r"|_checkpoint_wrapped_module)\.")  # fmt: skip  # torch.compile, DDP, DeepSpeed, FSDP
OUTER = re.compile(r"(?:[A-Za-z_]\w*\.){1,4}")  # what trainers put before the names of a network
EMA = "model_ema."  # before averaged weights in CompVis' files, their names without dots
COUNTS = ("model_ema.decay", "model_ema.num_updates")  # alone in files whose averages have become the weights
UNDOTTED = re.compile(
    r"(diffusion_model|(?:input|output|transformer)_blocks|middle_block|time_embed|label_emb|(?:in|out|emb)_layers"
    r"|skip_connection|attn\d|to_[qkv]|to_out|norm\d?|proj_in|proj_out|proj|ff|net|op|conv|out|\d)(?=.)"
)  # words of a UNet's names, in which averages have lost the dots
MAX_AVERAGED, MAX_UNDOTTED = 5_000, 128  # averages of one UNet, and characters of a name: no published one has more
MAX_OUTER = 8  # different beginnings of names in one file
BESIDE = ("ema.", "ema_model.", "params_ema.")  # before those of one network, beside or instead of the others
VISION = ("visual.", "vision_model.", "visual_projection.")  # the tower of CLIP that sees
SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
MARKERS = {"v_pred": ("prediction", "v"), "ztsnr": ("zero_terminal_snr", True)}  # empty tensors of community files
EXTRAS = {  # known, and of no use here
    *SCHEDULE, *MARKERS, "logvar", "lvlb_weights", "scale_factor", "denoiser.sigmas", "spiece_model",
    "input_resolution", "context_length", "vocab_size",
}  # fmt: skip
LEFTOVERS = re.compile(
    r"^(?:first_stage_model\.)?(?:loss|model_ema|discriminator|perceptual_loss|lpips)\.|^embedding_manager\."
    r"|^(?:optimizers?|optimizer_states?|optimizer_state_dict|opt|optim|lr_schedulers?|scheduler|scaler|grad_scaler"
    r"|callbacks|loops|hyper_parameters|hparams|args|epoch|step|global_step|n_averaged|initted|rng_states?"
    r"|random_states?|loss_scaler|native_amp_scaling_state)(?:\.|$)|^ddim_\w+$|^model\.lvlb_weights$"
    r"|^(?:cond_stage_model|conditioner\.embedders\.\d+)\.(?:(?:\w+\.)*visual\.|(?:\w+\.)*vision_model\."
    r"|(?:\w+\.)*visual_projection\.|logit_scale$|text_projection$)"
)  # of training: losses, optimizers, counters; and of CLIP what only its other tower needs


class Part(NamedTuple):
    """The tensors of one component in a file: their names in its layout -> in the file."""

    kind: str  # of `components.COMPONENTS`
    layout: str  # original | diffusers | open_clip
    names: dict[str, str]


class Found(NamedTuple):
    """What the names in a file tell."""

    parts: dict[str, Part]
    unknown: list[str]  # names that belong to no part and are no known extras
    averages: str = ""  # where there are averaged weights: which are used, and how to choose the others


USED = "averaged weights are used, not the others beside them (averaged=false)"
OWN = "its own weights are used, not the averaged ones beside them (averaged=true)"
ONLY = "its weights are averages only, which are used"


def find_parts(keys: Iterable[str], *, ema: bool | None) -> Found:
    """Components in a file.

    ema: the averaged weights where there are others too; None: those of a trainer's table of averages, but of a single
    file its own, since a merge keeps the averages of one of its parents.
    """
    keys = list(keys)
    real = {WRAPPED.sub("", key): key for key in keys}
    if len(real) < len(keys):  # wrapped and bare under one name: none of them goes before the other
        real = {key: key for key in keys}
    beside = {key for key in real if key.startswith(BESIDE)}
    parts, unknown, averages = _beside(beside, real.keys() - beside, ema) if beside else _find(real.keys(), ema)
    named = {
        name: part._replace(names={their: real.get(key, key) for their, key in part.names.items()})
        for name, part in parts.items()
    }
    return Found(named, sorted(real[key] for key in unknown), averages)


def _beside(averaged: set[str], others: set[str], ema: bool | None) -> Found:
    """Among the averaged weights of a training checkpoint, or among the others."""
    own = _find(others, False)
    if ema is False and own.parts:
        return own._replace(averages=OWN)
    prefix = next(prefix for prefix in BESIDE if any(key.startswith(prefix) for key in averaged))
    parts, unknown, _ = _find({key.removeprefix(prefix) for key in averaged if key.startswith(prefix)}, False)
    named = {
        name: part._replace(names={their: prefix + key for their, key in part.names.items()})
        for name, part in parts.items()
    }
    left = [prefix + key for key in unknown] + (own.unknown if parts else [])
    return Found(named, left, USED if own.parts else ONLY)


def _find(keys: Iterable[str], ema: bool | None) -> Found:
    keys = set(keys)
    kept = {key for key in keys if not _is_extra(key)}
    averaged = {_undotted(key): key for key in keys if key.startswith(EMA) and key not in COUNTS}
    parts = _bare_parts(kept, "") or _placed_parts(kept) or _outer_parts(kept)
    used = {key for part in parts.values() for key in part.names.values()}
    found = Found(parts, sorted(kept - used))
    if "unet" not in parts and 0 < len(averaged) <= MAX_AVERAGED:
        names = {_dotted(key): key for key in averaged.values() if len(key) < MAX_UNDOTTED}
        only = _placed_parts(names)
        named = {name: part._replace(names={their: names[key] for their, key in part.names.items()})
                 for name, part in only.items()}  # fmt: skip
        return found._replace(parts=parts | named, averages=ONLY if named else "")
    return _choose(found, averaged, ema) if averaged and parts else found


def _choose(found: Found, averaged: Mapping[str, str], ema: bool | None) -> Found:
    """The parts with averaged weights in place of their own, where that is asked for."""
    theirs = {name: {their: _undotted(EMA + key.removeprefix("model.")) for their, key in part.names.items()}
              for name, part in found.parts.items()}  # fmt: skip
    both = [name for name, names in theirs.items() if averaged.keys() & names.values()]
    if not both or not ema:
        return found._replace(averages=OWN if both else "")
    parts = dict(found.parts)
    for name in both:
        names = {their: averaged.get(key, key) for their, key in theirs[name].items()}
        parts[name] = parts[name]._replace(names=names)
    used = {key for name in both for key in parts[name].names.values()}
    return Found(parts, sorted({*found.unknown, *averaged.values()} - used), USED)


def _undotted(key: str) -> str:
    """The name of an average, without what a network was wrapped in when its averages were named."""
    rest = key.removeprefix(EMA).replace(".", "")
    return EMA + re.sub(r"_orig_mod|_fsdp_wrapped_module|module", "", rest)


def _dotted(key: str) -> str:
    """The name in a UNet of the weights of which these are the averages."""
    dotted = UNDOTTED.sub(r"\1.", key.removeprefix(EMA))
    return "model." + re.sub(r"(?<=put_blocks\.)1\.([01])\.(?=\d)", r"1\1.", dotted)  # a number of two digits


def _bare_parts(keys: Iterable[str], prefix: str) -> dict[str, Part]:
    """Components whose names have this prefix alone: one, or the two towers of CLIP."""
    own, parts = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}, {}
    for marker, (component, kind, layout) in BARE.items():
        if marker in own:
            tower = {key for key in own if key.startswith(VISION) == marker.startswith(VISION)}
            parts[component] = Part(kind, layout, {key: prefix + key for key in tower})
    return parts


def _placed_parts(keys: Iterable[str]) -> dict[str, Part]:
    """Components of a whole system in one file, by the prefixes of its places."""
    parts, places = {}, {}
    for key in sorted(keys):
        place = next((place for prefix, place in PREFIXES.items() if key.startswith(prefix)), None)
        if place and places.setdefault(place.folder, place) == place:  # a second one of its kind is of no use
            part = parts.setdefault(place.folder, Part(place.kind, place.layout, {}))
            part.names[key.removeprefix(place.prefix)] = key
    return parts


def _outer_parts(keys: set[str]) -> dict[str, Part]:
    """Components below names that are a trainer's own: "net.", "model.", "generator.", "text_encoders.clip_l."."""
    ends = tuple("." + marker for marker in BARE)
    marked = sorted(key for key in keys if key.endswith(ends))
    prefixes = {key.removesuffix(marker) for key in marked for marker in BARE if key.endswith("." + marker)}
    parts = {}
    for prefix in sorted(prefixes) if len(prefixes) <= MAX_OUTER else ():
        is_second = "clip_g" in prefix or "text_encoder_2" in prefix
        for name, part in _bare_parts(keys, prefix).items() if OUTER.fullmatch(prefix) else ():
            parts.setdefault("text_encoder_2" if is_second and name == "text_encoder" else name, part)
    return parts


def _is_extra(key: str) -> bool:
    return key in EXTRAS or key.startswith(EMA) or LEFTOVERS.search(key) is not None
