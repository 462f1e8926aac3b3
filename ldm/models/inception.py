"""Inception-v3 (arXiv:1512.00567) as TensorFlow published it on 2015-12-05, in whose features FID and KID are measured.

    299 px | stem: 5 convolutions, 35x35x192 | A A A 288 | B 17x17x768 | C C C C | D 8x8x1280 | E E 2048 | mean | linear

Deviations of that network from the paper's, which the numbers in papers depend on: averages of 3x3 do not count the
padding, the last block takes maxima instead, and there are 1008 classes. Names are those of the published files
(pt_inception-2015-12-05-6726825d.pth, and torchvision's).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.io.tensors import read_tensors
from ldm.utils.errors import WeightsError

FEATURES, CLASSES, SIDE = 2048, 1008, 299
Step = tuple  # (channels, kernel, stride): a convolution
SQUARE, ROW, COLUMN = 3, (1, 7), (7, 1)


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. Padded where it has no stride, unless told otherwise."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int] = 1, stride: int = 1, padded: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(side // 2 for side in sides) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Branches(nn.Module):
    """Chains of convolutions side by side, and a pooled branch: their outputs one after the other along the channels.

    chains: name -> steps. A step that is a list forks: all of its convolutions read what came before.
    pool: channels of the convolution behind it; None has none, and the block halves the sides.
    """

    def __init__(self, c_in: int, pool: int | None, last: bool = False, **chains: list[Step | list[Step]]):
        super().__init__()
        self.paths: list[list[list[str]]] = []  # chain -> step -> names of its convolutions
        self.last = last
        for name, steps in chains.items():
            width, path = c_in, []
            for number, step in enumerate(steps, 1):
                forks = step if isinstance(step, list) else [step]
                names = [f"{name}_{number}{'ab'[i]}" for i in range(len(forks))]
                names = names if len(forks) > 1 else [f"{name}_{number}" if len(steps) > 1 else name]
                for own, fork in zip(names, forks, strict=True):
                    self.add_module(own, Conv(width, *fork))
                width, path = forks[0][0], [*path, names]
            self.paths.append(path)
        self.branch_pool = Conv(c_in, pool) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for path in self.paths:
            ends = [x]
            for names in path:
                ends = [self.get_submodule(name)(ends[0]) for name in names]
            outputs += ends
        return torch.cat([*outputs, self._pooled(x)], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.branch_pool is None:
            return F.max_pool2d(x, 3, stride=2)
        if self.last:
            return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        return self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))


def block_a(c_in: int, pool: int) -> Branches:
    """35x35, its Fig. 5 -> 224 + pool channels."""
    return Branches(c_in, pool, branch1x1=[(64,)], branch5x5=[(48,), (64, 5)],
                    branch3x3dbl=[(64,), (96, SQUARE), (96, SQUARE)])  # fmt: skip


def block_b() -> Branches:
    """35x35x288 -> 17x17x768, its Fig. 10."""
    return Branches(288, None, branch3x3=[(384, SQUARE, 2)], branch3x3dbl=[(64,), (96, SQUARE), (96, SQUARE, 2)])


def block_c(width: int) -> Branches:
    """17x17x768, its Fig. 6."""
    return Branches(768, 192, branch1x1=[(192,)], branch7x7=[(width,), (width, ROW), (192, COLUMN)],
                    branch7x7dbl=[(width,), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)])  # fmt: skip


def block_d() -> Branches:
    """17x17x768 -> 8x8x1280."""
    return Branches(768, None, branch3x3=[(192,), (320, SQUARE, 2)],
                    branch7x7x3=[(192,), (192, ROW), (192, COLUMN), (192, SQUARE, 2)])  # fmt: skip


def block_e(c_in: int, last: bool = False) -> Branches:
    """8x8 -> 2048 channels, its Fig. 7."""
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Branches(c_in, 192, last, branch1x1=[(320,)], branch3x3=[(384,), fork],
                    branch3x3dbl=[(448,), (384, SQUARE), fork])  # fmt: skip


class Inception(nn.Module):
    """Pixels in [-1, 1] (B 3 299 299) -> features "pool3" (B 2048), and logits (B 1008).

    The logits lack the bias, as in the program of arXiv:1606.03498, whose score everybody reports.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = block_b()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(block_c, (128, 160, 160, 192))
        self.Mixed_7a = block_d()
        self.Mixed_7b, self.Mixed_7c = block_e(1280), block_e(2048, last=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # B 64 147 147
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # B 192 71 71
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # B 288 35 35
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # B 768 17 17
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # B 2048 8 8
        features = x.mean((2, 3))
        return features, F.linear(features, self.fc.weight)


def load_inception(path: str) -> Inception:
    """From the published file. Raises WeightsError unless it holds every tensor in its shape."""
    with torch.device("meta"):
        network = Inception()
    tensors = read_tensors(path)
    expected = {n: t.shape for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    if wrong := [name for name, shape in expected.items() if name not in tensors or tensors[name].shape != shape]:
        raise WeightsError(
            f"{path}: not the Inception-v3 of 2015-12-05 ({len(wrong)} tensors missing or of another shape, such as "
            f"{wrong[0]}); give pt_inception-2015-12-05-6726825d.pth"
        )
    network = network.to_empty(device="cpu")
    network.load_state_dict({name: tensors[name] for name in expected}, strict=False)
    return network.eval()


def clean(images: Tensor) -> Tensor:
    """Antialiased bicubic, as clean-fid (arXiv:2104.11222): uint8 (B 3 H W) -> (B 3 299 299), as the two below."""
    x = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return (x.clamp(0, 255) - 128) / 128


def torch_bilinear(images: Tensor) -> Tensor:
    """Not antialiased, as pytorch-fid, whose scaling differs too."""
    return F.interpolate(images.float() / 255, (SIDE, SIDE), mode="bilinear") * 2 - 1


def tensorflow(images: Tensor) -> Tensor:
    """Bilinear without half pixels, as TensorFlow 1, with it the first FID (arXiv:1706.08500), and torch-fidelity."""
    rows, columns = (torch.arange(SIDE, device=images.device) * (n / SIDE) for n in images.shape[2:])
    places = [2 * at / (n - 1) - 1 for at, n in ((columns, images.shape[3]), (rows, images.shape[2]))]
    grid = torch.stack(torch.meshgrid(*places, indexing="xy"), dim=-1).expand(len(images), -1, -1, -1)  # B 299 299 2
    x = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=True)
    return (x - 128) / 128


# The filter moves a FID by more than many papers claim.
RESIZES = {"clean": clean, "torch_bilinear": torch_bilinear, "tensorflow": tensorflow}
