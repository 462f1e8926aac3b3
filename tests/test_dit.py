"""DiT and its leaves: published sizes, the four conditionings, how it starts, and what goes wrong."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.build import compose, make
from ldm.models.dit import CONDITIONING, AdaLNZeroBlock, DiT
from ldm.nn.embeddings import PatchEmbed, position_table, sinusoid, unpatchify
from ldm.utils.errors import ConfigError, WeightsError
from ldm.weights.dit import (
    computed,
    dit_arguments,
    dit_from_config,
    dit_from_shapes,
    dit_to_config,
    from_original,
    original_names,
    to_original,
)


def published(name, **changes):
    node = compose("train", [f"network={name}"])["network"]
    with torch.device("meta"):
        return make(node | {"in_channels": 4, "num_classes": 1000, "context_dim": None} | changes, "network")


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def gmacs(net, side, **conditions):
    """The papers' "Gflops": half of the FLOPs of products, for one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 4, side, side), torch.empty(1), **conditions)
    return counter.get_total_flops() / 2e9


def one_label():
    return torch.empty(1, dtype=torch.int64, device="meta")


def tiny(**changes):
    """A small DiT whose zero-initialised parameters are drawn anew, so that everything matters."""
    torch.manual_seed(0)
    net = DiT(4, **dict(sample_size=8, width=32, depth=2, num_heads=4, num_classes=5) | changes).eval()
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def inputs(size=(8, 8), batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 4, *size), torch.linspace(0, 999, batch), torch.arange(batch)


@pytest.mark.parametrize(
    "name, count, expected",  # Table 1 and Table 4 of the paper
    [
        ("dit_s2", 32_865_056, 6.056), ("dit_s4", 32_920_448, 1.413), ("dit_s8", 33_142_016, 0.358),
        ("dit_b2", 130_315_808, 23.005), ("dit_b4", 130_426_496, 5.565), ("dit_b8", 130_869_248, 1.418),
        ("dit_l2", 457_840_672, 80.698), ("dit_l4", 457_988_224, 19.696), ("dit_l8", 458_578_432, 5.011),
        ("dit_xl2", 674_834_720, 118.621), ("dit_xl4", 675_000_704, 29.044), ("dit_xl8", 675_664_640, 7.392),
    ],
)  # fmt: skip
def test_published_sizes(name, count, expected):
    net = published(name)
    assert parameters(net) == count
    assert gmacs(net, 32, labels=one_label()) == pytest.approx(expected, abs=1e-3)


def test_published_size_at_512():
    net = published("dit_xl2", sample_size=64)
    assert gmacs(net, 64, labels=one_label()) == pytest.approx(524.538, abs=1e-3)
    assert parameters(net) + 16 * 16 * 1152 == 675_129_632  # as counted with the frozen table of 256 px


@pytest.mark.parametrize(
    "conditioning, count, expected",  # Fig. 5
    [
        ("in_context", 449_162_528, 119.354),
        ("cross_attention", 597_991_712, 137.603),
        ("adaln", 600_452_384, 118.547),
    ],
)
def test_the_other_conditionings_at_xl2(conditioning, count, expected):
    net = published("dit_xl2", conditioning=conditioning)
    assert parameters(net) == count
    assert gmacs(net, 32, labels=one_label()) == pytest.approx(expected, abs=1e-3)


def test_small_costs_what_the_small_unet_costs():
    ours = published("dit_small", num_classes=None, context_dim=64)
    unet = published("unet_small", num_classes=None, context_dim=64, pooled_dim=None)
    context = torch.empty(1, 16, 64, device="meta")
    assert gmacs(ours, 8, context=context) == pytest.approx(gmacs(unet, 8, context=context), rel=0.03)


