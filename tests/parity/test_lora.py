"""LoRA and its kin against PEFT and diffusers: the UNet in every file format, DoRA, LoHa, LoKr; CLIP's text model."""

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.adapters.lora import Loaded, LoRA
from ldm.adapters.lora_names import index
from ldm.conditioning.clip import CLIPText
from ldm.weights.clip import from_transformers
from tests.parity.test_clip import text_judge
from tests.parity.test_unet import SD15, SDXL, error, inputs, pair

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
              "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"]  # fmt: skip


def adapted(config, seed, lora):
    """Ours without, and theirs with an adapter whose every parameter is drawn anew; and what theirs gives."""
    ours, theirs = pair(config, seed)
    theirs.add_adapter(lora)
    for name, parameter in theirs.named_parameters():
        if "lora" in name or "hada" in name or "lokr" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return ours, theirs


def outputs(ours, theirs, config):
    torch.manual_seed(9)
    x, t, cond, added = inputs(config, (8, 12))
    with torch.no_grad():
        return ours(x, t, **cond), theirs(x, t, cond["context"], added_cond_kwargs=added or None).sample


def state_of(theirs):
    return {key: value.contiguous() for key, value in peft.get_peft_model_state_dict(theirs).items()}


# --- what others write, read by us -----------------------------------------------------------------------------------


def as_diffusers(state, theirs, tmp_path):
    """With the settings in the header, from where alpha comes."""
    settings = theirs.peft_config["default"].to_dict()
    pipeline = diffusers.StableDiffusionXLPipeline
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=settings)
    return tmp_path / "pytorch_lora_weights.safetensors"


def as_old_diffusers(state, theirs, tmp_path):
    """Attention processors held their LoRA; no scale was stored, so B has it."""
    scale = theirs.peft_config["default"].lora_alpha / theirs.peft_config["default"].r
    found = {}
    for key, value in state.items():
        key = re.sub(r"\.to_out\.0\.", ".to_out.", key)
        key = re.sub(r"\.(to_\w+)\.lora_A\.", r".processor.\1_lora.down.", key)
        key = re.sub(r"\.(to_\w+)\.lora_B\.", r".processor.\1_lora.up.", key)
        found[f"unet.{key}"] = value * (scale if ".up." in key else 1)
    save_file(found, tmp_path / "old.safetensors")
    return tmp_path / "old.safetensors"


def as_kohya(state, theirs, tmp_path):
    """By diffusers' own converter, which writes the rank as alpha; PEFT's is put there."""
    found = diffusers.utils.convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
    alpha = torch.tensor(float(theirs.peft_config["default"].lora_alpha))
    found = {re.sub(r"^lora_?unet_?", "lora_unet_", key): value for key, value in found.items()}
    found = {key: alpha.clone() if key.endswith(".alpha") else value for key, value in found.items()}
    save_file(found, tmp_path / "kohya.safetensors")
    return tmp_path / "kohya.safetensors"


def as_peft(state, theirs, tmp_path):
    return write_peft(state, theirs.peft_config["default"], tmp_path)


def write_peft(state, settings, folder):
    save_file({f"base_model.model.{key}": value for key, value in state.items()}, folder / "adapter_model.safetensors")
    settings.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config, write",
    [(SDXL, as_diffusers), (SD15, as_old_diffusers), (SD15, as_kohya), (SDXL, as_kohya), (SD15, as_peft)],
    ids=["sdxl-diffusers", "sd15-old diffusers", "sd15-kohya", "sdxl-kohya", "sd15-peft"],
)
def test_lora_of_every_format_equals_peft(config, write, tmp_path):
    targets = ATTENTION if write is as_old_diffusers else EVERYTHING
    lora = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=write is as_peft)
    ours, theirs = adapted(config, 0, lora)
    path = write(state_of(theirs), theirs, tmp_path)
    adapter = Loaded(path)
    assert adapter.inject({"network": ours}) == {"network": sum("lora_A" in key for key in state_of(theirs))}
    out, expected = outputs(ours, theirs, config)
    assert error(out, expected) <= 2e-5
    adapter.merge()
    assert error(outputs(ours, theirs, config)[0], expected) <= 2e-5


@pytest.mark.parametrize(
    "kind, knobs",
    [
        ("LoraConfig", dict(use_dora=True, lora_alpha=5)),
        ("LoHaConfig", dict(alpha=5)),
        ("LoHaConfig", dict(alpha=5, use_effective_conv2d=True)),
        ("LoKrConfig", dict(alpha=5, r=1)),
        ("LoKrConfig", dict(alpha=2, r=64)),  # both matrices whole
    ],
)
def test_its_kin_equal_peft(kind, knobs, tmp_path):
    ours, theirs = pair(SD15, 1)
    judge = peft.get_peft_model(theirs, getattr(peft, kind)(**dict(r=3, target_modules=EVERYTHING) | knobs))
    for parameter in judge.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    judge.save_pretrained(tmp_path)
    adapter = Loaded(tmp_path)
    adapter.inject({"network": ours})
    out, expected = outputs(ours, theirs, SD15)
    assert error(out, expected) <= 2e-5
    adapter.merge()
    assert error(outputs(ours, theirs, SD15)[0], expected) <= 2e-5


