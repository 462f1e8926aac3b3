"""The CPU's own ways of computing what torch also computes: equal values, equal derivatives, used where they pay."""

import pytest
import torch
import torch.nn.functional as F

from ldm.nn import blockwise
from ldm.nn.convolution import Conv2d
from ldm.nn.linear import DTYPES, ONEDNN

pytestmark = pytest.mark.skipif(not ONEDNN, reason="this build of torch has no oneDNN")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def assert_same(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert ((a - b).abs().max() / b.abs().max()).item() <= tolerance


def with_gradients(f, *inputs):
    out = f(*inputs)
    return out, *torch.autograd.grad(out.square().sum(), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries, keys", [(512, 512), (300, 900)])
def test_attention_by_blocks(dtype, queries, keys):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 32).to(dtype).transpose(1, 2).requires_grad_() for n in (queries, keys, keys))
    assert blockwise.blockwise_is_faster(q, k)
    out = blockwise.BlockAttention.apply(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    ours = with_gradients(blockwise.BlockAttention.apply, q, k, v)
    assert_same(ours, with_gradients(F.scaled_dot_product_attention, q, k, v), TOLERANCE[dtype])


def test_attention_by_blocks_is_left_alone_where_it_does_not_pay():
    few_keys, small, double = torch.randn(1, 2, 77, 64), torch.randn(1, 2, 256, 8), torch.randn(1, 1, 512, 64).double()
    assert not blockwise.blockwise_is_faster(torch.randn(1, 2, 4096, 64), few_keys)
    assert not blockwise.blockwise_is_faster(small, small)
    assert not blockwise.blockwise_is_faster(double, double)


@pytest.mark.parametrize("dtype, channels, kernel, side", [
    (torch.float32, (1280, 768), 3, 4), (torch.bfloat16, (1280, 768), 3, 4), (torch.float32, (128, 64), 1, 32),
])  # fmt: skip
def test_convolution_as_product(dtype, channels, kernel, side):
    if dtype not in DTYPES:
        pytest.skip("this CPU has no bfloat16 products")
    torch.manual_seed(0)
    layer = Conv2d(*channels, kernel, padding=kernel // 2).to(dtype)
    x = torch.randn(2, channels[0], side, side).to(dtype).requires_grad_()
    assert layer.is_product(x)
    assert not layer.is_product(x.to(memory_format=torch.channels_last))
    ours = with_gradients(lambda x, *_: layer(x), x, *layer.parameters())
    theirs = with_gradients(lambda *a: F.conv2d(*a, padding=kernel // 2), x, *layer.parameters())
    assert_same(ours, theirs, TOLERANCE[dtype])
    assert torch.equal(layer(x)[1:], layer(x[1:])), "an image's result must not depend on its batch"
