"""ControlNet, arXiv:2302.05543: a copy of a UNet's encoder and middle reads a picture and steers the UNet beside it.

    hint -> HintEncoder ---+                                 once per picture
                           |
    x ------> conv_in --> (+) --> level 0 --> ... --> level n --> middle       the copy
                           |         |                   |          |
                          zero      zero                zero       zero        1x1 convolutions that start at zero
                           |         |                   |          |
                           +---------+--- residuals -----+----------+          -> `residuals` of UNet.forward

| copied from | zero convolutions | parameters    |
| ----------- | ----------------- | ------------- |
| sd15        | 12 + 1            |   361,279,120 |
| sdxl        | 9 + 1             | 1,251,014,160 |

Names of conditions and shapes as in `ldm.models.unet`.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.unet import UNet, check_condition
from ldm.nn.convolution import Conv2d, zero_init
from ldm.utils.errors import ConfigError

SEEN = ("context", "context_mask", "pooled", "size", "labels", "image")  # of the base's conditions; no image tokens


class HintEncoder(nn.ModuleList):
    """3x3 convolutions with SiLU between; each width but the first halves the sides: (B C H W) -> (B C' h w)."""

    def __init__(self, in_channels: int, widths: Sequence[int], out_channels: int):
        super().__init__([nn.Conv2d(in_channels, widths[0], 3, padding=1)])
        for width, wider in pairwise(widths):
            self.append(nn.Conv2d(width, width, 3, padding=1))
            self.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.append(zero_init(nn.Conv2d(widths[-1], out_channels, 3, padding=1)))

    def forward(self, hint: Tensor) -> Tensor:
        first, *others = self
        h = first(hint)
        for conv in others:
            h = conv(F.silu(h))
        return h


class ControlNet(nn.Module):
    """Residuals for `net`, the UNet whose encoder and middle are copied: Eq. (2), arXiv:2302.05543.

    Until it is trained all of them are zero. The hint is in [0, 1], not in [-1, 1] as images are, and is encoded once:

        encoded = controlnet.encode(hint)
        net(x, t, **cond, residuals=controlnet.steer(x, t, encoded, cond))

    global_pool: residuals are means over the picture, so that it gives content and no layout (the "shuffle" model).
    Raises ConfigError where x, hint and widths do not fit together.
    """

    slot = "residuals"
    num_encoded = 1

    def __init__(
        self,
        net: UNet,
        *,
        hint_channels: int = 3,
        hint_widths: Sequence[int] = (16, 32, 96, 256),  # one more than the codec halves the sides
        global_pool: bool = False,
    ):
        super().__init__()
        self.in_channels, self.context_dim, self.global_pool = net.in_channels, net.context_dim, global_pool
        parts = copy.deepcopy((net.conditioning, net.encoder, net.middle))
        self.conditioning, self.encoder, self.middle = parts
        skip_channels = self.encoder.skip_channels
        self.hint_encoder = HintEncoder(hint_channels, hint_widths, skip_channels[0])
        self.zero_convs = nn.ModuleList(zero_init(Conv2d(width, width, 1)) for width in skip_channels)
        self.zero_middle = zero_init(Conv2d(skip_channels[-1], skip_channels[-1], 1))
        self.requires_grad_()

    @property
    def hint_channels(self) -> int:
        return self.hint_encoder[0].in_channels

    @property
    def widths(self) -> list[int]:
        """Channels of the residuals."""
        return [conv.out_channels for conv in (*self.zero_convs, self.zero_middle)]

    @property
    def downsample(self) -> int:
        """Pixels of the hint per latent, on a side."""
        return 2 ** (len(self.hint_encoder) // 2 - 1)

    def encode(self, hint: Tensor) -> list[Tensor]:
        """Hint (B hint_channels H W) in [0, 1] -> one tensor (B C h w)."""
        return [self.hint_encoder(hint.to(self.zero_middle.weight))]

    def steer(self, x: Tensor, t: Tensor, encoded: Sequence[Tensor], cond: dict) -> list[Tensor]:
        """Residuals at x (B C h w) and t (B), of the conditions that it sees among the base's."""
        return self(x, t, *encoded, **{name: cond[name] for name in SEEN if name in cond})

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        hint: Tensor,  # encoded
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        size: Tensor | None = None,
        labels: Tensor | None = None,
        image: Tensor | None = None,
    ) -> list[Tensor]:
        """One residual per skip of the UNet, finest first, then one for the middle."""
        emb = self.conditioning(t, pooled, size, labels, x.dtype)  # B E
        check_condition("context", context, self.context_dim, "context_dim")
        if image is not None and self.in_channels > x.shape[1]:  # copied from an inpainting UNet; others see x alone
            x = torch.cat([x, image], dim=1)
        h = self.encoder.conv_in(x)
        if h.shape[2:] != hint.shape[2:]:
            (a, b), (c, d) = hint.shape[2:], h.shape[2:]
            raise ConfigError(
                f"the encoded hint is {a}x{b}, x is {c}x{d}: give a hint of the image's size, and one more of "
                f"hint_widths than the codec halves the sides (there are {len(self.hint_encoder) // 2})"
            )
        skips = [h + hint]
        for level in self.encoder.levels:
            skips += level(skips[-1], emb, context, context_mask)
        residuals = [conv(skip) for conv, skip in zip(self.zero_convs, skips, strict=True)]
        residuals.append(self.zero_middle(self.middle(skips[-1], emb, context, context_mask)))
        return [r.mean((2, 3), keepdim=True) for r in residuals] if self.global_pool else residuals
