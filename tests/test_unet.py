"""The UNet and its leaves: published sizes, golden values, shapes, conditions and what goes wrong with them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.build import compose, make
from ldm.models.unet import UNet
from ldm.nn import linear as linear_module
from ldm.nn.attention import CrossAttention, SelfAttention
from ldm.nn.embeddings import sinusoid
from ldm.nn.linear import Linear
from ldm.utils.errors import ConfigError, WeightsError
from ldm.weights.unet import diffusers_names, from_diffusers, to_diffusers


def published(name, **changes):
    with torch.device("meta"):
        return make(compose("train", [f"network={name}"])["network"] | changes, "network")


def tiny(**changes):
    """A small UNet whose zero-initialised parameters are drawn anew, so that everything matters."""
    torch.manual_seed(0)
    small = dict(in_channels=4, channels=32, channel_mult=[1, 2], num_res_blocks=1, depth=[0, 1, 1], head_dim=32)
    net = UNet(**small | dict(context_dim=24) | changes).eval()
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def inputs(size=(8, 8), batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 4, *size), torch.linspace(0, 999, batch), torch.randn(batch, 6, 24)


@pytest.mark.parametrize(
    "name, changes, count",
    [
        ("sd15", {}, 859_520_964),
        ("sd15", {"in_channels": 9, "out_channels": 4}, 859_535_364),
        ("sd21", {}, 865_910_724),
        ("sdxl", {}, 2_567_463_684),
        ("sdxl_refiner", {}, 2_259_526_660),
    ],
)
def test_published_parameter_counts(name, changes, count):
    assert sum(p.numel() for p in published(name, **changes).parameters()) == count


@pytest.mark.parametrize("name, expected, keys", [("sd15", (45, 16, 48), 686), ("sdxl", (35, 11, 210), 1680)])
def test_published_norms_and_keys(name, expected, keys):
    net = published(name)
    groups = [m.eps for m in net.modules() if isinstance(m, nn.GroupNorm)]
    layers = [m.eps for m in net.modules() if isinstance(m, nn.LayerNorm)]
    assert (groups.count(1e-5), groups.count(1e-6), layers.count(1e-5)) == expected
    assert len(groups) + len(layers) == sum(expected)
    assert len({their for theirs in diffusers_names(net.state_dict()).values() for their in theirs}) == keys


def test_sinusoid_golden_values():
    emb = sinusoid(torch.tensor([500.0]), 320)[0]
    assert torch.allclose(emb[:3], torch.tensor([-0.883849, 0.702759, 0.886686]), atol=2e-5)
    assert torch.allclose(emb[160:163], torch.tensor([-0.467772, 0.711428, -0.462372]), atol=2e-5)
    assert sinusoid(torch.zeros(2, 6), 256).shape == (2, 6, 256)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1), (16, 6)])
def test_any_size_keeps_its_shape(size):
    x, t, context = inputs(size)
    assert tiny(channel_mult=[1, 2, 2], depth=[0, 1, 0, 1])(x, t, context=context).shape == x.shape


def test_starts_at_zero_and_every_parameter_gets_a_gradient():
    x, t, context = inputs()
    conditions = dict(context=context, pooled=torch.randn(2, 8), size=torch.rand(2, 3), labels=torch.tensor([0, 4]))
    knobs = dict(context_dim=24, pooled_dim=8, num_sizes=3, num_classes=5, dropout=0.1)
    fresh = UNet(4, channels=32, channel_mult=[1, 1], depth=[1, 1, 1], head_dim=32, **knobs)
    assert not fresh(x, t, **conditions).any()
    for checkpointing in (False, True):
        net = tiny(**knobs, checkpointing=checkpointing).train()
        net(x, t, **conditions).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in net.parameters())


def test_checkpointing_and_channels_last_change_nothing():
    x, t, context = inputs()
    net = tiny()
    expected = net(x, t, context=context)
    assert torch.equal(tiny(checkpointing=True)(x, t, context=context), expected)
    nhwc = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, context=context)
    assert nhwc.is_contiguous(memory_format=torch.channels_last) and torch.allclose(nhwc, expected, atol=1e-5)


@torch.no_grad()
def test_each_condition_matters_and_each_image_sees_its_own():
    x, t, context = inputs()
    net = tiny(pooled_dim=8, num_sizes=2, num_classes=3, in_channels=5, out_channels=4)
    given = dict(
        context=context,
        pooled=torch.randn(2, 8),
        size=torch.tensor([[64.0, 32.0]] * 2),
        labels=torch.tensor([0, 1]),
        image=torch.randn(2, 1, 8, 8),
    )
    expected = net(x, t, **given)
    for name, value in given.items():
        other = value.clone()
        other[1] = (other[1] + 1) % 3 if name == "labels" else other[1] + torch.randn(other[1].shape)
        out = net(x, t, **given | {name: other})
        assert torch.allclose(out[0], expected[0], atol=1e-5), name
        assert not torch.allclose(out[1], expected[1], atol=1e-4), name


@torch.no_grad()
def test_residuals():
    x, t, context = inputs((7, 8))
    net = tiny()
    skips = net.encoder(x, torch.zeros(2, 128), context)
    shapes = [skip.shape for skip in skips] + [skips[-1].shape]
    expected = net(x, t, context=context)
    assert torch.equal(net(x, t, context=context, residuals=[torch.zeros(s) for s in shapes]), expected)
    for index in range(len(shapes)):
        residuals = [torch.full(shape, float(i == index)) for i, shape in enumerate(shapes)]
        assert not torch.allclose(net(x, t, context=context, residuals=residuals), expected)
    with pytest.raises(ConfigError, match="got 1 residuals, expected 5"):
        net(x, t, context=context, residuals=[torch.zeros(shapes[0])])


def test_mask_hides_tokens_and_may_hide_all():
    x, t, context = inputs()
    net = tiny()
    mask = torch.tensor([[True, True, False, False, False, False], [False] * 6])
    other = torch.where(mask[..., None], context, torch.randn_like(context))
    out = net(x, t, context=context, context_mask=mask)
    assert torch.equal(out, net(x, t, context=other, context_mask=mask))
    assert torch.allclose(out[:1], net(x[:1], t[:1], context=context[:1, :2]), atol=1e-5)
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters())
    assert torch.equal(net(x, t, context=context, context_mask=mask | True), net(x, t, context=context))


@pytest.mark.parametrize(
    "conditions, message",
    [
        ({}, "context_dim=24 but got no `context`"),
        ({"context": torch.zeros(2, 6, 25)}, "`context` has width 25"),
        ({"pooled": torch.zeros(2, 8)}, "no use for it"),
        ({"labels": torch.tensor([0, 0])}, "no use for it"),
        ({"size": torch.zeros(2, 6)}, "no use for it"),
        ({"image": torch.zeros(2, 1, 8, 8)}, "5 channels together"),
    ],
)
def test_conditions_that_do_not_fit(conditions, message):
    x, t, context = inputs()
    with pytest.raises(ConfigError, match=message):
        tiny()(x, t, **({"context": context} if conditions and "context" not in conditions else {}) | conditions)


@pytest.mark.parametrize("knobs", [{"depth": [1, 1]}, {"head_dim": [32]}, {"head_dim": 48}, {"channels": 40}])
def test_sizes_that_do_not_fit(knobs):
    with pytest.raises(ConfigError):
        tiny(**knobs)


def test_without_text():
    x, t, _ = inputs()
    net = tiny(context_dim=None)
    assert net(x, t).shape == x.shape
    with pytest.raises(ConfigError, match="`context_mask` .* no use"):
        net(x, t, context_mask=torch.ones(2, 6, dtype=torch.bool))


def test_round_trip_of_names_and_strictness():
    state = tiny(pooled_dim=8, num_classes=3, linear_projection=False).state_dict()
    theirs = to_diffusers(state)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.weight" in theirs
    assert all(torch.equal(value, state[key]) for key, value in from_diffusers(theirs, state).items())
    theirs["lora.weight"] = theirs.pop("conv_in.bias")
    with pytest.raises(WeightsError, match=r"missing 1 \(conv_in.bias\); unknown 1 \(lora.weight\)"):
        from_diffusers(theirs, state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: x.repeat(1, 1, 2)[..., :48]])
def test_linear_equals_torch(bias, view):
    """Also its first and second derivatives, for inputs of any stride."""
    torch.manual_seed(0)
    layer = Linear(48, 96, bias=bias)
    x = view(torch.randn(2, 512, 48)).detach().requires_grad_()
    assert linear_module.use_onednn(x, layer.weight) == linear_module.ONEDNN
    results = []
    for f in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        out = f(x)
        inner = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()], create_graph=True)
        outer = torch.autograd.grad(sum(g.square().sum() for g in inner), [x, *layer.parameters()])
        results.append([out, *inner, *outer])
    for ours, theirs in zip(*results, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_attention_leaves():
    torch.manual_seed(0)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 12)
    layer = SelfAttention(16, 2, 8, bias=True)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    assert torch.allclose(layer(x), layer.out((weights @ v).transpose(1, 2).flatten(2)), atol=1e-6)
    causal = layer(x, causal=True)
    assert torch.allclose(causal[:, :2], layer(x[:, :2], causal=True), atol=1e-6)
    bounded = CrossAttention(16, 12, 2, 8, qk_norm=True)
    assert torch.allclose(bounded(x * 1e3, context, None), bounded(x, context, None), atol=1e-4)
    assert bounded(x, context).shape == x.shape
