"""Files of weights as people have them: what trainers and merges leave in them, and what is no file of weights."""

import argparse
import json

import pytest
import torch

from ldm.conditioning.clip import CLIPText, CLIPVision
from ldm.conditioning.clip_tokenizer import EOS, CLIPTokenizer
from ldm.io.magic import format_of
from ldm.io.tensors import read_tensors, write_tensors
from ldm.models.dit import DiT
from ldm.models.if_unet import IFUNet
from ldm.models.unet import UNet
from ldm.published import Options, load_published
from ldm.tools.convert import convert
from ldm.utils.errors import NonFiniteError, WeightsError
from ldm.weights import load_model, load_system, save_model
from ldm.weights.clip import to_open_clip, to_transformers
from ldm.weights.components import COMPONENTS, UNET
from ldm.weights.detect import looks_like
from ldm.weights.parts import SCHEDULE, find_parts
from tests.test_clip import toy_vocabulary
from tests.test_systems_weights import edit, networks, original, save_vocabulary, text
from tests.test_weights import one_line, published, randomised, same, small, small_vae, system

UNET_KEY = "model.diffusion_model."


@pytest.fixture(scope="module")
def nets():
    return networks("sd15")


@pytest.fixture(scope="module")
def state(nets):
    return original("sd15", nets)


def averages_of(state, value=None):
    names = [key for key in state if key.startswith(UNET_KEY)]
    undotted = {key: "model_ema." + key.removeprefix("model.").replace(".", "") for key in names}
    return {undotted[key]: state[key] if value is None else torch.full_like(state[key], value) for key in names}


def saved(path, state):
    torch.save(state, path) if path.suffix != ".safetensors" else write_tensors(path, state)
    return path


# ----------------------------------------------------------------------------------------------- averages and wrappings


def test_counters_of_averages_without_averages(state, nets, tmp_path):
    """sd-v1-4, v1-5-pruned-emaonly, 512-base-ema: the averages have become the weights, their counters stayed."""
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    path = saved(tmp_path / "a.ckpt", {"state_dict": state | counters})
    for ema in (None, True, False):
        found = load_system(path, ema=ema).networks
        assert all(same(found[slot].state_dict(), net.state_dict()) for slot, net in nets.items())


def test_own_weights_go_before_the_averages_of_a_parent(state, nets, tmp_path, capsys):
    path = saved(tmp_path / "a.safetensors", state | averages_of(state, 0.0))
    weight = nets["network"].decoder.conv_out.weight
    for ema, words in ((None, "its own weights are used"), (False, "its own"), (True, "averaged weights are used")):
        found = load_system(path, ema=ema).networks["network"].decoder.conv_out.weight
        assert torch.equal(found, torch.zeros_like(weight) if ema else weight)
        line = [line for line in capsys.readouterr().err.splitlines() if "averaged" in line]
        assert words in line[0] if ema is not False else not line  # said once
    nine = original("sd15_inpaint", networks("sd15_inpaint"))
    path = saved(tmp_path / "nine.safetensors", nine | averages_of(state, 0.0))
    assert load_system(path).name == "sd15_inpaint"
    with pytest.raises(WeightsError) as error:
        load_system(path, ema=True)
    one_line(error, "averaged weights of another model", "averaged=false")


def test_a_file_of_averages_alone(state, nets, tmp_path, capsys):
    for name in ("sd15", "sdxl"):  # their names have lost their dots, and may be of block 1.0 or 10
        names = {
            UNET_KEY + key: torch.zeros(()) for key in UNET.layouts["original"].write(published(name).state_dict())
        }
        found = find_parts(averages_of(names), ema=None).parts["unet"].names
        assert found.keys() == {key.removeprefix(UNET_KEY) for key in names}
    others = {key: tensor for key, tensor in state.items() if not key.startswith(UNET_KEY)}
    for rest in ({}, others):
        path = saved(tmp_path / f"{len(rest)}.safetensors", rest | averages_of(state))
        assert same(load_model(path).state_dict(), nets["network"].state_dict())
    assert "averages only" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "_forward_module.module."])
def test_names_of_wrapped_networks(kind, state, nets, tmp_path):
    wrapped = {
        "outside": {kind + key: tensor for key, tensor in state.items()},
        "inside": {key.replace(UNET_KEY, UNET_KEY + kind): tensor for key, tensor in state.items()},
    }
    for name, content in wrapped.items():
        found = load_system(saved(tmp_path / f"{name}.safetensors", content)).networks
        assert all(same(found[slot].state_dict(), net.state_dict()) for slot, net in nets.items())


