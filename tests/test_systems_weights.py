"""Published systems: recognised, loaded whole, converted both ways with their text encoders, or refused in one line."""

import json
import math
import struct
from pathlib import Path

import hydra
import pytest
import torch

from ldm.build import config_dir, make, plain
from ldm.conditioning.clip import CLIPText, CLIPVision
from ldm.conditioning.clip_tokenizer import CLIPTokenizer
from ldm.io.tensors import DTYPE_NAMES, read_tensors, write_tensors
from ldm.models.unet import UNet
from ldm.tools.convert import convert, main
from ldm.utils.errors import ConfigError, LdmError, WeightsError
from ldm.weights import load_model, load_system, save_model
from ldm.weights.clip import to_open_clip, to_transformers
from ldm.weights.components import COMPONENTS
from ldm.weights.places import places_of
from ldm.weights.systems import identify
from tests.test_clip import toy_vocabulary
from tests.test_weights import one_line, randomised, same, small_vae

VOCAB = len(toy_vocabulary()[0])
TEXTS = {  # tiny ones of the published kinds, with heads of 64 channels
    "clip_l": (64, 2, 1, "quick_gelu", False),
    "clip_h": (128, 3, 2, "gelu", True),  # of whose blocks and projection SD 2.x uses two and none
    "clip_g": (192, 2, 3, "gelu", True),
}
UNETS = {
    "sd15": dict(context_dim=64, linear_projection=False, head_dim=[4, 8]),
    "sd21": dict(context_dim=128),
    "sdxl": dict(context_dim=256, pooled_dim=192, num_sizes=6),
    "sdxl_refiner": dict(context_dim=192, pooled_dim=192, num_sizes=5),
}
SYSTEMS = ["sd15", "sd15_inpaint", "sd21", "sd21_inpaint", "sdxl", "sdxl_inpaint", "sdxl_refiner"]
PIPELINES = {
    "sd15": ("StableDiffusionPipeline", "PNDMScheduler"),
    "sd15_inpaint": ("StableDiffusionInpaintPipeline", "PNDMScheduler"),
    "sd21": ("StableDiffusionPipeline", "DDIMScheduler"),
    "sd21_inpaint": ("StableDiffusionInpaintPipeline", "PNDMScheduler"),
    "sdxl": ("StableDiffusionXLPipeline", "EulerDiscreteScheduler"),
    "sdxl_inpaint": ("StableDiffusionXLInpaintPipeline", "EulerDiscreteScheduler"),
    "sdxl_refiner": ("StableDiffusionXLImg2ImgPipeline", "EulerDiscreteScheduler"),
}


def text(slot, **changes):
    width, depth, heads, activation, projected = TEXTS[slot]
    knobs = {"depth": depth, "projected": projected} | changes
    return randomised(CLIPText(width, num_heads=heads, activation=activation, vocab_size=VOCAB, **knobs), seed=width)


def networks(name):
    """Tiny networks of a system by slot; SD 2's text encoder with all that its original file holds."""
    family = name.removesuffix("_inpaint")
    channels = 9 if family != name else 4
    knobs = {"channels": 64, "channel_mult": [1, 1], "num_res_blocks": 1, "depth": [0, 1, 1]} | UNETS[family]
    unet = randomised(UNet(channels, out_channels=4, **knobs))
    nets = {"network": unet, "autoencoder": small_vae()}
    return nets | {place.slot: text(place.slot) for place in places_of(name)[2:]}


def original(name, nets):
    """State of the original file of a system."""
    state = {}
    for place in places_of(name):
        published = COMPONENTS[place.kind].layouts[place.layout].write(nets[place.slot].state_dict())
        state |= {place.prefix + key: tensor for key, tensor in published.items()}
    return state


def write_system(path, name="sd15", **extras):
    write_tensors(path, original(name, networks(name)) | extras)
    return path


def save_vocabulary(folder):
    vocab, merges = toy_vocabulary()
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    return folder


# --------------------------------------------------------------------------------------------- the published figures


def published(name):
    """Network of a shipped config, without memory."""
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        node = plain(hydra.compose(f"network/{name}"))
    while "_target_" not in node:
        node = next(iter(node.values()))
    with torch.device("meta"):
        return make({key: value for key, value in node.items() if value != "???"}, "network")


