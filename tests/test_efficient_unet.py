"""The networks of Imagen and DeepFloyd IF: published sizes, their blocks, how they start, what goes wrong."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.build import compose, make
from ldm.models.efficient_unet import SKIP_SCALE, EfficientUNet, ResNetBlock
from ldm.models.if_unet import IFUNet
from ldm.nn.text_unet import AttentionPool, TextAttention
from ldm.utils.errors import ConfigError


def published(name, **changes):
    with torch.device("meta"):
        node = compose("train", [f"network={name}"])["network"]
        return make(node | {"in_channels": 3, "context_dim": 4096} | changes, "network")


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def gmacs(net, side, length):
    """Half of the FLOPs of products, for one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x = torch.empty(1, 3, side, side)
        given = dict(low_res=x, aug_level=torch.empty(1)) if net.embed.aug_mlp else {}
        net(x, torch.empty(1), context=torch.empty(1, length, net.embed.context_dim), **given)
    return counter.get_total_flops() / 2e9


SMALL = {
    IFUNet: dict(channels=32, channel_mult=[1, 2], num_res_blocks=1, attention=[False, True], head_dim=16, text_dim=8),
    EfficientUNet: dict(channels=[16, 32], num_res_blocks=[1, 2], attention=[False, True], num_heads=2, groups=8),
}
KINDS = [(IFUNet, False), (IFUNet, True), (EfficientUNet, True)]
IDS = ["if", "if_enlarges", "efficient"]


def fresh(kind, super_resolution=True, **changes):
    torch.manual_seed(0)
    return kind(3, **SMALL[kind] | dict(context_dim=12, pool_heads=2, super_resolution=super_resolution) | changes)


def tiny(kind, super_resolution=True, **changes):
    """A small network whose zero-initialised parameters are drawn anew, so that everything matters."""
    net = fresh(kind, super_resolution, **changes).eval()
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def inputs(super_resolution=True, size=(8, 8), batch=2):
    torch.manual_seed(1)
    x, t = torch.randn(batch, 3, *size), torch.linspace(10, 999, batch)
    given = dict(context=torch.randn(batch, 5, 12))
    if super_resolution:
        given |= dict(low_res=torch.randn_like(x), aug_level=torch.linspace(0, 0.5, batch))
    return x, t, given


# --- Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, count",
    [
        ("imagen_64", 2_437_591_043), ("imagen_64to256", 566_954_755), ("imagen_256to1024", 558_557_955),
        ("if_i_m", 371_605_830), ("if_i_l", 935_365_830), ("if_i_xl", 4_304_695_110),
        ("if_ii_m", 460_997_382), ("if_ii_l", 1_183_628_550), ("if_iii_l", 660_105_862),
    ],
)  # fmt: skip
def test_published_sizes(name, count):
    assert parameters(published(name)) == count


@pytest.mark.parametrize(
    "name, side, length, expected",
    [
        ("if_i_m", 64, 77, 114.72), ("if_i_xl", 64, 77, 1439.51),
        ("if_ii_m", 256, 77, 538.96), ("imagen_64to256", 256, 128, 299.46), ("imagen_256to1024", 1024, 128, 4618.38),
    ],
)  # fmt: skip
def test_published_costs(name, side, length, expected):
    assert gmacs(published(name), side, length) == pytest.approx(expected, abs=0.01)


def test_most_parameters_are_at_the_coarsest_and_little_of_the_arithmetic():
    """App. B.1: parameters are shifted from high resolutions to low ones."""
    net = published("imagen_64to256")
    coarsest = parameters(net.down[-1]) + parameters(net.up[0])
    assert coarsest / (parameters(net) - parameters(net.embed)) > 0.75
    assert parameters(net) > 1.2 * 460_997_382 and gmacs(net, 256, 77) < 0.6 * 538.96  # against IF-II-M


@pytest.mark.parametrize("name, side", [("imagen_small_16", 16), ("imagen_sr_small", 32)])
def test_the_small_ones_cost_no_more_than_unet_small(name, side):
    assert gmacs(published(name, context_dim=64), side, 16) < 0.083  # of 8x8 latents


