"""Whole systems against diffusers and transformers: what they save we load, what we save they load, bit for bit."""

import pytest
import torch

from ldm.conditioning.clip_tokenizer import CLIPTokenizer
from ldm.io.tensors import read_tensors
from ldm.tools.convert import convert
from ldm.weights import load_model, load_system, save_model
from ldm.weights.places import places_of

diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")

from tests.parity import pipelines, test_clip  # noqa: E402

NAMES = {"sd21_zero_snr": "sd21"}
FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2")
PROMPTS = ["a photo of a red cat", "9 lives!", "cat " * 90]
CPU = torch.device("cpu")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def ids(tokenizer):
    return tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids


def networks(pipe):
    found = {folder: getattr(pipe, folder, None) for folder in FOLDERS}
    return {folder: net for folder, net in found.items() if net is not None}


@torch.no_grad()
def differences(system, theirs):
    """Relative error of each network of ours against theirs, on the same random inputs."""
    g = torch.Generator().manual_seed(1)
    for place in places_of(system.name):
        ours, net = system.networks[place.slot], theirs[place.folder]
        if place.slot == "network":
            x, t = torch.randn(2, ours.in_channels, 8, 8, generator=g), torch.tensor([999, 3])
            context, cond, added = torch.randn(2, 5, ours.context_dim, generator=g), {}, {}
            if ours.conditioning.num_sizes:
                size = torch.full((2, ours.conditioning.num_sizes), 512.0)
                cond = {"pooled": torch.randn(2, ours.conditioning.pooled_dim, generator=g), "size": size}
                added = {"added_cond_kwargs": {"text_embeds": cond["pooled"], "time_ids": size}}
            yield difference(ours(x, t.float(), context=context, **cond), net(x, t, context, **added).sample)
        elif place.slot == "autoencoder":
            x, z = torch.randn(2, 3, 16, 24, generator=g), torch.randn(2, 4, 2, 3, generator=g)
            yield difference(ours.encode(x)[0], net.encode(x).latent_dist.mean)
            yield difference(ours.decode(z), net.decode(z).sample)
        else:
            tokens = torch.randint(0, ours.tokens.num_embeddings, (2, 77), generator=g)
            expected = net(tokens, output_hidden_states=True).hidden_states
            yield difference(ours(tokens), expected[-1])
            yield difference(ours(tokens, skip=1), expected[-2])


def assert_same_scheduler(ours, theirs):
    """What we write where no source says it is what the pipelines of these systems were published with."""
    assert type(ours) is type(theirs)
    for steps in (1, 7, 50):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", pipelines.SYSTEMS)
def test_systems_in_both_layouts(name, tmp_path):
    """Theirs, a folder and a single file -> ours: the same results. Ours, converted -> theirs: the same bits."""
    pipe = pipelines.pipeline(name)
    theirs = networks(pipe)
    pipelines.save_folder(pipe, tmp_path / "folder")
    pipelines.save_original(pipe, tmp_path / "folder", tmp_path / "file.safetensors")
    known = None if name != "sd21_base" else name  # the file does not say that it predicts noise
    for path in (tmp_path / "folder", tmp_path / "file.safetensors"):
        system = load_system(path, name=known)
        assert system.name == NAMES.get(name, name)
        assert max(differences(system, theirs)) <= 2e-5
    folder = load_system(tmp_path / "folder")
    assert folder.settings["prediction"] == ("v" if pipe.scheduler.config.prediction_type == "v_prediction" else "eps")
    assert folder.settings["scale"] == pipe.vae.config.scaling_factor

    vocabulary = tmp_path / "folder" / ("tokenizer_2" if name == "sdxl_refiner" else "tokenizer")
    convert(tmp_path / "file.safetensors", tmp_path / "converted", "diffusers", tokenizer=vocabulary, system=known)
    back = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "converted")
    assert type(back) is type(pipe)
    assert back.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type
    if name != "sd21_base":  # published with PNDM
        assert_same_scheduler(back.scheduler, pipe.scheduler)
    again = networks(back)
    assert again.keys() == theirs.keys() and all(
        same(again[key].state_dict(), theirs[key].state_dict()) for key in again
    )
    for tokenizer in ("tokenizer", "tokenizer_2"):
        if expected := getattr(pipe, tokenizer, None):
            assert torch.equal(ids(getattr(back, tokenizer)), ids(expected))
    convert(tmp_path / "converted", tmp_path / "file2.safetensors", "original")
    file, file2 = read_tensors(tmp_path / "file.safetensors"), read_tensors(tmp_path / "file2.safetensors")
    lost = {key for key in file if key.endswith(("position_ids", "alphas_cumprod", "v_pred", "ztsnr"))}
    free = {key for key in file if key.endswith("logit_scale")}  # written anew
    assert file.keys() - lost == file2.keys() - lost
    assert same(
        {key: file[key] for key in file2.keys() - lost - free}, {key: file2[key] for key in file2.keys() - lost - free}
    )


