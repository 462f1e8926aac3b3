"""ControlNets in published files: names (tables as in `ledger`) and arguments of our constructor.

The trunk is named as the UNet that it was copied from. OTHERS are formats that are not read.
"""

import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace

from torch import Tensor

from ldm.models.controlnet import ControlNet
from ldm.models.unet import UNet
from ldm.utils.errors import WeightsError
from ldm.weights import formats, unet
from ldm.weights.formats import Config, Shapes, check_fixed
from ldm.weights.ledger import Names, first_row, to_ours, to_theirs, translate

PREFIX = "control_model."  # of original files
CLASS = "ControlNetModel"  # in config.json
FIXED = {"controlnet_conditioning_channel_order": "rgb"}
OTHERS = {  # a piece of a key -> what steers in another way and has such keys; the first row that matches
    r"^lora_controlnet$": "a Control-LoRA, layers of low rank that go with the weights of its base",
    r"^difference$": "a ControlNet stored as the difference to its base, which would have to be added",
    r"lllite_": "a ControlNet-LLLite",
    r"task_embedding$|control_add_embedding\.|spatial_ch_projs\.": "a ControlNet-Union",
    r"enc_zero_convs|ctrl_to_base|base_to_ctrl|middle_block_in\.": "a ControlNet-XS",
    r"^(mid_convs|down_res)\.\d": "a ControlNeXt",
    r"transformer_layes\.|style_embedding$|spatial_pos": "a style adapter or the fuser of CoAdapters",
    r"controlnet_blocks\.|controlnet_x_embedder\.|pos_embed_input\.": "a ControlNet of a transformer (SD3 or FLUX)",
}
ONLY_UNET = (  # in the config.json of a UNet and not of a ControlNet
    "sample_size", "out_channels", "up_block_types", "center_input_sample", "dual_cross_attention",
    "time_embedding_type", "attention_type", "conv_in_kernel", "conv_out_kernel",
)  # fmt: skip


def _own_names(keys: list[str], layout: str) -> Names:
    """What a ControlNet has besides the trunk of a UNet."""
    last = max(int(match[1]) for key in keys if (match := re.match(r"hint_encoder\.(\d+)", key)))

    def hint(match: re.Match) -> str:
        i = int(match[1])
        if layout == "original":
            return f"input_hint_block.{2 * i}."  # a SiLU after each
        ends = {0: "conv_in", last: "conv_out"}
        return f"controlnet_cond_embedding.{ends.get(i, f'blocks.{i - 1}')}."

    table = {
        "original": [(r"^zero_convs\.(\d+)\.", r"zero_convs.\1.0."), (r"^zero_middle\.", "middle_block_out.0.")],
        "diffusers": [(r"^zero_convs\.", "controlnet_down_blocks."), (r"^zero_middle\.", "controlnet_mid_block.")],
    }[layout]
    return {key: translate(re.sub(r"^hint_encoder\.(\d+)\.", hint, key), table) for key in keys}


def _names(keys: Iterable[str], layout: str) -> Names:
    own, trunk = [], []
    for key in keys:
        (own if key.startswith(("hint_encoder.", "zero_")) else trunk).append(key)
    base_names = {"original": unet.original_names, "diffusers": unet.diffusers_names}[layout]
    return base_names(trunk) | _own_names(own, layout)


def from_original(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """An original state dict, its prefix removed, under our names. WeightsError unless all keys match."""
    return to_ours(state, _names(keys, "original"))


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_original`."""
    return to_theirs(state, _names(state, "original"))


def from_diffusers(state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """A diffusers state dict under our names. WeightsError as `from_original`."""
    return to_ours(state, _names(keys, "diffusers"))


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_diffusers`."""
    return to_theirs(state, _names(state, "diffusers"))


def build(*, hint_channels: int, hint_widths: list[int], global_pool: bool = False, **base: object) -> ControlNet:
    """The ControlNet of these arguments, those of its base among them."""
    return ControlNet(UNet(**base), hint_channels=hint_channels, hint_widths=hint_widths, global_pool=global_pool)


def from_config(config: Config) -> Config:
    """Arguments of `build` from the config.json of a ControlNetModel. Raises WeightsError."""
    check_fixed(config, FIXED)
    return {
        **formats.unet_from_config(config),
        "hint_channels": config.get("conditioning_channels", 3),
        "hint_widths": config.get("conditioning_embedding_out_channels", [16, 32, 96, 256]),
        "global_pool": config.get("global_pool_conditions", False),
    }


def other_kind(keys: Iterable[str]) -> str | None:
    """The one of OTHERS that has such keys, in words for an error message."""
    words = first_row(OTHERS, keys)
    return words and f"{words}, is not read here; take the whole ControlNet of that kind"


def from_shapes(shapes: Shapes) -> Config:
    """Arguments of `build` from a file of original layout; whether it pools, no shape tells: only "shuffle" does."""
    if words := other_kind(shapes):
        raise WeightsError(words)
    base = {**shapes, "out.2.weight": shapes["input_blocks.0.0.weight"][1::-1]}  # as many channels out as in
    hints = [shape for key, shape in shapes.items() if re.fullmatch(r"input_hint_block\.\d+\.weight", key)]
    widths = [shapes[f"input_hint_block.{4 * i}.weight"][0] for i in range(len(hints) // 2)]
    channels = shapes["input_hint_block.0.weight"][1]
    return {**formats.unet_from_shapes(base), "hint_channels": channels, "hint_widths": widths}


def arguments(net: ControlNet) -> Config:
    """The arguments of `build` that made a network, as far as they change its keys or its result."""
    return {
        **formats.unet_arguments(_as_unet(net)),
        "hint_channels": net.hint_channels,
        "hint_widths": [conv.out_channels for conv in list(net.hint_encoder)[:-1:2]],
        "global_pool": net.global_pool,
    }


def to_config(net: ControlNet) -> Config:
    """config.json of the ControlNetModel that is this network. WeightsError where there is none."""
    base = formats.unet_to_config(_as_unet(net))
    own = arguments(net)
    return {
        **{name: value for name, value in base.items() if name not in ONLY_UNET},
        "_class_name": CLASS,
        "conditioning_channels": own["hint_channels"],
        "conditioning_embedding_out_channels": own["hint_widths"],
        "global_pool_conditions": own["global_pool"],
        **FIXED,
    }


def _as_unet(net: ControlNet) -> SimpleNamespace:
    """The trunk, as far as `formats` looks at a UNet."""
    parts = {name: getattr(net, name) for name in ("in_channels", "context_dim", "conditioning", "encoder", "middle")}
    decoder = SimpleNamespace(conv_out=SimpleNamespace(out_channels=net.in_channels))
    return SimpleNamespace(**parts, decoder=decoder, modules=net.modules)
