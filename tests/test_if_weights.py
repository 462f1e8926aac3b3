"""DeepFloyd IF's files: names of both layouts, rows head by head, arguments from shapes, config.yml and config.json."""

import pytest
import torch
from torch import nn

from ldm.build import compose, make
from ldm.models.if_unet import IFUNet
from ldm.utils.errors import WeightsError
from ldm.weights.formats_if import if_arguments, if_from_config, if_from_shapes, if_from_yml, if_to_config, if_to_yml
from ldm.weights.if_unet import (
    diffusers_names,
    from_diffusers,
    from_original,
    original_names,
    to_diffusers,
    to_original,
)

PUBLISHED = ["if_i_m", "if_i_xl", "if_ii_m", "if_iii_l"]


def published(name):
    with torch.device("meta"):
        node = compose("train", [f"network={name}"])["network"]
        return make(node | {"in_channels": 3, "context_dim": 4096}, "network")


def tiny(**changes):
    torch.manual_seed(0)
    sizes = dict(channels=64, channel_mult=[1, 2], num_res_blocks=[1, 2], attention=[False, True], context_dim=48)
    knobs = dict(text_dim=32, text_norm="group", pool_heads=3, activation="gelu", learned_variance=True)
    net = IFUNet(3, **sizes | knobs | changes).eval()
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_arguments_of_published_files(name):
    net = published(name)
    arguments = if_arguments(net)
    with torch.device("meta"):
        again = IFUNet(**arguments).state_dict()
    assert shapes_of(again) == shapes_of(net.state_dict())
    shapes = shapes_of(to_original(net.state_dict()))
    assert if_from_shapes(shapes).items() <= arguments.items()
    assert if_from_yml(if_to_yml(net), shapes).items() <= arguments.items()
    assert if_from_config(if_to_config(net)).items() <= arguments.items()


def test_names_of_the_authors_files():
    names = original_names(published("if_ii_m").state_dict())
    assert names["embed.aug_mlp.fc2.bias"] == ("aug_proj.2.bias",)
    assert names["embed.pooling.pool.kv.weight"] == (
        "encoder_pooling.1.k_proj.weight",
        "encoder_pooling.1.v_proj.weight",
    )
    assert names["embed.pooling.pool.position"] == ("encoder_pooling.1.positional_embedding",)
    assert names["embed.pooling.norm_out.bias"] == ("encoder_pooling.3.bias",)
    # 1 + 3 + 3 + 4 + 6 + 5 input blocks, of which 3, 6, 10 and 16 halve; 6 + 6 + 4 + 3 + 3 output blocks
    assert names["encoder.levels.3.downsample.conv1.bias"] == ("input_blocks.16.0.in_layers.2.bias",)
    assert names["encoder.levels.4.blocks.4.attention.text_kv.bias"] == ("input_blocks.21.1.encoder_kv.bias",)
    assert names["decoder.levels.0.upsample.norm2.bias"] == ("output_blocks.5.2.out_layers.0.bias",)
    assert names["decoder.levels.2.upsample.norm2.bias"] == ("output_blocks.15.1.out_layers.0.bias",)
    assert names["decoder.levels.4.blocks.2.res.skip.bias"] == ("output_blocks.21.0.skip_connection.bias",)
    assert names["middle.0.attention.out.weight"] == ("middle_block.1.proj_out.weight",)
    assert names["middle.1.res.emb_proj.weight"] == ("middle_block.2.emb_layers.1.weight",)


def test_names_of_diffusers():
    names = diffusers_names(published("if_i_m").state_dict())
    assert names["middle.0.attention.qkv.bias"] == tuple(f"mid_block.attentions.0.to_{x}.bias" for x in "qkv")
    assert names["encoder.levels.1.downsample.conv2.bias"] == ("down_blocks.1.downsamplers.0.conv2.bias",)
    assert names["decoder.levels.0.blocks.3.attention.text_norm.bias"] == ("up_blocks.0.attentions.3.norm_cross.bias",)
    only_text = diffusers_names(published("if_ii_m").state_dict(), self_attention=False)
    assert only_text["middle.0.attention.qkv.bias"] == ("mid_block.attentions.0.to_q.bias",)