LEFT = {
    "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}], "lr_schedulers": [{"last_epoch": 1}],
    "callbacks": {}, "global_step": 3, "epoch": 1, "loops": {}, "hyper_parameters": {"lr": 0.1},
}  # fmt: skip


@pytest.mark.parametrize(
    "wrap",
    {
        "lightning": lambda s: {"state_dict": s, **LEFT},
        "deepspeed": lambda s: {"module": {f"module.{k}": t for k, t in s.items()}, "ds_config": {}, "optimizer": None},
        "nested": lambda s: {"model": {"state_dict": {"params": s}}, "optimizer": LEFT["optimizer_states"][0]},
        "gan": lambda s: {"generator": s, "discriminator": {"conv.weight": torch.zeros(2)}},
        "net": lambda s: {f"net.{k}": t for k, t in s.items()} | {"optimizer": {"exp_avg": torch.zeros(2)}},
    }.items(),
    ids=lambda item: item[0],
)
def test_tables_of_trainers(wrap, tmp_path):
    unet, vae = small(), small_vae()
    path = saved(tmp_path / "mp_rank_00_model_states.pt", wrap[1](system(unet, vae)) if wrap[0] != "net" else wrap[1](
        UNET.layouts["original"].write(unet.state_dict())))  # fmt: skip
    assert same(load_model(path).state_dict(), unet.state_dict())


def test_dit_of_its_trainer(tmp_path):
    """The averages, whose table of positions has drifted by rounding; nested as trainers of others have them too."""
    net = randomised(DiT(4, sample_size=16, width=64, depth=1, num_heads=1, num_classes=5))
    row = COMPONENTS["dit"]
    averaged = row.layouts["original"].write(net.state_dict()) | row.computed(net)
    averaged = {key: tensor.detach().clone() for key, tensor in averaged.items()}
    averaged["pos_embed"] += 2e-4
    raw = {key: torch.zeros_like(tensor) for key, tensor in averaged.items()}
    content = {"model": raw, "ema": {"module": averaged}, "opt": {}, "args": argparse.Namespace(lr=1e-4)}
    for path in (saved(tmp_path / "a.pt", content), saved(tmp_path / "b.pt", content | {"ema": averaged})):
        assert same(load_model(path).state_dict(), net.state_dict())


def test_leftovers_that_are_known(state, nets, tmp_path):
    left = (
        "first_stage_model.loss.discriminator.main.0.weight", "first_stage_model.model_ema.decay", "logvar",
        "first_stage_model.model_ema.decoderconv_outweight", "embedding_manager.initial_embeddings.*", "n_averaged",
        "cond_stage_model.transformer.vision_model.post_layernorm.weight", "cond_stage_model.logit_scale",
        "optimizer_states.0.state.0.exp_avg", "denoiser.sigmas", "ddim_alphas",
    )  # fmt: skip
    content = state | dict.fromkeys((*left, *SCHEDULE), torch.zeros(1))
    found = load_system(saved(tmp_path / "a.safetensors", content)).networks
    assert all(same(found[slot].state_dict(), net.state_dict()) for slot, net in nets.items())


@pytest.mark.parametrize("name", ["spare.weight", UNET_KEY + "spare.weight", "first_stage_model.decoder.spare.weight"])
def test_unknown_tensors(name, state, nets, tmp_path, capsys):
    path = saved(tmp_path / "a.safetensors", state | {name: torch.zeros(2)})
    with pytest.raises(WeightsError) as error:
        load_system(path)
    one_line(error, "spare.weight", "1 (", "published.strict=false")
    capsys.readouterr()
    found = load_system(path, strict=False).networks
    assert all(same(found[slot].state_dict(), net.state_dict()) for slot, net in nets.items())
    line = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(line) == 1 and "1 (" in line[0] and "spare.weight" in line[0]
    run = load_published(path, tokenizer=str(save_vocabulary(tmp_path / "v")), options=Options(strict=False))
    assert run.config["system"] == "sd15"
    missing = {key: tensor for key, tensor in state.items() if "out.2.bias" not in key} | {name: torch.zeros(2)}
    with pytest.raises(WeightsError, match="out.2.bias"):  # which no setting can mend
        load_system(saved(tmp_path / "b.safetensors", missing), strict=False)


