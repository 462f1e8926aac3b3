"""ControlNet: what it is made of, that it starts as nothing, how several join a network."""

import math

import pytest
import torch
from torch import nn

from ldm.adapters.control import Control, Controlled
from ldm.diffusion import prediction, process
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import cfg
from ldm.diffusion.interpolant import Linear
from ldm.models.controlnet import ControlNet
from ldm.models.t2i_adapter import T2IAdapter
from ldm.models.unet import UNet
from ldm.utils.errors import ConfigError, DataError, WeightsError
from ldm.weights import controlnet as weights

SD15 = {"in_channels": 4, "head_dim": [40, 80, 160, 160], "context_dim": 768, "linear_projection": False}
SDXL = {"in_channels": 4, "channel_mult": [1, 2, 4], "depth": [0, 2, 10, 10], "context_dim": 2048, "pooled_dim": 1280,
        "num_sizes": 6}  # fmt: skip
TINY = {"in_channels": 4, "channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "depth": [1, 0, 1],
        "head_dim": 16, "context_dim": 12}  # fmt: skip
FLOW = process.RectifiedFlow()


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def randomised(net, seed=0):
    """What starts at zero is drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator) * (p.min() == p.max()))
    return net.eval()


def tiny(seed=0, **knobs):
    torch.manual_seed(seed)
    return randomised(UNet(**TINY | knobs), seed)


def inputs(count=2, side=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, t = torch.randn(count, 4, side, side, generator=g), torch.linspace(900, 10, count)
    return x, t, {"context": torch.randn(count, 5, 12, generator=g)}


def hint(count=1, side=64, seed=0):
    pixels = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return (255 * pixels).to(torch.uint8)


# --- what it is made of --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, count, zeros, keys", [(SD15, 361_279_120, 12, 340), (SDXL, 1_251_014_160, 9, 844)], ids=["sd15", "sdxl"]
)
def test_published_sizes(sizes, count, zeros, keys):
    with torch.device("meta"):
        net = ControlNet(UNet(**sizes))
    assert parameters(net) == count
    assert len(net.zero_convs) == zeros and parameters(net.hint_encoder) == 1_086_480
    assert net.downsample == 8
    original, diffusers = weights.to_original(net.state_dict()), weights.to_diffusers(net.state_dict())
    assert len(original) == len(diffusers) == keys
    assert {"time_embed.0.weight", "input_hint_block.0.weight", "input_hint_block.14.bias", "zero_convs.0.0.weight",
            "middle_block_out.0.bias", "middle_block.1.proj_in.weight"} <= original.keys()  # fmt: skip
    assert {"controlnet_cond_embedding.conv_in.weight", "controlnet_cond_embedding.blocks.5.weight",
            "controlnet_cond_embedding.conv_out.bias", "controlnet_mid_block.bias",
            f"controlnet_down_blocks.{zeros - 1}.weight"} <= diffusers.keys()  # fmt: skip
    shapes = {name: tuple(tensor.shape) for name, tensor in original.items()}
    expected = weights.arguments(net)
    with torch.device("meta"):
        for found in (weights.from_shapes(shapes), weights.from_config(weights.to_config(net))):
            assert weights.arguments(weights.build(**found)) == expected


def test_both_layouts_round_trip_bit_exact():
    net = randomised(ControlNet(tiny()))
    state = net.state_dict()
    for write, read in ((weights.to_original, weights.from_original), (weights.to_diffusers, weights.from_diffusers)):
        again = read(write(state), state)
        assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    with pytest.raises(WeightsError, match="missing 1 .zero_convs.0.0.bias."):
        published = weights.to_original(state)
        del published["zero_convs.0.0.bias"]
        weights.from_original(published, state)


def test_it_is_a_copy_that_does_not_share_and_can_be_trained():
    net = tiny().requires_grad_(False)
    copy = ControlNet(net)
    assert all(p.requires_grad for p in copy.parameters())
    shared = {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in copy.parameters()}
    assert not shared
    for name in ("conditioning", "encoder", "middle"):
        ours, theirs = getattr(copy, name).state_dict(), getattr(net, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# --- how it joins a network ----------------------------------------------------------------------------------------


def joined(net, *controls, p=FLOW):
    return Controlled(net, [c if isinstance(c, Control) else Control(c) for c in controls], p)


@torch.no_grad()
def test_untrained_it_changes_no_bit():
    net = tiny()
    x, t, cond = inputs()
    expected = net(x, t, **cond)
    both = joined(net, ControlNet(net), ControlNet(net))
    given, null = both.conditions([hint(), hint(2, seed=1)], (64, 64), 2)
    assert given is null  # guidance takes a hint away from neither half
    assert torch.equal(both(x, t, **cond, **given), expected)
    assert torch.equal(both(x, t, **cond), expected)


@torch.no_grad()
def test_residuals_add_up_with_their_scales():
    net = tiny()
    a, b = randomised(ControlNet(net), 1), randomised(ControlNet(net), 2)
    x, t, cond = inputs()
    both = joined(net, Control(a, scale=0.5), Control(b, scale=2.0))
    given, _ = both.conditions([hint(), hint(seed=1)], (64, 64), 2)
    ra, rb = (c.steer(x, t, [h], cond) for c, h in zip((a, b), given["hints"], strict=True))
    expected = net(x, t, **cond, residuals=[0.5 * p + 2 * q for p, q in zip(ra, rb, strict=True)])
    assert torch.allclose(both(x, t, **cond, **given), expected, atol=1e-5)
    more = both(x, t, **cond, **given, residuals=[0 * r + 1 for r in ra])  # what others add is kept
    assert not torch.allclose(more, expected, atol=1e-3)
    off = joined(net, Control(a, scale=0.0))
    given, _ = off.conditions([hint()], (64, 64), 2)
    assert torch.equal(off(x, t, **cond, **given), net(x, t, **cond))


@torch.no_grad()
def test_the_hint_is_encoded_once_and_text_alone_is_seen():
    net = tiny()
    control = randomised(ControlNet(net))
    calls, forward = [], control.hint_encoder.forward
    control.hint_encoder.forward = lambda h: calls.append(len(h)) or forward(h)
    x, t, cond = inputs(3)
    both = joined(net, control)
    given, _ = both.conditions([hint()], (64, 64), 3)
    for _ in range(4):
        both(x, t, **cond, **given)
    assert calls == [1]
    seen = control.steer(x, t, given["hints"], {**cond, "image_tokens": torch.zeros(3, 2, 12)})  # an IP-Adapter's
    expected = control.steer(x, t, given["hints"], cond)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


@torch.no_grad()
def test_a_copy_of_an_inpainting_network_sees_its_image():
    net = tiny(in_channels=9, out_channels=4)
    x, t, cond = inputs()
    both = joined(net, randomised(ControlNet(net)))
    given, _ = both.conditions([hint()], (64, 64), 2)
    a, b = (both(x, t, **cond, **given, image=torch.full((2, 5, 8, 8), v)) for v in (0.0, 1.0))
    assert not torch.allclose(a, b, atol=1e-3)


@torch.no_grad()
def test_guess_mode_steers_the_conditional_half_alone():
    net = tiny()
    control = randomised(ControlNet(net))
    x, t, cond = inputs(2)
    null = {"context": torch.zeros_like(cond["context"])}
    both = joined(net, Control(control, scale=0.8, guess=True))
    last = len(control.widths) - 1
    assert both.controls[0].strengths == [0.8 * 0.825 ** (last - i) for i in range(last + 1)]
    with_hint, without = both.conditions([hint()], (64, 64), 2)
    assert torch.allclose(both(x, t, **null, **without), net(x, t, **null), atol=1e-6)
    denoiser, bare = (Denoiser(n, FLOW, prediction.Flow()) for n in (both, net))
    guided = cfg(denoiser, cond | with_hint, null | without, scale=3.0)(x, 0.5)
    expected = torch.lerp(bare(x, 0.5, **null), denoiser(x, 0.5, **cond, **with_hint), 3.0)
    assert torch.allclose(guided, expected, atol=1e-4)


PROCESSES = {"flow": FLOW, "table": process.linear(), "backwards": Linear(), "edm": process.EDM()}


@pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("window", [(0.0, 0.5), (0.3, 0.8), (0.5, 1.0), (0.0, 1.0)], ids=str)
def test_windows_count_steps_by_where_they_begin(p, window):
    """As diffusers does on an even grid: from the first step at or after start, until the last that ends by end."""
    net = tiny()
    both = joined(net, Control(randomised(ControlNet(net)), window=window), p=p)
    start, end = window
    n = 10
    for i in range(n):
        t = torch.full((2,), p.net_time(1 - i / n))
        kept = not (i / n < start - 1e-9 or (i + 1) / n > end + 1e-9)
        assert both.acts(0, t) == kept, i


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, size, message",
    [
        (hint(side=32), (64, 64), "the hint is 32x32 pixels, but what is drawn is 64x64"),
        (hint().float() / 127.5 - 1, (64, 64), "torch.float32 from -1 to 0.99.*; expected uint8, or floats of 0..1"),
        (hint().float(), (64, 64), "torch.float32 from 0 to 254; expected uint8"),
        (hint().long(), (64, 64), "the hint is torch.int64 from"),
        (torch.full((1, 3, 64, 64), math.nan), (64, 64), "from nan to nan"),
        (torch.zeros(0, 3, 64, 64), (64, 64), "the hint is empty"),
        (torch.zeros(1, 3, 0, 0), (0, 0), "the hint is empty"),
        (hint()[0], (64, 64), "no batch of pictures"),
        (hint(3), (64, 64), "there are 3 hints for 2 images"),
        (hint()[:, :2], (64, 64), "the hint has 2 channels, this network reads 3"),
    ],
)
def test_hints_that_cannot_be_are_named_in_one_line(given, size, message):
    net = tiny()
    with pytest.raises(DataError, match=message) as error:
        joined(net, ControlNet(net)).conditions([given], size, 2)
    assert "\n" not in str(error.value)


def test_hints_of_holes_of_one_channel_and_of_pixels():
    net = tiny()
    both = joined(net, ControlNet(net))
    holes = hint().float() / 255
    holes[:, :, :9] = -1
    both.conditions([holes], (64, 64), 2)
    grey = hint()[:, :1]
    a, b = (both.conditions([h], (64, 64), 2)[0]["hints"][0] for h in (grey, grey.expand(-1, 3, -1, -1)))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"scale": math.nan}, "scale=nan, expected a finite number"),
        ({"window": (0.5, 0.5)}, "expected .start, end. with 0 <= start < end <= 1"),
        ({"window": (0, math.nan)}, "window"),
    ],
)
def test_numbers_that_cannot_be(knobs, message):
    with pytest.raises(ConfigError, match=message):
        Control(ControlNet(tiny()), **knobs)


def test_another_base_and_another_codec_are_refused():
    net = tiny()
    with pytest.raises(ConfigError, match="this ControlNet is for another base: it adds .64, 64, 64, 128"):
        joined(net, ControlNet(tiny(channels=64)))
    with pytest.raises(ConfigError, match="a ControlNet steers a UNet, the base is a Conv2d"):
        joined(nn.Conv2d(3, 3, 1), ControlNet(net))
    with pytest.raises(ConfigError, match="guess=true is a way to use a ControlNet, not a T2IAdapter"):
        Control(T2IAdapter(3, [32, 64]), guess=True)
    with pytest.raises(DataError, match="there are 0 hints for 1 controls"):
        joined(net, ControlNet(net)).conditions([], (64, 64), 2)
    other = joined(net, ControlNet(net, hint_widths=[16, 32]))  # for a codec that halves the sides once
    given, _ = other.conditions([hint()], (64, 64), 2)
    x, t, cond = inputs()
    with pytest.raises(ConfigError, match="the encoded hint is 32x32, x is 8x8: .* one more of hint_widths"):
        other(x, t, **cond, **given)
    given, _ = joined(net, ControlNet(net)).conditions([hint()], (64, 64), 2)
    with pytest.raises(ConfigError, match="context"):
        joined(net, ControlNet(net))(x, t, **given)
