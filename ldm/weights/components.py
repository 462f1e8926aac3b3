"""The networks whose published weights are known here: one row each, all that loading and saving ask of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ldm.conditioning.clip import CLIPText, CLIPVision
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet
from ldm.utils.errors import WeightsError
from ldm.weights import autoencoder, clip, formats, formats_clip, unet
from ldm.weights.formats import Config, Shapes


class Layout(NamedTuple):
    """Published names to ours and back."""

    read: Callable[[Mapping[str, Tensor], Iterable[str]], dict[str, Tensor]]  # state, our keys -> our state
    write: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # our state -> state


class Component(NamedTuple):
    """What is known of one network."""

    network: type[nn.Module]
    layouts: dict[str, Layout]  # original, diffusers; CLIP also open_clip
    prefix: str  # of its keys in an original file of its own; in that of a whole system: `places`
    files: dict[str, str]  # suffix -> stem of its weights in a diffusers folder
    class_names: tuple[str, ...]  # in config.json
    from_config: Callable[[Config], Config]  # config.json -> arguments of `network`
    from_shapes: Callable[[Shapes], Config]  # shapes in an original file -> arguments
    arguments: Callable[[Any], Config]  # network -> its arguments
    to_config: Callable[[Any], Config]  # network -> config.json


DIFFUSERS_FILES = {".safetensors": "diffusion_pytorch_model", ".bin": "diffusion_pytorch_model"}
TRANSFORMERS_FILES = {".safetensors": "model", ".bin": "pytorch_model"}
TRANSFORMERS = Layout(clip.from_transformers, clip.to_transformers)
OPEN_CLIP = Layout(clip.from_open_clip, clip.to_open_clip)

UNET = Component(
    UNet,
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
)
VAE = Component(
    AutoencoderKL,
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
    {"original": OPEN_CLIP, "open_clip": OPEN_CLIP, "diffusers": TRANSFORMERS},
    "",
    TRANSFORMERS_FILES,
    ("CLIPVisionModelWithProjection",),
    formats_clip.vision_from_config,
    formats_clip.vision_from_shapes,
    formats_clip.vision_arguments,
    formats_clip.vision_to_config,
)
COMPONENTS = {  # by the names of the folders
    "unet": UNET,
    "vae": VAE,
    "text_encoder": CLIP_TEXT,
    "text_encoder_2": CLIP_TEXT,
    "image_encoder": CLIP_VISION,
}


def component_of(net: nn.Module) -> str:
    """The name of the component a network is. WeightsError for one that no published layout holds."""
    for name, component in COMPONENTS.items():
        if isinstance(net, component.network):
            return name
    raise WeightsError(f"no published layout is known for a {type(net).__name__}; known: {', '.join(COMPONENTS)}")
