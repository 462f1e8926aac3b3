"""Adapters around a training objective: what it was before is frozen, they alone are trained, and written as published.

    adapters = {"lora": LoRA(targets="attn")}               train.py adapters=lora
    adapters = {"controlnet": controlnet(net, 8)}           train.py adapters=controlnet objective=control
    attach(objective, adapters)
    export(averaged objective, adapters, RUN/adapter)       lora.safetensors, ..., as others read them

Both kinds are told apart by what they are: changes of weights are `WeightAdapter`, what steers is a network of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from ldm.adapters.control import Control, Controlled, Steering, slots_of
from ldm.adapters.control_objective import ControlObjective
from ldm.adapters.lora import WeightAdapter
from ldm.adapters.lora_names import NETWORK
from ldm.conditioning.stored import StoredEncoder
from ldm.diffusion.objective import DiffusionObjective
from ldm.models.controlnet import ControlNet
from ldm.models.controlnet_transformer import ControlNetTransformer
from ldm.models.dit import DiT
from ldm.models.pixart import PixArt
from ldm.models.t2i_adapter import T2IAdapter
from ldm.models.unet import UNet
from ldm.utils.errors import ConfigError
from ldm.weights import save_model

Adapters = Mapping[str, WeightAdapter | Steering]
HINT_WIDTHS = (16, 32, 96, 256)  # §3.2 of arXiv:2302.05543


def base_of(objective: nn.Module) -> nn.Module:
    """The network that adapters go around. Raises ConfigError for an objective without one."""
    if not isinstance(objective, DiffusionObjective):
        kind = type(objective).__name__
        raise ConfigError(f"adapters go around the network of a diffusion model, which {kind} has not: adapters=none")
    net = objective.denoiser.net
    return net.net if isinstance(net, Controlled) else net


def networks_of(objective: nn.Module) -> dict[str, nn.Module]:
    """What changes of weights go around, by slot: the base, and what reads captions."""
    networks = {NETWORK: base_of(objective)}
    for name, encoder in objective.conditioner.encoders.items():
        if encoder.field == "caption":  # a published encoder is a rule around its network
            networks[name] = dict(encoder.named_children()).get("network", encoder)
    return networks


def attach(objective: nn.Module, adapters: Adapters) -> None:
    """Put adapters around an objective, of which from then on they alone are trained. Raises ConfigError."""
    networks = networks_of(objective)
    objective.requires_grad_(False)
    controls = [Control(adapter) for adapter in adapters.values() if not isinstance(adapter, WeightAdapter)]
    if len(controls) != isinstance(objective, ControlObjective):
        raise ConfigError(
            f"there are {len(controls)} adapters that a hint steers with, and the objective is "
            f"{type(objective).__name__}: one of controlnet, t2i_adapter goes with objective=control, none with others"
        )
    for adapter in adapters.values():
        if isinstance(adapter, WeightAdapter):
            adapter.inject(networks)
    if controls:
        objective.denoiser.net = Controlled(networks[NETWORK], controls, objective.denoiser.process)
    for name, encoder in objective.conditioner.encoders.items():
        if isinstance(encoder, StoredEncoder) and any(p.requires_grad for p in encoder.parameters()):
            raise ConfigError(f"cache= has texts as {name} read them before, text_targets train it: drop one of both")


def export(objective: nn.Module, adapters: Adapters, folder: Path) -> None:
    """Each adapter in a file of its own below `folder`, with its numbers in this objective: the trained or averaged.

    A ControlNet of a transformer has no published layout: it stays in the run's checkpoints alone.
    """
    networks = networks_of(objective)
    for name, adapter in adapters.items():
        file = folder / f"{name}.safetensors"
        if isinstance(adapter, WeightAdapter):
            adapter.on(networks).save(file)
        elif not isinstance(adapter, ControlNetTransformer):
            file.unlink(missing_ok=True)  # of a run that was continued
            save_model(objective.denoiser.net.controls[0].network, file, layout="original")


# --- networks that steer, for a base ---------------------------------------------------------------------------------


def controlnet(
    net: nn.Module,
    downsample: int,  # pixels per latent, on a side
    *,
    hint_channels: int = 3,
    hint_widths: Sequence[int] | None = None,  # None: HINT_WIDTHS, as many as needed
    num_blocks: int | None = None,  # that are copied of a transformer; None: 13 of 28, as PixArt-delta
    global_pool: bool = False,  # of a UNet's: content without layout
) -> ControlNet | ControlNetTransformer:
    """The ControlNet of a UNet, a DiT or a PixArt. Raises ConfigError for another network, or another's knobs."""
    is_transformer = isinstance(net, DiT | PixArt)
    if not is_transformer and not isinstance(net, UNet):
        raise ConfigError(f"there is no ControlNet for a {type(net).__name__}; expected a UNet, a DiT or a PixArt")
    halvings = (downsample * (net.patch_size if is_transformer else 1)).bit_length() - 1
    widths = hint_widths or (*HINT_WIDTHS, *[HINT_WIDTHS[-1]] * halvings)[: halvings + 1]
    if not is_transformer:
        if num_blocks is not None:
            raise ConfigError(f"num_blocks={num_blocks} is of transformers: of a UNet the whole encoder is copied")
        return ControlNet(net, hint_channels=hint_channels, hint_widths=widths, global_pool=global_pool)
    if global_pool:
        raise ConfigError("global_pool=true is of UNets; a transformer's residuals are tokens")
    num_blocks = num_blocks or max(1, round(len(net.blocks) * 13 / 28))
    return ControlNetTransformer(net, num_blocks=num_blocks, hint_channels=hint_channels, hint_widths=widths)


def t2i_adapter(
    net: nn.Module,
    downsample: int,
    *,
    hint_channels: int = 3,
    num_res_blocks: int | None = None,  # per level; None: 2, and of a light one 4
    light: bool = False,  # on a quarter of the channels
    to_middle: bool = False,  # as SDXL's: half the sides from the start, and the last feature is the middle's
) -> T2IAdapter:
    """The T2I-Adapter of a UNet. Raises ConfigError for another network."""
    if not isinstance(net, UNet):
        raise ConfigError(f"there is no T2I-Adapter for a {type(net).__name__}; expected a UNet")
    levels, with_middle = slots_of(net)["features"]
    channels = with_middle if to_middle else levels
    unshuffle, halved = (2 * downsample, [2]) if to_middle else (downsample, range(1, len(levels)))
    num_res_blocks = num_res_blocks or (4 if light else 2)
    return T2IAdapter(hint_channels, channels, num_res_blocks=num_res_blocks, unshuffle=unshuffle, halved=halved,
                      light=light)  # fmt: skip