@pytest.mark.parametrize(
    "slot, keys, open_keys, parameters",
    [("clip_l", 196, None, 123_060_480), ("clip_h", 372, 281, 340_387_840), ("clip_g", 517, 390, 694_659_840)],
)
def test_text_encoders_in_both_layouts(slot, keys, open_keys, parameters):
    net = published(slot)
    assert sum(p.numel() for p in net.parameters()) == parameters
    row = COMPONENTS["clip_text"]
    for layout, count in (("diffusers", keys), ("original", keys), ("open_clip", open_keys)):
        state = row.layouts[layout].write(net.state_dict())
        if count:
            assert len(state) == count
            assert row.from_shapes({key: tuple(t.shape) for key, t in state.items()}) == row.arguments(net)
    config = json.loads(json.dumps(row.to_config(net)))
    assert row.from_config(config) == row.arguments(net)


@pytest.mark.parametrize(
    "sizes, parameters",
    [
        ((1024, 24, 16, 4096, 768), 303_966_208),
        ((1280, 32, 16, 5120, 1024), 632_076_800),
        ((1664, 48, 16, 8192, 1280), 1_844_907_264),
    ],
)
def test_image_encoders_in_both_layouts(sizes, parameters):
    with torch.device("meta"):
        net = CLIPVision(*sizes, "gelu")
    row = COMPONENTS["clip_vision"]
    assert sum(p.numel() for p in net.parameters()) == parameters
    shapes = {key: tuple(t.shape) for key, t in row.layouts["original"].write(net.state_dict()).items()}
    assert row.from_shapes(shapes) == row.from_config(row.to_config(net)) == row.arguments(net)