# --- Blocks -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sums_are_scaled():
    torch.manual_seed(0)
    x, emb = torch.randn(2, 16, 4, 4), torch.randn(2, 8)
    block = ResNetBlock(16, 16, emb_dim=8, groups=8)
    nn.init.dirac_(block.skip.weight)
    nn.init.zeros_(block.skip.bias)
    whole = block(x, emb)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    assert SKIP_SCALE == 0.5**0.5 and torch.allclose(block(x, emb), x * SKIP_SCALE)
    assert whole.shape == x.shape and not torch.allclose(whole, x * SKIP_SCALE, atol=1e-2)
    scaled, plain = (fresh(IFUNet, skip_scale=scale).encoder.levels[0].blocks[0].res for scale in (0.7071, 1.0))
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 64)
    assert torch.equal(scaled(x, emb), 0.7071 * x) and torch.equal(plain(x, emb), x)  # they start with conv2 = 0


@torch.no_grad()
def test_the_signal_does_not_fade():
    """Through the 22 blocks of the paper's ladder, narrow; with conv2 = 0 it would be 1e-5 at the bottom."""
    torch.manual_seed(0)
    ladder = dict(channels=[16, 32, 64, 128], num_res_blocks=[2, 4, 8, 8], attention=[False] * 4)
    net = EfficientUNet(3, **ladder, groups=8, super_resolution=False)
    stds = []
    for block in [*net.down, *net.up]:
        block.register_forward_hook(lambda module, given, out: stds.append(out.std().item()))
    net(torch.randn(2, 3, 32, 32), torch.tensor([10.0, 900.0]))
    assert min(stds) > 0.1 and max(stds) < 10


def test_blocks_compute_at_the_smaller_size():
    """App. B.1: down-sampling comes before the convolutions, up-sampling after them."""
    net, sizes = tiny(EfficientUNet), []
    for block in [*net.down, *net.up]:
        block.blocks[0].register_forward_hook(lambda module, given, out: sizes.append(out.shape[2]))
    x, t, given = inputs(size=(16, 16))
    net(x, t, **given)
    assert sizes == [8, 4, 4, 8]


@pytest.mark.parametrize("self_attention", [True, False])
@torch.no_grad()
def test_text_attention(self_attention):
    """Keys of the text first, then of the pixels, or of the text alone; one softmax over all."""
    torch.manual_seed(0)
    layer = TextAttention(16, 2, 8, text_dim=12, self_attention=self_attention, groups=4)
    nn.init.normal_(layer.out.weight)
    x, text = torch.randn(2, 16, 2, 3), torch.randn(2, 5, 12)
    assert layer.qkv.out_features == (48 if self_attention else 16)
    h = layer.norm(x).flatten(2).mT
    q, *own = layer.qkv(h).split(16, dim=-1)
    k, v = layer.text_kv(layer.text_norm(text)).chunk(2, dim=-1)
    if self_attention:
        k, v = torch.cat([k, own[0]], dim=1), torch.cat([v, own[1]], dim=1)
    q, k, v = (a.unflatten(2, (2, 8)).transpose(1, 2) for a in (q, k, v))
    expected = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(x, text), x + layer.out(expected).mT.unflatten(2, (2, 3)), atol=1e-5)
    masked = layer(x, text, torch.tensor([[True] * 3 + [False] * 2] * 2))
    assert torch.allclose(masked, layer(x, text[:, :3]), atol=1e-5)


@torch.no_grad()
def test_attention_pool():
    torch.manual_seed(0)
    pool, text = AttentionPool(12, 2), torch.randn(2, 5, 12)
    query = text.mean(1, keepdim=True) + pool.position
    k, v = pool.kv(torch.cat([query, text], dim=1)).chunk(2, dim=-1)
    q, k, v = (a.unflatten(2, (2, 6)).transpose(1, 2) for a in (pool.q(query), k, v))
    expected = ((q @ k.mT / 6**0.5).softmax(-1) @ v).transpose(1, 2).flatten(1)
    assert torch.allclose(pool(text, None), expected, atol=1e-5)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    assert torch.allclose(pool(text, mask), pool(text[:, :3], None), atol=1e-5)