def test_several_at_once_equal_peft(tmp_path):
    ours, theirs = pair(SD15, 2)
    adapters, scales = [], [0.8, -0.3, 1.0]
    for i, (rank, targets) in enumerate([(2, ATTENTION), (5, ["to_q", "to_v", "conv1"]), (3, ["to_k", "ff.net.2"])]):
        theirs.add_adapter(peft.LoraConfig(r=rank, lora_alpha=4, target_modules=targets), adapter_name=f"a{i}")
        for name, parameter in theirs.named_parameters():
            if f"lora_B.a{i}" in name:
                parameter.data.normal_(std=0.1)
        state = peft.get_peft_model_state_dict(theirs, adapter_name=f"a{i}")
        adapters.append(Loaded(write_peft(state, theirs.peft_config[f"a{i}"], tmp_path), scales[i], name=f"a{i}"))
        adapters[-1].inject({"network": ours})
    theirs.set_adapters(["a0", "a1", "a2"], scales)
    out, expected = outputs(ours, theirs, SD15)
    assert error(out, expected) <= 2e-5
    theirs.set_adapters(["a0", "a2"], [1.0, 0.5])
    adapters[1].eject()
    adapters[0].scale, adapters[2].scale = 1.0, 0.5
    out, expected = outputs(ours, theirs, SD15)
    assert error(out, expected) <= 2e-5


# --- what we write, read by others -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, decompose",  # of kohya's files diffusers leaves dora_scale out
    [("kohya", False), ("diffusers", False), ("diffusers", True), ("peft", False), ("peft", True)],
)
def test_files_of_ours_are_read_by_others(layout, decompose, tmp_path):
    ours, theirs = pair(SD15, 3)
    adapter = LoRA(3, 5.0, targets=r"attn\d\.to_|conv1$|proj_in$", decompose=decompose)
    adapter.inject({"network": ours})
    for parameter in adapter.trainable().values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path / ("peft" if layout == "peft" else "lora.safetensors")
    adapter.save(path, layout)
    if layout == "peft":
        theirs = peft.PeftModel.from_pretrained(theirs, path).base_model.model
    else:
        read = diffusers.StableDiffusionPipeline.lora_state_dict
        state, alphas = read(load_file(path), unet_config=theirs.config)
        theirs.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    out, expected = outputs(ours, theirs, SD15)
    assert error(out, expected) <= 2e-5


def test_names_of_sgm_are_those_that_diffusers_translates():
    ours, _ = pair(SDXL, 4)
    known = {stem: site for stem, site in index({"network": ours}).items() if stem.startswith("lora_unet_")}
    sgm = [stem for stem in known if re.search(r"unet_(input|middle|output)_block\w+(transformer_blocks|proj_)", stem)]
    translate = diffusers.loaders.lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers
    numbers = {f"{stem}.alpha": torch.tensor(i) for i, stem in enumerate(sgm)}
    theirs = translate(numbers, SimpleNamespace(layers_per_block=2))
    assert len(theirs) == len(sgm) > 100
    for key, i in theirs.items():
        stem = key.removesuffix(".alpha").replace("unet_input_", "unet_down_").replace("middle_block", "mid_block")
        assert known[stem.replace("unet_output_", "unet_up_")] == known[sgm[int(i)]]


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix, flat", [("text_encoder.", False), ("lora_te_", True)], ids=["diffusers", "kohya"])
def test_text_encoder_equals_peft(prefix, flat, tmp_path):
    transformers = pytest.importorskip("transformers")
    width, depth, heads, activation = config = (32, 2, 4, "quick_gelu")
    judge = text_judge(transformers.CLIPTextModel, config)
    ours = CLIPText(*config, vocab_size=judge.config.vocab_size).eval()
    ours.load_state_dict(from_transformers(judge.state_dict(), ours.state_dict()))
    judge = peft.get_peft_model(judge, peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj", "fc1"]))
    state = {}
    for key, value in peft.get_peft_model_state_dict(judge).items():
        value.add_(0.1 * torch.randn_like(value))
        name = key.removeprefix("base_model.model.")
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        stem, end = re.match(r"(.*)\.(lora_[AB])\.weight", name).groups()
        kohya = f"{prefix}{stem.replace('.', '_')}.lora_{'down' if end == 'lora_A' else 'up'}.weight"
        state[kohya if flat else f"{prefix}{name}"] = value.clone()
    save_file(state, tmp_path / "text.safetensors")
    ids = torch.tensor([[0, 5, 9, 3, 1], [0, 7, 7, 2, 1]])
    before = ours.norm(ours(ids))
    assert Loaded(tmp_path / "text.safetensors").inject({"clip_l": ours}) == {"clip_l": 3 * depth}
    with torch.no_grad():
        out, expected = ours.norm(ours(ids)), judge(ids).last_hidden_state
    assert error(out, expected) <= 2e-5 < error(before, expected)