def write_hollow(path, state):
    """A safetensors file in half precision with the shapes of the real one, and holes for tensors."""
    table, end = {}, 0
    for name, tensor in state.items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        shape = list(tensor.shape)
        table[name] = {"dtype": DTYPE_NAMES[torch.float16], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path


@pytest.mark.parametrize(
    "name, keys, gigabytes",
    [("sd15", 1130, 2.13), ("sd21", 1215, 2.58), ("sdxl", 2514, 6.94), ("sdxl_refiner", 1858, 6.08)],
)
def test_published_files_are_known_by_their_headers(tmp_path, name, keys, gigabytes):
    """Whole files of the published sizes (SD 1.5 and SDXL as written here: theirs have `position_ids` too)."""
    nets = {"network": published(name), "autoencoder": published("sd_vae")}
    nets |= {place.slot: published(place.slot) for place in places_of(name)[2:]}
    state = original(name, nets)
    assert len(state) == keys
    path = write_hollow(tmp_path / "a.safetensors", state)
    assert path.stat().st_size / 1e9 == pytest.approx(gigabytes, abs=0.01) and identify(path) == name


# ----------------------------------------------------------------------------------------------------- loaded whole


@pytest.mark.parametrize("name", SYSTEMS)
def test_original_to_diffusers_and_back_keeps_every_bit(tmp_path, name):
    nets = networks(name)
    state = original(name, nets)
    write_tensors(tmp_path / "a.safetensors", state)
    vocabulary = save_vocabulary(tmp_path / "vocabulary")
    convert(tmp_path / "a.safetensors", tmp_path / "folder", "diffusers", tokenizer=vocabulary)
    convert(tmp_path / "folder", tmp_path / "b.safetensors", "original")
    assert same(read_tensors(tmp_path / "b.safetensors"), state)
    unused = [path.parent.name for path in (tmp_path / "folder").glob("*/unused.safetensors")]
    assert unused == (["text_encoder"] if "sd21" in name else [])
    index = json.loads((tmp_path / "folder/model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"][1]) == PIPELINES[name]

    for path in (tmp_path / "a.safetensors", tmp_path / "folder", tmp_path / "b.safetensors"):
        system = load_system(path)
        assert system.name == identify(path) == name
        assert system.networks.keys() == system.nodes.keys() == nets.keys()
        for slot, net in system.networks.items():
            ours, expected = net.state_dict(), nets[slot].state_dict()
            assert not net.training and same(ours, {key: expected[key] for key in ours})
            assert make(system.nodes[slot], "network").state_dict().keys() == ours.keys()
            assert json.loads(json.dumps(system.nodes[slot])) == system.nodes[slot]
    assert system.tokenizer is None
    tokenizer = CLIPTokenizer.from_json(load_system(tmp_path / "folder").tokenizer)
    assert torch.equal(tokenizer.encode(["a red cat"]), CLIPTokenizer(*toy_vocabulary()).encode(["a red cat"]))


def test_the_block_of_sd2_that_no_one_reads(tmp_path):
    """Systems load without it; a conversion keeps it, beside the encoder, where other programs do not look."""
    path = write_system(tmp_path / "a.safetensors", "sd21")
    convert(path, tmp_path / "folder", "diffusers")
    for place in (path, tmp_path / "folder"):
        net = load_system(place).networks["clip_h"]
        assert len(net.blocks) == 2 and net.projection is None
    folder = tmp_path / "folder/text_encoder"
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["architectures"] == ["CLIPTextModel"]
    assert not any("layers.2." in key or "projection" in key for key in read_tensors(folder / "model.safetensors"))
    (folder / "unused.safetensors").unlink()
    convert(tmp_path / "folder", tmp_path / "b.safetensors", "original")  # as from a folder of others
    assert identify(tmp_path / "b.safetensors") == "sd21"
    assert len(load_system(tmp_path / "b.safetensors").networks["clip_h"].blocks) == 2


def test_dtypes(tmp_path):
    path = write_system(tmp_path / "a.safetensors")
    system = load_system(path, torch.bfloat16)
    dtypes = {slot: {p.dtype for p in net.parameters()} for slot, net in system.networks.items()}
    assert dtypes == {"network": {torch.bfloat16}, "autoencoder": {torch.float32}, "clip_l": {torch.bfloat16}}
    convert(path, tmp_path / "half", "diffusers", dtype="fp16")
    for dtype, expected in ((None, torch.float16), (torch.float32, torch.float32)):
        nets = load_system(tmp_path / "half", dtype).networks.values()
        assert {p.dtype for net in nets for p in net.parameters()} == {expected}
    with pytest.raises(ConfigError, match="fp8"):
        convert(path, tmp_path / "b", "diffusers", dtype="fp8")


def test_extras_of_files_of_the_wild(tmp_path):
    """Markers, corrupt position_ids, parts of CLIP that have no use, and names without `text_model.`."""
    nets = networks("sdxl")
    state = original("sdxl", nets)
    first = "conditioner.embedders.0.transformer."
    state = {key.replace(f"{first}text_model.", first): tensor for key, tensor in state.items()}
    state |= {f"{first}embeddings.position_ids": torch.zeros(1, 77).half(), f"{first}logit_scale": torch.ones(())}
    state |= {f"{first}text_projection.weight": torch.zeros(64, 64), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    write_tensors(tmp_path / "a.safetensors", state)
    system = load_system(tmp_path / "a.safetensors")
    assert not system.networks["clip_l"].projection
    assert system.settings == {"prediction": "v", "zero_terminal_snr": True}
    assert all(same(system.networks[slot].state_dict(), net.state_dict()) for slot, net in nets.items())
    convert(tmp_path / "a.safetensors", tmp_path / "folder", "diffusers")
    scheduler = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    convert(tmp_path / "folder", tmp_path / "b.safetensors", "original")
    again = read_tensors(tmp_path / "b.safetensors")
    assert {"v_pred", "ztsnr", f"{first}text_projection.weight"} < again.keys()
    assert load_system(tmp_path / "b.safetensors").settings.items() >= system.settings.items()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_position_ids(tmp_path, dtype):
    """Of no use, whole numbers as published, and often spoilt by a cast."""
    ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None].to(dtype)}
    path = write_system(tmp_path / "a.safetensors", **ids)
    assert same(load_system(path).networks["clip_l"].state_dict(), text("clip_l").state_dict())
    convert(path, tmp_path / "folder", "diffusers")
    assert not any("position_ids" in key for key in read_tensors(tmp_path / "folder/text_encoder/model.safetensors"))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_settings_of_a_folder_and_names_that_only_people_know(tmp_path):
    path = write_system(tmp_path / "a.safetensors", "sd21")
    convert(path, tmp_path / "folder", "diffusers")
    edit(tmp_path / "folder/scheduler/scheduler_config.json", prediction_type="epsilon", rescale_betas_zero_snr=False)
    edit(tmp_path / "folder/vae/config.json", scaling_factor=0.5)
    system = load_system(tmp_path / "folder")
    betas = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    assert system.name == "sd21_base"
    assert system.settings == {"prediction": "eps", "zero_terminal_snr": False, "scale": 0.5} | betas
    convert(tmp_path / "folder", tmp_path / "b.safetensors", "original")
    assert identify(tmp_path / "b.safetensors") == "sd21_base"  # our own files remember
    assert load_system(tmp_path / "b.safetensors").settings == system.settings

    assert load_system(path, name="sd21_base").name == "sd21_base"
    assert "prediction" not in load_system(tmp_path / "folder", name="sd21").settings
    for wrong in ("sdxl", "sd21_inpaint", "nothing"):
        with pytest.raises(WeightsError, match=f"holds the system sd21, not {wrong}"):
            load_system(path, name=wrong)
    edit(tmp_path / "folder/scheduler/scheduler_config.json", prediction_type="flow")
    with pytest.raises(WeightsError, match="prediction=flow"):
        identify(tmp_path / "folder")


