"""Adapters in sampling, by the command: LoRAs merged, switched and composed, ControlNets and T2I-Adapters, refusals."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ldm.adapters.lora import LoRA
from ldm.generate import Refiner, generate
from ldm.io.images import read_png_text
from ldm.io.tensors import read_tensors, write_tensors
from ldm.models.controlnet import ControlNet
from ldm.models.t2i_adapter import T2IAdapter
from ldm.models.unet import UNet
from ldm.published import load_published
from ldm.sampling import Sampling
from ldm.tools.convert import main as convert
from ldm.tools.subject import attach
from ldm.utils.errors import LdmError, WeightsError
from ldm.weights import load_model, save_model
from ldm.weights.systems import identify
from tests.test_cli import command, refused
from tests.test_lora_formats import Q, kohya, lora
from tests.test_systems_weights import networks, save_vocabulary, write_system
from tests.test_weights import randomised, same

SIDE = 32  # pixels; the tiny autoencoder halves them
ATTENTION, TEXT = r"\.attn[12]\.to_(q|v)$", r"self_attn\.q_proj$"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A tiny SD 1.5 and adapters for it: two LoRAs, one of the text too, a ControlNet, a T2I-Adapter, pictures."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("attach")
    write_system(folder / "base.safetensors", "sd15")
    save_vocabulary(folder / "vocabulary")
    nets = networks("sd15")
    for seed, (name, targets, text) in enumerate([("a", ATTENTION, TEXT), ("b", r"ff\.net|attn1", None)]):
        adapter = LoRA(2, targets=targets, text_targets=text, name=name)
        adapter.inject({slot: nets[slot] for slot in ("network", "clip_l")})
        torch.manual_seed(seed)
        for p in adapter.trainable().values():
            p.data.normal_(std=0.5)
        adapter.save(folder / f"{name}.safetensors")
        adapter.eject()
    save_model(randomised(ControlNet(nets["network"], hint_widths=[8, 16])), folder / "control.safetensors", "original")
    adapter = T2IAdapter(3, [64, 64], unshuffle=2, halved=[1])
    save_model(randomised(adapter), folder / "t2i.safetensors", "original")
    torch.manual_seed(3)
    for name in ("photo", "edges"):
        pixels = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
    half = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    half[:, : SIDE // 2] = 255
    Image.fromarray(half.numpy()).save(folder / "left.png")
    Image.fromarray(255 - half.numpy()).save(folder / "right.png")
    return folder


@pytest.fixture(scope="module")
def loaded(files):
    return load_published(files / "base.safetensors", tokenizer=str(files / "vocabulary"))


@pytest.fixture
def run(loaded):
    """The base as a run, and a function that draws with it: B 3 H W int."""
    run = loaded
    run.detach()

    def draw(prompts=("a cat",), **knobs):
        options = {"steps": 4, "guidance": 3.0, "image_size": SIDE, "dialect": "native"} | knobs
        images = run.generate(list(prompts), seeds=[0], **options)
        return torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in images]).permute(0, 3, 1, 2).int()

    return run, draw


def close(a, b):
    """Up to a grey level, which rounding may turn."""
    return int((a - b).abs().max()) <= 1


def differ(a, b):
    return float((a - b).abs().float().mean()) > 1


def base(files, out):
    return (f"weights={files}/base.safetensors", f"tokenizer={files}/vocabulary", f"image_size={SIDE}", "steps=4",
            "sampler=ddim", "times=trailing", "prompts=[a cat]", "guidance.scale=3", f"out={out}")  # fmt: skip


# --- LoRAs -----------------------------------------------------------------------------------------------------------


def test_one_lora_is_the_same_however_it_is_composed_and_leaves_no_trace(files, run):
    run, draw = run
    state, plain = {k: v.clone() for k, v in run.objective.state_dict().items()}, draw()
    said = run.attach(lora=files / "a.safetensors")
    assert len(said) == 1 and "2 modules of clip_l, 16 modules of network; scale 1, merged" in said[0]
    merged = draw()
    assert differ(merged, plain)
    for composition in ("switch", "composite"):
        assert composition in run.attach(lora=[files / "a.safetensors"], composition=composition)[0]
        assert close(draw(), merged)
    run.attach(lora=[{"path": files / "a.safetensors", "window": [0, 0.5]}] * 2)
    first_half = draw()
    assert differ(first_half, merged) and differ(first_half, plain)
    halves = [{"path": files / "a.safetensors", "window": window} for window in ([0, 0.5], [0.5, 1])]
    run.attach(lora=halves)
    assert close(draw(), merged), "prompts too are encoded with whichever acts"
    run.detach()
    assert torch.equal(draw(), plain)
    after = run.objective.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)


def test_several_loras(files, run):
    run, draw = run
    both = [files / "a.safetensors", {"path": files / "b.safetensors", "scale": 0.7}]
    run.attach(lora=both)
    merged = draw()
    run.attach(lora=both[::-1])
    assert close(draw(), merged), "merge(A, B) = merge(B, A)"
    run.attach(lora=both, composition="switch", every=4)
    only_a = draw()
    run.attach(lora=both[:1])
    assert close(draw(), only_a), "four steps, four of the first"
    run.attach(lora=both, composition="switch", every=2)
    turns = draw()
    halves = [{"path": files / "a.safetensors", "window": [0, 0.5]},
              {"path": files / "b.safetensors", "scale": 0.7, "window": [0.5, 1]}]  # fmt: skip
    run.attach(lora=halves)
    assert close(draw(), turns) and differ(turns, merged) and differ(turns, only_a)
    run.attach(lora=both, composition="composite")
    assert differ(draw(), merged)


def test_regions(files, run):
    run, draw = run
    run.attach(lora=files / "a.safetensors")
    everywhere = draw()
    a = [{"path": files / "a.safetensors", "mask": str(files / f"{side}.png")} for side in ("left", "right")]
    run.attach(lora=a)
    assert close(draw(), everywhere), "one LoRA in both halves"
    said = run.attach(lora=[a[0], {"path": files / "b.safetensors", "mask": str(files / "right.png")}])
    assert all("by regions" in line for line in said) and differ(draw(), everywhere)


# --- what steers -----------------------------------------------------------------------------------------------------


def test_hints_are_encoded_once_and_act_in_their_windows(files, run, monkeypatch):
    run, draw = run
    plain, encoded = draw(), []
    encode = ControlNet.encode
    monkeypatch.setattr(ControlNet, "encode", lambda self, hint: (encoded.append(len(hint)), encode(self, hint))[1])
    control = {"path": files / "control.safetensors", "image": str(files / "edges.png")}
    said = run.attach(controlnet=control, t2i_adapter=[{**control, "path": files / "t2i.safetensors", "scale": 0.5}])
    assert [line.split()[0] for line in said] == ["controlnet", "t2i_adapter"]
    together = draw(("a cat", "a cat"), batch_size=1)[:1]
    assert encoded == [1], "one hint, for two batches of four steps with guidance"
    run.attach(controlnet=control)
    alone = draw()
    assert differ(alone, plain) and differ(together, alone)
    run.attach(controlnet={**control, "guess": True})
    assert differ(draw(), alone)
    run.attach(controlnet=[{**control, "window": [0, 0.5]}, {**control, "window": [0.5, 1]}])
    assert close(draw(), alone)
    run.attach(controlnet={**control, "scale": 0})
    assert torch.equal(draw(), plain)
    photo = {**control, "image": str(files / "photo.png"), "annotate": "canny"}
    run.attach(controlnet=photo, lora=files / "b.safetensors")
    assert differ(draw(), alone) and draw(image_size=[64, 32]).shape[2:] == (64, 32), "a photo is cropped to any size"
    inpaint = {"image": str(files / "photo.png"), "annotate": "inpaint", "mask": str(files / "left.png")}
    run.attach(controlnet={**control, **inpaint})
    assert differ(draw(), alone)
    run.detach()
    assert torch.equal(draw(), plain)


def test_a_refiner_is_left_alone(files, run):
    (run, _), other = run, copy.deepcopy(run[0].objective)
    sampling = Sampling.named("ddim", 4, 3.0, None, "none")

    def finished(handover):
        return generate(run.objective, ["a cat"], [0], sampling, image_size=SIDE, attached=run.attached,
                        refiner=Refiner(other, handover)).int()  # fmt: skip

    plain = finished(0.0), finished(0.5)
    run.attach(lora=files / "a.safetensors", composition="switch", controlnet={"path": files / "control.safetensors",
               "image": str(files / "edges.png")})  # fmt: skip
    assert torch.equal(finished(0.0), plain[0]) and differ(finished(0.5), plain[1])


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_command_says_and_records_what_is_attached(files, tmp_path, capsys):
    lora = f"[{{path: {files}/a.safetensors, scale: 0.8}}, {files}/b.safetensors]"
    control = f"[{{path: {files}/control.safetensors, image: {files}/edges.png, window: [0, 0.5]}}]"
    knobs = (f"image={files}/photo.png", "strength=0.5", "composition=composite")
    command(sample, *base(files, tmp_path), f"lora={lora}", f"controlnet={control}", *knobs)
    out = capsys.readouterr().out
    assert "a.safetensors: 2 modules of clip_l, 16 modules of network; scale 0.8, composed (composite)" in out
    assert "controlnet" in out and "parameters; scale 1" in out
    record = json.loads((tmp_path / "samples.json").read_text())[0]
    assert record["lora"] == [{"path": f"{files}/a.safetensors", "scale": 0.8}, f"{files}/b.safetensors"]
    assert record["controlnet"][0]["window"] == [0, 0.5] and record["composition"] == "composite"
    assert json.loads(read_png_text(tmp_path / "0000.png")["settings"])["lora"] == record["lora"]


def refusals(files):
    """What is attached -> what is said."""
    a, left, large = files / "a.safetensors", str(files / "left.png"), str(files / "large.png")
    edges = {"path": files / "control.safetensors", "image": str(files / "edges.png")}
    return [
        (
            {"lora": files / "sdxl.safetensors"},
            r"sdxl.safetensors: made for SDXL \(text of width 2048\), but the base is",
        ),
        ({"lora": [a, files / "ranks.safetensors"]}, r"down \(3, 64\), up \(64, 4\), which do not make a change"),
        ({"lora": files / "base.safetensors"}, "base.safetensors: a checkpoint of .*; expected a LoRA"),
        (
            {"lora": files / "control.safetensors"},
            "a ControlNet, to be put beside a base .controlnet=FILE.; expected a",
        ),
        ({"lora": files / "photo.png"}, "photo.png"),
        ({"lora": files / "absent.safetensors"}, "absent.safetensors"),
        ({"lora": {"path": a, "scale": math.nan}}, "a.safetensors: scale=nan, expected a finite number"),
        ({"lora": {"path": a, "scal": 1}}, "has no argument 'scal'; did you mean 'scale'"),
        ({"lora": {"path": a, "window": [0.5, 0.2]}}, r"window=\[0.5, 0.2\], expected \[start, end\]"),
        ({"lora": {"scale": 1}}, "nothing sets path"),
        ({"lora": {"path": a, "mask": left}}, "masks must cover the image together"),
        ({"lora": {"path": a, "mask": large}}, "the mask is 64x64 pixels, but what is drawn is 32x32"),
        ({"lora": {"path": a, "mask": left}, "composition": "switch"}, "LoRAs that take turns have no masks"),
        ({"lora": a, "composition": "mean"}, "composition=mean: expected one of merge, switch, composite"),
        ({"lora": a, "composition": "switch", "every": 0}, "every=0: adapters switch after 1 step or more"),
        ({"composition": "switch"}, "composition=switch is of LoRAs, and lora is not set"),
        ({"controlnet": edges["path"]}, "control.safetensors: has no picture to follow; give image=FILE"),
        ({"controlnet": edges | {"image": large}}, "the hint is 64x64 pixels, but what is drawn is 32x32"),
        (
            {"controlnet": edges | {"image": torch.full((3, SIDE, SIDE), 1.5)}},
            "from 1.5 to 1.5; expected uint8, or floats",
        ),
        ({"controlnet": edges | {"image": str(files / "absent.png")}}, "absent.png"),
        ({"controlnet": edges | {"path": files / "other.safetensors"}}, "another base: it reads text of width 12, the"),
        (
            {"controlnet": edges | {"path": files / "t2i.safetensors"}},
            "no component 'controlnet'.*; there is t2i_adapter",
        ),
        ({"controlnet": edges | {"path": a}}, "a LoRA, to be put in a base .lora=FILE."),
        ({"controlnet": edges | {"annotate": "hed"}}, "annotate=hed, expected one of canny, sketch"),
        ({"controlnet": edges | {"annotate": "inpaint"}}, "annotate=inpaint and mask=FILE go together"),
        ({"controlnet": edges | {"scale": math.inf}}, "scale=inf, expected a finite number"),
        (
            {"t2i_adapter": edges | {"path": files / "t2i.safetensors", "guess": True}},
            "guess=true is a way to use a Con",
        ),
        (
            {"t2i_adapter": edges | {"path": files / "wide.safetensors"}},
            r"for another base: it adds \[32, 64\] channels",
        ),
    ]


def test_bad_input_is_one_line_and_leaves_the_base_as_it_was(files, run):
    run, draw = run
    cross = kohya(Q.replace("attn1.to_q", "attn2.to_k"))
    write_tensors(files / "sdxl.safetensors", lora(cross, torch.randn(3, 2048), torch.randn(64, 3)))
    write_tensors(files / "ranks.safetensors", lora(kohya(Q), torch.randn(3, 64), torch.randn(64, 4)))
    other = UNet(4, channels=64, channel_mult=[1, 1], num_res_blocks=1, depth=[0, 1, 1], context_dim=12)
    save_model(ControlNet(other, hint_widths=[8, 16]), files / "other.safetensors", "original")
    save_model(T2IAdapter(3, [32, 64], unshuffle=2, halved=[1]), files / "wide.safetensors", "original")
    Image.new("L", (64, 64), 255).save(files / "large.png")
    plain, modules = draw(), list(run.objective.modules())
    nothing = {"lora": [], "controlnet": [], "t2i_adapter": [], "composition": "merge", "every": 5,
                   "dialect": {"guess_decay": 0.825}}  # fmt: skip
    for given, message in refusals(files):
        with pytest.raises(LdmError, match=message) as error:
            attach(run, nothing | given)
            draw()
        assert "\n" not in str(error.value)
        run.detach()
        assert list(run.objective.modules()) == modules
    assert torch.equal(draw(), plain)


def test_bad_input_on_the_command_line(files, tmp_path, capsys):
    arguments = base(files, tmp_path / "out")
    code, says = refused(sample, capsys, *arguments, f"lora=[{{path: {files}/a.safetensors, scale: nan}}]")
    assert code == 2 and "scale=nan, expected a finite number" in says
    code, says = refused(sample, capsys, f"weights={files}/a.safetensors", *arguments[1:])
    assert code == 4 and "a LoRA, to be put in a base (lora=FILE)" in says
    assert not (tmp_path / "out").exists()


def test_a_failure_half_way_leaves_the_base_as_it_was(files, run):
    run, draw = run
    plain, modules = draw(), list(run.objective.modules())
    with pytest.raises(WeightsError, match="no component 'controlnet'"):
        run.attach(lora=files / "a.safetensors", controlnet={"path": files / "t2i.safetensors",
                   "image": str(files / "edges.png")})  # fmt: skip
    assert list(run.objective.modules()) == modules and torch.equal(draw(), plain)


# --- published files of what steers ----------------------------------------------------------------------------------

STEERING = {
    "controlnet": lambda: ControlNet(networks("sd15")["network"]),
    "full": lambda: T2IAdapter(3, [32, 64, 64, 64]),
    "xl": lambda: T2IAdapter(1, [32, 64, 96, 96], unshuffle=16, halved=[2]),
    "light": lambda: T2IAdapter(3, [32, 64, 64, 64], num_res_blocks=4, light=True),
}


@pytest.mark.parametrize("name", STEERING)
def test_published_files_are_known_and_converted_bit_for_bit(name, tmp_path):
    net = randomised(STEERING[name]())
    save_model(net, tmp_path / "net.safetensors", "original")
    state = read_tensors(tmp_path / "net.safetensors")
    torch.save(state, tmp_path / "net.pth")
    write_tensors(tmp_path / "bare.safetensors", {k.removeprefix("control_model."): v for k, v in state.items()})
    assert convert([str(tmp_path / "net.pth"), str(tmp_path / "folder"), "--layout", "diffusers"]) == 0
    assert convert([str(tmp_path / "folder"), str(tmp_path / "back.safetensors"), "--layout", "original"]) == 0
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()
    for file in (
        "net.safetensors",
        "net.pth",
        "bare.safetensors",
        "folder",
        "folder/diffusion_pytorch_model.safetensors",
    ):
        loaded = load_model(tmp_path / file)
        assert type(loaded) is type(net) and same(loaded.state_dict(), net.state_dict())


def test_a_controlnet_within_a_whole_system_is_what_the_file_is_about(files, tmp_path):
    """ControlNet 1.0's files hold Stable Diffusion too, which can be drawn from as well."""
    state = {**read_tensors(files / "base.safetensors"), **read_tensors(files / "control.safetensors")}
    write_tensors(tmp_path / "control_sd15_canny.safetensors", state)
    assert isinstance(load_model(tmp_path / "control_sd15_canny.safetensors"), ControlNet)
    assert isinstance(load_model(tmp_path / "control_sd15_canny.safetensors", "unet"), UNet)
    assert identify(tmp_path / "control_sd15_canny.safetensors") == "sd15"
