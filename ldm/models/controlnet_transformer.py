"""ControlNet for transformers, arXiv:2401.05252 (PixArt-delta), §3.3: copies of the first blocks steer the base.

    hint -> HintEncoder -> tokens                              once per picture
                             |
    x, t, text -> embed --> (+) --> block 0 --> block 1 --> ... --> block n          the copies
                                      |           |                   |
                                     zero        zero                zero            Linear layers that start at zero
                                      |           |                   |
                                      +-----------+-- residuals ------+              -> `residuals` of DiT and PixArt

The base has no encoder and decoder to tell apart, so what copy i gives is added to what block i of the base gives.
Deviations: the hint is encoded as ControlNet does it, by convolutions from pixels to patches, where PixArt-delta takes
the latents of its autoencoder; the first copy reads the patches, where its program gives it what block 0 has made.

Names of conditions and shapes as in `ldm.models.dit` and `ldm.models.pixart`.
"""

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.controlnet import HintEncoder
from ldm.models.dit import DiT
from ldm.models.pixart import PixArt
from ldm.nn.convolution import zero_init
from ldm.nn.linear import Linear
from ldm.utils.errors import ConfigError

SEEN = ("context", "context_mask", "labels", "size")  # of the base's conditions


class ControlNetTransformer(nn.Module):
    """Residuals for `net`, the transformer whose first `num_blocks` blocks are copied with all that feeds them.

    Until it is trained all of them are zero. The hint is in [0, 1] and is encoded once, as that of a `ControlNet`.
    Raises ConfigError where x, hint and numbers do not fit together.
    """

    slot = "residuals"
    num_encoded = 1
    global_pool = False  # tokens keep the layout

    def __init__(
        self,
        net: DiT | PixArt,
        *,
        num_blocks: int = 13,  # of PixArt's 28: Table 3, more give nothing
        hint_channels: int = 3,
        hint_widths: Sequence[int] = (16, 32, 96, 256, 256),  # one more than codec and patches halve the sides
    ):
        super().__init__()
        if not 1 <= num_blocks <= len(net.blocks):
            raise ConfigError(f"num_blocks={num_blocks}: expected 1 to {len(net.blocks)}, the blocks of the base")
        left_out = (*net.blocks[num_blocks:], net.final)
        self.trunk = copy.deepcopy(net, {id(part): nn.Identity() for part in left_out})
        self.trunk.blocks = self.trunk.blocks[:num_blocks]
        width = net.patch_embed.out_channels
        self.hint_encoder = HintEncoder(hint_channels, hint_widths, width)
        self.zero_linears = nn.ModuleList(zero_init(Linear(width, width)) for _ in range(num_blocks))
        self.requires_grad_()

    @property
    def hint_channels(self) -> int:
        return self.hint_encoder[0].in_channels

    @property
    def widths(self) -> list[int]:
        """Channels of the residuals."""
        return [linear.out_features for linear in self.zero_linears]

    def encode(self, hint: Tensor) -> list[Tensor]:
        """Hint (B hint_channels H W) in [0, 1] -> one tensor (B D h w), a vector for each patch."""
        return [self.hint_encoder(hint.to(self.zero_linears[0].weight))]

    def steer(self, x: Tensor, t: Tensor, encoded: Sequence[Tensor], cond: dict) -> list[Tensor]:
        """Residuals at x (B C H W) and t (B), of the conditions that it sees among the base's."""
        return self(x, t, *encoded, **{name: cond[name] for name in SEEN if name in cond})

    def forward(self, x: Tensor, t: Tensor, hint: Tensor, **cond: Tensor | None) -> list[Tensor]:
        """One residual (B N D) for each of the first blocks; cond: what the base takes."""
        p = self.trunk.patch_size
        if tuple(hint.shape[2:]) != (x.shape[2] // p, x.shape[3] // p):
            (a, b), (c, d) = hint.shape[2:], x.shape[2:]
            count = len(self.hint_encoder) // 2
            raise ConfigError(
                f"the encoded hint is {a}x{b}, the patches are {c // p}x{d // p}: give a hint of the image's size, and "
                f"one more of hint_widths than codec and patches halve the sides (there are {count})"
            )
        h, given, _ = self.trunk.enter(x, t, **cond)
        tokens = hint.flatten(2).transpose(1, 2)  # B N D
        h = h + F.pad(tokens, (0, 0, 0, h.shape[1] - tokens.shape[1]))  # conditions may be tokens after the patches
        residuals = []
        for block, zero in zip(self.trunk.blocks, self.zero_linears, strict=True):
            h = block(h, *given)
            residuals.append(zero(h))
        return residuals
