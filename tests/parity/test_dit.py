"""DiT against diffusers' DiTTransformer2DModel, with random weights moved through the published layouts."""

import pytest
import torch

from ldm.models.dit import DiT
from ldm.utils.errors import WeightsError
from ldm.weights.dit import (
    computed,
    dit_from_config,
    dit_to_config,
    from_diffusers,
    from_original,
    to_diffusers,
    to_original,
)

diffusers = pytest.importorskip("diffusers")

SIZES = [
    dict(num_attention_heads=4, attention_head_dim=16, num_layers=3, sample_size=8, num_embeds_ada_norm=10),
    dict(num_attention_heads=2, attention_head_dim=72, num_layers=2, sample_size=32, out_channels=8),
    dict(num_attention_heads=6, attention_head_dim=8, num_layers=4, sample_size=16, patch_size=4, in_channels=3),
    dict(num_attention_heads=3, attention_head_dim=32, num_layers=1, sample_size=16, patch_size=8, out_channels=8),
    dict(num_attention_heads=8, attention_head_dim=8, num_layers=2, sample_size=6, patch_size=1, norm_eps=1e-6),
]


def pair(sizes, seed=0, scale=1.0, authors=False):
    """Ours and theirs with the same weights; what starts constant (zeroed layers, biases) is drawn anew.

    authors: theirs with the two numbers that diffusers changed put back.
    """
    torch.manual_seed(seed)
    theirs = diffusers.DiTTransformer2DModel(**sizes).eval()
    for parameter in theirs.parameters():
        constant = parameter.min() == parameter.max()
        parameter.data.add_(0.1 * torch.randn_like(parameter) * constant).mul_(scale)
    for block in theirs.transformer_blocks:  # their embedders are copies of the first block's
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
        if authors:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6
    arguments = dit_from_config(dict(theirs.config) | ({} if authors else {"freq_shift": 1}))
    ours = DiT(**arguments).eval()
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours.state_dict()))
    return ours, theirs


def error(ours, theirs, side):
    classes = ours.embed.num_classes
    x, t = torch.randn(3, ours.in_channels, side, side), torch.tensor([999.0, 17.0, 400.0])
    labels = torch.tensor([0, classes - 1, classes])
    expected = theirs(x, t, labels).sample
    return float((ours(x, t, labels=labels) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("scale", [1, 1 / 16])
@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_equals_diffusers(sizes, scale):
    ours, theirs = pair(sizes, scale=scale)
    assert error(ours, theirs, sizes["sample_size"]) <= 2e-5


@pytest.mark.parametrize("side", [4, 12, 24])
@torch.no_grad()
def test_other_sizes_equal_diffusers(side):
    assert error(*pair(SIZES[0], seed=1), side) <= 2e-5


@pytest.mark.parametrize("sizes", SIZES[:3])
@torch.no_grad()
def test_the_authors_formula(sizes):
    """By default; it is another function than diffusers' of the same weights."""
    ours, theirs = pair(sizes, seed=2, authors=True)
    assert error(ours, theirs, sizes["sample_size"]) <= 2e-5
    assert error(pair(sizes, seed=2)[0], theirs, sizes["sample_size"]) > 1e-3


@pytest.mark.parametrize("sizes", SIZES)
def test_round_trips_are_bit_exact(sizes):
    ours, theirs = pair(sizes)
    published = to_diffusers(ours.state_dict())
    assert published.keys() == theirs.state_dict().keys()
    assert all(torch.equal(published[key], value) for key, value in theirs.state_dict().items())
    original = to_original(ours.state_dict()) | computed(ours)
    back = from_original(original, ours.state_dict())
    assert all(torch.equal(back[key], value) for key, value in ours.state_dict().items())
    config = dit_to_config(ours)
    assert config["freq_shift"] == 1 and dit_from_config(config) == dit_from_config(dict(theirs.config, freq_shift=1))
    ignored = {name: value for name, value in config.items() if name not in ("_class_name", "freq_shift")}
    again = diffusers.DiTTransformer2DModel(**ignored)
    assert again.state_dict().keys() == published.keys()


def test_copies_that_differ_are_refused():
    ours, theirs = pair(SIZES[0])
    state = theirs.state_dict()
    key = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    state[key] = state[key] + 1
    with pytest.raises(WeightsError, match="transformer_blocks.2.* differs from transformer_blocks.0"):
        from_diffusers(state, ours.state_dict())
