"""Weights for networks that take more channels than the published ones: instructions and pictures beside x_t."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.models.unet import UNet
from ldm.utils.errors import WeightsError
from ldm.weights.ledger import listing


def expand_input(net: UNet, in_channels: int) -> UNet:
    """The network with `in_channels` inputs, changed in place: the new ones have weight zero, so at first it answers as
    before whatever they hold. Stable Diffusion's inpainting model began so, with 9 for 4 (arXiv:2112.10752).

    Raises WeightsError for fewer channels than there are.
    """
    if in_channels < net.in_channels:
        raise WeightsError(f"the UNet has in_channels={net.in_channels}, expected at most {in_channels}")
    conv = net.encoder.conv_in
    conv.weight = torch.nn.Parameter(_widened(conv.weight.detach(), in_channels), conv.weight.requires_grad)
    conv.in_channels = net.in_channels = in_channels
    return net


def to_inpainting(custom: Mapping[str, Tensor], inpainting: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict:
    """custom + (inpainting - base), the inpainting model of a fine-tuned one: state dicts of UNets in any one layout.

    Channels that only the inpainting model reads are its own. Raises WeightsError where names differ.
    """
    for state in (inpainting, base):
        if odd := sorted(custom.keys() ^ state.keys()):
            raise WeightsError(f"three UNets of one layout are needed, these differ in {listing(odd)}")
    merged = {}
    for name, weight in custom.items():
        target = inpainting[name]
        start, original = ((w if w.shape == target.shape else _widened(w, target.shape[1])).float()
                           for w in (weight, base[name]))  # fmt: skip
        merged[name] = (start + (target.float() - original)).to(weight.dtype)
    return merged


def _widened(weight: Tensor, in_channels: int) -> Tensor:
    """Kernels (O I 3 3) of the first convolution with zeros for the channels that are new."""
    return pad(weight, (0, 0, 0, 0, 0, in_channels - weight.shape[1])).clone()