def test_position_table_golden_values():
    table = position_table((16, 16), 1152, base=16)
    channels = [0, 288, 576, 864]
    assert torch.allclose(table[1, channels], torch.tensor([0.841471, 0.540302, 0, 1]), atol=1e-6)  # a column on
    assert torch.allclose(table[16, channels], torch.tensor([0, 1, 0.841471, 0.540302]), atol=1e-6)  # a row on
    assert table.double().sum().item() == pytest.approx(134598.948, abs=1e-2)
    assert torch.equal(position_table((32, 16), 32, base=16)[2 * 16 + 3], position_table((16, 16), 32, base=16)[16 + 3])
    doubled = position_table((8, 8), 32, base=16, interpolation=2)
    assert torch.equal(doubled, position_table((8, 8), 32, base=8))


def test_sinusoid_with_the_other_divisor():
    one = torch.ones(1)
    assert sinusoid(one, 256)[0, 128 + 64].sin().item() == pytest.approx(0.01, rel=1e-3)
    assert sinusoid(one, 256, freq_shift=1)[0, -1].item() == pytest.approx(1e-4, rel=1e-3)
    assert sinusoid(one, 256)[0, -1].item() == pytest.approx(1.0746e-4, rel=1e-3)


def test_patches_are_a_strided_convolution_and_go_back_in_order():
    embed = PatchEmbed(3, 8, 2)
    x = torch.randn(2, 3, 4, 6)
    expected = nn.functional.conv2d(x, embed.weight, embed.bias, stride=2).flatten(2).mT
    assert torch.allclose(embed(x), expected, atol=1e-6)
    tokens = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(2, 6, 12)  # B h*w p*p*C
    assert torch.equal(unpatchify(tokens, (2, 3), 2), x)


@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_starts_at_zero_and_every_parameter_gets_a_gradient(conditioning):
    x, t, labels = inputs()
    given = dict(labels=labels, context=torch.randn(2, 3, 6))
    fresh = DiT(4, width=32, depth=2, num_heads=4, num_classes=5, context_dim=6, conditioning=conditioning)
    assert not fresh(x, t, **given).any()
    outputs = []
    for checkpointing in (False, True):
        net = tiny(context_dim=6, conditioning=conditioning, checkpointing=checkpointing).train()
        outputs.append(net(x, t, **given))
        outputs[-1].square().sum().backward()
        assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in net.parameters())
    assert torch.equal(*outputs) and outputs[0].shape == (2, 8, 8, 8)


def test_adaln_zero_blocks_start_as_the_identity():
    block = DiT(4, width=32, depth=1, num_heads=4).blocks[0]
    x = torch.randn(2, 9, 32)
    assert isinstance(block, AdaLNZeroBlock) and torch.equal(block(x, torch.randn(2, 32)), x)


@pytest.mark.parametrize("conditioning", CONDITIONING)
@torch.no_grad()
def test_each_condition_matters_and_each_image_sees_its_own(conditioning):
    x, t, labels = inputs()
    net = tiny(context_dim=6, conditioning=conditioning)
    given = dict(labels=labels, context=torch.randn(2, 3, 6))
    expected = net(x, t, **given)
    for name, value in {"t": t, **given}.items():
        other = value.clone()
        other[1] = other[1] + 1 if name == "labels" else other[1] + torch.randn(other[1].shape) * 9
        out = net(x, other, **given) if name == "t" else net(x, t, **given | {name: other})
        assert torch.allclose(out[0], expected[0], atol=1e-5), name
        assert not torch.allclose(out[1], expected[1], atol=1e-4), name


@pytest.mark.parametrize("conditioning", CONDITIONING)
@torch.no_grad()
def test_mask_hides_tokens(conditioning):
    x, t, labels = inputs()
    net = tiny(context_dim=6, conditioning=conditioning)
    context, mask = torch.randn(2, 3, 6), torch.tensor([[True, True, False], [True, False, False]])
    out = net(x, t, labels=labels, context=context, context_mask=mask)
    other = torch.where(mask[..., None], context, torch.randn_like(context))
    assert torch.equal(out, net(x, t, labels=labels, context=other, context_mask=mask))
    alone = net(x[:1], t[:1], labels=labels[:1], context=context[:1, :2])
    assert torch.allclose(out[:1], alone, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (2, 2), (6, 16)])