def test_where_attention_is():
    def resolutions(net):
        return [level.blocks[0].attention is not None for level in net.encoder.levels]

    assert resolutions(published("if_ii_m")) == [False, False, False, True, True]
    assert resolutions(published("imagen_64")) == [False, True, True, True]
    for name, fused in (("imagen_64to256", 3), ("imagen_256to1024", 1)):
        found = [module for module in published(name).modules() if isinstance(module, TextAttention)]
        assert [module.qkv.out_features // (2 * 1024) for module in found] == [fused, fused]  # one down, one up


# --- The networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, super_resolution", KINDS, ids=IDS)
def test_starts_at_zero_and_every_parameter_gets_a_gradient(kind, super_resolution):
    x, t, given = inputs(super_resolution)
    assert not fresh(kind, super_resolution)(x, t, **given).any()
    outputs, kept = [], []
    for checkpointing in (False, True):
        net = tiny(kind, super_resolution, checkpointing=checkpointing)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda a, sizes=sizes: sizes.append(a.numel()) or a, lambda a: a):
            outputs.append(net.train()(x, t, **given))
        kept.append(sum(sizes))
        outputs[-1].square().sum().backward()
        assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in net.parameters())
    assert torch.equal(*outputs) and outputs[0].shape == x.shape and kept[1] < 0.7 * kept[0]


@torch.no_grad()
@pytest.mark.parametrize("super_resolution", [False, True])
def test_the_skip_of_the_inputs_begins_as_low_res_and_adds_both(super_resolution):
    net, (x, t, given) = fresh(EfficientUNet, super_resolution, input_skip=True).eval(), inputs(super_resolution)
    low_res = given["low_res"] if super_resolution else torch.zeros_like(x)
    assert torch.equal(net(x, t, **given), low_res)
    net.skip.bias[:3] = torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(net(x, t, **given), low_res + x * torch.tensor([1.0, 2.0, 3.0])[:, None, None])


@pytest.mark.parametrize("kind, super_resolution", KINDS, ids=IDS)
@torch.no_grad()
def test_each_condition_matters_and_each_image_sees_its_own(kind, super_resolution):
    x, t, given = inputs(super_resolution)
    net = tiny(kind, super_resolution)
    expected = net(x, t, **given)
    for name, value in {"t": t, **given}.items():
        other = value.clone()
        other[1] = 0.9 if name == "aug_level" else other[1] + 9 * torch.randn(other[1].shape)
        out = net(x, other, **given) if name == "t" else net(x, t, **given | {name: other})
        assert torch.allclose(out[0], expected[0], atol=1e-5), name
        assert not torch.allclose(out[1], expected[1], atol=1e-3), name


@pytest.mark.parametrize("kind, super_resolution", KINDS, ids=IDS)
@torch.no_grad()
def test_mask_hides_tokens(kind, super_resolution):
    x, t, given = inputs(super_resolution)
    net = tiny(kind, super_resolution)
    context, mask = given.pop("context"), torch.tensor([[True] * 2 + [False] * 3] * 2)
    out = net(x, t, context=context, context_mask=mask, **given)
    other = torch.where(mask[..., None], context, torch.randn_like(context))
    assert torch.allclose(net(x, t, context=other, context_mask=mask, **given), out, atol=1e-5)
    assert torch.allclose(net(x, t, context=context[:, :2], **given), out, atol=1e-5)


@pytest.mark.parametrize("kind", [IFUNet, EfficientUNet])
@torch.no_grad()
def test_the_three_ways_of_text(kind):
    """App. D.3.1; all of them hear it, only one reads its tokens."""
    x, t, given = inputs()
    other = given | {"context": given["context"].flip(0)}
    sizes = []
    for text in ("mean_pool", "attention_pool", "cross_attention"):
        net = tiny(kind, text=text)
        sizes.append(parameters(net))
        assert not torch.allclose(net(x, t, **given), net(x, t, **other), atol=1e-3)
        readers = [m.text_kv is not None for m in net.modules() if isinstance(m, TextAttention)]
        assert all(readers) == any(readers) == (text == "cross_attention") and readers
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (16, 8)])
@torch.no_grad()
def test_sizes_and_variants(size):
    x, t, given = inputs(size=size)
    assert tiny(EfficientUNet, self_attention=False)(x, t, **given).shape == x.shape
    assert tiny(IFUNet, learned_variance=True, activation="gelu", text_norm="layer")(x, t, **given).shape[1] == 6
    alone = {name: value for name, value in given.items() if name != "context"}
    for kind in SMALL:
        assert tiny(kind, context_dim=None)(x, t, **alone).shape == x.shape
        assert tiny(kind, False, context_dim=None)(x, t).shape == x.shape