# ----------------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("layout", ["transformers", "open_clip", "folder"])
def test_the_text_tower_of_a_whole_clip(layout, state, tmp_path):
    tower, vision = text("clip_l"), randomised(CLIPVision(64, 2, 1, 100, 48, "quick_gelu", 28, 14))
    if layout == "open_clip":
        whole = to_open_clip(tower.state_dict()) | to_open_clip(vision.state_dict())
        whole |= {"text_projection": torch.zeros(64, 48), "input_resolution": torch.tensor(224)}
    else:
        whole = to_transformers(tower.state_dict()) | to_transformers(vision.state_dict())
        whole |= {"text_projection.weight": torch.zeros(48, 64), "logit_scale": torch.tensor(4.6)}
    path = saved(tmp_path / "model.safetensors", whole)
    if layout == "folder":
        row = COMPONENTS["clip_text"]
        config = {"architectures": ["CLIPModel"], "projection_dim": 48, "text_config": row.to_config(tower),
                  "vision_config": COMPONENTS["clip_vision"].to_config(vision)}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        path = tmp_path
        assert same(load_model(path, "image_encoder").state_dict(), vision.state_dict())
    rest = saved(tmp_path / "rest.safetensors", {k: t for k, t in state.items() if not k.startswith("cond_stage")})
    found = load_system(rest, parts={"text_encoder": path}).networks["clip_l"]
    assert found.projection.weight.shape == (48, 64) and same(
        {key: t for key, t in found.state_dict().items() if key != "projection.weight"}, tower.state_dict()
    )


def test_text_encoders_as_comfyui_saves_them(tmp_path):
    first, second = text("clip_l"), text("clip_g")
    rest = {k: t for k, t in original("sdxl", networks("sdxl")).items() if not k.startswith("conditioner.")}
    base = saved(tmp_path / "xl.safetensors", rest)
    published = to_transformers(second.state_dict())
    files = {
        "clip_l": to_transformers(first.state_dict()) | {"logit_scale": torch.tensor(4.6)},
        "clip_g": published,
        "inside": {f"text_encoders.clip_g.transformer.{key}": tensor for key, tensor in published.items()},
        "open": to_open_clip(second.state_dict()),
    }
    paths = {name: saved(tmp_path / f"{name}.safetensors", content) for name, content in files.items()}
    for name in ("clip_g", "inside", "open"):
        parts = {"text_encoder": paths["clip_l"], "text_encoder_2": paths[name]}
        found = load_system(base, parts=parts).networks
        assert same(found["clip_g"].state_dict(), second.state_dict())
        assert same(found["clip_l"].state_dict(), first.state_dict())


def test_a_lone_openclip_of_sd2_stops_before_its_last_block(tmp_path):
    rest = {k: t for k, t in original("sd21", networks("sd21")).items() if not k.startswith("cond_stage")}
    clip = saved(tmp_path / "clip_h.safetensors", to_open_clip(text("clip_h").state_dict()))
    found = load_system(saved(tmp_path / "a.safetensors", rest), parts={"text_encoder": clip})
    assert len(found.networks["clip_h"].blocks) == 2 and found.networks["clip_h"].projection is None


# -------------------------------------------------------------------------------------------- what no tensor tells


def test_heads_come_from_what_stands_beside_the_file(state, tmp_path, capsys):
    path = saved(tmp_path / "a.safetensors", state)
    head_dims = []
    for name, content in (
        (None, ""),
        ("a.yaml", "model: {params: {parameterization: v, scale_factor: 0.5, linear_start: 0.001, "
                   "unet_config: {params: {num_heads: 4}}}}"),
        ("config.yaml", "model: {params: {network_config: {params: {num_head_channels: 16}}}}"),
    ):  # fmt: skip
        if name:
            (tmp_path / name).write_text(content)
        found = load_system(path)
        head_dims.append(UNET.arguments(found.networks["network"])["head_dim"])
        if name == "a.yaml":
            assert found.settings == {"prediction": "v", "scale": 0.5, "beta_start": 0.001}
            (tmp_path / name).unlink()
    assert head_dims == [[8, 8], [16, 16], [16, 16]]
    guesses = [line for line in capsys.readouterr().err.splitlines() if "guessed" in line]
    assert "head_dim=[8, 8]" in "".join(guesses)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "compose.yaml").write_text("a: &a {b: 1}\nc: *a")  # another's
    (tmp_path / "config.json").write_text('{"text": "${oc.env:HOME}"}')
    load_model(path, "unet")
    assert "compose.yaml" in capsys.readouterr().err
    net = DiT(4, sample_size=16, width=64, depth=1, num_heads=4, num_classes=5)
    save_model(randomised(net), tmp_path / "dit")
    row = COMPONENTS["dit"]
    (tmp_path / "alone").mkdir()
    path = saved(tmp_path / "alone/a.pt", row.layouts["original"].write(net.state_dict()))
    assert row.arguments(load_model(path))["num_heads"] == 1
    (tmp_path / "alone/config.json").write_bytes((tmp_path / "dit/config.json").read_bytes())
    assert row.arguments(load_model(path))["num_heads"] == 4


