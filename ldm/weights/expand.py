"""Weights for networks that take more channels than the published ones: instructions and pictures beside x_t."""

import torch
from torch.nn.functional import pad

from ldm.models.unet import UNet
from ldm.utils.errors import WeightsError


def expand_input(net: UNet, in_channels: int) -> UNet:
    """The network with `in_channels` inputs, changed in place: the new ones have weight zero, so at first it answers as
    before whatever they hold. Stable Diffusion's inpainting model began so, with 9 for 4 (arXiv:2112.10752).

    Raises WeightsError for fewer channels than there are.
    """
    if in_channels < net.in_channels:
        raise WeightsError(f"the UNet has in_channels={net.in_channels}, expected at most {in_channels}")
    conv = net.encoder.conv_in
    more = (0, 0, 0, 0, 0, in_channels - net.in_channels)
    conv.weight = torch.nn.Parameter(pad(conv.weight.detach(), more), conv.weight.requires_grad)
    conv.in_channels = net.in_channels = in_channels
    return net
