"""PixArt against diffusers' PixArtTransformer2DModel, and Sigma's compression, which diffusers lacks, against words."""

import pytest
import torch
import torch.nn.functional as F

from ldm.models.pixart import ImageAttention, PixArt
from ldm.weights.pixart import (
    from_diffusers,
    from_original,
    pixart_from_config,
    pixart_to_config,
    to_diffusers,
    to_original,
)  # fmt: skip

diffusers = pytest.importorskip("diffusers")

SIZES = {  # heads, width of a head, blocks and width of the text are small, all else as published
    "alpha 256": dict(sample_size=32),
    "alpha 512": dict(sample_size=64),
    "alpha 1024": dict(sample_size=128),  # its file says no more: micro-conditions, interpolation 2
    "sigma 256": dict(sample_size=32, interpolation_scale=0.5, use_additional_conditions=False),
    "sigma 1024": dict(sample_size=128, interpolation_scale=2, use_additional_conditions=False),
    "sigma 2k": dict(sample_size=256, interpolation_scale=4, use_additional_conditions=False),
    "patches of 4": dict(sample_size=16, patch_size=4, in_channels=3, out_channels=3),
}
SMALL = dict(num_attention_heads=2, attention_head_dim=24, num_layers=2, cross_attention_dim=48, caption_channels=20)


def pair(sizes, seed=0, scale=1.0):
    """Ours and theirs with the same weights; what starts constant is drawn anew."""
    torch.manual_seed(seed)
    theirs = diffusers.PixArtTransformer2DModel(**SMALL | sizes).eval()
    for parameter in theirs.parameters():
        constant = parameter.min() == parameter.max()
        parameter.data.add_(0.1 * torch.randn_like(parameter) * constant).mul_(scale)
    ours = PixArt(**pixart_from_config(dict(theirs.config))).eval()
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours.state_dict()))
    return ours, theirs


def error(ours, theirs, grid, mask=None):
    p = ours.patch_size
    x, t = torch.randn(2, ours.in_channels, grid[0] * p, grid[1] * p), torch.tensor([999.0, 17.0])
    context, size, added = torch.randn(2, 7, ours.context_dim), None, {"resolution": None, "aspect_ratio": None}
    if ours.embed.num_sizes:
        size = torch.tensor([[1024.0, 768, 1024 / 768], [512, 2048, 0.25]])
        added = {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]}
    expected = theirs(x, context, t, added_cond_kwargs=added, encoder_attention_mask=mask).sample
    ours = ours(x, t, context=context, context_mask=mask, size=size)
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("scale", [1, 1 / 16])
@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_equals_diffusers(name, scale):
    ours, theirs = pair(SIZES[name], scale=scale)
    assert error(ours, theirs, (6, 6)) <= 2e-5
    mask = torch.tensor([[True] * 3 + [False] * 4, [True] * 7])
    assert error(ours, theirs, (5, 8), mask) <= 2e-5


@torch.no_grad()
def test_its_own_size_equals_diffusers():
    assert error(*pair(SIZES["alpha 256"], seed=1), (16, 16)) <= 2e-5


@pytest.mark.parametrize("name", SIZES)
def test_round_trips_are_bit_exact(name):
    ours, theirs = pair(SIZES[name])
    published = to_diffusers(ours.state_dict())
    assert published.keys() == theirs.state_dict().keys()
    assert all(torch.equal(published[key], value) for key, value in theirs.state_dict().items())
    original = to_original(ours.state_dict()) | {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)}
    back = from_original(original, ours.state_dict())
    assert all(torch.equal(back[key], value) for key, value in ours.state_dict().items())
    config = pixart_to_config(ours)
    assert pixart_from_config(config) == pixart_from_config(dict(theirs.config))
    del config["_class_name"]
    assert diffusers.PixArtTransformer2DModel(**config).state_dict().keys() == published.keys()


@torch.no_grad()
def test_compression_in_words():
    """§2.4 of arXiv:2403.04692, head by head and square by square."""
    torch.manual_seed(0)
    dim, heads, (h, w) = 12, 2, (4, 6)
    layer = ImageAttention(dim, heads, kv_ratio=2).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, h * w, dim).double()
    q, k, v = layer.qkv(x).split(dim, dim=2)

    def compress(tokens):
        places = tokens.reshape(2, h, w, dim)
        conv, rows = layer.compression.conv, []
        for i in range(0, h, 2):
            for j in range(0, w, 2):
                square = places[:, i : i + 2, j : j + 2]  # 2 2 2 D
                rows.append(torch.einsum("bijd,dij->bd", square, conv.weight[:, 0]) + conv.bias)
        norm = layer.compression.norm
        return F.layer_norm(torch.stack(rows, 1), (dim,), norm.weight, norm.bias, 1e-5)

    k, v = compress(k), compress(v)
    out = []
    for head in range(heads):
        part = slice(head * dim // heads, (head + 1) * dim // heads)
        weights = (q[..., part] @ k[..., part].mT / (dim // heads) ** 0.5).softmax(-1)
        out.append(weights @ v[..., part])
    expected = layer.out(torch.cat(out, -1))
    assert torch.allclose(layer(x, (h, w)), expected, rtol=1e-10, atol=1e-10)
