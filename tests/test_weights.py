"""Published weights: every key counted, layouts recognised, bad files refused in one line with nothing left behind."""

import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import hydra
import pytest
import torch

from ldm.build import config_dir, make, plain
from ldm.conditioning.clip import CLIPText
from ldm.io.inert import read_pickle
from ldm.io.stored import index_tensors
from ldm.io.tensors import read_tensors, write_tensors
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet
from ldm.tools.convert import main as convert
from ldm.utils.errors import ConfigError, WeightsError
from ldm.weights import load_model, save_model
from ldm.weights.components import UNET, VAE
from ldm.weights.detect import looks_like
from ldm.weights.formats import check_bounds
from ldm.weights.parts import SCHEDULE

SMALL = dict(channels=32, channel_mult=[1, 2], num_res_blocks=1, depth=[1, 1, 1], head_dim=[4, 8])
SD = dict(SMALL, context_dim=768, linear_projection=False)
XL = dict(SMALL, depth=[0, 2, 2], head_dim=64, context_dim=2048, pooled_dim=1280, num_sizes=6)


def published(name):
    """Network of a shipped config, without memory."""
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        node = plain(hydra.compose(f"network/{name}"))["network"]
    with torch.device("meta"):
        return make({key: value for key, value in node.items() if value != "???"}, "network")


def randomised(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data.normal_(generator=generator)
    return net


def small(seed=0, **changes):
    return randomised(UNet(4, **SD | changes), seed)


def small_vae():
    return randomised(AutoencoderKL(channels=32, channel_mult=[1, 1], num_res_blocks=1))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def system(unet, vae):
    """State of a whole original file, with the extras of a training checkpoint."""
    state = {f"model.diffusion_model.{k}": v for k, v in UNET.layouts["original"].write(unet.state_dict()).items()}
    state |= {f"first_stage_model.{k}": v for k, v in VAE.layouts["original"].write(vae.state_dict()).items()}
    return state | {name: torch.zeros(3) for name in SCHEDULE}


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize(
    "name, keys, parameters, looks",
    [
        ("sd15", 686, 859_520_964, "a UNet of Stable Diffusion 1"),
        ("sd21", 686, 865_910_724, "a UNet of Stable Diffusion 2"),
        ("sdxl", 1680, 2_567_463_684, "a UNet of SDXL"),
        ("sdxl_refiner", 1220, 2_259_526_660, "a UNet of SDXL refiner"),
        ("sd_vae", 248, 83_653_863, "an autoencoder"),
    ],
)
def test_published_sizes_in_both_layouts(name, keys, parameters, looks):
    """Counts of the real files; and from their shapes alone, or their config.json, the same network comes back."""
    net = published(name)
    component = VAE if name == "sd_vae" else UNET
    assert sum(p.numel() for p in net.parameters()) == parameters
    shapes = {}
    for layout in ("original", "diffusers"):
        state = component.layouts[layout].write(net.state_dict())
        assert len(state) == keys
        shapes[layout] = {key: tuple(tensor.shape) for key, tensor in state.items()}
        assert looks_like(shapes[layout]) == looks
    arguments = component.arguments(net)
    inferred = check_bounds(component.from_shapes(shapes["original"]))
    with torch.device("meta"):
        again = component.network(**inferred)
    assert component.arguments(again) == arguments
    configured = component.from_config(json.loads(json.dumps(component.to_config(net))))
    assert configured.items() <= arguments.items()


def test_inpainting_has_nine_channels():
    net = UNet(9, out_channels=4, **SD)
    shapes = {key: tuple(t.shape) for key, t in UNET.layouts["original"].write(net.state_dict()).items()}
    assert looks_like(shapes) == "a UNet of Stable Diffusion 1 for inpainting"
    assert UNET.from_shapes(shapes)["in_channels"] == 9


FREE = {"context_dim": None}  # self-attention alone


@pytest.mark.parametrize("changes", [{}, {"num_classes": 7}, XL, FREE], ids=["sd", "labels", "xl", "free"])
def test_round_trip_keeps_every_bit(tmp_path, changes):
    net = small(**changes)
    save_model(net, tmp_path / "a.safetensors", layout="original")
    first = load_model(tmp_path / "a.safetensors")
    assert not first.training and same(first.state_dict(), net.state_dict())
    if changes is not FREE:  # diffusers has no such network
        save_model(first, tmp_path / "folder")
        first = load_model(tmp_path / "folder")
    save_model(first, tmp_path / "b.safetensors", layout="original")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_foreign_file_is_inferred_from_its_shapes(tmp_path):
    net = small(head_dim=[4, 8])  # 8 heads, as SD 1.x
    state = UNET.layouts["original"].write(net.state_dict())
    for name, prefix in (("bare", ""), ("prefixed", "model.diffusion_model.")):
        write_tensors(tmp_path / f"{name}.safetensors", {prefix + key: tensor for key, tensor in state.items()})
        loaded = load_model(tmp_path / f"{name}.safetensors")
        assert UNET.arguments(loaded) == UNET.arguments(net) and same(loaded.state_dict(), net.state_dict())


def test_dtype(tmp_path):
    save_model(small().half(), tmp_path / "a.safetensors", layout="original")
    for asked, given in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (None, torch.float16)):
        assert {p.dtype for p in load_model(tmp_path / "a.safetensors", dtype=asked).parameters()} == {given}


