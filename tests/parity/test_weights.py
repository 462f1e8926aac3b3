"""Published layouts against diffusers: what it saves we load, what we save it loads, and no bit changes on the way."""

import json

import pytest
import torch

from ldm.io.tensors import read_tensors, write_tensors
from ldm.weights import load_model, save_model
from ldm.weights.unet import to_original

diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def unet(widths, attends, heads, depth=1, in_channels=4, **config):
    kinds = [CROSS if level else PLAIN for level in attends]
    return diffusers.UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        sample_size=8,
        block_out_channels=widths,
        down_block_types=[down for down, _ in kinds],
        up_block_types=[up for _, up in reversed(kinds)],
        attention_head_dim=heads,
        transformer_layers_per_block=depth,
        **config,
    )


def vector(dim):
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": dim,
        "use_linear_projection": True,
    }


def vae(widths, blocks, **config):
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=blocks,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        norm_num_groups=4,
        **config,
    )


MODELS = {
    "sd15": lambda: unet((32, 64, 64, 64), (1, 1, 1, 0), 8, cross_attention_dim=24),
    "sd2": lambda: unet((64, 64, 128), (1, 1, 0), [1, 1, 2], cross_attention_dim=16, use_linear_projection=True),
    "sdxl": lambda: unet((32, 64, 64), (0, 1, 1), [1, 2, 2], [1, 2, 3], cross_attention_dim=40, **vector(20 + 6 * 256)),
    "refiner": lambda: unet((32, 64, 64, 64), (0, 1, 1, 0), 2, 4, cross_attention_dim=24, **vector(24 + 5 * 256)),
    "inpainting": lambda: unet((32, 32, 64), (1, 1, 0), 4, in_channels=9, cross_attention_dim=24, layers_per_block=1),
    "one level": lambda: unet((32,), (1,), 4, cross_attention_dim=8, layers_per_block=3),
    "labels": lambda: unet((32, 32), (1, 0), 4, cross_attention_dim=8, num_class_embeds=5),
    "vae": lambda: vae((8, 16, 16, 16), 2),
    "vae 16 channels": lambda: vae((8, 8), 1, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    "vae without attention": lambda: vae((8, 16), 1, mid_block_add_attention=False, scaling_factor=0.13025),
}


@pytest.fixture(params=MODELS)
def theirs(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # nothing stays zero or one
    return model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@torch.no_grad()
def outputs(ours, theirs):
    g = torch.Generator().manual_seed(1)
    if isinstance(theirs, diffusers.AutoencoderKL):
        x = torch.randn(2, 3, 16, 16, generator=g)
        mean = theirs.encode(x).latent_dist.mean
        return [(ours.encode(x)[0], mean), (ours.decode(mean), theirs.decode(mean).sample)]
    c, t = theirs.config, torch.tensor([999, 3])
    x = torch.randn(2, c.in_channels, 8, 8, generator=g)
    ours_, theirs_ = {}, {}
    if c.addition_embed_type:
        pooled_dim = ours.conditioning.pooled_dim
        pooled, size = torch.randn(2, pooled_dim, generator=g), torch.full((2, ours.conditioning.num_sizes), 512.0)
        ours_ = {"pooled": pooled, "size": size}
        theirs_ = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": size}}
    if c.num_class_embeds:
        ours_["labels"] = theirs_["class_labels"] = torch.tensor([0, 4])
    context = torch.randn(2, 5, c.cross_attention_dim, generator=g)
    return [(ours(x, t.float(), context=context, **ours_), theirs(x, t, context, **theirs_).sample)]


def test_round_trip(theirs, tmp_path):
    """diffusers -> ours -> original -> ours -> diffusers -> theirs: the same results, then the same bits."""
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    for ours_out, expected in outputs(ours, theirs):
        assert (ours_out - expected).abs().max() <= 2e-5 * expected.abs().max()

    save_model(ours, tmp_path / "original.safetensors", layout="original")
    again = load_model(tmp_path / "original.safetensors")
    assert same(ours.state_dict(), again.state_dict())
    save_model(again, tmp_path / "original2.safetensors", layout="original")
    assert (tmp_path / "original.safetensors").read_bytes() == (tmp_path / "original2.safetensors").read_bytes()

    save_model(again, tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert same(back.state_dict(), theirs.state_dict())
    for ours_out, expected in outputs(again, back):  # heads, which no bit shows
        assert (ours_out - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "refiner", "inpainting"])
def test_original_names_are_those_diffusers_converts(name, tmp_path):
    """The names are not ours alone: diffusers' own converter of single files accepts every one."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    theirs = MODELS[name]()
    theirs.save_pretrained(tmp_path / "theirs")
    original = to_original(load_model(tmp_path / "theirs").state_dict())
    prefixed = {"model.diffusion_model." + key: tensor for key, tensor in original.items()}
    assert same(convert_ldm_unet_checkpoint(prefixed, dict(theirs.config)), theirs.state_dict())


@pytest.mark.parametrize("name", ["vae", "vae without attention"])
def test_original_names_of_the_autoencoder(name, tmp_path):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    theirs = MODELS[name]()
    theirs.save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "vae.safetensors", layout="original")
    converted = convert_ldm_vae_checkpoint(read_tensors(tmp_path / "vae.safetensors"), dict(theirs.config))
    state = {key: tensor for key, tensor in theirs.state_dict().items()}
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key].reshape(state[key].shape), state[key]) for key in state)


@pytest.mark.parametrize("name", ["sd15", "vae"])
def test_shards_variants_and_pickles(name, tmp_path):
    theirs = MODELS[name]()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)
    theirs.half().save_pretrained(tmp_path / "fp16", variant="fp16")
    theirs.save_pretrained(tmp_path / "fp16 shards", variant="fp16", max_shard_size="100KB")
    shards, pickled, half = (load_model(tmp_path / kind) for kind in ("shards", "bin", "fp16"))
    assert same(shards.state_dict(), pickled.state_dict())
    assert all(torch.equal(a.half().float(), b) for a, b in zip(shards.parameters(), half.parameters(), strict=True))
    kept = load_model(tmp_path / "fp16 shards", dtype=None, variant="fp16")
    assert {p.dtype for p in kept.parameters()} == {torch.float16}
    index = next((tmp_path / "shards").glob("*.index.json"))
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1


def test_autoencoders_of_old_files(tmp_path):
    """Before 0.17 diffusers named the attention query, key, value, proj_attn, and kept it as 1x1 convolutions."""
    theirs = MODELS["vae"]()
    theirs.save_pretrained(tmp_path / "new")
    renamed = {}
    for key, tensor in theirs.state_dict().items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[key] = tensor
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    write_tensors(tmp_path / "old" / "diffusion_pytorch_model.safetensors", renamed)
    assert same(load_model(tmp_path / "old").state_dict(), load_model(tmp_path / "new").state_dict())
