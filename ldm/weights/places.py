"""Where published systems keep their networks: one row per family, one place per network."""

from typing import Any, NamedTuple

from ldm.utils.errors import WeightsError


class Place(NamedTuple):
    """One network of a system."""

    slot: str  # what we call it there
    folder: str  # of a diffusers pipeline
    kind: str  # of `components.COMPONENTS`
    prefix: str = ""  # of its keys in an original file; without one there is no file of the whole system
    layout: str = "original"  # of the names that follow the prefix


UNET = Place("network", "unet", "unet", "model.diffusion_model.")
VAE = Place("autoencoder", "vae", "vae", "first_stage_model.")
FAMILIES = {
    "sd15": (
        UNET,
        VAE,
        Place("clip_l", "text_encoder", "clip_text", "cond_stage_model.transformer."),
    ),
    "sd21": (
        UNET,
        VAE,
        Place("clip_h", "text_encoder", "clip_text", "cond_stage_model.model.", "open_clip"),
    ),
    "sdxl": (
        UNET,
        VAE,
        Place("clip_l", "text_encoder", "clip_text", "conditioner.embedders.0.transformer."),
        Place("clip_g", "text_encoder_2", "clip_text", "conditioner.embedders.1.model.", "open_clip"),
    ),
    "sdxl_refiner": (
        UNET,
        VAE,
        Place("clip_g", "text_encoder_2", "clip_text", "conditioner.embedders.0.model.", "open_clip"),
    ),
    "dit": (
        Place("network", "transformer", "dit"),
        Place("autoencoder", "vae", "vae"),
    ),
    "pixart": (
        Place("network", "transformer", "pixart"),
        Place("autoencoder", "vae", "vae"),
        Place("t5", "text_encoder", "t5"),
    ),
    "if": (
        Place("network", "unet", "if"),
        Place("t5", "text_encoder", "t5"),
    ),
}
SYSTEMS = {  # by name, a file of configs/system: the family
    "sd15": "sd15", "sd15_inpaint": "sd15",
    "sd21": "sd21", "sd21_base": "sd21", "sd21_inpaint": "sd21",
    "sdxl": "sdxl", "sdxl_inpaint": "sdxl", "sdxl_refiner": "sdxl_refiner",
    "dit_xl2_256": "dit", "dit_xl2_512": "dit", "sit_xl2_256": "dit",
    "pixart_256": "pixart", "pixart_512": "pixart", "pixart_1024": "pixart",
    "pixart_sigma_256": "pixart", "pixart_sigma_512": "pixart", "pixart_sigma_1024": "pixart",
    "pixart_sigma_2k": "pixart",
    "if_i_m": "if", "if_i_l": "if", "if_i_xl": "if", "if_ii_m": "if", "if_ii_l": "if", "if_iii_l": "if",
}  # fmt: skip
CONTROL = Place("controlnet", "controlnet", "controlnet", "control_model.")  # of ControlNet 1.0's in a whole system
PREFIXES = {place.prefix: place for places in (*FAMILIES.values(), (CONTROL,)) for place in places if place.prefix}
NETWORKS = ("unet", "transformer")  # the folders of what draws
SIDES = {32: "256", 64: "512", 128: "1024", 256: "2k"}  # of latents -> of images, as a transformer's system is named
SIGMA = {"text_length": 300, "scale": 0.13025}  # settings of which alpha has neither
IF_STAGES = {  # of DeepFloyd IF: the channels of each of its sizes
    "i": {"m": 192, "l": 320, "xl": 704},
    "ii": {"m": 96, "l": 160},
    "iii": {"l": 64},
}
TASKS = {4: "", 9: "_inpaint"}  # by input channels


def family_of(kind: str, network: dict[str, Any]) -> str:
    """The family of a network of these arguments: of its kind, that is, whatever its widths."""
    if kind != "unet":
        return kind
    by_sizes = {5: "sdxl_refiner", 6: "sdxl"}
    return by_sizes.get(network["num_sizes"]) or ("sd21" if network["linear_projection"] else "sd15")


def system_of(kind: str, network: dict[str, Any], settings: dict[str, Any]) -> str:
    """The name of the system of a network; "sd21" whichever it predicts, DiT's for SiT too, whose files are alike.

    Raises WeightsError where there is none.
    """
    if kind == "unet":
        return family_of(kind, network) + _task(network)
    if kind == "if":
        return _if_stage(network)
    side = SIDES[min((side for side in SIDES if side >= network["sample_size"]), default=max(SIDES))]
    if kind == "dit":
        return "dit_xl2_256" if side == "256" else "dit_xl2_512"
    if network["num_sizes"]:
        return "pixart_1024"
    told = any(settings.get(name) == value for name, value in SIGMA.items())
    is_sigma = told or network.get("kv_layers") or side in ("1024", "2k")
    return f"pixart_sigma_{side}" if is_sigma else f"pixart_{side}"


def _if_stage(unet: dict[str, Any]) -> str:
    """The last stage has six levels, the one before it five; of several sizes the smallest that is as wide."""
    stage = "i" if not unet["super_resolution"] else "ii" if len(unet["channel_mult"]) < 6 else "iii"
    *_, largest = IF_STAGES[stage]
    size = next((size for size, width in IF_STAGES[stage].items() if width >= unet["channels"]), largest)
    return f"if_{stage}_{size}"


def _task(unet: dict[str, Any]) -> str:
    if unet["in_channels"] not in TASKS or unet["out_channels"] != 4 or not unet["context_dim"]:
        channels = f"{unet['in_channels']} input and {unet['out_channels']} output channels"
        raise WeightsError(f"a UNet with {channels}, context_dim={unet['context_dim']}, is of no published system")
    return TASKS[unet["in_channels"]]


def others_of(system: str) -> set[str]:
    """The systems whose networks have the same kind and inputs: the name of one of them may be given instead."""
    if SYSTEMS[system] not in ("dit", "pixart"):
        return {system, f"{system}_base"} & SYSTEMS.keys()
    same = {name for name, family in SYSTEMS.items() if family == SYSTEMS[system]}
    return same - {"pixart_1024"} if system != "pixart_1024" else {system}


def places_of(system: str) -> tuple[Place, ...]:
    """The networks of a system, or of a family, by its name."""
    return FAMILIES[SYSTEMS.get(system, system)]