# ------------------------------------------------------------------------------------------------ one encoder alone


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("kind", ["clip_l", "clip_h", "clip_g", "vision"])
def test_a_lone_encoder(tmp_path, kind, layout):
    net = text(kind) if kind in TEXTS else randomised(CLIPVision(32, 2, 4, 100, 24, "gelu", 28, 14))
    path = tmp_path / ("a.safetensors" if layout == "original" else "image_encoder" if kind == "vision" else "text")
    save_model(net, path, layout)
    again = load_model(path)
    assert type(again) is type(net) and same(again.state_dict(), net.state_dict())
    row = COMPONENTS["clip_vision" if kind == "vision" else "clip_text"]
    assert row.arguments(again) == row.arguments(net)


def test_foreign_files_of_one_encoder(tmp_path):
    clip, vision = text("clip_g"), randomised(CLIPVision(64, 2, 1, 100, 24, "gelu", 28, 14))
    towers = to_open_clip(clip.state_dict()) | to_open_clip(vision.state_dict())
    write_tensors(tmp_path / "open_clip.safetensors", towers)
    for component, net in (("text_encoder_2", clip), ("image_encoder", vision)):
        assert same(load_model(tmp_path / "open_clip.safetensors", component).state_dict(), net.state_dict())
    first = text("clip_l")
    for prefix in (True, False):
        write_tensors(tmp_path / f"{prefix}.safetensors", to_transformers(first.state_dict(), prefix))
        again = load_model(tmp_path / f"{prefix}.safetensors")
        assert COMPONENTS["clip_text"].arguments(again) == COMPONENTS["clip_text"].arguments(first)
    save_model(clip, tmp_path / "bin")
    torch.save(read_tensors(tmp_path / "bin/model.safetensors"), tmp_path / "bin/pytorch_model.bin")
    (tmp_path / "bin/model.safetensors").unlink()
    assert same(load_model(tmp_path / "bin").state_dict(), clip.state_dict())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_act": "gelu_new"}, "gelu_new"),
        ({"intermediate_size": 100}, "shapes differ"),
        ({"num_attention_heads": 7}, "7 heads"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"vocab_size": 10**9}, "vocab_size"),
    ],
)
def test_configs_of_other_encoders(tmp_path, changes, words):
    save_model(text("clip_l"), tmp_path / "text_encoder")
    edit(tmp_path / "text_encoder/config.json", **changes)
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path / "text_encoder")
    one_line(error, "text_encoder", words)


# ------------------------------------------------------------------------------------------------- what is refused


class Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def bad_system(tmp_path, kind) -> Path:
    path = tmp_path / "bad.safetensors"
    state = original("sd15", networks("sd15"))
    prefixes = {"UNet": "model.", "VAE": "first_stage_model."}
    if kind in prefixes:
        only = {key: tensor for key, tensor in state.items() if key.startswith(prefixes[kind])}
        write_tensors(path, only)
    elif kind == "no text":
        write_tensors(path, {key: tensor for key, tensor in state.items() if not key.startswith("cond_stage")})
    elif kind == "other text":
        write_tensors(path, original("sd15", networks("sd15") | {"clip_l": text("clip_h", projected=False)}))
    elif kind == "two texts":
        write_tensors(
            path, state | {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": torch.zeros(2)}
        )
    elif kind == "lora":
        write_tensors(path, {"lora_unet_a.lora_up.weight": torch.zeros(2, 2)})
    elif kind == "controlnet":
        write_tensors(path, {f"control_{key}": tensor for key, tensor in state.items()})
    elif kind == "integers":
        write_tensors(path, state | {"model.diffusion_model.out.2.bias": torch.zeros(4, dtype=torch.int8)})
    elif kind == "channels":
        conv = "model.diffusion_model.input_blocks.0.0.weight"
        write_tensors(path, state | {conv: torch.zeros(64, 8, 3, 3)})
    elif kind == "settings":
        write_tensors(path, state, {"settings": {"scale": "large"}})
    elif kind == "code":
        path = path.with_suffix(".ckpt")
        torch.save({"state_dict": state, "hook": Code()}, path)
    else:
        write_tensors(path, state)
        path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    "kind, words",
    {
        "UNet": "the system sd15 without vae, text_encoder; expected unet, vae, text_encoder: give what is missing",
        "VAE": "an autoencoder only; expected a whole system",
        "no text": "the system sd15 without text_encoder",
        "other text": "width 128, but its network reads text of 64",
        "two texts": "of no known part: 1",
        "lora": "a LoRA",
        "controlnet": "a ControlNet",
        "integers": "int8",
        "channels": "8 input",
        "settings": "scale=large",
        "code": "exec",
        "cut": "cut short",
        "absent": "no such file",
    }.items(),
)
def test_no_system(tmp_path, kind, words):
    path = bad_system(tmp_path, kind) if kind != "absent" else tmp_path / "bad.safetensors"
    with pytest.raises(LdmError) as error:
        load_system(path)
    one_line(error, "bad.", words)
    if kind in ("UNet", "VAE", "no text"):  # parts can be converted
        return
    for layout, name in (("diffusers", "folder"), ("original", "out.safetensors")):
        with pytest.raises(LdmError) as error:
            convert(path, tmp_path / name, layout)
        one_line(error, "bad.", words)
    assert not list(tmp_path.glob("*folder*")) + list(tmp_path.glob("*out*"))


def test_folders_that_are_no_system(tmp_path):
    convert(write_system(tmp_path / "a.safetensors"), tmp_path / "whole", "diffusers")
    for name in ("empty", "lora", "parts"):
        (tmp_path / name).mkdir()
    write_tensors(tmp_path / "lora/pytorch_lora_weights.safetensors", {"unet.a.lora_A.weight": torch.zeros(2, 2)})
    (tmp_path / "whole/vae").rename(tmp_path / "parts/vae")
    controlnet = tmp_path / "controlnet"
    save_model(networks("sd15")["network"], controlnet)
    edit(controlnet / "config.json", _class_name="ControlNetModel")
    expected = {
        "empty": "a folder without weights only",
        "lora": "a LoRA",
        "parts": "a folder of vae only",
        "controlnet": "a folder of controlnet only",
        "whole": "the system sd15 without vae; expected unet, vae, text_encoder",
    }
    for name, words in expected.items():
        with pytest.raises(WeightsError) as error:
            identify(tmp_path / name)
        one_line(error, name, words)
    with pytest.raises(WeightsError, match="nothing to convert"):
        convert(tmp_path / "empty", tmp_path / "b", "diffusers")


def test_what_people_say_on_the_command_line(tmp_path, capsys):
    path = write_system(tmp_path / "a.safetensors", "sd21")
    vocabulary = save_vocabulary(tmp_path / "vocabulary")
    knobs = ["--layout", "diffusers", "--system", "sd21_base", "--dtype", "bf16", "--tokenizer", str(vocabulary)]
    assert main([str(path), str(tmp_path / "folder"), *knobs]) == 0
    assert "text_encoder" in capsys.readouterr().out
    system = load_system(tmp_path / "folder", dtype=None)
    assert (system.name, system.settings["prediction"]) == ("sd21_base", "eps")
    assert system.tokenizer and {p.dtype for p in system.networks["clip_h"].parameters()} == {torch.bfloat16}
    marks = json.loads((tmp_path / "folder/tokenizer/special_tokens_map.json").read_text())
    assert marks["pad_token"] == "!"
