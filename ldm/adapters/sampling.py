"""Adapters from files around a model that is drawn from: what sample.py lora=, controlnet= and t2i_adapter= come to.

attached = Attached(objective, [Patch("style.safetensors", 0.8)], {"controlnet": [Hint("canny.pth", "edges.png")]})
cond, null = attached.conditions((512, 512), count=4)       of what steers
denoise = attached.compose(make, times, (512, 512))
attached.detach()                                           the model as it was, bit for bit
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.base import check_scale, check_window
from ldm.adapters.composition import Denoise, composite, switch, windowed
from ldm.adapters.control import Control, Controlled, check_base
from ldm.adapters.lora import Loaded
from ldm.adapters.training import base_of, networks_of
from ldm.data.hints import canny, grey, inpaint, palette, sketch
from ldm.data.transforms import resize_crop
from ldm.io.images import read_image
from ldm.io.stored import index_tensors
from ldm.utils.errors import ConfigError, DataError, WeightsError
from ldm.weights.controlnet import other_kind
from ldm.weights.load import load_model

COMPOSITIONS = ("merge", "switch", "composite")
ALWAYS = (0.0, 1.0)
ANNOTATORS = {"canny": canny, "sketch": sketch, "grey": grey, "palette": palette, "inpaint": inpaint}


@dataclass
class Patch:
    """A LoRA, or one of its kin, as it is used. Raises ConfigError, DataError."""

    path: str
    scale: float = 1.0
    window: Sequence[float] = ALWAYS  # the share of the schedule in which it acts
    mask: str | Tensor | None = None  # a picture, or 3 H W uint8: it acts where that is white
    name: str | None = None  # None: that of the file
    strict: bool = True  # False: keys that match nothing in the base are left out, and named

    def __post_init__(self):
        self.scale = check_scale(self.path, self.scale)
        self.window = check_window(self.path, self.window)
        self.mask = None if self.mask is None else _picture(self.mask)

    @property
    def can_merge(self) -> bool:
        """Whether it does the same everywhere, all the time."""
        return self.window == ALWAYS and self.mask is None


@dataclass
class Hint:
    """A ControlNet or T2I-Adapter as it is used, and the picture that it follows. Raises ConfigError, DataError."""

    path: str
    image: str | Tensor | None = None  # the hint itself, or what `annotate` makes one of; a file, or 3 H W uint8
    scale: float = 1.0
    window: Sequence[float] = ALWAYS
    guess: bool = False  # of a ControlNet: without a prompt
    decay: float | None = 0.825  # of guess, from one residual to the next finer one; None: 0.1 over all, as diffusers
    annotate: str | None = None  # canny, sketch, grey, palette, inpaint
    mask: str | Tensor | None = None  # of inpaint: white where the picture is to be made anew

    def __post_init__(self):
        self.scale = check_scale(self.path, self.scale)
        self.window = check_window(self.path, self.window)
        if self.annotate not in (None, *ANNOTATORS):
            raise ConfigError(f"{self.path}: annotate={self.annotate}, expected one of {', '.join(ANNOTATORS)}")
        if (self.annotate == "inpaint") != (self.mask is not None):
            raise ConfigError(f"{self.path}: annotate=inpaint and mask=FILE go together; give both or neither")
        if self.image is None:
            raise ConfigError(f"{self.path}: has no picture to follow; give image=FILE")
        self.image = _picture(self.image)
        self.mask = None if self.mask is None else _picture(self.mask)

    def hint(self, size: Sequence[int]) -> Tensor:
        """1 3 H W for images of size = (height, width); a picture of another size is cropped, a hint is not."""
        if self.annotate is None:
            return _of_size(self.image, size, f"{self.path}: the hint")[None]
        image = resize_crop(self.image, *size)[None]
        if self.mask is None:
            return ANNOTATORS[self.annotate](image)
        return inpaint(image, resize_crop(self.mask, *size)[None, :1] / 255)


class Attached:
    """LoRAs within the networks of a model and what steers it beside them, until `detach`.

    composition: merge; switch, one LoRA for `every` steps, then the next; composite, the mean of what each gives
    alone. Masks make it a mean of regions. Raises ConfigError, WeightsError, and then leaves the model as it was.
    """

    def __init__(
        self,
        objective: nn.Module,
        patches: Sequence[Patch],
        hints: Mapping[str, Sequence[Hint]],  # by component, controlnet or t2i_adapter
        *,
        composition: str = "merge",
        every: int = 5,
    ):
        if composition not in COMPOSITIONS:
            raise ConfigError(f"composition={composition}: expected one of {', '.join(COMPOSITIONS)}")
        self.regions = any(patch.mask is not None for patch in patches)
        if self.regions and composition == "switch":
            raise ConfigError("composition=switch: LoRAs that take turns have no masks; drop them, or use composite")
        self.composition, self.every = composition, every
        self.objective, self.base, self.before = objective, base_of(objective), objective.denoiser.net
        self.loras: list[Loaded] = []
        self.live: dict[Loaded, Patch] = {}  # those that are not merged
        self.hints = [hint for group in hints.values() for hint in group]
        self.report: list[str] = []  # a line for each adapter: what it changes
        self._encoded: dict[tuple[int, ...], tuple[dict, dict]] = {}  # by size: the hints of one image
        try:
            for patch in patches:
                self._inject(patch)
            controls = [self._control(component, hint) for component, group in hints.items() for hint in group]
            if controls:
                objective.denoiser.net = Controlled(self.base, controls, objective.denoiser.process)
        except Exception:
            self.detach()
            raise

    def _inject(self, patch: Patch) -> None:
        name = patch.name or Loaded(patch.path).name
        while any(lora.name == name for lora in self.loras):
            name += "_"
        lora = Loaded(patch.path, patch.scale, name, strict=patch.strict)
        changed = lora.inject(networks_of(self.objective))
        self.loras.append(lora)
        merges = self.composition == "merge" and patch.can_merge and not self.regions
        if merges:
            lora.merge()
        else:
            self.live[lora] = patch
        counts = ", ".join(f"{count} modules of {slot}" for slot, count in changed.items())
        how = "merged" if merges else f"composed ({'by regions' if self.regions else self.composition})"
        notes = "".join(f"; {note}" for note in lora.notes)
        self.report.append(f"lora {patch.path}: {counts or 'nothing is changed'}; scale {patch.scale:g}, {how}{notes}")

    def _control(self, component: str, hint: Hint) -> Control:
        p = next(self.base.parameters())
        path = Path(hint.path)
        if path.is_file() and (words := other_kind(index_tensors(path))):
            raise WeightsError(f"{path}: {words}")
        network = load_model(hint.path, component, p.dtype, p.device)
        try:
            check_base(network, self.base)
        except ConfigError as error:
            raise WeightsError(f"{hint.path}: {error}") from error
        parameters = sum(p.numel() for p in network.parameters())
        self.report.append(f"{component} {hint.path}: {parameters:,} parameters; scale {hint.scale:g}")
        return Control(network, scale=hint.scale, window=hint.window, guess=hint.guess, decay=hint.decay)

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    def detach(self) -> None:
        """Leave the model as it was."""
        for lora in reversed(self.loras):
            lora.eject()
        self.objective.denoiser.net = self.before
        self.loras, self.live, self.hints = [], {}, []

    @torch.no_grad()
    def conditions(self, size: Sequence[int], count: int) -> tuple[dict, dict]:
        """(cond, null) of `count` images of size = (height, width) pixels; each hint is encoded once a size."""
        if not self.hints:
            return {}, {}
        if (size := tuple(size)) not in self._encoded:
            hints = [hint.hint(size).to(self.device) for hint in self.hints]
            self._encoded[size] = self.objective.denoiser.net.conditions(hints, size, 1)
        cond, null = self._encoded[size]
        return _expand(cond, count), _expand(null, count)

    def compose(self, make: Callable[[], Denoise], times: Sequence[float], size: Sequence[int]) -> Denoise:
        """The denoise of all LoRAs together, on images of size = (height, width) pixels.

        make() encodes the prompts with whichever of them act then, and gives the denoise of that.
        """
        if not self.live:
            return make()
        loras = list(self.live)
        denoise = windowed(make, {lora: patch.window for lora, patch in self.live.items()})
        if self.composition == "switch":
            return switch(denoise, loras, times, every=self.every)
        if self.composition == "composite" or self.regions:
            masks = [self._mask(patch, size) for patch in self.live.values()] if self.regions else None
            return composite(denoise, loras, weights=masks)
        return denoise

    def _mask(self, patch: Patch, size: Sequence[int]) -> Tensor:
        """Where a LoRA acts on latents, 1 1 H W in [0, 1]: everywhere without a mask."""
        sides = [side // self.objective.codec.downsample for side in size]
        if patch.mask is None:
            return torch.ones(1, 1, *sides, device=self.device)
        mask = _of_size(patch.mask, size, f"{patch.path}: the mask").to(self.device, torch.float32)
        return F.interpolate(mask.mean(0)[None, None] / 255, sides, mode="area")


def _picture(source: str | Tensor) -> Tensor:
    return source if isinstance(source, Tensor) else read_image(source)


def _of_size(picture: Tensor, size: Sequence[int], what: str) -> Tensor:
    if tuple(picture.shape[1:]) != tuple(size):
        (a, b), (c, d) = picture.shape[1:], size
        raise DataError(f"{what} is {a}x{b} pixels, but what is drawn is {c}x{d}; give one of that size")
    return picture


def _expand(cond: dict, count: int) -> dict:
    """The conditions of one image, for `count` of them."""
    given = {**cond, "hints": [tensor.expand(count, *tensor.shape[1:]) for tensor in cond["hints"]]}
    return given | ({"steered": cond["steered"].expand(count, -1)} if "steered" in cond else {})