def test_folders_say_sizes_that_no_published_model_has(tmp_path):
    """Each is read, kept in both layouts, and saved again as it was."""
    unet = randomised(UNet(4, channels=32, channel_mult=[1, 2], num_res_blocks=1, depth=[1, 1, 1], head_dim=8,
                           context_dim=40, pooled_dim=24, num_sizes=6, size_dim=32))  # fmt: skip
    clip = randomised(CLIPText(32, 2, 2, "gelu", True, 99, mlp_dim=48, projection_dim=24))
    for net, kind in ((unet, "unet"), (clip, "clip_text")):
        save_model(net, tmp_path / kind)
        found = load_model(tmp_path / kind)
        assert COMPONENTS[kind].arguments(found) == COMPONENTS[kind].arguments(net)
        save_model(found, tmp_path / f"{kind}.safetensors", "original")
        again = load_model(tmp_path / f"{kind}.safetensors")
        assert COMPONENTS[kind].arguments(again) == COMPONENTS[kind].arguments(net)
        assert same(again.state_dict(), net.state_dict())
    config = json.loads((tmp_path / "unet/config.json").read_text())
    assert (config["addition_time_embed_dim"], config["projection_class_embeddings_input_dim"]) == (32, 24 + 6 * 32)


def test_if_of_other_heads_in_the_authors_layout(tmp_path):
    net = IFUNet(3, channels=32, channel_mult=[1, 2], num_res_blocks=1, attention=[False, True], head_dim=16,
                 context_dim=24, text_dim=32, text_norm="group", pool_heads=4)  # fmt: skip
    save_model(randomised(net), tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "if/a.safetensors", "original")
    convert(tmp_path / "if/a.safetensors", tmp_path / "again", "diffusers")
    for path in (tmp_path / "if/a.safetensors", tmp_path / "again"):
        found = load_model(path)
        assert same(found.state_dict(), net.state_dict()) and found.middle[0].attention.head_dim == 16


@pytest.mark.parametrize("added", [0, 2])
def test_ends_of_texts_where_tokens_were_added(added, tmp_path):
    """transformers pools at the largest id of a text where config.json says 2, and that may be an added token's."""
    vocab, _ = toy_vocabulary()
    nets = networks("sd15")
    nets["clip_l"] = randomised(CLIPText(64, 2, 1, "quick_gelu", vocab_size=len(vocab) + added))
    path = saved(tmp_path / "a.safetensors", original("sd15", nets))
    convert(path, tmp_path / "folder", "diffusers", tokenizer=save_vocabulary(tmp_path / "v"))
    config = json.loads((tmp_path / "folder/text_encoder/config.json").read_text())
    assert config["eos_token_id"] == (vocab[EOS] if added else 2)
    assert CLIPTokenizer(*toy_vocabulary()).eos == vocab[EOS]


# ------------------------------------------------------------------------------------------- what is something else


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "git lfs pull"),
        ("a.ckpt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "Git LFS pointer"),
        ("a.safetensors", b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
        ("a.safetensors", b"Invalid username or password.", "Invalid username"),
        ("a.safetensors", b"", "empty file"),
        ("a.gguf", b"GGUF\3\0\0\0" + bytes(600), "GGUF"),
        ("a.safetensors", b"GGUF\3\0\0\0" + bytes(600), "GGUF"),
        ("a.safetensors.part", b"\1" * 600, "unfinished download"),
        ("a.crdownload", b"\1" * 600, "unfinished download"),
        ("a.onnx", b"\x08\x07" * 300, "ONNX"),
        ("a.msgpack", b"\x85\xa6" * 300, "Flax"),
        ("a.h5", b"\x89HDF\r\n" + bytes(600), "HDF5"),
        ("a.ckpt", b"\x1f\x8b" + bytes(600), "gzip"),
        ("a.safetensors", b"\x89PNG\r\n" + bytes(600), "picture"),
    ],
)
def test_files_that_are_something_else(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path / name)
    one_line(error, name, words)


