"""AutoencoderKL against diffusers' on random weights: encode and decode to float32 rounding, names both ways."""

import pytest
import torch

from ldm.models.autoencoder import AutoencoderKL
from ldm.weights.autoencoder import from_diffusers, to_diffusers

diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")

CONFIGS = {
    "sd": dict(channels=16, channel_mult=(1, 2, 4, 4), num_res_blocks=2, latent_channels=4, groups=8),
    "sd3": dict(channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=16, groups=4, quant_conv=False),
    "no attention": dict(channels=12, channel_mult=(1, 1, 3), num_res_blocks=1, attention=False, groups=2),
    "grey": dict(in_channels=1, channels=8, channel_mult=(2, 1), num_res_blocks=3, latent_channels=2, groups=4),
}


def make_reference(
    in_channels=3, channels=8, channel_mult=(1,), num_res_blocks=1, latent_channels=4, attention=True, groups=8,
    quant_conv=True,
):  # fmt: skip
    levels = len(channel_mult)
    return diffusers.AutoencoderKL(
        in_channels=in_channels,
        out_channels=in_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels * mult for mult in channel_mult),
        layers_per_block=num_res_blocks,
        latent_channels=latent_channels,
        norm_num_groups=groups,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        mid_block_add_attention=attention,
    ).eval()


def make_pair(config: dict, seed: int, scale: float = 1.0):
    """The two networks with the same random weights, none of them zero or one."""
    reference = make_reference(**config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reference.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / fan_in**0.5)
    ours = AutoencoderKL(**config).eval()
    ours.load_state_dict(from_diffusers(reference.state_dict(), ours.state_dict()))
    return reference, ours


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("scale", [1.0, 1 / 16])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_encode_and_decode_equal_diffusers(name, scale):
    config = CONFIGS[name]
    for seed, (height, width) in enumerate([(16, 16), (8, 24)]):
        reference, ours = make_pair(config, seed, scale)
        x = torch.randn(2, config.get("in_channels", 3), height, width, generator=torch.Generator().manual_seed(seed))
        posterior = reference.encode(x).latent_dist
        mean, logvar = ours.encode(x)
        assert relative(mean, posterior.mean) <= 2e-5
        assert relative(logvar, posterior.logvar) <= 2e-5
        z = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
        assert relative(ours.decode(z), reference.decode(z).sample) <= 2e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_names_go_both_ways(name):
    reference, ours = make_pair(CONFIGS[name], seed=3)
    published = to_diffusers(ours.state_dict())
    assert published.keys() == reference.state_dict().keys()
    assert all(torch.equal(published[key], tensor) for key, tensor in reference.state_dict().items())


def test_every_name_of_the_published_size():
    with torch.device("meta"):
        reference = make_reference(channels=128, channel_mult=(1, 2, 4, 4), num_res_blocks=2, groups=32)
        ours = AutoencoderKL()
    assert {key: tensor.shape for key, tensor in to_diffusers(ours.state_dict()).items()} == {
        key: tensor.shape for key, tensor in reference.state_dict().items()
    }
    assert len(reference.state_dict()) == 248
