"""ControlNets and T2I-Adapters beside a base network: one or several, each with its own scale and part of the schedule.

    controlled = Controlled(net, [Control(canny, scale=0.8), Control(depth, window=(0, 0.5))], process)
    cond, null = controlled.conditions([edges, depths], size=(512, 512), count=4)
    denoise = guidance(Denoiser(controlled, process, prediction), text | cond, empty | null)

A network that steers (`ldm.models.controlnet`, `ldm.models.t2i_adapter`) has `encode(hint)`, run once per picture,
`steer(x, t, encoded, cond)`, run at every step, and `slot`, the condition of the base that takes what that gives.
"""

import math
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from ldm.adapters.base import SLACK, check_scale, check_window
from ldm.diffusion.process import Process
from ldm.models.controlnet import ControlNet
from ldm.models.controlnet_transformer import ControlNetTransformer
from ldm.models.dit import DiT
from ldm.models.pixart import PixArt
from ldm.models.t2i_adapter import T2IAdapter
from ldm.models.unet import UNet
from ldm.utils.errors import ConfigError, DataError

Steering = ControlNet | ControlNetTransformer | T2IAdapter


class Control(nn.Module):
    """A ControlNet or T2I-Adapter as it is used.

    scale: of all that it adds. window = (start, end): the share of the schedule in which it acts, 0 the first step; a
    step counts by where it begins. guess, of ControlNets: without a prompt, as the authors' code does it: guidance's
    other half is left alone, and each residual is `decay` of the next coarser one; None: the finest has 0.1, as in
    diffusers.
    Raises ConfigError for numbers that cannot be.
    """

    def __init__(
        self,
        network: Steering,
        *,
        scale: float = 1.0,
        window: Sequence[float] = (0.0, 1.0),
        guess: bool = False,
        decay: float | None = 0.825,
    ):
        super().__init__()
        if guess and not isinstance(network, ControlNet):
            raise ConfigError(f"guess=true is a way to use a ControlNet, not a {type(network).__name__}; leave it out")
        self.network = network
        self.window = check_window("control", window)
        self.only_cond = guess or network.global_pool
        last = len(network.widths) - 1
        decay = 0.1 ** (1 / last) if decay is None else check_scale("control", decay)
        falling = decay if guess and not network.global_pool else 1.0
        self.strengths = [check_scale("control", scale) * falling ** (last - i) for i in range(last + 1)]

    def encode(self, hint: Tensor, size: Sequence[int], count: int) -> list[Tensor]:
        """What `forward` reads of a hint, of which there is one for all `count` images or one for each."""
        hint = read_hint(hint, self.network.hint_channels, size)
        if len(hint) not in (1, count):
            raise DataError(f"there are {len(hint)} hints for {count} images; give one, or one for each")
        return [tensor.expand(count, *tensor.shape[1:]) for tensor in self.network.encode(hint)]

    def forward(self, x: Tensor, t: Tensor, encoded: Sequence[Tensor], cond: dict) -> list[Tensor]:
        """What is added in the network's slot."""
        added = self.network.steer(x, t, encoded, cond)
        return [a if s == 1 else a * s for a, s in zip(added, self.strengths, strict=True)]


class Controlled(nn.Module):
    """A base network with what its controls add: net(x, t, **cond) of the same signature, and two conditions more.

    hints: the encoded hints of all controls in a row; without them the base computes alone. steered (B, controls) bool,
    on the CPU: which images each control steers; all of them where it is left out. Both come from `conditions`.
    Raises ConfigError for a control made for another base.
    """

    def __init__(self, net: nn.Module, controls: Sequence[Control], process: Process):
        super().__init__()
        for control in controls:
            check_base(control.network, net)
        self.net = net
        self.controls = nn.ModuleList(controls)
        self.bounds = [net_times(control.window, process) for control in controls]

    def conditions(self, hints: Sequence[Tensor], size: Sequence[int], count: int) -> tuple[dict, dict]:
        """(cond, null) of one hint per control, (1 or `count` C H W) of images of `size` = (height, width) pixels.

        Hints are uint8, or floats in [0, 1] in which the holes of an inpainting ControlNet are -1. Raises DataError.
        """
        if len(hints) != len(self.controls):
            raise DataError(f"there are {len(hints)} hints for {len(self.controls)} controls; give one for each")
        pairs = zip(self.controls, hints, strict=True)
        cond = {"hints": [tensor for control, hint in pairs for tensor in control.encode(hint, size, count)]}
        if not any(control.only_cond for control in self.controls):
            return cond, cond
        in_null = torch.tensor([not control.only_cond for control in self.controls]).expand(count, -1)  # B K
        return {**cond, "steered": torch.ones_like(in_null)}, {**cond, "steered": in_null}

    def forward(
        self, x: Tensor, t: Tensor, *, hints: Sequence[Tensor] = (), steered: Tensor | None = None, **cond
    ) -> Tensor:
        added = {name: cond.pop(name) for name in ("features", "residuals") if cond.get(name) is not None}
        rest = iter(hints)
        for k, control in enumerate(self.controls if hints else ()):
            encoded = list(islice(rest, control.network.num_encoded))
            rows = torch.ones(len(x), dtype=torch.bool) if steered is None else steered[:, k]
            if self.acts(k, t) and rows.any():
                new, slot = steer_rows(control, rows, x, t, encoded, cond), control.network.slot
                added[slot] = [a + b for a, b in zip(added[slot], new, strict=True)] if slot in added else new
        return self.net(x, t, **cond, **added)

    def acts(self, k: int, t: Tensor) -> bool:
        """Whether control k has a say at the time that the network is fed, in a window one for all images."""
        control, (sign, low, high) = self.controls[k], self.bounds[k]
        return any(control.strengths) and (control.window == (0, 1) or low < sign * float(t.max()) <= high)


