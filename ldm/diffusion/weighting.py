"""Weights on the squared error of the raw network output F, one per image.

weight(snr, gain) with snr = alpha^2 / sigma^2 and gain = (d x0 / d F)^2. A weight w on the error of x0 is w * gain on
F's, and one on the error of eps is w * snr * gain: papers that differ in what they predict are told apart only here.
"""

import torch
from torch import Tensor


def unit(snr: Tensor, gain: Tensor) -> Tensor:
    """Every F counts the same: L_simple, Eq. (14), arXiv:2006.11239 for eps."""
    return torch.ones_like(snr)


def snr(snr: Tensor, gain: Tensor) -> Tensor:
    """The error of x0 times the SNR, which is the plain error of eps whatever is predicted: arXiv:2202.00512."""
    return snr * gain


def min_snr(snr: Tensor, gain: Tensor, gamma: float = 5.0) -> Tensor:
    """The error of x0 times min(SNR, gamma): §3.4, arXiv:2303.09556."""
    return snr.clamp(max=gamma) * gain


def p2(snr: Tensor, gain: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """The error of eps over (k + SNR)^gamma: arXiv:2204.00227."""
    return snr * gain / (k + snr) ** gamma


def edm(snr: Tensor, gain: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The error of x0 times (sigma^2 + sigma_d^2) / (sigma sigma_d)^2: Table 1, arXiv:2206.00364."""
    return (snr + 1 / sigma_data**2) * gain


def sigmoid(snr: Tensor, gain: Tensor, bias: float = 2.0) -> Tensor:
    """The error of eps times sigmoid(bias - log SNR): arXiv:2303.00848."""
    return snr * gain * torch.sigmoid(bias - snr.log())
