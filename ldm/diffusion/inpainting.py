"""The inpainting model of Stable Diffusion (arXiv:2112.10752, §4.5): a network that also sees what is to be kept.

network input = [ x_t | mask: 1 = repaint | latents of the picture with the hole in mid-grey ]
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import DiffusionObjective
from ldm.utils.errors import DataError
from ldm.utils.seeding import Noise, keys


class InpaintingObjective(DiffusionObjective):
    """`DiffusionObjective` whose condition `image` is [mask | latents of the masked picture] (B 1+C h w).

    batch: "image" (B 3 H W uint8) and "mask" (B 1 H W, repaint where it is 0.5 or more). In training a mask that is not
    given is drawn: masks(keys, height, width) -> B 1 H W. When sampling, no mask means everything, and then no image is
    needed. Raises DataError for sizes that do not fit, and for moments without their image.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        codec: nn.Module,
        conditioner: nn.Module,
        density: Callable[..., Tensor],
        weighting: Callable[..., Tensor],
        masks: Callable[[Tensor, int, int], Tensor],
        *,
        seed: int = 0,
        stratified: bool = True,
        offset_noise: float = 0.0,
    ):
        super().__init__(denoiser, codec, conditioner, density, weighting,
                         seed=seed, stratified=stratified, offset_noise=offset_noise)  # fmt: skip
        self.masks = masks

    @staticmethod
    def image_channels(codec: nn.Module) -> int:
        return 1 + codec.channels

    def image_conditions(self, batch: dict, shape: Sequence[int], generator: Noise | None) -> dict[str, Tensor]:
        size = tuple(side * self.codec.downsample for side in shape[2:])
        image, mask = self.picture(batch, size), self.mask(batch, size)
        masked = torch.where(mask, 0.0, image.float() / 127.5 - 1)  # B 3 H W, the hole 0: no uint8 can say that
        latents = self.codec.encode(masked, generator)
        mask = F.interpolate(mask.to(latents), shape[2:], mode="nearest")  # B 1 h w
        parts = (part.expand(shape[0], -1, -1, -1) for part in (mask, latents))
        return {"image": torch.cat(list(parts), dim=1)}

    def picture(self, batch: dict, size: tuple[int, int]) -> Tensor:
        """Images (B or 1, 3 H W) uint8."""
        if "image" in batch:
            return _of_size(batch["image"], size, "image")
        if "mask" in batch or "position" in batch:
            raise DataError("inpainting needs the images themselves, and the data has none: switch their cache off")
        return torch.zeros(1, 3, *size, dtype=torch.uint8, device=self._device())

    def mask(self, batch: dict, size: tuple[int, int]) -> Tensor:
        """What to repaint (B or 1, 1 H W) bool."""
        if "mask" in batch:
            mask = _of_size(batch["mask"], size, "mask") >= 0.5
        elif "position" in batch:  # training
            mask = self.masks(keys(self.seed, "mask", batch["position"]), *size)
        else:
            mask = torch.ones(1, 1, *size, dtype=torch.bool)
        return mask.to(self._device())

    def _device(self) -> torch.device:
        return next(self.parameters()).device


def _of_size(x: Tensor, size: tuple[int, int], name: str) -> Tensor:
    if x.shape[2:] != size:
        found, expected = ("x".join(map(str, sides)) for sides in (x.shape[2:], size))
        raise DataError(f"the {name} is {found} pixels, but what is inpainted is {expected}; give one of that size")
    return x
