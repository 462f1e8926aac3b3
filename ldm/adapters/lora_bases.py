"""The base that an adapter was made for, by the names and widths of its layers."""

import math
import re
from collections.abc import Callable, Iterable, Mapping

from ldm.adapters.base import Networks
from ldm.adapters.lora_names import NETWORK, Site
from ldm.io.stored import Stored
from ldm.models.dit import DiT
from ldm.models.pixart import PixArt
from ldm.models.unet import UNet
from ldm.weights.detect import FAMILIES

Modules = Mapping[str, Mapping[str, Stored]]

BY_NAME = {  # a piece of a layer's name -> what has such layers; the first row that matches
    r"double_blocks|single_blocks|single_transformer_blocks": "FLUX",
    r"joint_blocks": "Stable Diffusion 3",
    r"transformer_blocks[._]\d+[._](img|txt)_m(lp|od)": "Qwen-Image",
    r"transformer_blocks[._]\d+[._]attn[._]": "Stable Diffusion 3 or FLUX",
    r"(^|[._])prior[._]": "Stable Cascade",
    r"blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]": "Wan",
    r"down_blocks[._]0[._]attentions|up_blocks[._]3[._]attentions": "Stable Diffusion 1 or 2",
    r"input_blocks[._][12][._]1[._]|output_blocks[._](9|10|11)[._]1[._]": "Stable Diffusion 1 or 2",
    r"attentions[._]\d+[._]transformer_blocks[._][1-9]": "SDXL",
    r"blocks?[._](\d+[._])?1[._]transformer_blocks[._][1-9]": "SDXL",
    r"(^|_)te2_|^text_encoder_2|clip_g": "SDXL",
    r"^(lora_unet_|lora_transformer_|transformer\.|diffusion_model\.)?transformer_blocks[._]": "another transformer",
}
TEXT = r"attn2[._]to_[kv]$"  # layers whose inputs are as wide as the text
ENCODER = r"layers[._]\d+[._]self_attn[._][qkv]_proj$"  # as wide as a text encoder


def other_base(modules: Modules, known: Mapping[str, Site], networks: Networks) -> str | None:
    """The base that the modules are for and the one there is, in words; None where nothing tells them apart."""
    for pattern, describe in ((TEXT, _family), (ENCODER, _encoder)):
        made = {inputs for stem, found in modules.items() if re.search(pattern, stem) and (inputs := _inputs(found))}
        there = {site.parameter(networks).shape[1] for stem, site in known.items() if re.search(pattern, stem)}
        if made and there and not made & there:
            return f"made for {_either(made, describe)}, but the base is {_either(there, describe)}"
    strange = modules.keys() - known.keys()
    found = (words for pattern, words in BY_NAME.items() if any(re.search(pattern, stem) for stem in strange))
    words, base = next(found, None), _base(networks)
    return f"made for {words}, but the base is {base}" if words and not base.startswith(words) else None


def _inputs(tensors: Mapping[str, Stored]) -> int | None:
    """The width of the inputs of a module, where its tensors tell."""
    for name in ("down", "diff", "a2", "hada_w1_b"):
        if name in tensors and len(tensors[name].shape) > 1:
            return tensors[name].shape[1]
    factors = [tensors[name].shape for name in ("lokr_w1", "lokr_w1_b", "lokr_w2", "lokr_w2_b") if name in tensors]
    return math.prod(shape[1] for shape in factors) if factors and all(len(shape) > 1 for shape in factors) else None


def _base(networks: Networks) -> str:
    net = networks.get(NETWORK)
    if isinstance(net, UNet) and net.context_dim:
        return _family(net.context_dim)
    return "another transformer" if isinstance(net, DiT | PixArt) else "another network"


def _either(widths: Iterable[int], describe: Callable[[int], str]) -> str:
    return " or ".join(describe(width) for width in sorted(widths))


def _family(width: int) -> str:
    return f"{FAMILIES.get(width, 'another network')} (text of width {width})"


def _encoder(width: int) -> str:
    return f"a text encoder of width {width}"
