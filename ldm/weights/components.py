"""The networks whose published weights are known here: one row each, all that loading and saving ask of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ldm.conditioning.clip import CLIPText, CLIPVision
from ldm.conditioning.t5 import T5Encoder
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.controlnet import ControlNet
from ldm.models.dit import DiT
from ldm.models.if_unet import IFUNet
from ldm.models.pixart import PixArt
from ldm.models.t2i_adapter import T2IAdapter
from ldm.models.unet import UNet
from ldm.utils.errors import WeightsError
from ldm.weights import (
    autoencoder,
    clip,
    controlnet,
    dit,
    formats,
    formats_clip,
    formats_if,
    if_unet,
    pixart,
    t2i_adapter,
    t5,
    unet,
)
from ldm.weights.formats import Config, Shapes


class Layout(NamedTuple):
    """Published names to ours and back."""

    read: Callable[..., dict[str, Tensor]]  # state, our keys -> our state
    write: Callable[..., dict[str, Tensor]]  # our state -> state


class Component(NamedTuple):
    """What is known of one kind of network."""

    network: type[nn.Module]
    folders: tuple[str, ...]  # its names in systems, which are those of its folders; the first where nothing else says
    layouts: dict[str, Layout]  # original, diffusers; CLIP also open_clip
    prefix: str  # of its keys in an original file of its own; in that of a whole system: `places`
    files: dict[str, str]  # suffix -> stem of its weights in a diffusers folder
    class_names: tuple[str, ...]  # in config.json
    from_config: Callable[[Config], Config]  # config.json -> arguments of `network`
    from_shapes: Callable[[Shapes], Config]  # shapes in an original file -> arguments
    arguments: Callable[[Any], Config]  # network -> its arguments
    to_config: Callable[[Any], Config]  # network -> config.json
    computed: Callable[[Any], dict[str, Tensor]] = lambda net: {}  # what original files store besides its state
    formulas: Mapping[str, Config] = {}  # arguments that no file tells, by the program whose results they give
    from_yml: Callable[[Config, Shapes], Config] | None = None  # YAML beside an original file, shapes -> the same
    to_yml: Callable[[Any], Config] | None = None  # network -> what config.yml says of it
    build: Callable[..., nn.Module] | None = None  # arguments -> network, where that is not made of numbers

    knobs: Callable[[Any], Config] = lambda net: {}  # of the original layout: what orders its values, from the network

    def make(self, arguments: Config) -> nn.Module:
        return (self.build or self.network)(**arguments)

    def read(self, layout: str, net: nn.Module, state: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
        """Published tensors as those of this network."""
        return self.layouts[layout].read(state, keys, **(self.knobs(net) if layout == "original" else {}))

    def write(self, layout: str, net: nn.Module) -> dict[str, Tensor]:
        """A network's tensors as published."""
        return self.layouts[layout].write(net.state_dict(), **(self.knobs(net) if layout == "original" else {}))


DIFFUSERS_FILES = {".safetensors": "diffusion_pytorch_model", ".bin": "diffusion_pytorch_model"}
TRANSFORMERS_FILES = {".safetensors": "model", ".bin": "pytorch_model"}
TRANSFORMERS = Layout(clip.from_transformers, clip.to_transformers)
OPEN_CLIP = Layout(clip.from_open_clip, clip.to_open_clip)

