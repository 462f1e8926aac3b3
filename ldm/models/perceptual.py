"""LPIPS, the learned perceptual distance: arXiv:1801.03924, Eq. (1), on the features of VGG16 (arXiv:1409.1556).

The weights come from files the user names: torchvision's VGG16, and the 1,472 head weights of the `lpips` package.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.io.tensors import read_tensors
from ldm.utils.errors import WeightsError

# (index in torchvision's `features`, input channels, output channels); a tap after the last convolution of each stage
STAGES = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
SHIFT = (-0.030, -0.088, -0.188)  # ImageNet's mean and deviation, for images in [-1, 1]
SCALE = (0.458, 0.448, 0.450)

_CONV = re.compile(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)")
_HEAD = re.compile(r"lin(\d)\.model\.1\.weight")


def load_lpips(vgg: str, heads: str) -> "LPIPS":
    """LPIPS from torchvision's VGG16 file and the heads' file (one file of the `lpips` package may be both)."""
    return LPIPS({**read_tensors(vgg), **read_tensors(heads)})


class LPIPS(nn.Module):
    """Distance of two batches of images in [-1, 1]: (B 3 H W) x 2 -> (B,). Sides of at least 16.

    Its weights are buffers outside the state dict: no optimizer moves them, no checkpoint repeats them, and gradients
    flow through to the images. Raises WeightsError when a tensor is missing or has another shape.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        named = _rename(tensors)
        for stage, convs in enumerate(STAGES):
            for index, c_in, c_out in convs:
                self._keep(named, f"weight_{index}", (c_out, c_in, 3, 3))
                self._keep(named, f"bias_{index}", (c_out,))
            self._keep(named, f"head_{stage}", (1, convs[-1][2], 1, 1))
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (x - self.shift) / self.scale, (y - self.shift) / self.scale
        distance = x.new_zeros(len(x))
        for stage, convs in enumerate(STAGES):
            x, y = self._stage(x, stage, convs), self._stage(y, stage, convs)  # B C h w
            apart = (F.normalize(x, eps=1e-10) - F.normalize(y, eps=1e-10)).square()
            distance = distance + F.conv2d(apart, self.get_buffer(f"head_{stage}")).mean((1, 2, 3))
        return distance

    def _stage(self, x: Tensor, stage: int, convs: tuple) -> Tensor:
        if stage > 0:
            x = F.max_pool2d(x, 2)
        for index, _, _ in convs:
            weight, bias = self.get_buffer(f"weight_{index}"), self.get_buffer(f"bias_{index}")
            x = F.relu(F.conv2d(x, weight, bias, padding=1), inplace=True)
        return x

    def _keep(self, named: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
        if name not in named or named[name].shape != shape:
            found = tuple(named[name].shape) if name in named else "nothing"
            raise WeightsError(f"LPIPS: {name} should be {shape}, found {found}; give VGG16's and the heads' files")
        self.register_buffer(name, named[name].float(), persistent=False)


def _rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's and the `lpips` package's names -> weight_0, bias_0, ..., head_0, ..."""
    named = {}
    for name, tensor in tensors.items():
        if conv := _CONV.fullmatch(name):
            named[f"{conv[2]}_{conv[1]}"] = tensor
        elif head := _HEAD.fullmatch(name):
            named[f"head_{head[1]}"] = tensor
    return named