@pytest.mark.parametrize("kind, super_resolution", KINDS, ids=IDS)
@torch.no_grad()
def test_half_precision(kind, super_resolution):
    x, t, given = inputs(super_resolution)
    net = tiny(kind, super_resolution)
    expected = net(x, t, **given)
    tolerance = 0.05 * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (net(x, t, **given).float() - expected).abs().max() < tolerance
    half = net.bfloat16()(x.bfloat16(), t, **given)
    assert half.dtype == torch.bfloat16 and (half.float() - expected).abs().max() < tolerance


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [IFUNet, EfficientUNet])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"context": None}, "context_dim=12 but got no `context`"),
        ({"context": torch.zeros(2, 5, 13)}, "`context` has width 13, but the .* was built with context_dim=12"),
        ({"context_mask": torch.ones(2, 4) > 0}, r"`context_mask` is \(2, 4\), expected \(2, 5\)"),
        ({"low_res": None}, "super_resolution=True but got no `low_res`"),
        ({"aug_level": None}, "super_resolution=True but got no `aug_level`"),
        ({"low_res": torch.zeros(2, 3, 4, 4)}, r"`low_res` is \(2, 3, 4, 4\), expected \(2, 3, 8, 8\) as x"),
        ({"aug_level": torch.tensor([0.1, 250.0])}, r"`aug_level` is \[0.1.*, 250.0\], expected numbers from 0"),
        ({"x": torch.zeros(2, 3, 8, 9)}, "x is 8x9, but this .* needs sides that [24] divides"),
        ({"x": torch.zeros(2, 4, 8, 8)}, "x has 4 channels, but the .* was built with in_channels=3"),
    ],
)
def test_inputs_that_do_not_fit(kind, changes, message):
    x, t, given = inputs()
    with pytest.raises(ConfigError, match=message) as error:
        tiny(kind)(**dict(x=x, t=t) | given | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [IFUNet, EfficientUNet])
def test_inputs_nobody_asked_for(kind):
    x, t, given = inputs()
    with pytest.raises(ConfigError, match="got `low_res`, but it was built with super_resolution=False"):
        tiny(kind, False)(x, t, **given)
    with pytest.raises(ConfigError, match="got `context` .* has no use for it"):
        tiny(kind, context_dim=None)(x, t, **given)


@pytest.mark.parametrize(
    "kind, knobs, message",
    [
        (IFUNet, {"attention": [True]}, "channel_mult has 2 levels, so attention needs 2 entries"),
        (IFUNet, {"num_res_blocks": [1, 2, 3]}, r"num_res_blocks=\[1, 2, 3\]"),
        (IFUNet, {"head_dim": 48}, "head_dim=48 does not divide 64 channels"),
        (IFUNet, {"channels": 40}, "40 channels do not split into the 32 groups"),
        (IFUNet, {"activation": "relu"}, "activation='relu' is unknown; expected one of: silu, gelu"),
        (IFUNet, {"text_norm": "batch"}, "text_norm='batch' is unknown; expected one of: layer, group"),
        (IFUNet, {"text": "concat"}, "expected one of: mean_pool, attention_pool, cross_attention"),
        (IFUNet, {"context_dim": None, "self_attention": False}, "self_attention=False leaves nothing to attend to"),
        (EfficientUNet, {"attention": [True]}, "must have one entry per block"),
        (EfficientUNet, {"num_res_blocks": [0, 1]}, "num_res_blocks at least 1"),
        (EfficientUNet, {"pool_heads": 5}, "pool_heads=5 does not divide the text's width, context_dim=12"),
        (EfficientUNet, {"num_heads": 5}, "num_heads=5 does not divide twice the 32 channels"),
        (EfficientUNet, {"groups": 32}, "16 channels do not split into the 32 groups"),
    ],
)
def test_numbers_that_do_not_fit(kind, knobs, message):
    with pytest.raises(ConfigError, match=message):
        fresh(kind, **knobs)