UNET = Component(
    UNet,
    ("unet",),
    {
        "original": Layout(unet.from_original, unet.to_original),
        "diffusers": Layout(unet.from_diffusers, unet.to_diffusers),
    },
    "model.diffusion_model.",
    DIFFUSERS_FILES,
    ("UNet2DConditionModel",),
    formats.unet_from_config,
    formats.unet_from_shapes,
    formats.unet_arguments,
    formats.unet_to_config,
    from_yml=formats.unet_from_yml,
)
IF = Component(
    IFUNet,
    ("unet",),
    {
        "original": Layout(if_unet.from_original, if_unet.to_original),
        "diffusers": Layout(if_unet.from_diffusers, if_unet.to_diffusers),
    },
    "",
    DIFFUSERS_FILES,
    (),  # that of UNET; `kind_of` tells them apart
    formats_if.if_from_config,
    formats_if.if_from_shapes,
    formats_if.if_arguments,
    formats_if.if_to_config,
    from_yml=formats_if.if_from_yml,
    to_yml=formats_if.if_to_yml,
    knobs=lambda net: {"head_dim": net.middle[0].attention.head_dim},
)
VAE = Component(
    AutoencoderKL,
    ("vae",),
    {
        "original": Layout(autoencoder.from_original, autoencoder.to_original),
        "diffusers": Layout(autoencoder.from_diffusers, autoencoder.to_diffusers),
    },
    "",
    DIFFUSERS_FILES,
    ("AutoencoderKL",),
    formats.vae_from_config,
    formats.vae_from_shapes,
    formats.vae_arguments,
    formats.vae_to_config,
)
CLIP_TEXT = Component(
    CLIPText,
    ("text_encoder", "text_encoder_2"),
    {"original": TRANSFORMERS, "open_clip": OPEN_CLIP, "diffusers": TRANSFORMERS},
    "",
    TRANSFORMERS_FILES,
    formats_clip.TEXT_CLASSES,
    formats_clip.text_from_config,
    formats_clip.text_from_shapes,
    formats_clip.text_arguments,
    formats_clip.text_to_config,
)
CLIP_VISION = Component(
    CLIPVision,
    ("image_encoder",),
    {"original": OPEN_CLIP, "open_clip": OPEN_CLIP, "diffusers": TRANSFORMERS},
    "",
    TRANSFORMERS_FILES,
    ("CLIPVisionModelWithProjection",),
    formats_clip.vision_from_config,
    formats_clip.vision_from_shapes,
    formats_clip.vision_arguments,
    formats_clip.vision_to_config,
)
DIT = Component(
    DiT,
    ("transformer",),
    {
        "original": Layout(dit.from_original, dit.to_original),
        "diffusers": Layout(dit.from_diffusers, dit.to_diffusers),
    },
    "",
    DIFFUSERS_FILES,
    ("DiTTransformer2DModel",),
    dit.dit_from_config,
    dit.dit_from_shapes,
    dit.dit_arguments,
    dit.dit_to_config,
    dit.computed,
    dit.FORMULAS,
)
PIXART = Component(
    PixArt,
    ("transformer",),
    {
        "original": Layout(pixart.from_original, pixart.to_original),
        "diffusers": Layout(pixart.from_diffusers, pixart.to_diffusers),
    },
    "",
    DIFFUSERS_FILES,
    ("PixArtTransformer2DModel",),
    pixart.pixart_from_config,
    pixart.pixart_from_shapes,
    pixart.pixart_arguments,
    pixart.pixart_to_config,
    pixart.computed,
)
T5_LAYOUT = Layout(t5.from_transformers, t5.to_transformers)
T5 = Component(
    T5Encoder,
    ("text_encoder", "text_encoder_2"),
    {"original": T5_LAYOUT, "diffusers": T5_LAYOUT},
    "",
    TRANSFORMERS_FILES,
    t5.CLASSES,
    t5.from_config,
    t5.from_shapes,
    t5.arguments,
    t5.to_config,
)
CONTROLNET = Component(
    ControlNet,
    ("controlnet",),
    {
        "original": Layout(controlnet.from_original, controlnet.to_original),
        "diffusers": Layout(controlnet.from_diffusers, controlnet.to_diffusers),
    },
    controlnet.PREFIX,
    DIFFUSERS_FILES,
    (controlnet.CLASS,),
    controlnet.from_config,
    controlnet.from_shapes,
    controlnet.arguments,
    controlnet.to_config,
    build=controlnet.build,
)
T2I_ADAPTER = Component(
    T2IAdapter,
    ("t2i_adapter", "adapter"),  # the second is that of diffusers' pipelines
    {
        "original": Layout(t2i_adapter.from_original, t2i_adapter.to_original),
        "diffusers": Layout(t2i_adapter.from_diffusers, t2i_adapter.to_diffusers),
    },
    "",
    DIFFUSERS_FILES,
    (t2i_adapter.CLASS,),
    t2i_adapter.from_config,
    t2i_adapter.from_shapes,
    t2i_adapter.arguments,
    t2i_adapter.to_config,
)
COMPONENTS = {
    "unet": UNET,
    "if": IF,
    "dit": DIT,
    "pixart": PIXART,
    "vae": VAE,
    "clip_text": CLIP_TEXT,
    "t5": T5,
    "clip_vision": CLIP_VISION,
    "controlnet": CONTROLNET,
    "t2i_adapter": T2I_ADAPTER,
}
FOLDERS = tuple(dict.fromkeys(folder for row in COMPONENTS.values() for folder in row.folders))
NORM_TYPES = {"ada_norm_zero": "dit", "ada_norm_single": "pixart"}  # of the class that diffusers had before it split


def row_of(net: nn.Module) -> Component:
    """What is known of a network's kind. WeightsError for one that no published layout holds."""
    for row in COMPONENTS.values():
        if isinstance(net, row.network):
            return row
    raise WeightsError(f"no published layout is known for a {type(net).__name__}; known: {', '.join(COMPONENTS)}")


def kind_of(config: Config) -> str | None:
    """The kind whose class a config.json names; None for a class unknown here. Raises WeightsError."""
    name = class_name(config)
    if name == "Transformer2DModel":
        if (norm := config.get("norm_type")) not in NORM_TYPES:
            known = " or ".join(f"{norm} ({kind})" for norm, kind in NORM_TYPES.items())
            raise WeightsError(f"config.json has norm_type={str(norm)[:60]} of a {name}, expected {known}")
        return NORM_TYPES[norm]
    if name == "UNet2DConditionModel" and config.get("addition_embed_type") == "text":
        return "if"
    return next((kind for kind, row in COMPONENTS.items() if name in row.class_names), None)


def class_name(config: Config) -> str:
    return str(config.get("_class_name") or next(iter(config.get("architectures") or ["?"])))[:80]