def test_half_precision_folders(tmp_path):
    pipe = pipelines.pipeline("sdxl").to(torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    for variant in (None, "fp16"):  # without being asked, too: there is no other
        system = load_system(tmp_path / "half", torch.float16, variant=variant)
        dtypes = {slot: {p.dtype for p in net.parameters()} for slot, net in system.networks.items()}
        assert dtypes.pop("autoencoder") == {torch.float32} and set.union(*dtypes.values()) == {torch.float16}
    tokenizer = CLIPTokenizer.from_json(system.tokenizer)
    assert torch.equal(tokenizer.encode(PROMPTS)[:, 0], ids(pipe.tokenizer))


@pytest.mark.parametrize("config", test_clip.TEXT, ids=str)
@pytest.mark.parametrize("projected", [False, True])
@torch.no_grad()
def test_text_encoders(config, projected, tmp_path):
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    theirs = test_clip.text_judge(cls, config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    tokens = torch.randint(0, test_clip.VOCAB, (2, 77))
    expected = theirs(tokens, output_hidden_states=True)
    hidden = ours(tokens)
    assert difference(hidden, expected.hidden_states[-1]) <= 2e-5
    pooled = expected.text_embeds if projected else expected.pooler_output
    assert difference(ours.pool(hidden, tokens.argmax(-1)), pooled) <= 2e-5
    for layout, name in (("original", "a.safetensors"), ("diffusers", "ours")):
        save_model(ours, tmp_path / name, layout)
        assert same(load_model(tmp_path / name).state_dict(), ours.state_dict())
    back = cls.from_pretrained(tmp_path / "ours")
    assert same(back.state_dict(), theirs.state_dict())
    assert difference(hidden, back(tokens, output_hidden_states=True).hidden_states[-1]) <= 2e-5


@pytest.mark.parametrize("config", test_clip.VISION, ids=str)
@torch.no_grad()
def test_image_encoders(config, tmp_path):
    width, depth, heads, mlp, projection, activation, image, patch = config
    kind = transformers.CLIPVisionModelWithProjection
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth, "num_attention_heads": heads}
    sizes |= {"projection_dim": projection, "hidden_act": activation, "image_size": image, "patch_size": patch}
    theirs = test_clip.randomised(kind(transformers.CLIPVisionConfig(**sizes)), 0, 1.0)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    pixels = torch.randn(2, 3, image, image)
    expected = theirs(pixels, output_hidden_states=True)
    assert difference(ours(pixels, skip=1), expected.hidden_states[-2]) <= 2e-5
    assert difference(ours.pool(ours(pixels)), expected.image_embeds) <= 2e-5
    for layout, name in (("original", "a.safetensors"), ("diffusers", "ours")):
        save_model(ours, tmp_path / name, layout)
        assert same(load_model(tmp_path / name).state_dict(), ours.state_dict())
    assert same(kind.from_pretrained(tmp_path / "ours").state_dict(), theirs.state_dict())
