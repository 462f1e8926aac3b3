"""nn.Linear at the speed of the machine: on a CPU it goes to oneDNN.

torch sends float32 matrix products to MKL, which uses half of an AMD core's vector width, but convolutions and
bfloat16 to oneDNN, which uses all of it: 90 against 210 GFLOP/s on one EPYC core. In bfloat16 what is saved is the
copy that torch makes of the bias. The operator is the one that torch.compile emits.
`torch.backends.mkldnn.flags(enabled=False)` turns it off, as it does for convolutions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
DTYPES = [torch.float32] + [torch.bfloat16] * (ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported())
MIN_WORK = 1 << 21  # multiply-adds; below it the call costs more than the product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (... I), (O I), (O) -> (... O)."""
    if use_onednn(x, weight):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def use_onednn(x: Tensor, weight: Tensor) -> bool:
    """Large products on a CPU; a weight with gaps between its rows would take oneDNN's reference code."""
    return (
        onednn_takes(x)
        and x.dtype == weight.dtype
        and x.numel() * weight.shape[0] >= MIN_WORK
        and (weight.is_contiguous() or weight.t().is_contiguous())
    )


def onednn_takes(x: Tensor) -> bool:
    """Whether products of such tensors may go to oneDNN at all."""
    return (
        ONEDNN
        and x.is_cpu
        and x.dtype in DTYPES
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class OneDNNLinear(torch.autograd.Function):
    """The product and its derivatives, which are products again (so that second derivatives exist)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # M O
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if to_x else None,
            linear(rows.t(), x.flatten(0, -2).t()) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


def matmul_t(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of two matrices, without derivatives: (M I), (N I) -> (M N)."""
    if use_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.t()


class Linear(nn.Linear):
    """nn.Linear through `linear`: same parameters, same names."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
