"""Weights for networks that take more channels than the published ones: instructions and pictures beside x_t."""

import torch
from torch import nn
from torch.nn.functional import pad

from ldm.models.unet import UNet
from ldm.utils.errors import WeightsError


def expand_input(net: nn.Module, in_channels: int) -> nn.Module:
    """The network with `in_channels` inputs, changed in place: the new ones have weight zero, so at first it answers as
    before whatever they hold. Stable Diffusion's inpainting model began so, with 9 for 4 (arXiv:2112.10752).

    Raises WeightsError for fewer channels than there are, and for more of another network than a UNet.
    """
    if in_channels == net.in_channels:
        return net
    if not isinstance(net, UNet):
        raise WeightsError(f"{type(net).__name__} has in_channels={net.in_channels}; only a UNet can get {in_channels}")
    if in_channels < net.in_channels:
        raise WeightsError(f"the UNet has in_channels={net.in_channels}, expected at most {in_channels}")
    conv = net.encoder.conv_in
    more = (0, 0, 0, 0, 0, in_channels - net.in_channels)
    conv.weight = torch.nn.Parameter(pad(conv.weight.detach(), more), conv.weight.requires_grad)
    conv.in_channels = net.in_channels = in_channels
    return net
