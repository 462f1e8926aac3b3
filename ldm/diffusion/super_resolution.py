"""Super-resolution: a network that also sees the image small, enlarged and noised (arXiv:2106.15282, arXiv:2205.11487).

    training   image -> antialiased, 1/factor of the sides -> bilinear, back to the sides -> crop -> noise of aug_level
    sampling   the image of the stage before               -> bilinear, to the sides              -> noise of aug_level

The noise hides from the network what the stage before gets wrong: "noise conditioning augmentation".
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import DiffusionObjective
from ldm.diffusion.variational import check_table, variational_loss
from ldm.utils.errors import ConfigError, DataError
from ldm.utils.seeding import Noise, keys, randn_like, uniform
from ldm.utils.tensors import pad_dims

AUG_LEVEL = 0.1  # to sample with where nothing is said, of 0.1 to 0.3 that arXiv:2205.11487 finds best


class SuperResolutionObjective(DiffusionObjective):
    """`DiffusionObjective` with the conditions `low_res` (B C H W, as large as x) and `aug_level` (B).

    batch: in training "image" (B 3 H W uint8) at full size and "position"; when sampling "image" (B or 1, 3 h w uint8),
    what is to be enlarged, and "aug_level", its noise. Noise of level s is that of the process where the network is fed
    1000 s: time s of a continuous one. Raises ConfigError for numbers that cannot be, DataError for images of a wrong
    size.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        codec: nn.Module,
        conditioner: nn.Module,
        density: Callable[..., Tensor],
        weighting: Callable[..., Tensor],
        *,
        factor: int = 4,  # by which both sides grow
        crop: int | None = None,  # train on a square of so many pixels; None: on the whole image
        levels: Sequence[float] = (0.0, 1.0),  # aug_level in training is even over these; (0, 0): no noise
        align_corners: bool = False,  # where the enlarged pixels lie: DeepFloyd IF's lie corner on corner
        vlb_weight: float = 0.0,  # of the bound that trains a learned variance, as in `HybridObjective`
        seed: int = 0,
        stratified: bool = True,
        offset_noise: float = 0.0,
    ):
        super().__init__(denoiser, codec, conditioner, density, weighting,
                         seed=seed, stratified=stratified, offset_noise=offset_noise)  # fmt: skip
        if factor < 2:
            raise ConfigError(f"objective.factor={factor}: super-resolution enlarges by 2 or more")
        if len(levels) != 2 or not 0 <= levels[0] <= levels[1] <= 1:
            raise ConfigError(f"objective.levels={list(levels)}: expected [low, high] between 0 and 1")
        if crop is not None and (crop < 1 or crop % codec.downsample):
            raise ConfigError(f"objective.crop={crop}: expected pixels, a multiple of {codec.downsample}, or null")
        if vlb_weight:
            check_table(denoiser.process)
        self.factor, self.crop, self.levels, self.align_corners = factor, crop, tuple(levels), align_corners
        self.vlb_weight = vlb_weight

    def other_losses(self, x0, x_t, t, F, v):
        return {"vlb": self.vlb_weight * variational_loss(self.denoiser, x0, x_t, t, F, v)} if self.vlb_weight else {}

    def latents(self, batch: dict) -> Tensor:
        return self.codec.encode(self.cropped(_pixels(batch), batch["position"]))

    def image_conditions(self, batch: dict, shape: Sequence[int], generator: Noise | None) -> dict[str, Tensor]:
        """The same for both halves of guidance. Shape is that of x."""
        size = tuple(side * self.codec.downsample for side in shape[2:])
        if "position" in batch:
            whole = _pixels(batch)
            enlarged = enlarge(shrink(whole, self.factor), whole.shape[2:], self.align_corners)
            enlarged = self.cropped(enlarged, batch["position"])
            low, high = self.levels
            level = low + (high - low) * uniform(keys(self.seed, "aug_level", batch["position"]))  # B
        else:
            enlarged = enlarge(self.small(batch, size), size, self.align_corners)
            level = torch.full(shape[:1], self.level(batch.get("aug_level")), dtype=torch.float64)
        device = next(self.parameters()).device
        low_res = self.codec.encode(enlarged.to(device)).expand(shape[0], -1, -1, -1)
        alpha, sigma = (pad_dims(a, low_res) for a in self.noise_of(level.to(low_res)))
        return {"low_res": alpha * low_res + sigma * randn_like(low_res, generator), "aug_level": level.to(low_res)}

    def noise_of(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of an aug_level. A table has an index 0, which is time 1 / T and not clean."""
        process = self.denoiser.process
        return process(level if process.num_steps is None else (level + 1 / process.num_steps).clamp(max=1))

    def level(self, asked: float | None) -> float:
        """The aug_level to sample with."""
        if asked is None:
            return min(AUG_LEVEL, self.levels[1])
        if not 0 <= asked <= 1:
            raise ConfigError(f"aug_level={asked} must lie between 0 (the image as it is) and 1 (nothing but noise)")
        return float(asked)

    def small(self, batch: dict, size: tuple[int, int]) -> Tensor:
        """What is to be enlarged to `size`, height and width in pixels."""
        if "image" not in batch:
            raise DataError("this model enlarges images and was given none: draw it in a cascade, or give image=FILE")
        found = tuple(batch["image"].shape[2:])
        if tuple(side * self.factor for side in found) != size:
            found, size = ("x".join(map(str, sides)) for sides in (found, size))
            raise DataError(f"an image of {found} pixels enlarged {self.factor} times is not {size}; set image_size")
        return batch["image"]

    def cropped(self, images: Tensor, position: Tensor) -> Tensor:
        """A square of `crop` pixels out of each image (B C H W), wherever its position says."""
        if self.crop is None:
            return images
        height, width = images.shape[2:]
        if min(height, width) < self.crop:
            raise DataError(f"objective.crop={self.crop} does not fit in an image of {height}x{width} pixels")
        u = uniform(keys(self.seed, "crop", position.to(images.device)), (2,))  # B 2
        corner = (u * u.new_tensor([height - self.crop + 1, width - self.crop + 1])).long()
        steps = torch.arange(self.crop, device=images.device)
        rows, columns = (steps + corner[:, axis, None] for axis in (0, 1))  # B crop
        of = torch.arange(len(images), device=images.device)[:, None, None]
        return images[of, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)  # B crop crop C -> B C crop crop


def shrink(images: Tensor, factor: int) -> Tensor:
    """uint8 images (B 3 H W) -> float32 [-1, 1] with 1/factor of the sides, by an antialiased bicubic filter.

    The filter datasets are resized by, so that a stage is trained on what the stage before has learned to draw.
    """
    height, width = images.shape[2:]
    if height % factor or width % factor:
        raise DataError(f"an image of {height}x{width} pixels cannot be made {factor} times smaller; set image_size")
    x = images.float() / 127.5 - 1
    return F.interpolate(x, (height // factor, width // factor), mode="bicubic", antialias=True).clamp(-1, 1)


def enlarge(images: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """uint8 or float images (B 3 h w) -> float32 [-1, 1] of that height and width, bilinear."""
    x = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def _pixels(batch: dict) -> Tensor:
    if "image" not in batch:
        raise DataError("super-resolution needs the images themselves, the data has latents: switch their cache off")
    return batch["image"]
