"""ControlNets and T2I-Adapters against diffusers', alone and beside its UNet, with random weights in its layout."""

import json

import pytest
import torch

from ldm.adapters.control import Control, Controlled
from ldm.diffusion.process import RectifiedFlow
from ldm.models.t2i_adapter import T2IAdapter
from ldm.weights import controlnet, t2i_adapter
from tests.parity.test_unet import SD15, SDXL, error, inputs, pair

diffusers = pytest.importorskip("diffusers")

BOTH = pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
UNKNOWN = ("up_block_types",)  # of diffusers' arguments of a UNet, none of its ControlNet's


def redraw(net, scale=1.0):
    """What starts constant (norms, biases, zeroed layers) is drawn anew."""
    for parameter in net.parameters():
        constant = parameter.min() == parameter.max()
        parameter.data.add_(0.1 * torch.randn_like(parameter) * constant).mul_(scale)
    return net.eval()


def config_of(net):
    """As its config.json says it."""
    return json.loads(net.to_json_string())


def control_pair(config, seed, scale=1.0, **knobs):
    torch.manual_seed(seed)
    theirs = {name: value for name, value in config[1].items() if name not in UNKNOWN}
    theirs = redraw(diffusers.ControlNetModel(in_channels=4, **theirs, **knobs), scale)
    ours = controlnet.build(**controlnet.from_config(config_of(theirs))).eval()
    ours.load_state_dict(controlnet.from_diffusers(theirs.state_dict(), ours.state_dict()))
    return ours, theirs


def adapter_pair(kind, seed, widths, in_channels=3):
    torch.manual_seed(seed)
    theirs = diffusers.T2IAdapter(in_channels, widths, 2, 16 if kind == "full_adapter_xl" else 8, kind).eval()
    ours = T2IAdapter(**t2i_adapter.from_config(config_of(theirs))).eval()
    ours.load_state_dict(t2i_adapter.from_diffusers(theirs.state_dict(), ours.state_dict()))
    return ours, theirs


def theirs_of(net, x, t, hint, cond, added, **knobs):
    """diffusers' residuals in one list."""
    down, middle = net(
        x, t, cond["context"], hint, added_cond_kwargs=added or None, return_dict=False, **knobs
    )
    return [*down, middle]


def worst(ours, theirs):
    return max(error(a, b) for a, b in zip(ours, theirs, strict=True))


@BOTH
@pytest.mark.parametrize("seed, size, scale", [(0, (8, 8), 1), (1, (16, 8), 1), (2, (7, 9), 1), (3, (8, 12), 1 / 16)])
@torch.no_grad()
def test_residuals_equal_diffusers(config, seed, size, scale):
    ours, theirs = control_pair(config, seed, scale)
    x, t, cond, added = inputs(config, size)
    hint = torch.rand(2, 3, *(8 * side for side in size))
    expected = theirs_of(theirs, x, t, hint, cond, added)
    assert worst(ours.steer(x, t, ours.encode(hint), cond), expected) <= 2e-5


@torch.no_grad()
def test_pooled_residuals_equal_diffusers():
    """The "shuffle" model."""
    ours, theirs = control_pair(SD15, 4, global_pool_conditions=True)
    x, t, cond, added = inputs(SD15, (8, 8))
    hint = torch.rand(2, 3, 64, 64)
    residuals = ours.steer(x, t, ours.encode(hint), cond)
    assert residuals[0].shape[2:] == (1, 1)
    assert worst(residuals, theirs_of(theirs, x, t, hint, cond, added)) <= 2e-5


@BOTH
@torch.no_grad()
def test_several_controlnets_beside_a_unet_equal_diffusers(config):
    net, their_net = pair(config, seed=5)
    (a, their_a), (b, their_b) = control_pair(config, 6), control_pair(config, 7)
    x, t, cond, added = inputs(config, (8, 12))
    hints = [torch.rand(2, 3, 64, 96), torch.rand(2, 3, 64, 96)]
    several = diffusers.MultiControlNetModel([their_a, their_b])
    down, middle = several(x, t, cond["context"], hints, [0.7, 1.3], added_cond_kwargs=added or None, return_dict=False)
    expected = their_net(
        x, t, cond["context"], added_cond_kwargs=added or None,
        down_block_additional_residuals=down, mid_block_additional_residual=middle,
    ).sample  # fmt: skip
    ours = Controlled(net, [Control(a, scale=0.7), Control(b, scale=1.3)], RectifiedFlow())
    given, _ = ours.conditions(hints, (64, 96), 2)
    assert error(ours(x, t, **cond, **given), expected) <= 2e-5


