"""The UNet against diffusers' UNet2DConditionModel, with random weights moved through the published layout."""

import pytest
import torch

from ldm.models.unet import UNet
from ldm.weights.unet import from_diffusers, to_diffusers

diffusers = pytest.importorskip("diffusers")

# ours, theirs. In diffusers `attention_head_dim` is the number of heads (its issue 2011).
SD15 = (
    dict(channels=32, channel_mult=[1, 2, 2], depth=[1, 1, 0, 1], head_dim=[4, 8, 8], context_dim=24),
    dict(
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=24,
    ),
)
SDXL = (
    dict(channels=32, channel_mult=[1, 2, 3], depth=[0, 2, 3, 3], head_dim=32, context_dim=40),
    dict(
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 3],
        attention_head_dim=[1, 2, 3],
        cross_attention_dim=40,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=20 + 6 * 256,
    ),
)
SD15[0]["linear_projection"] = False
SDXL[0].update(pooled_dim=20, num_sizes=6)


def pair(config, seed, scale=1.0):
    """Ours and theirs with the same weights; what starts constant (norms, biases, zeroed layers) is drawn anew."""
    torch.manual_seed(seed)
    theirs = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, sample_size=8, **config[1]).eval()
    for parameter in theirs.parameters():
        constant = parameter.min() == parameter.max()
        parameter.data.add_(0.1 * torch.randn_like(parameter) * constant).mul_(scale)
    ours = UNet(4, **config[0]).eval()
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours.state_dict()))
    return ours, theirs


def inputs(config, size):
    x, t = torch.randn(2, 4, *size), torch.tensor([999.0, 17.0])
    context = torch.randn(2, 7, config[0]["context_dim"])
    if config is SD15:
        return x, t, {"context": context}, {}
    pooled, sizes = torch.randn(2, 20), torch.tensor([[512.0, 768, 0, 8, 1024, 1024]] * 2)
    return x, t, {"context": context, "pooled": pooled, "size": sizes}, {"text_embeds": pooled, "time_ids": sizes}


def error(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("seed, size, scale", [(0, (8, 8), 1), (1, (16, 8), 1), (2, (7, 9), 1), (3, (8, 12), 1 / 16)])
@torch.no_grad()
def test_equals_diffusers(config, seed, size, scale):
    ours, theirs = pair(config, seed, scale)
    x, t, cond, added = inputs(config, size)
    expected = theirs(x, t, cond["context"], added_cond_kwargs=added or None).sample
    assert error(ours(x, t, **cond), expected) <= 2e-5


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
@torch.no_grad()
def test_residuals_and_mask_equal_diffusers(config):
    ours, theirs = pair(config, seed=4)
    x, t, cond, added = inputs(config, (8, 8))
    mask = torch.tensor([[True] * 3 + [False] * 4, [True] * 7])
    emb = torch.zeros(2, ours.conditioning.out_dim)
    residuals = [torch.randn_like(skip) for skip in ours.encoder(x, emb, cond["context"])]
    residuals.append(torch.randn_like(residuals[-1]))
    expected = theirs(
        x,
        t,
        cond["context"],
        encoder_attention_mask=mask,
        added_cond_kwargs=added or None,
        down_block_additional_residuals=residuals[:-1],
        mid_block_additional_residual=residuals[-1],
    ).sample
    assert error(ours(x, t, context_mask=mask, residuals=residuals, **cond), expected) <= 2e-5


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_round_trip_is_bit_exact(config):
    ours, theirs = pair(config, seed=5)
    published = to_diffusers(ours.state_dict())
    assert published.keys() == theirs.state_dict().keys()
    assert all(torch.equal(published[key], value) for key, value in theirs.state_dict().items())