@torch.no_grad()
def test_any_size_that_splits(size):
    x, t, labels = inputs(size)
    assert tiny(learned_variance=False)(x, t, labels=labels).shape == x.shape
    assert tiny(num_classes=None)(x, t).shape == (2, 8, *size)


def test_half_precision():
    x, t, labels = inputs()
    net = tiny()
    expected = net(x, t, labels=labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(net(x, t, labels=labels).float(), expected, atol=0.1)
    half = net.bfloat16()(x.bfloat16(), t, labels=labels)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), expected, atol=0.1)


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"patch_size": 3}, "sample_size=8 does not split into patches of patch_size=3"),
        ({"num_heads": 5}, "width=32 must be a multiple of num_heads=5"),
        ({"width": 30, "num_heads": 5}, "and of 4"),
        ({"conditioning": "film"}, "expected one of: in_context, cross_attention, adaln, adaln_zero"),
    ],
)
def test_numbers_that_do_not_fit(knobs, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**knobs)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(2, 4, 8, 7)}, "x is 8x7, which does not split into patches of patch_size=2"),
        ({"x": torch.zeros(2, 3, 8, 8)}, "x has 3 channels, but the network was built with 4"),
        ({"labels": None}, "num_classes=5 but got no `labels`"),
        ({"labels": torch.tensor([0, 6])}, "`labels` holds 6, expected 0 to 4, or 5 for no class"),
        ({"labels": torch.tensor([-1, 0])}, "`labels` holds -1"),
        ({"context": None}, "context_dim=6 but got no `context`"),
        ({"context": torch.zeros(2, 3, 7)}, "`context` has width 7"),
        ({"context_mask": torch.ones(2, 4) > 0}, r"`context_mask` is \(2, 4\), expected \(2, 3\)"),
        ({"context_mask": torch.tensor([[True] * 3, [False] * 3])}, "drops every token of text 1"),
    ],
)
def test_conditions_that_do_not_fit(changes, message):
    x, t, labels = inputs()
    given = dict(x=x, t=t, labels=labels, context=torch.zeros(2, 3, 6)) | changes
    with pytest.raises(ConfigError, match=message):
        tiny(context_dim=6)(**given)
    if changes.get("context_mask") is not None:
        with pytest.raises(ConfigError, match="`context_mask` .* no use"):
            tiny()(x, t, labels=labels, context_mask=changes["context_mask"])


def test_names_and_arguments_of_the_authors_files():
    net = published("dit_xl2")
    names = {their for theirs in original_names(net.state_dict()).values() for their in theirs}
    assert {"t_embedder.mlp.2.bias", "blocks.27.adaLN_modulation.1.weight", "final_layer.linear.bias"} <= names
    state = to_original(net.state_dict()) | computed(net)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert len(state) == len(names) + 1 and shapes["pos_embed"] == (1, 256, 1152)
    assert dit_from_shapes(shapes).items() <= dit_arguments(net).items()
    assert dit_from_config(dit_to_config(net)).items() <= dit_arguments(net).items()


def test_tables_that_are_not_ours_and_networks_without_a_place():
    net = tiny()
    state = to_original(net.state_dict()) | computed(net)
    from_original(state | {"pos_embed": state["pos_embed"].half()}, net.state_dict())
    with pytest.raises(WeightsError, match="pos_embed is not the fixed sin-cos table"):
        from_original(state | {"pos_embed": state["pos_embed"].flip(1)}, net.state_dict())
    with pytest.raises(WeightsError, match="conditioning=adaln, .* has no place in diffusers' layout"):
        dit_to_config(tiny(conditioning="adaln"))
    with pytest.raises(WeightsError, match="norm_type=layer_norm, this network is for 'ada_norm_zero' only"):
        dit_from_config({"norm_type": "layer_norm"})
    with pytest.raises(WeightsError, match="5 channels come out of 4"):
        dit_from_config({"in_channels": 4, "out_channels": 5})