def test_programs_are_named_and_not_run(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-L-14.pt")
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path / "ViT-L-14.pt")
    one_line(error, "ViT-L-14.pt", "TorchScript")


def test_a_wrong_suffix_is_read_by_content(tmp_path):
    net = small()
    state = UNET.layouts["original"].write(net.state_dict())
    write_tensors(tmp_path / "a.safetensors", state)
    (tmp_path / "a.safetensors").rename(tmp_path / "a.ckpt")
    torch.save(state, tmp_path / "b.safetensors")
    for path, kind in ((tmp_path / "a.ckpt", "safetensors"), (tmp_path / "b.safetensors", "torch")):
        assert format_of(path) == kind and same(load_model(path).state_dict(), net.state_dict())


@pytest.mark.parametrize(
    "key, words",
    {
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "FLUX",
        "transformer_blocks.0.attn.add_q_proj.weight": "Stable Diffusion 3",
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
        "model.double_layers.0.attn.w1q.weight": "AuraFlow",
        "clip_txt_pooled_mapper.weight": "Stable Cascade",
        "blocks.0.default_modulation.1.weight": "Hunyuan-DiT",
        "add_embedding.image_norm.weight": "Kandinsky",
        "model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight": "Stable Video Diffusion",
        "time_embedding.cond_proj.weight": "LCM",
        "model.diffusion_model.time_embed.cond_proj.weight": "LCM",
        "edm_mean": "Playground",
        "model.diffusion_model.out.2.scale_weight": "fp8",
        "mid_block.attentions.0.to_q.weight.quant_state.bitsandbytes__nf4": "bitsandbytes",
        "down_blocks.0.motion_modules.0.norm.weight": "AnimateDiff",
        "quantize.embedding.weight": "codebook",
    }.items(),
    ids=lambda value: value[1] if isinstance(value, tuple) else value,
)
def test_systems_that_are_not_built_are_named(key, words, state, tmp_path):
    assert words in looks_like({key: (2, 2)})
    if any(word in key for word in ("edm_", "cond_proj", "scale_weight")):  # beside networks that are known
        path = saved(tmp_path / "a.safetensors", state | {key: torch.zeros(2)})
        for strict in (True, False):  # no tensor to be left out
            with pytest.raises(WeightsError) as error:
                load_system(path, strict=strict)
            one_line(error, words)


def test_classes_of_other_systems_are_named(tmp_path):
    save_model(small(), tmp_path / "transformer")
    edit(tmp_path / "transformer/config.json", _class_name="SD3Transformer2DModel")
    with pytest.raises(WeightsError) as error:
        load_system(tmp_path)
    one_line(error, "SD3Transformer2DModel", "Stable Diffusion 3")
    (tmp_path / "transformer").rename(tmp_path / "prior")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableCascadePriorPipeline"}')
    with pytest.raises(WeightsError, match="a folder of prior .*which is Stable Cascade"):
        load_system(tmp_path)


# --------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize(
    "key, words",
    [
        ("first_stage_model.decoder.conv_out.weight", ("autoencoder", "decoder.conv_out.weight")),
        (UNET_KEY + "out.2.weight", ("network", "decoder.conv_out.weight")),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", ("conditioner", "norm.weight")),
    ],
)
def test_weights_that_are_no_numbers_are_named(key, words, state, tmp_path):
    path = saved(tmp_path / "a.safetensors", state | {key: state[key] * float("nan")})
    run = load_published(path, tokenizer=str(save_vocabulary(tmp_path / "v")))
    with pytest.raises(NonFiniteError) as error:
        run.generate(["a cat"], steps=1, image_size=32)
    one_line(error, "not finite", *words)
    assert "dtype" not in str(error.value) and error.value.exit_code == 5


def test_no_advice_of_the_precision_in_use(state, tmp_path):
    key = UNET_KEY + "out.2.weight"
    path = saved(tmp_path / "a.safetensors", state | {key: torch.full_like(state[key], 3e38)})
    for dtype, advised in (("fp32", set()), ("bf16", {"dtype=fp32"})):
        run = load_published(path, tokenizer=str(save_vocabulary(tmp_path / "v")), dtype=dtype)
        with pytest.raises(NonFiniteError) as error:
            run.generate(["a cat"], steps=2, image_size=32)
        words = str(error.value).replace(",", "").split()
        assert {word for word in words if word.startswith("dtype=")} == advised
    assert read_tensors(path)[key].isfinite().all()