def steer_rows(
    control: Control, rows: Tensor, x: Tensor, t: Tensor, encoded: Sequence[Tensor], cond: dict
) -> list[Tensor]:
    """What a control adds, computed for some images only, zero for the others."""
    if rows.all():
        return control(x, t, encoded, cond)
    rows = rows.to(x.device)
    some = {name: value[rows] for name, value in cond.items() if isinstance(value, Tensor)}
    added = control(x[rows], t[rows], [tensor[rows] for tensor in encoded], some)
    return [a.new_zeros(len(x), *a.shape[1:]).index_put((rows,), a) for a in added]


def net_times(window: Sequence[float], process: Process) -> tuple[float, float, float]:
    """A window in the time that networks are fed: (sign, low, high), for which low < sign * time <= high is inside."""
    start, end = window
    sign = 1.0 if process.net_time(0.75) > process.net_time(0.25) else -1.0
    high = sign * process.net_time(1 - start + SLACK) if start > SLACK else math.inf
    low = sign * process.net_time(1 - end + SLACK) if end < 1 else -math.inf
    return sign, low, high


def check_base(network: Steering, net: nn.Module) -> None:
    """ConfigError unless what the network adds has the widths of the base's slots."""
    name = type(network).__name__
    steered = DiT | PixArt if isinstance(network, ControlNetTransformer) else UNet
    if not isinstance(net, steered):
        kind = "UNet" if steered is UNet else "DiT or a PixArt"
        raise ConfigError(f"a {name} steers a {kind}, the base is a {type(net).__name__}")
    if isinstance(network, ControlNet) and network.context_dim != net.context_dim:
        wide, read = network.context_dim, net.context_dim
        raise ConfigError(f"this {name} is for another base: it reads text of width {wide}, the base {read}")
    if isinstance(network, ControlNetTransformer):
        every = [net.patch_embed.out_channels] * len(net.blocks)
        fitting = (every[: len(network.widths)],)
    else:
        fitting = slots_of(net)[network.slot]
    if network.widths not in fitting:
        raise ConfigError(f"this {name} is for another base: it adds {network.widths} channels, expected {fitting[0]}")


def slots_of(net: UNet) -> dict[str, tuple[list[int], ...]]:
    """Channels that may be added in each slot."""
    skips = net.encoder.skip_channels
    levels = [level.blocks[-1].res.norm2.num_channels for level in net.encoder.levels]
    return {"residuals": ([*skips, skips[-1]],), "features": (levels, [*levels, levels[-1]])}


def read_hint(hint: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """A hint (B 1|3|channels H W), uint8 or float, as float32 (B channels H W). DataError names what does not fit."""
    if hint.ndim != 4 or not hint.numel():
        raise DataError(f"the hint is empty or no batch of pictures: shape {tuple(hint.shape)}, expected B C H W")
    if tuple(hint.shape[2:]) != tuple(size):
        (a, b), (c, d) = hint.shape[2:], size
        raise DataError(f"the hint is {a}x{b} pixels, but what is drawn is {c}x{d}; give one of that size")
    if hint.dtype == torch.uint8:
        hint = hint.float() / 255
    elif not hint.is_floating_point() or not ((hint == -1) | (hint >= 0) & (hint <= 1)).all():
        low, high = hint.min().item(), hint.max().item()
        raise DataError(
            f"the hint is {hint.dtype} from {low:.4g} to {high:.4g}; expected uint8, or floats of 0..1 (-1: a hole)"
        )
    if hint.shape[1] == 3 and channels == 1:
        return hint.float().mean(1, keepdim=True)
    if hint.shape[1] not in (1, channels):
        raise DataError(f"the hint has {hint.shape[1]} channels, this network reads {channels}")
    return hint.float().expand(-1, channels, -1, -1)