class Callback:
    """A class that the reader of a checkpoint does not have."""

    def __init__(self):
        self.best = {"score": torch.zeros(2)}


def save_lightning(path, state):
    stub = type(sys)("pytorch_lightning")
    stub.Callback, Callback.__module__ = Callback, stub.__name__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, stub.__name__, stub)
        content = {"epoch": 3, "callbacks": {Callback: Callback()}, "state_dict": state, "optimizer_states": [{"a": 1}]}
        torch.save(content, path)


def test_training_checkpoint_with_averages_and_unknown_classes(tmp_path):
    raw, averaged, vae = small(1), small(2), small_vae()
    state = system(raw, vae)
    for key, tensor in UNET.layouts["original"].write(averaged.state_dict()).items():
        state["model_ema." + f"diffusion_model.{key}".replace(".", "")] = tensor
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    save_lightning(tmp_path / "last.ckpt", state)
    assert same(load_model(tmp_path / "last.ckpt", ema=True).state_dict(), averaged.state_dict())
    for ema in (None, False):  # a merge keeps the averages of one of its parents
        assert same(load_model(tmp_path / "last.ckpt", ema=ema).state_dict(), raw.state_dict())
    assert same(load_model(tmp_path / "last.ckpt", "vae").state_dict(), vae.state_dict())
    assert "pytorch_lightning" not in sys.modules

    del state["model_ema.diffusion_modelout2bias"]
    save_lightning(tmp_path / "torn.ckpt", state)
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path / "torn.ckpt", ema=True)
    one_line(error, "torn.ckpt", "out.2.bias")


