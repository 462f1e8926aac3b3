"""PatchGAN: one logit per 70x70 patch (arXiv:1611.07004, section 3.2 and appendix 6.1.2), as used by taming and LDM.

    conv 4x4 s2  64 | conv 4x4 s2 128 BN | conv 4x4 s2 256 BN | conv 4x4 s1 512 BN | conv 4x4 s1 1
"""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Logits of overlapping patches, positive for real: (B C H W) -> (B 1 h w); 256 px -> 30x30, 2,765,633 weights."""

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 3):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_init)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _init(module: nn.Module) -> None:
    """DCGAN's initialisation: arXiv:1511.06434, section 4."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
