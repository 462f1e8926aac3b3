"""PixArt: published sizes, how it starts, its conditions and grids, the start from DiT, and what goes wrong."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.build import compose, make
from ldm.models.dit import DiT
from ldm.models.pixart import KVCompression, PixArt
from ldm.utils.errors import ConfigError, WeightsError
from ldm.weights.pixart import (
    from_dit,
    pixart_arguments,
    pixart_from_config,
    pixart_from_shapes,
    pixart_to_config,
    to_original,
)

SMALL = dict(sample_size=8, width=24, depth=2, num_heads=2)


def published(name, **changes):
    with torch.device("meta"):
        return make(compose("train", [f"network={name}"])["network"] | {"in_channels": 4} | changes, "network")


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def gmacs(net, side, **conditions):
    """The papers' "Gflops": half of the FLOPs of products, for one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 4, side, side), torch.empty(1), **conditions)
    return counter.get_total_flops() / 2e9


def text(tokens, dim=4096):
    return torch.empty(1, tokens, dim, device="meta")


def tiny(**changes):
    """A small PixArt whose zero-initialised parameters are drawn anew, so that everything matters."""
    torch.manual_seed(0)
    net = PixArt(4, **SMALL | dict(context_dim=6) | changes).eval()
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def inputs(size=(8, 8)):
    torch.manual_seed(1)
    return torch.randn(2, 4, *size), torch.tensor([999.0, 17.0]), torch.randn(2, 5, 6)


@pytest.mark.parametrize(
    "name, count, side, tokens, expected",
    [
        ("pixart_256", 610_856_096, 32, 120, 149.05),
        ("pixart_512", 610_856_096, 64, 120, 617.99),
        ("pixart_1024", 611_349_152, 128, 120, 3254.8),
        ("pixart_sigma_256", 610_856_096, 32, 120, 149.05),
        ("pixart_sigma_512", 610_856_096, 64, 120, 617.99),
        ("pixart_sigma_1024", 610_856_096, 128, 300, 3316.8),
        ("pixart_sigma_2k", 610_856_096, 256, 300, 26182.8),
    ],
)
def test_published_sizes(name, count, side, tokens, expected):
    net = published(name, context_dim=4096)
    size = torch.empty(1, 3, device="meta") if net.embed.num_sizes else None
    assert parameters(net) == count and net.sample_size == side
    assert gmacs(net, side, context=text(tokens), size=size) == pytest.approx(expected, rel=5e-5)


def test_adaln_single_saves_a_quarter_and_compression_saves_compute():
    per_block = published("pixart_512", context_dim=4096, modulation="per_block")
    assert parameters(per_block) == 828_494_240
    compressed = published("pixart_sigma_kv", context_dim=4096)
    added = [m for m in compressed.modules() if isinstance(m, KVCompression)]
    assert len(added) == 14 and parameters(compressed) - 610_856_096 == sum(map(parameters, added))
    saved = 14 * 0.75 * 2 * 4096**2 * 1152 / 1e9  # three of four keys and values, in half of the blocks
    cost = 14 * 2 * 4096 * 1152 / 1e9
    assert gmacs(compressed, 128, context=text(300)) == pytest.approx(3316.79 - saved + cost, rel=1e-4)


def test_small_costs_what_the_small_unet_costs():
    context = text(16, 64)
    unet = published("unet_small", num_classes=None, context_dim=64, pooled_dim=None)
    ours = gmacs(published("pixart_small", context_dim=64), 8, context=context)
    assert ours == pytest.approx(gmacs(unet, 8, context=context), rel=0.03)


@pytest.mark.parametrize("modulation", ["single", "per_block"])
def test_starts_at_zero_without_text_and_every_parameter_gets_a_gradient(modulation):
    x, t, context = inputs()
    knobs = dict(modulation=modulation, num_sizes=3, kv_ratio=2, kv_layers=[1])
    size = torch.tensor([[512.0, 256, 2], [64, 64, 1]])
    fresh = PixArt(4, 6, **SMALL, **knobs)
    assert not fresh(x, t, context=context, size=size).any()
    assert not fresh.blocks[0].cross_attn(torch.randn(2, 16, 24), torch.randn(2, 5, 24)).any()
    outputs = []
    for checkpointing in (False, True):
        net = tiny(**knobs, checkpointing=checkpointing).train()
        outputs.append(net(x, t, context=context, size=size))
        outputs[-1].square().sum().backward()
        assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in net.parameters())
    assert torch.equal(*outputs) and outputs[0].shape == (2, 8, 8, 8)


@torch.no_grad()
def test_per_block_modulation_starts_as_the_identity():
    block = PixArt(4, 6, **SMALL, modulation="per_block").blocks[0]
    x = torch.randn(2, 16, 24)
    assert torch.equal(block(x, torch.randn(2, 24), torch.randn(2, 5, 24), None, (4, 4)), x)


@torch.no_grad()
def test_compression_starts_as_the_mean_of_squares():
    layer = PixArt(4, 6, **SMALL, kv_ratio=2, kv_layers=[0]).blocks[0].attn.compression
    x = torch.randn(2, 5 * 7, 24)  # the odd row and column are left out
    squares = x.unflatten(1, (5, 7))[:, :4, :6].unflatten(2, (3, 2)).unflatten(1, (2, 2)).mean((2, 4)).flatten(1, 2)
    assert torch.allclose(layer(x, (5, 7)), nn.functional.layer_norm(squares, (24,)), atol=1e-5)


