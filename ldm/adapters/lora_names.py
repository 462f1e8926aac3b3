"""What published adapters call the layers of our networks.

    kohya, SD 1.x, SDXL    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
    kohya, SDXL            lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q     (names of sgm)
    kohya, text            lora_te_text_model_encoder_layers_0_self_attn_q_proj; with two: lora_te1_, lora_te2_
    diffusers              unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q; text_encoder..., _2...
    PEFT                   base_model.model.down_blocks.0...                  (of one network, without its name)
    ComfyUI                diffusion_model.input_blocks.4.1...; text_encoders.clip_l.transformer.text_model...

So each layer has one dotted name in each layout of its weights, and a key of a file is found by looking it up.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor, nn

from ldm.adapters.adapted import is_layer
from ldm.adapters.base import Networks
from ldm.adapters.product import Block
from ldm.conditioning.clip import CLIPText
from ldm.conditioning.t5 import T5Encoder
from ldm.models.dit import DiT
from ldm.models.pixart import PixArt
from ldm.models.unet import UNet
from ldm.weights import clip, dit, pixart, t5, unet
from ldm.weights.ledger import Names

NETWORK = "network"  # the denoiser's slot
NO_BASE = ("autoencoder",)  # slots that adapters leave alone
SINGLE = ("cond_stage_model.transformer.", "cond_stage_model.model.")  # where original files have a text encoder
SEVERAL = ("conditioner.embedders.{}.transformer.", "conditioner.embedders.{}.model.")  # or two
TABLES: dict[type[nn.Module], tuple[Callable[[Iterable[str]], Names], ...]] = {  # the layout of diffusers first
    UNet: (unet.diffusers_names, unet.original_names),
    DiT: (dit.diffusers_names, dit.original_names),
    PixArt: (pixart.diffusers_names, pixart.original_names),
    CLIPText: (clip.transformers_names, lambda keys: clip.transformers_names(keys, prefix=False), clip.open_clip_names),
    T5Encoder: (t5.names,),
}


class Site(NamedTuple):
    """A published layer: one block of the rows of a layer of ours."""

    slot: str
    path: str
    block: Block

    def parameter(self, networks: Networks, key: str = "weight") -> Tensor | None:
        """The base's own numbers: a view."""
        whole = networks[self.slot].get_submodule(self.path)._parameters[key]
        return None if whole is None else self.block.of(whole.detach())


class Prefix(NamedTuple):
    """How the keys of one network begin in a file: those that are written, then others that are read."""

    dotted: tuple[str, ...]  # before a name as it is
    flat: tuple[str, ...]  # before a name whose dots are underscores


def sites(slot: str, net: nn.Module, layout: int = 0) -> dict[Site, str]:
    """Every layer that adapters can change, by its name in a layout of TABLES; 0 is that of diffusers.

    A network that nobody has published has the names it has here.
    """
    keys = [f"{path}.weight" for path, module in net.named_modules() if is_layer(module)]
    tables = TABLES.get(type(net), (lambda keys: {key: (key,) for key in keys},))
    return {
        Site(slot, key.removesuffix(".weight"), Block(index, len(theirs))): re.sub(r"[._]weight$", "", their)
        for key, theirs in tables[layout](keys).items()
        for index, their in enumerate(theirs)
        if their.endswith("weight")  # OpenCLIP's projection has another name, and is transposed
    }


def adaptable(networks: Networks) -> dict[str, nn.Module]:
    """The networks that adapters are for: the denoiser and its text encoders."""
    return {slot: net for slot, net in networks.items() if slot not in NO_BASE}


def prefixes(networks: Networks) -> dict[str, Prefix]:
    """By slot. Text encoders are numbered where there are two: CLIP-L is the first."""
    texts = [slot for slot in adaptable(networks) if slot != NETWORK]
    found = {}
    for slot, net in adaptable(networks).items():
        number = texts.index(slot) + 1 if slot in texts else 0
        comfy = f"text_encoders.{slot}.transformer."
        if not number:
            kind = "unet" if isinstance(net, UNet) else "transformer"
            others = ("", "diffusion_model.", "model.diffusion_model.")
            flat = ("lora_unet_", "lora_transformer_", "lycoris_", "oft_unet_")
            found[slot] = Prefix((f"{kind}.", *others), flat)
        elif len(texts) == 1:
            dotted = ("text_encoder.", "text_encoder_2.", "", comfy, *SINGLE)
            found[slot] = Prefix(dotted, ("lora_te_", "lora_te1_", "lora_te2_", "lycoris_", "oft_te_"))
        else:
            end = "" if number == 1 else f"_{number}"
            dotted = (f"text_encoder{end}.", comfy, *(start.format(number - 1) for start in SEVERAL))
            found[slot] = Prefix(dotted, (f"lora_te{number}_", f"oft_te{number}_"))
    return found


def index(networks: Networks) -> dict[str, Site]:
    """Every beginning of a key that a file may have -> the layer it is about."""
    known: dict[str, Site] = {}
    for slot, prefix in prefixes(networks).items():
        net = networks[slot]
        for layout in range(len(TABLES.get(type(net), (None,)))):
            for site, name in sites(slot, net, layout).items():
                stems = [start + name for start in prefix.dotted]
                stems += [start + name.replace(".", "_") for start in prefix.flat]
                known |= {stem: site for stem in stems if stem not in known}
    return known
