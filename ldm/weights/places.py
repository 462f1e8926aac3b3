"""Where published systems keep their networks: one row per family, one place per network."""

from typing import Any, NamedTuple

from ldm.utils.errors import WeightsError


class Place(NamedTuple):
    """One network of a system."""

    slot: str  # what we call it there
    folder: str  # of a diffusers pipeline
    prefix: str  # of its keys in an original file
    layout: str  # of the names that follow the prefix


UNET = Place("network", "unet", "model.diffusion_model.", "original")
VAE = Place("autoencoder", "vae", "first_stage_model.", "original")
FAMILIES = {
    "sd15": (
        UNET,
        VAE,
        Place("clip_l", "text_encoder", "cond_stage_model.transformer.", "original"),
    ),
    "sd21": (
        UNET,
        VAE,
        Place("clip_h", "text_encoder", "cond_stage_model.model.", "open_clip"),
    ),
    "sdxl": (
        UNET,
        VAE,
        Place("clip_l", "text_encoder", "conditioner.embedders.0.transformer.", "original"),
        Place("clip_g", "text_encoder_2", "conditioner.embedders.1.model.", "open_clip"),
    ),
    "sdxl_refiner": (
        UNET,
        VAE,
        Place("clip_g", "text_encoder_2", "conditioner.embedders.0.model.", "open_clip"),
    ),
}
PREFIXES = {place.prefix: place for places in FAMILIES.values() for place in places}
TASKS = {4: "", 9: "_inpaint"}  # by input channels


def family_of(unet: dict[str, Any]) -> str:
    """The family of a UNet of these arguments: of its kind, that is, whatever its widths."""
    by_sizes = {5: "sdxl_refiner", 6: "sdxl"}
    return by_sizes.get(unet["num_sizes"]) or ("sd21" if unet["linear_projection"] else "sd15")


def system_of(unet: dict[str, Any]) -> str:
    """The name of the system of a UNet; SD 2's is "sd21", whichever it predicts. WeightsError where there is none."""
    if unet["in_channels"] not in TASKS or unet["out_channels"] != 4 or not unet["context_dim"]:
        channels = f"{unet['in_channels']} input and {unet['out_channels']} output channels"
        raise WeightsError(f"a UNet with {channels}, context_dim={unet['context_dim']}, is of no published system")
    return family_of(unet) + TASKS[unet["in_channels"]]


def places_of(system: str) -> tuple[Place, ...]:
    """The networks of a system by its name."""
    return FAMILIES[system.removesuffix("_inpaint").removesuffix("_base")]
