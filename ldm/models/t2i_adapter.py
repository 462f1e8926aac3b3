"""T2I-Adapter, arXiv:2302.08453: a small network turns a picture into features that are added inside a UNet's encoder.

    hint -> PixelUnshuffle -> conv_in -> level 0 -> level 1 -> level 2 -> level 3     run once per picture, not per step
                                            |          |          |          |
                                            +--------- features -------------+        -> `features` of UNet.forward

    level = [average pooling] -> [1x1] -> residual blocks (conv3x3, ReLU, conv) -> [1x1]

| config  | channels          | unshuffle | halved | blocks            | parameters, hint of 1 / 3 channels |
| ------- | ----------------- | --------- | ------ | ----------------- | ---------------------------------- |
| full    | 320 640 1280 1280 | 8         | 1 2 3  | 2                 | 77,000,640 / 77,369,280            |
| full_xl | 320 640 1280 1280 | 16        | 2      | 2                 | 77,553,600 / 79,028,160            |
| light   | 320 640 1280 1280 | 8         | 1 2 3  | 4, a quarter wide | 18,689,200 (3 channels)            |

The UNet of SDXL has three levels: there the fourth feature goes to the middle.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.utils.errors import ConfigError


class Block(nn.Module):
    """x + conv(relu(conv3x3(x))), without norms: (B C H W) -> (B C H W)."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class Level(nn.Sequential):
    """Residual blocks at one resolution; a light one runs them on a quarter of the channels, its 3x3 kernels twice."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, *, down: bool, light: bool):
        width = out_channels // 4 if light else out_channels
        super().__init__()
        self.down = nn.AvgPool2d(2, ceil_mode=True) if down else nn.Identity()
        self.conv_in = nn.Conv2d(in_channels, width, 1) if light or in_channels != width else nn.Identity()
        self.blocks = nn.Sequential(*(Block(width, 3 if light else 1) for _ in range(num_res_blocks)))
        self.conv_out = nn.Conv2d(width, out_channels, 1) if light else nn.Identity()


class T2IAdapter(nn.Module):
    """Features of a hint (B in_channels H W) in [0, 1]: one per level of the UNet, finest first; SDXL's middle too.

    Raises ConfigError for a hint whose sides the first step, `unshuffle`, does not divide.
    """

    slot = "features"
    global_pool = False  # features keep the layout

    def __init__(
        self,
        in_channels: int = 3,  # of the hint
        channels: Sequence[int] = (320, 640, 1280, 1280),  # of the UNet's levels
        *,
        num_res_blocks: int = 2,
        unshuffle: int = 8,  # the pixels of so large squares become channels
        halved: Sequence[int] = (1, 2, 3),  # levels that begin with half the sides
        light: bool = False,
    ):
        super().__init__()
        self.hint_channels, self.unshuffle, self.light = in_channels, unshuffle, light
        self.widths, self.halved = list(channels), list(halved)  # channels of the features; levels
        width = in_channels * unshuffle**2
        self.conv_in = nn.Identity() if light else nn.Conv2d(width, channels[0], 3, padding=1)
        widths = [width if light else channels[0], *channels]
        self.levels = nn.ModuleList(
            Level(widths[i], channels[i], num_res_blocks, down=i in halved, light=light) for i in range(len(channels))
        )

    @property
    def num_encoded(self) -> int:
        return len(self.levels)

    def forward(self, hint: Tensor) -> list[Tensor]:
        if any(side % self.unshuffle for side in hint.shape[2:]):
            height, width = hint.shape[2:]
            raise ConfigError(f"the hint is {height}x{width} pixels, which {self.unshuffle} does not divide")
        h = self.conv_in(F.pixel_unshuffle(hint, self.unshuffle))
        features = []
        for level in self.levels:
            h = level(h)
            features.append(h)
        return features

    def encode(self, hint: Tensor) -> list[Tensor]:
        """The features: all there is to compute."""
        return self(hint.to(next(self.parameters())))

    def steer(self, x: Tensor, t: Tensor, encoded: Sequence[Tensor], cond: dict) -> Sequence[Tensor]:
        """The same features at every step."""
        return encoded
