"""The networks whose published weights are known here: one row each, all that loading and saving ask of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet
from ldm.utils.errors import WeightsError
from ldm.weights import autoencoder, formats, unet
from ldm.weights.formats import Config, Shapes


class Layout(NamedTuple):
    """Published names to ours and back."""

    read: Callable[[Mapping[str, Tensor], Iterable[str]], dict[str, Tensor]]  # state, our keys -> our state
    write: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # our state -> state


class Component(NamedTuple):
    """What is known of one network."""

    network: type[nn.Module]
    layouts: dict[str, Layout]  # original, diffusers
    prefix: str  # of its keys in an original file of its own
    system_prefix: str  # and in that of a whole system
    file: str  # stem of its weights in a diffusers folder
    class_name: str  # in config.json
    from_config: Callable[[Config], Config]  # config.json -> arguments of `network`
    from_shapes: Callable[[Shapes], Config]  # shapes in an original file -> arguments
    arguments: Callable[[Any], Config]  # network -> its arguments
    to_config: Callable[[Any], Config]  # network -> config.json


UNET = Component(
    UNet,
    {
        "original": Layout(unet.from_original, unet.to_original),
        "diffusers": Layout(unet.from_diffusers, unet.to_diffusers),
    },
    "model.diffusion_model.",
    "model.diffusion_model.",
    "diffusion_pytorch_model",
    "UNet2DConditionModel",
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
    "first_stage_model.",
    "diffusion_pytorch_model",
    "AutoencoderKL",
    formats.vae_from_config,
    formats.vae_from_shapes,
    formats.vae_arguments,
    formats.vae_to_config,
)
COMPONENTS = {"unet": UNET, "vae": VAE}  # by the names of the folders


def component_of(net: nn.Module) -> str:
    """The name of the component a network is. WeightsError for one that no published layout holds."""
    for name, component in COMPONENTS.items():
        if isinstance(net, component.network):
            return name
    raise WeightsError(f"no published layout is known for a {type(net).__name__}; known: {', '.join(COMPONENTS)}")
