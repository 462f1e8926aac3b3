"""DeepFloyd IF's U-Net against diffusers' UNet2DConditionModel, with random weights moved through the layouts."""

import pytest
import torch

from ldm.models.if_unet import IFUNet
from ldm.weights.formats_if import if_arguments, if_from_config, if_from_shapes, if_to_config
from ldm.weights.if_unet import from_diffusers, from_original, to_diffusers, to_original

diffusers = pytest.importorskip("diffusers")

COMMON = dict(
    encoder_hid_dim=24,
    cross_attention_dim=32,
    attention_head_dim=16,
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    addition_embed_type="text",
    addition_embed_type_num_heads=3,
    cross_attention_norm="group_norm",
    resnet_time_scale_shift="scale_shift",
    act_fn="gelu",
)
BASE = dict(in_channels=3, out_channels=6)
ENLARGES = dict(
    in_channels=6,
    out_channels=6,
    class_embed_type="timestep",
    time_embedding_act_fn="gelu",
    resnet_skip_time_act=True,
    resnet_out_scale_factor=1 / 0.7071,
    mid_block_scale_factor=1 / 0.7071,
    only_cross_attention=True,
)
CONFIGS = {  # widths, blocks, levels that attend, the rest
    "I": ((32, 64, 96), 2, (0, 1, 1), BASE),
    "I_wide": ((64, 128), 1, (1, 1), BASE | dict(attention_head_dim=64, encoder_hid_dim=48, cross_attention_dim=96)),
    "I_silu": ((32, 64), 3, (0, 0), BASE | dict(act_fn="silu", out_channels=3, attention_head_dim=8)),
    "I_unprojected": ((32, 32, 64), 1, (0, 1, 0), BASE | dict(encoder_hid_dim=None, addition_embed_type_num_heads=4)),
    "II": ((32, 64, 128), [1, 2, 3], (0, 1, 1), ENLARGES),
    "II_both": ((32, 64), [2, 1], (0, 1), ENLARGES | dict(only_cross_attention=False)),
    "III": ((32, 64, 64, 96), [1, 1, 2, 2], (0, 0, 0, 1), ENLARGES | dict(attention_head_dim=32)),
}


def pair(name, seed=0, scale=1.0):
    """Ours and theirs with the same weights; what starts constant (norms, biases, zeroed layers) is drawn anew."""
    widths, blocks, attends, rest = CONFIGS[name]
    torch.manual_seed(seed)
    sizes = dict(
        sample_size=16,
        block_out_channels=widths,
        layers_per_block=blocks,
        down_block_types=["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        up_block_types=["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
        time_embedding_dim=max(widths),
    )
    theirs = diffusers.UNet2DConditionModel(**COMMON | sizes | rest).eval()
    for parameter in theirs.parameters():
        constant = parameter.min() == parameter.max()
        parameter.data.add_(0.1 * torch.randn_like(parameter) * constant).mul_(scale)
    ours = IFUNet(**if_from_config(dict(theirs.config))).eval()
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours.state_dict()))
    return ours, theirs


def error(ours, theirs, size=(16, 16), length=9):
    factor = 2 ** (len(theirs.config.block_out_channels) - 1)
    x = torch.randn(2, 3, size[0] // 8 * factor, size[1] // 8 * factor)
    t, context = torch.tensor([999.0, 17.0]), torch.randn(2, length, ours.embed.context_dim)
    given, steps, both = {}, None, x
    if ours.embed.aug_mlp is not None:
        steps = torch.tensor([250, 3])
        given = dict(low_res=torch.randn_like(x), aug_level=steps / 1000)
        both = torch.cat([x, given["low_res"]], dim=1)
    expected = theirs(both, t, context, class_labels=steps).sample
    return float((ours(x, t, context=context, **given) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed, size, scale", [(0, (16, 16), 1), (1, (24, 8), 1), (2, (16, 32), 1 / 16)])
@torch.no_grad()
def test_equals_diffusers(name, seed, size, scale):
    assert error(*pair(name, seed, scale), size) <= 2e-5


@torch.no_grad()
def test_the_length_of_the_padding_counts():
    """GroupNorm is over all tokens, so that texts are always padded to the same length: IF's 77."""
    ours, theirs = pair("II", seed=3)
    assert error(ours, theirs, length=77) <= 2e-5
    x, t, context = torch.randn(1, 3, 8, 8), torch.tensor([5.0]), torch.randn(1, 4, 24)
    given = dict(low_res=x, aug_level=torch.zeros(1))
    longer = ours(x, t, context=torch.cat([context, torch.zeros(1, 4, 24)], dim=1), **given)
    assert not torch.allclose(ours(x, t, context=context, **given), longer, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_are_bit_exact(name):
    ours, theirs = pair(name)
    published = to_diffusers(ours.state_dict())
    assert published.keys() == theirs.state_dict().keys()
    assert all(torch.equal(published[key], value) for key, value in theirs.state_dict().items())
    head_dim = ours.middle[0].attention.head_dim
    original = to_original(ours.state_dict(), head_dim=head_dim)
    back = from_original(original, ours.state_dict(), head_dim=head_dim)
    assert all(torch.equal(back[key], value) for key, value in ours.state_dict().items())
    config = if_to_config(ours)
    assert if_from_config(config) == if_from_config(dict(theirs.config))
    again = diffusers.UNet2DConditionModel(**{key: value for key, value in config.items() if key != "_class_name"})
    assert again.state_dict().keys() == published.keys()
    tells = if_from_shapes({key: tuple(value.shape) for key, value in original.items()})
    guessed = {"head_dim", "pool_heads", "activation", "skip_scale"}  # what no shape tells is as published
    assert {key for key, value in tells.items() if value != if_arguments(ours)[key]} <= guessed