def test_pickled_tensors_of_every_kind_are_read_as_torch_reads_them(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "plain": base, "transposed": base.t(), "row": base[1], "column": base[:, 2], "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3), "half": base.half(), "bfloat": base.bfloat16(), "bool": base > 3,
        "parameter": torch.nn.Parameter(base),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "a.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "old.pt"):
        index = index_tensors(tmp_path / name)
        assert same({key: stored.read() for key, stored in index.items()}, {k: t.detach() for k, t in tensors.items()})


def test_convert_a_whole_file_and_back(tmp_path, capsys):
    unet, vae = small(**XL), small_vae()
    write_tensors(tmp_path / "xl.safetensors", system(unet, vae))
    assert convert([str(tmp_path / "xl.safetensors"), str(tmp_path / "folder"), "--layout", "diffusers"]) == 0
    assert json.loads((tmp_path / "folder/vae/config.json").read_text())["scaling_factor"] == 0.13025
    assert same(load_model(tmp_path / "folder").state_dict(), unet.state_dict())
    assert convert([str(tmp_path / "folder"), str(tmp_path / "back.safetensors"), "--layout", "original"]) == 0
    expected = {key: tensor for key, tensor in system(unet, vae).items() if key not in SCHEDULE}
    assert same(read_tensors(tmp_path / "back.safetensors"), expected)
    assert not (tmp_path / "folder/model_index.json").exists()  # no pipeline without a text encoder
    alone = [str(tmp_path / "xl.safetensors"), str(tmp_path / "alone"), "--layout", "diffusers"]
    assert convert([*alone, "--component", "text_encoder"]) == WeightsError.exit_code
    assert "there is no text_encoder" in capsys.readouterr().err and not (tmp_path / "alone").exists()
    assert convert([*alone, "--component", "unet"]) == 0
    assert same(load_model(tmp_path / "alone").state_dict(), unet.state_dict())
    assert convert([str(tmp_path / "folder/vae"), str(tmp_path / "v.safetensors"), "--layout", "original"]) == 0
    assert same(load_model(tmp_path / "v.safetensors").state_dict(), vae.state_dict())


# ------------------------------------------------------------------------------------------------- what is refused


class Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def bad_file(tmp_path, kind) -> Path:
    net = small()
    state = UNET.layouts["original"].write(net.state_dict())
    path = tmp_path / "bad.safetensors"
    lora = {f"lora_unet_{i}.lora_{side}.weight": torch.zeros(4, 4) for i in range(3) for side in ("up", "down")}
    changed = {
        "lora": lora,
        "controlnet": {f"control_model.{key}": tensor for key, tensor in state.items()},
        "unknown": {"a": torch.zeros(2), "b": torch.zeros(2)},
        "empty": {},
        "missing": {key: tensor for key, tensor in state.items() if key != "out.2.bias"},
        "extra": state | {"spare.weight": torch.zeros(2)},
        "stray": system(net, small_vae()) | {"stray.weight": torch.zeros(2)},
        "shape": state | {"time_embed.0.weight": torch.zeros(128, 31)},
        "integers": state | {"time_embed.0.weight": torch.zeros(128, 32, dtype=torch.int8)},
        "text encoder": {"text_model.final_layer_norm.weight": torch.zeros(4)},
    }.get(kind, state)
    if kind == "code":
        torch.save({"state_dict": state, "callbacks": Code()}, tmp_path / "bad.ckpt")
        return tmp_path / "bad.ckpt"
    if kind == "bare code":
        (tmp_path / "bad.ckpt").write_bytes(pickle.dumps(Code()))
        return tmp_path / "bad.ckpt"
    if kind == "deflated":
        torch.save(state, tmp_path / "stored.ckpt")
        with zipfile.ZipFile(tmp_path / "stored.ckpt") as old, zipfile.ZipFile(tmp_path / "bad.ckpt", "w", 8) as new:
            for entry in old.namelist():
                new.writestr(entry, old.read(entry))
        return tmp_path / "bad.ckpt"
    if kind == "cut pickle":
        torch.save(state, tmp_path / "bad.ckpt")
        (tmp_path / "bad.ckpt").write_bytes((tmp_path / "bad.ckpt").read_bytes()[:-5000])
        return tmp_path / "bad.ckpt"
    write_tensors(path, changed)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    return path


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "kind, words",
    {
        "lora": "a LoRA",
        "controlnet": "describes no controlnet",
        "unknown": "nothing known",
        "empty": "an empty file",
        "missing": "out.2.bias",
        "extra": "spare.weight",
        "stray": "stray.weight",
        "shape": "shapes differ",
        "integers": "int8",
        "text encoder": "a CLIP encoder",
        "code": "exec",
        "bare code": "not a plain file of tensors",
        "deflated": "compressed",
        "cut": "cut short",
        "cut pickle": "cut short",
        "absent": "no such file",
    }.items(),
)
def test_bad_files_are_one_line_and_leave_nothing(tmp_path, capsys, kind, words):
    path = bad_file(tmp_path, kind) if kind != "absent" else tmp_path / "absent.safetensors"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(WeightsError) as error:
        load_model(path)
    one_line(error, path.name, words)
    for layout, name in (("diffusers", "folder"), ("original", "out.safetensors")):
        assert convert([str(path), str(tmp_path / name), "--layout", layout]) == WeightsError.exit_code
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_mutated_pickles_are_read_or_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(3), "b": torch.ones(2, 2).t()}, "lr": 0.1}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        data = archive.read("a/data.pkl")
    dice = random.Random(0)
    for _ in range(1500):
        mutated = bytearray(data)
        for _ in range(dice.randint(1, 4)):
            mutated[dice.randrange(len(data))] = dice.randrange(256)
        try:
            read_pickle(bytes(mutated[: dice.choice([len(data), dice.randrange(len(data))])]), tmp_path)
        except WeightsError as error:
            assert "\n" not in str(error)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"act_fn": "gelu"}, "act_fn=gelu"),
        ({"norm_num_groups": 16}, "norm_num_groups"),
        ({"block_out_channels": [32, 48]}, "multiples"),
        ({"block_out_channels": "wide"}, "describes no unet"),
        ({"layers_per_block": 10**9}, "num_res_blocks"),
        ({"layers_per_block": 2}, "missing"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ({"_class_name": "ControlNetModel"}, "missing 26 (controlnet_cond_embedding"),
        ({"cross_attention_dim": 96}, "shapes differ"),
    ],
)
def test_configs_of_other_networks(tmp_path, changes, words):
    save_model(small(), tmp_path / "unet")
    edit(tmp_path / "unet/config.json", **changes)
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path / "unet")
    one_line(error, "unet", words)


