"""Images -> what CLIP's vision tower sees in them, arXiv:2103.00020: for image prompts, adapters and metrics."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning.clip import CLIPVision, check_skip
from ldm.conditioning.conditioner import Encoder
from ldm.utils.errors import DataError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the training images, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


class CLIPImageEncoder(Encoder):
    """Images (uint8 3 H W each, of any size) -> context (B 1+N D), not normed, and pooled, the image's embedding (B P).

    The image of "no condition", None, is zeros after normalisation, the mean grey. Raises DataError for other images.
    """

    field = "image"
    null = None

    def __init__(self, network: CLIPVision, skip: int = 1):
        super().__init__()
        check_skip(skip, network.blocks)
        self.network = network
        self.skip = skip
        self.dims = {"context_dim": network.width, "pooled_dim": network.projection_dim}

    def forward(self, images: Sequence[Tensor | None], device: torch.device) -> dict[str, Tensor]:
        size, dtype = self.network.image_size, self.network.positions.dtype
        blank = torch.zeros(3, size, size)
        pixels = torch.stack([blank if image is None else preprocess(image, size) for image in images])  # B 3 S S
        return self.encode(pixels.to(device, dtype))

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Normalised pixels (B 3 S S) -> their conditions."""
        hidden = self.network(pixels, self.skip)  # B 1+N D
        return {"context": hidden, "pooled": self.network.pool(hidden, self.skip)}


def preprocess(image: Tensor, size: int) -> Tensor:
    """uint8 (3 H W) -> normalised float32 (3 size size): short side resized to `size`, the middle cut out.

    PIL resizes, bicubic and rounded to uint8, as for the pictures that CLIP was trained on: torch's own is two grey
    levels off.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise DataError(f"image is {image.dtype} {tuple(image.shape)}, expected torch.uint8 (3, height, width)")
    short = min(image.shape[1:])
    height, width = (int(size * side / short) for side in image.shape[1:])
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    resized = torch.tensor(np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    top, left = (height - size) // 2, (width - size) // 2
    square = resized[:, top : top + size, left : left + size]
    return (square / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
