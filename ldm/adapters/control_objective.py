"""What trains a ControlNet or T2I-Adapter: the loss of its base, and a hint with every image."""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import DiffusionObjective
from ldm.utils.errors import DataError
from ldm.utils.seeding import Noise, keys


class ControlObjective(DiffusionObjective):
    """Eq. (5), arXiv:2302.05543: the loss of the base moves its one control; `denoiser` is of a `Controlled` network.

    batch: as `DiffusionObjective`, and "hint" (B C H W); in training one that is not there is made by `annotate`, a
    function of `ldm.data.hints`, which is given what it asks for by name: images, scenes and size, mask. When sampling,
    no hint means the base alone. That half of the prompts is dropped, as the paper has it, so that the hint alone must
    do, is set at the conditioner: dropout=0.5.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        codec: nn.Module,
        conditioner: nn.Module,
        density: Callable[..., Tensor],
        weighting: Callable[..., Tensor],
        annotate: Callable[..., Tensor],
        masks: Callable[[Tensor, int, int], Tensor] | None = None,  # of hints with holes: masks(keys, height, width)
        *,
        seed: int = 0,
        stratified: bool = True,
        offset_noise: float = 0.0,
    ):
        super().__init__(denoiser, codec, conditioner, density, weighting,
                         seed=seed, stratified=stratified, offset_noise=offset_noise)  # fmt: skip
        self.annotate, self.masks = annotate, masks

    def image_conditions(self, batch: dict, shape: Sequence[int], generator: Noise | None) -> dict:
        size = [side * self.codec.downsample for side in shape[2:]]
        hint = batch.get("hint")
        if hint is None and "position" in batch:  # training
            hint = self.hints(batch)
        return {} if hint is None else self.denoiser.net.conditions([hint], size, shape[0])[0]

    def hints(self, batch: dict) -> Tensor:
        """Those of a batch (B C H W). Raises DataError where the data lacks what they are made of."""
        if "image" not in batch:
            raise DataError("hints are made of the images, and the data has only latents: switch their cache off")
        wanted, images = inspect.signature(self.annotate).parameters, batch["image"]
        if "scenes" in wanted and "scene" not in batch:
            raise DataError("this hint is drawn from scenes, which only data=shapes knows; choose one made of images")
        parts = {
            "images": lambda: images,
            "scenes": lambda: batch["scene"],
            "size": lambda: images.shape[-1],
            "mask": lambda: self.holes(batch),
        }
        return self.annotate(**{name: part() for name, part in parts.items() if name in wanted}).to(images.device)

    def holes(self, batch: dict) -> Tensor:
        """Masks (B 1 H W) float, 1 in the holes: the data's or drawn."""
        if "mask" in batch:
            return batch["mask"]
        drawn = self.masks(keys(self.seed, "mask", batch["position"]), *batch["image"].shape[2:])
        return drawn.to(batch["image"].device, torch.float32)