@pytest.mark.parametrize(
    "shard, words",
    [("no.safetensors", "missing"), ("../a.safetensors", "beside it"), ("/etc/passwd", "beside it"), (7, "weight_map")],
)
def test_shards(tmp_path, shard, words):
    save_model(small(), tmp_path / "unet")
    weights = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    table = {key: weights.name for key in read_tensors(weights)} | {"conv_in.bias": shard}
    weights.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    load_model(tmp_path / "unet")  # one file goes before shards
    weights.rename(tmp_path / "unet/elsewhere.safetensors")
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path / "unet")
    one_line(error, "index.json", words)


def test_what_cannot_be_saved(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="no published layout"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(WeightsError, match="has no place"):
        save_model(UNet(4, **SD | {"depth": [1, 1, 0]}), tmp_path / "a")
    with pytest.raises(ConfigError, match="expected a .safetensors file"):
        save_model(small(), tmp_path / "a", layout="original")
    with pytest.raises(ConfigError, match="layout='webui'"):
        save_model(small(), tmp_path / "a.safetensors", layout="webui")
    (tmp_path / "here").mkdir()
    with pytest.raises(WeightsError, match="already exists"):
        save_model(small(), tmp_path / "here")
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="cannot be written"):
        save_model(small(), tmp_path / "file" / "inside")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "here"]


MEMORY = """
import gc, sys
from ldm.weights import load_model

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

for path in sys.argv[1:]:
    load_model(path)  # everything is imported, and every list as long as it gets
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak
    base = status("VmRSS")
    net = load_model(path)
    size = sum(p.numel() * p.element_size() for p in net.parameters()) / 1024
    print((status("VmHWM") - base) / size)
    del net
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of memory")
def test_loading_takes_the_size_of_the_weights(tmp_path):
    """Also where projections are fused on the way, as in CLIP's blocks, or turned, as the autoencoder's."""
    wide = UNet(4, **SD | {"channels": 128, "head_dim": [16, 32]})  # 35 MB
    clip = CLIPText(384, 4, 6, "quick_gelu", vocab_size=100)  # 29 MB
    vae = AutoencoderKL(channels=128, channel_mult=[1, 2], num_res_blocks=1)  # 25 MB
    nets = {"wide": wide, "clip": clip, "vae": vae}
    paths = [tmp_path / f"{name}.safetensors" for name in nets] + [tmp_path / "wide.ckpt"]
    for net, path in zip(nets.values(), paths, strict=False):
        save_model(net, path, layout="original")
    torch.save(UNET.layouts["original"].write(wide.state_dict()), paths[-1])
    command = [sys.executable, "-c", MEMORY, *paths]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=True)
    ratios = [float(line) for line in done.stdout.split()]
    assert len(ratios) == 4 and 0.5 <= min(ratios) and max(ratios) <= 1.2, ratios
