"""A small convolutional classifier, whose features measure how far drawn images are from real ones.

    x, y coordinates and the image | conv 4x4 s2 | (residual block, down) x 3 | GN SiLU, mean over positions | linear

It is no paper's; Inception-v3 (inception.py) takes 23M parameters and ImageNet to be the same for photographs. The two
coordinate channels (arXiv:1807.03247) let the mean over positions still say where something is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.nn.convolution import Downsample, ResBlock, group_norm, silu

GROUPS = 8


class Classifier(nn.Module):
    """Images in [-1, 1] of any size (B C H W) -> features (B D), D = channels[-1], and logits (B K)."""

    def __init__(self, in_channels: int, num_classes: int, channels: Sequence[int] = (32, 64, 64)):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels + 2, channels[0], 4, stride=2, padding=1)
        stages = []
        for i, width in enumerate(channels):
            stages += [Downsample(channels[i - 1])] if i else []
            stages += [ResBlock(channels[max(i - 1, 0)], width, groups=GROUPS)]
        self.stages = nn.Sequential(*stages)
        self.norm = group_norm(channels[-1], GROUPS)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv_in(torch.cat([x, coordinates(x)], dim=1))  # B C0 H/2 W/2
        features = silu(self.norm(self.stages(h))).mean((2, 3))  # B D
        return features, self.head(features)


def coordinates(x: Tensor) -> Tensor:
    """Row and column of every pixel in [-1, 1]: (B 2 H W)."""
    rows, columns = (torch.linspace(-1, 1, side, device=x.device, dtype=x.dtype) for side in x.shape[2:])
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(x), -1, -1, -1)