def authors_attention(state, x, text, head_dim):
    """The middle's attention by the authors' formula: a head's rows of q, k, v, or k, v of the text, are together."""

    def conv(name, value):
        return nn.functional.conv1d(value, state[f"middle_block.1.{name}.weight"], state[f"middle_block.1.{name}.bias"])

    def norm(name, value):
        weight, bias = state[f"middle_block.1.{name}.weight"], state[f"middle_block.1.{name}.bias"]
        return nn.functional.group_norm(value, 32, weight, bias)

    def by_head(value):
        return value.unflatten(1, (x.shape[1] // head_dim, -1))  # B H kinds*d N

    q, *own = by_head(conv("qkv", norm("norm", x).flatten(2))).split(head_dim, dim=2)
    k, v = by_head(conv("encoder_kv", norm("norm_encoder", text.mT))).split(head_dim, dim=2)
    if own:
        k, v = torch.cat([k, own[0]], dim=3), torch.cat([v, own[1]], dim=3)  # the text's first
    weights = torch.einsum("bhct,bhcs->bhts", q * head_dim**-0.25, k * head_dim**-0.25).softmax(-1)
    return x + conv("proj_out", torch.einsum("bhts,bhcs->bhct", weights, v).flatten(1, 2)).view_as(x)


@pytest.mark.parametrize("self_attention", [True, False])
@torch.no_grad()
def test_rows_are_head_by_head(self_attention):
    net = tiny(self_attention=self_attention)
    x, text = torch.randn(2, 128, 3, 2), torch.randn(2, 5, 32)
    expected = authors_attention(to_original(net.state_dict()), x, text, head_dim=64)
    assert torch.allclose(net.middle[0].attention(x, text), expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"self_attention": False, "super_resolution": True}, {"text_dim": None, "context_dim": 96}]
)
def test_round_trips_are_bit_exact(changes):
    state = tiny(**changes).state_dict()
    original, published = to_original(state), to_diffusers(state)
    for again in (from_original(original, state), from_diffusers(published, state)):
        assert again.keys() == state.keys() and all(torch.equal(again[key], value) for key, value in state.items())
    assert original["middle_block.1.qkv.weight"].ndim == 3 and published["mid_block.attentions.0.to_q.weight"].ndim == 2
    original["lora.weight"] = original.pop("input_blocks.0.0.bias")
    with pytest.raises(WeightsError, match=r"missing 1 \(input_blocks.0.0.bias\); unknown 1 \(lora.weight\)"):
        from_original(original, state)


def test_config_yml_of_the_authors():
    """Numbers as text; `disable_self_attentions: true` disables nothing there, so the shapes decide."""
    net = tiny(super_resolution=True, skip_scale=0.7071, self_attention=False)
    params, shapes = if_to_yml(net), shapes_of(to_original(net.state_dict()))
    expected = dict(channel_mult="1,2", attention_resolutions="8", in_channels=6, out_channels=6, num_res_blocks=[1, 2])
    assert expected.items() <= params.items() and params["disable_self_attentions"] == "8"
    assert if_from_yml(params, shapes).items() <= if_arguments(net).items()
    assert if_from_yml(params | {"disable_self_attentions": True}, shapes)["self_attention"] is False
    assert if_from_yml(params | {"scale_skip_connection": False}, shapes)["skip_scale"] == 1
    with pytest.raises(WeightsError, match="use_scale_shift_norm=False, this network is for True only"):
        if_from_yml(params | {"use_scale_shift_norm": False}, shapes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cross_attention_norm": None}, "cross_attention_norm=None, this network is for 'group_norm' only"),
        ({"time_embedding_act_fn": "gelu"}, "time_embedding_act_fn=gelu, which makes a network that is not"),
        ({"resnet_out_scale_factor": 1.4}, "mid_block_scale_factor=1.0"),
        ({"time_embedding_dim": 512}, "time_embedding_dim=512"),
        ({"class_embed_type": "projection"}, "class_embed_type=projection"),
        ({"only_cross_attention": [True, False]}, "only_cross_attention="),
        ({"down_block_types": ["DownBlock2D"] * 2}, "has blocks .*DownBlock2D.* unknown here"),
        ({"out_channels": 5}, "5 channels come out of 3"),
    ],
)
def test_configs_of_other_networks(changes, message):
    with pytest.raises(WeightsError, match=message):
        if_from_config(if_to_config(tiny()) | changes)


def test_networks_without_a_place():
    with pytest.raises(WeightsError, match="text_norm=layer.* no place in a published layout"):
        if_to_config(tiny(text_norm="layer"))
