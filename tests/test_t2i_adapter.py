"""T2I-Adapter: its sizes, where its features go, its published files."""

import pytest
import torch

from ldm.adapters.control import Control, Controlled
from ldm.diffusion import process
from ldm.models.t2i_adapter import T2IAdapter
from ldm.models.unet import UNet
from ldm.utils.errors import ConfigError, DataError, WeightsError
from ldm.weights import t2i_adapter as weights
from tests.test_controlnet import TINY, hint, inputs, parameters, randomised, tiny

FULL, XL = {}, {"unshuffle": 16, "halved": [2]}
LIGHT = {"num_res_blocks": 4, "light": True}
SMALL = {"full": {"channels": [32, 64]}, "xl": XL | {"channels": [32, 64, 64, 64]},
         "light": LIGHT | {"channels": [32, 64, 64]}}  # fmt: skip
FLOW = process.RectifiedFlow()


@pytest.mark.parametrize(
    "sizes, channels, count, original_keys",
    [(FULL, 1, 77_000_640, 38), (FULL, 3, 77_369_280, 38), (XL, 1, 77_553_600, 38), (XL, 3, 79_028_160, 38),
     (LIGHT, 3, 18_689_200, 80)],
)  # fmt: skip
def test_published_sizes(sizes, channels, count, original_keys):
    with torch.device("meta"):
        net = T2IAdapter(channels, **sizes)
    assert parameters(net) == count
    original = weights.to_original(net.state_dict())
    assert len(original) == len(weights.to_diffusers(net.state_dict())) == original_keys
    shapes = {name: tuple(tensor.shape) for name, tensor in original.items()}
    assert weights.from_shapes(shapes) == weights.from_config(weights.to_config(net)) == weights.arguments(net)


@pytest.mark.parametrize("sizes", SMALL.values(), ids=SMALL)
def test_both_layouts_round_trip_bit_exact(sizes):
    net = T2IAdapter(3, **sizes)
    state = net.state_dict()
    for write, read in ((weights.to_original, weights.from_original), (weights.to_diffusers, weights.from_diffusers)):
        again = read(write(state), state)
        assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


def test_original_names_count_blocks_through_the_levels():
    full = weights.to_original(T2IAdapter(3, [32, 64]).state_dict())
    assert {"conv_in.weight", "body.0.block1.weight", "body.2.in_conv.weight", "body.3.block2.bias"} <= full.keys()
    assert "body.1.in_conv.weight" not in full
    light = weights.to_original(T2IAdapter(3, **SMALL["light"]).state_dict())
    assert {"body.0.in_conv.weight", "body.2.body.3.block2.weight", "body.1.out_conv.bias"} <= light.keys()
    with pytest.raises(WeightsError, match="has no place in diffusers' layout"):
        weights.to_config(T2IAdapter(3, [32, 64], halved=[]))


@torch.no_grad()
def test_features_change_the_path_and_the_skips():
    net = tiny()
    x, t, cond = inputs()
    emb = net.conditioning(t, None, None, None, x.dtype)
    zeros = [torch.zeros(1, 32, 8, 8), torch.zeros(1, 64, 4, 4)]
    plain = net.encoder(x, emb, cond["context"])
    assert torch.equal(net(x, t, **cond, features=zeros), net(x, t, **cond))
    bumped = net.encoder(x, emb, cond["context"], None, [zeros[0] + 1, zeros[1]])
    changed = [not torch.equal(a, b) for a, b in zip(plain, bumped, strict=True)]
    assert changed == [False, True, True, True]  # conv_in's; the block's, the step down's, the next level's
    assert torch.equal(bumped[1], plain[1] + 1)
    after = net.encoder(x, emb, cond["context"], None, [torch.ones(1, 32, 4, 4), zeros[1]])  # of the size below
    changed = [not torch.equal(a, b) for a, b in zip(plain, after, strict=True)]
    assert changed == [False, False, True, True] and torch.equal(after[2], plain[2] + 1)
    to_middle = net(x, t, **cond, features=[*zeros, torch.ones(1, 64, 4, 4)])
    assert not torch.allclose(to_middle, net(x, t, **cond), atol=1e-3)


def test_features_that_do_not_fit_are_refused():
    net, (x, t, cond) = tiny(), inputs()
    with pytest.raises(ConfigError, match="got 4 features, expected 2, one per level .and the middle's."):
        net(x, t, **cond, features=[torch.zeros(1, 32, 8, 8)] * 4)
    with pytest.raises(ConfigError, match=r"a feature is \(32, 5, 5\), but its level's last outputs are \(32, 8, 8\)"):
        net(x, t, **cond, features=[torch.zeros(1, 32, 5, 5), torch.zeros(1, 64, 4, 4)])


@torch.no_grad()
def test_it_runs_once_per_picture_and_several_add_up():
    net = tiny()
    x, t, cond = inputs()
    nets = [randomised(T2IAdapter(3, [32, 64]), 1), randomised(T2IAdapter(1, [32, 64]), 2)]
    both = Controlled(net, [Control(nets[0], scale=0.5), Control(nets[1], scale=-1.5, window=(0, 0.4))], FLOW)
    calls = []
    for adapter in nets:
        adapter.register_forward_hook(lambda *_: calls.append(1))
    given, null = both.conditions([hint(), hint(2, seed=1)], (64, 64), 2)
    assert given is null and len(given["hints"]) == 4
    a, b = given["hints"][:2], given["hints"][2:]
    late, early = torch.full((2,), 100.0), torch.full((2,), 900.0)
    for _ in range(3):
        out = both(x, early, **cond, **given), both(x, late, **cond, **given)
    assert len(calls) == 2
    expected = [0.5 * p - 1.5 * q for p, q in zip(a, b, strict=True)]
    assert torch.allclose(out[0], net(x, early, **cond, features=expected), atol=1e-5)
    assert torch.allclose(out[1], net(x, late, **cond, features=[0.5 * p for p in a]), atol=1e-5)


@torch.no_grad()
def test_the_kind_of_sdxl_gives_its_middle_a_feature():
    net = randomised(UNet(**TINY | {"channel_mult": [1, 2, 2], "depth": [0, 1, 1, 1]}))
    adapter = randomised(T2IAdapter(3, **SMALL["xl"]))
    x, t, cond = inputs(side=16)
    joined = Controlled(net, [Control(adapter)], FLOW)
    given, _ = joined.conditions([hint(side=128)], (128, 128), 2)
    assert [tuple(f.shape[1:]) for f in given["hints"]] == [(32, 8, 8), (64, 8, 8), (64, 4, 4), (64, 4, 4)]
    with_middle = joined(x, t, **cond, **given)
    three = net(x, t, **cond, features=given["hints"][:3])
    assert torch.allclose(with_middle, net(x, t, **cond, features=given["hints"]), atol=1e-5)
    assert not torch.allclose(with_middle, three, atol=1e-4)


def test_bad_input_is_named_in_one_line():
    net = tiny()
    with pytest.raises(ConfigError, match="this T2IAdapter is for another base: it adds .64, 64. channels, expected"):
        Controlled(net, [Control(T2IAdapter(3, [64, 64]))], FLOW)
    joined = Controlled(net, [Control(T2IAdapter(3, [32, 64]))], FLOW)
    with pytest.raises(ConfigError, match="the hint is 60x60 pixels, which 8 does not divide"):
        joined.conditions([hint(side=60)], (60, 60), 2)
    with pytest.raises(DataError, match="the hint is 32x32 pixels, but what is drawn is 64x64"):
        joined.conditions([hint(side=32)], (64, 64), 2)