@BOTH
@torch.no_grad()
def test_guess_mode_equals_diffusers(config):
    """As its pipelines do it: only the conditional half, here the first, is steered."""
    net, their_net = pair(config, seed=8)
    control, their_control = control_pair(config, 9)
    x, t, cond, added = inputs(config, (8, 8))
    hint = torch.rand(1, 3, 64, 64)
    first = {name: value[:1] for name, value in cond.items()}
    some = {name: value[:1] for name, value in added.items()}
    residuals = theirs_of(their_control, x[:1], t[:1], hint, first, some, guess_mode=True, conditioning_scale=0.8)
    residuals = [torch.cat([r, torch.zeros_like(r)]) for r in residuals]
    expected = their_net(
        x, t, cond["context"], added_cond_kwargs=added or None,
        down_block_additional_residuals=residuals[:-1], mid_block_additional_residual=residuals[-1],
    ).sample  # fmt: skip
    decay = 10 ** (-1 / (len(residuals) - 1))
    ours = Controlled(net, [Control(control, scale=0.8, guess=True, decay=decay)], RectifiedFlow())
    with_, without = ours.conditions([hint], (64, 64), 1)
    given = {"hints": [torch.cat(two) for two in zip(with_["hints"], without["hints"], strict=True)]}
    given["steered"] = torch.cat([with_["steered"], without["steered"]])
    assert error(ours(x, t, **cond, **given), expected) <= 2e-5


ADAPTERS = {  # kind, widths in diffusers' config, channels of the hint, sides of the latents
    "full": ("full_adapter", [32, 64, 64], 3, (8, 16)),
    "full grey odd": ("full_adapter", [32, 64, 64], 1, (9, 7)),
    "light": ("light_adapter", [32, 64], 3, (8, 8)),
    "full_xl": ("full_adapter_xl", [32, 64, 96, 96], 3, (8, 16)),
    "full_xl grey": ("full_adapter_xl", [32, 64, 96, 96], 1, (16, 8)),
}


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_adapters_beside_a_unet_equal_diffusers(name):
    """Features, and what a UNet makes of two adapters; SDXL's first level adds its own after the step down."""
    kind, widths, channels, size = ADAPTERS[name]
    config = SDXL if kind == "full_adapter_xl" else SD15
    net, their_net = pair(config, seed=10)
    pairs = [adapter_pair(kind, seed, widths, channels) for seed in (11, 12)]
    x, t, cond, added = inputs(config, size)
    hints = [torch.rand(2, channels, *(8 * side for side in size)) for _ in pairs]
    features = [theirs(hint) for (_, theirs), hint in zip(pairs, hints, strict=True)]
    for (ours, _), hint, expected in zip(pairs, hints, features, strict=True):
        assert worst(ours(hint), expected) <= 2e-5
    weighted = [0.6 * a + 0.9 * b for a, b in zip(*features, strict=True)]
    expected = their_net(
        x, t, cond["context"], added_cond_kwargs=added or None, down_intrablock_additional_residuals=weighted
    ).sample
    controls = [Control(ours, scale=scale) for (ours, _), scale in zip(pairs, (0.6, 0.9), strict=True)]
    ours = Controlled(net, controls, RectifiedFlow())
    given, _ = ours.conditions(hints, [8 * side for side in size], 2)
    assert error(ours(x, t, **cond, **given), expected) <= 2e-5


@BOTH
@torch.no_grad()
def test_controlnet_and_adapter_together_equal_diffusers(config):
    net, their_net = pair(config, seed=13)
    control, their_control = control_pair(config, 14)
    kind, widths = ("full_adapter_xl", [32, 64, 96, 96]) if config is SDXL else ("full_adapter", [32, 64, 64])
    adapter, their_adapter = adapter_pair(kind, 15, widths)
    x, t, cond, added = inputs(config, (8, 8))
    hints = [torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)]
    residuals = theirs_of(their_control, x, t, hints[0], cond, added)
    expected = their_net(
        x, t, cond["context"], added_cond_kwargs=added or None,
        down_block_additional_residuals=residuals[:-1], mid_block_additional_residual=residuals[-1],
        down_intrablock_additional_residuals=their_adapter(hints[1]),
    ).sample  # fmt: skip
    ours = Controlled(net, [Control(control), Control(adapter)], RectifiedFlow())
    given, _ = ours.conditions(hints, (64, 64), 2)
    assert error(ours(x, t, **cond, **given), expected) <= 2e-5


@BOTH
def test_controlnets_round_trip_is_bit_exact(config):
    ours, theirs = control_pair(config, seed=16)
    published = controlnet.to_diffusers(ours.state_dict())
    assert published.keys() == theirs.state_dict().keys()
    assert all(torch.equal(published[key], value) for key, value in theirs.state_dict().items())
    again = diffusers.ControlNetModel.from_config(controlnet.to_config(ours))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in published.items()}
    assert controlnet.from_config(config_of(again)) | {"out_channels": 4} == controlnet.arguments(ours)


@pytest.mark.parametrize("kind, widths", [("full_adapter", [32, 64, 64]), ("full_adapter_xl", [32, 64, 96, 96]),
                                          ("light_adapter", [32, 64])])  # fmt: skip
def test_adapters_round_trip_is_bit_exact(kind, widths):
    ours, theirs = adapter_pair(kind, 17, widths)
    published = t2i_adapter.to_diffusers(ours.state_dict())
    assert published.keys() == theirs.state_dict().keys()
    assert all(torch.equal(published[key], value) for key, value in theirs.state_dict().items())
    again = diffusers.T2IAdapter.from_config(t2i_adapter.to_config(ours))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in published.items()}