@torch.no_grad()
def test_each_condition_matters_and_each_image_sees_its_own():
    x, t, context = inputs((4, 10))
    net = tiny(num_sizes=3)
    given = dict(t=t, context=context, size=torch.tensor([[512.0, 256, 2], [64, 64, 1]]))
    expected = net(x, **given)
    for name, value in given.items():
        other = value.clone()
        other[1] = other[1] + torch.randn(other[1].shape) * 9
        out = net(x, **given | {name: other})
        assert torch.allclose(out[0], expected[0], atol=1e-5), name
        assert not torch.allclose(out[1], expected[1], atol=1e-4), name


@torch.no_grad()
def test_masks_drop_padded_tokens():
    x, t, context = inputs()
    net = tiny()
    mask = torch.tensor([[True] * 2 + [False] * 3, [True] * 4 + [False]])
    out = net(x, t, context=context, context_mask=mask)
    for i, length in enumerate((2, 4)):
        alone = net(x[i : i + 1], t[i : i + 1], context=context[i : i + 1, :length])
        assert torch.allclose(out[i : i + 1], alone, atol=1e-5)


@torch.no_grad()
def test_half_precision():
    x, t, context = inputs()
    net = tiny(kv_ratio=2, kv_layers=[1])
    expected = net(x, t, context=context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(net(x, t, context=context).float(), expected, atol=0.2)
    half = net.bfloat16()(x.bfloat16(), t, context=context)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), expected, atol=0.2)


@torch.no_grad()
def test_starts_from_dit():
    """At the chosen time it computes what the DiT computes without a class, and the text adds nothing yet."""
    torch.manual_seed(2)
    dit = DiT(4, **SMALL, num_classes=3)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.2)
    net = from_dit(PixArt(4, 6, **SMALL), dit, t=500)
    nn.init.zeros_(dit.embed.label_embedding.weight)
    x, _, context = inputs()
    t, labels = torch.full((2,), 500.0), torch.zeros(2, dtype=torch.int64)
    assert torch.allclose(net(x, t, context=context), dit(x, t, labels=labels), atol=1e-4)
    assert not torch.allclose(net(x, t + 400, context=context), dit(x, t + 400, labels=labels), atol=1e-2)
    with pytest.raises(WeightsError, match="no place for"):
        from_dit(PixArt(4, 6, **SMALL | {"width": 48}), dit)
    with pytest.raises(WeightsError, match="equally deep"):
        from_dit(PixArt(4, 6, **SMALL | {"depth": 3}), dit)
    with pytest.raises(WeightsError, match="modulation=single"):
        from_dit(PixArt(4, 6, **SMALL, modulation="per_block"), dit)


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"patch_size": 3}, "sample_size=8 does not split"),
        ({"num_heads": 5}, "width=24 must be a multiple of num_heads=5"),
        ({"num_sizes": 2}, "num_sizes=2, width=24: expected 0, or 3"),
        ({"num_sizes": 3, "width": 16}, "num_sizes=3, width=16"),
        ({"modulation": "film"}, "expected one of: single, per_block"),
        ({"kv_ratio": 2}, r"kv_ratio=2 needs kv_layers between 0 and 1, got \[\]"),
        ({"kv_ratio": 2, "kv_layers": [2]}, r"got \[2\]"),
        ({"kv_layers": [1]}, "kv_ratio=1 needs"),
    ],
)
def test_numbers_that_do_not_fit(knobs, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**knobs)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(2, 4, 8, 7)}, "does not split into patches of patch_size=2"),
        ({"context": None}, "the PixArt was built with context_dim=6 but got no `context`"),
        ({"context": torch.zeros(2, 5, 7)}, "`context` has width 7"),
        ({"context_mask": torch.zeros(2, 5) > 0}, "drops every token of text 0"),
        ({"size": torch.zeros(2, 3)}, "no use for it"),
        ({"x": torch.zeros(2, 4, 2, 8)}, "1x4 tokens cannot be compressed by kv_ratio=2"),
    ],
)
def test_conditions_that_do_not_fit(changes, message):
    x, t, context = inputs()
    with pytest.raises(ConfigError, match=message):
        tiny(kv_ratio=2, kv_layers=[0])(**dict(x=x, t=t, context=context) | changes)


@pytest.mark.parametrize("name", ["pixart_256", "pixart_1024", "pixart_sigma_256", "pixart_sigma_kv"])
def test_arguments_of_the_authors_files(name):
    net = published(name, context_dim=4096)
    shapes = {key: tuple(value.shape) for key, value in to_original(net.state_dict()).items()}
    shapes["pos_embed"] = (1, (net.sample_size // 2) ** 2, 1152)
    shapes["y_embedder.y_embedding"] = (300 if "sigma" in name else 120, 4096)
    assert "blocks.27.cross_attn.kv_linear.weight" in shapes and "blocks.0.scale_shift_table" in shapes
    assert ("blocks.14.attn.sr.weight" in shapes) == ("kv" in name)
    assert pixart_from_shapes(shapes).items() <= pixart_arguments(net).items()
    if "kv" not in name:
        assert pixart_from_config(pixart_to_config(net)).items() <= pixart_arguments(net).items()


def test_files_that_do_not_tell_and_networks_without_a_place():
    net = tiny(kv_ratio=2, kv_layers=[0])
    with pytest.raises(WeightsError, match="no pos_embed, so its resolution is unknown"):
        pixart_from_shapes({key: tuple(value.shape) for key, value in to_original(net.state_dict()).items()})
    with pytest.raises(WeightsError, match=r"kv_layers=\[0\] has no place in diffusers' layout"):
        pixart_to_config(net)
    with pytest.raises(WeightsError, match="norm_type=ada_norm, this network is for 'ada_norm_single' only"):
        pixart_from_config({"norm_type": "ada_norm"})
    with pytest.raises(WeightsError, match="no caption_channels"):
        pixart_from_config({})
