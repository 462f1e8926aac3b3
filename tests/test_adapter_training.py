"""train.py adapters=: around a run or published weights, alone trained, stored, resumed and written as published."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_finetuning import composed, systems, tune  # noqa: F401  a fixture among them

from ldm.adapters.lora import Loaded, LoRA
from ldm.adapters.training import networks_of
from ldm.build import compose, make
from ldm.generate import load_run
from ldm.training.distributed import ALONE
from ldm.utils.errors import LdmError
from ldm.weights import load_model
from train import train

CPU = torch.device("cpu")
TINY = ["codec=pixel", "image_size=16", "limit=8", "preview=none", "metrics=none", "lr_schedule=constant",
        "lr_schedule.warmup=0", "trainer.batch_size=4", "trainer.log_every=1", "optimizer.lr=1e-2"]  # fmt: skip
UNET = ["network=unet_small", "network.channels=32", "network.head_dim=16"]
DIT = ["network=dit_small", "network.width=32", "network.depth=2", "network.num_heads=2", "network.patch_size=4"]
PIXART = ["network=pixart_small", "network.width=32", "network.depth=2", "network.num_heads=2"]


def fit(run, *overrides, steps=2):
    """Losses of every step of a run."""
    cfg = compose("train", [*TINY, f"trainer.steps={steps}", *overrides])
    train(cfg, run, CPU, ALONE)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Runs of a few steps, of a UNet and of transformers."""
    root = tmp_path_factory.mktemp("bases")
    for name, network in {"unet": UNET, "dit": DIT, "pixart": PIXART}.items():
        fit(root / name, *network, steps=3 if name == "unet" else 1)
    return root


def newest(run, name):
    return load_file(run / "checkpoints/last" / f"{name}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- LoRA and its kin -----------------------------------------------------------------------------------------------


KINDS = [("unet", "lora"), ("unet", "locon"), ("unet", "loha"), ("dit", "lokr"), ("dit", "rslora"), ("pixart", "dora")]


@pytest.mark.parametrize("base, adapter", KINDS)
def test_adapters_alone_are_trained_and_stored(bases, tmp_path, base, adapter):
    fit(tmp_path, f"base={bases / base}", f"adapters={adapter}")
    model, frozen, optimizer = (newest(tmp_path, name) for name in ("model", "frozen", "optimizer"))
    assert same(frozen, newest(bases / base, "ema"))  # the base is that run's average, whatever happened since
    assert model and all(".products." in name or ".placed." in name for name in model)
    assert newest(tmp_path, "ema").keys() == model.keys()
    assert {name.rpartition(".")[0] for name in optimizer} == model.keys()
    trained = sum(tensor.numel() for tensor in model.values())
    assert sum(tensor.numel() for tensor in optimizer.values() if tensor.ndim) == 2 * trained  # AdamW's two moments


def test_the_published_file_draws_on_the_base_what_the_run_draws(bases, tmp_path):
    text = ["adapters.lora.text_targets=attention", "adapters.lora.alpha=2"]
    fit(tmp_path, f"base={bases / 'unet'}", "adapters=lora", *text, steps=5)
    run, base = load_run(tmp_path), load_run(bases / "unet")
    before = base.generate(["a red circle"], steps=2)[0]
    file = Loaded(tmp_path / "adapter/lora.safetensors")
    changed = file.inject(networks_of(base.objective))
    assert changed["network"] > 8 and changed["text"] == 2 * 2
    draws = [r.objective.denoiser.net for r in (run, base)]
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([500.0])
    cond = [r.objective.conditioner({"caption": ["a red circle"]}) for r in (run, base)]
    a, b = (net(x, t, **given) for net, given in zip(draws, cond, strict=True))
    assert torch.allclose(a, b, atol=1e-5)
    assert run.generate(["a red circle"], steps=2)[0].tobytes() != before.tobytes()
    file.eject()
    assert base.generate(["a red circle"], steps=2)[0].tobytes() == before.tobytes()


def test_a_run_resumes_to_the_same_bits_without_its_base(bases, tmp_path):
    knobs = ["adapters=lora", "adapters.lora.dropout=0.2", "trainer.save_every=2"]
    whole = fit(tmp_path / "whole", f"base={bases / 'unet'}", *knobs, steps=4)
    fit(tmp_path / "parts", f"base={bases / 'unet'}", *knobs, steps=2)
    frozen = (tmp_path / "parts/checkpoints/last/frozen.safetensors").read_bytes()
    assert fit(tmp_path / "parts", f"base={tmp_path / 'gone'}", *knobs, steps=4) == whole
    assert (tmp_path / "parts/checkpoints/last/frozen.safetensors").read_bytes() == frozen
    for name in ("model", "ema", "optimizer", "frozen"):
        assert same(newest(tmp_path / "whole", name), newest(tmp_path / "parts", name))
    file = "adapter/lora.safetensors"
    assert same(load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file))


def test_several_compose_and_a_base_without_adapters_is_fine_tuned(bases, tmp_path):
    fit(tmp_path / "two", f"base={bases / 'unet'}", "adapters=[lora,lokr]")
    assert {path.name for path in (tmp_path / "two/adapter").iterdir()} == {"lora.safetensors", "lokr.safetensors"}
    fit(tmp_path / "full", f"base={bases / 'unet'}")
    assert not (tmp_path / "full/adapter").exists()
    before, after = newest(bases / "unet", "ema"), newest(tmp_path / "full", "model")
    assert before.keys() == after.keys() and not same(before, after)


def test_lora_of_stable_diffusion_and_its_text_encoder(systems, tmp_path):  # noqa: F811
    knobs = ["adapters=lora", "adapters.lora.text_targets=self_attn", "optimizer.lr=3e-3"]
    losses = tune(tmp_path, "finetune_sd15", systems["sd15"], *knobs, steps=4)
    assert losses[0] != losses[-1]
    names = {key.partition("_text_model")[0].partition("_down_blocks")[0] for key in load_file(
        tmp_path / "adapter/lora.safetensors")}  # fmt: skip
    assert {"lora_unet", "lora_te"} <= names
    assert len(load_run(tmp_path).generate(["a cat"], steps=2)) == 1
    with pytest.raises(LdmError, match="cache= has texts as clip_l read them before, text_targets train it"):
        tune(tmp_path / "cached", "finetune_sd15", systems["sd15"], *knobs, f"cache={tmp_path / 'cache'}")


def test_a_base_between_adapters_has_no_dropout(bases, tmp_path):
    """Two runs differ by their seed of dropout alone: a base in training mode would draw."""
    fit(tmp_path / "base", *UNET, "network.dropout=0.5")
    losses = [fit(tmp_path / f"{k}", f"base={tmp_path / 'base'}", "adapters=lora", steps=1) for k in range(2)]
    whole = fit(tmp_path / "full", f"base={tmp_path / 'base'}", steps=1)
    assert losses[0] == losses[1] and whole != losses[0]


# --- what a hint steers with ----------------------------------------------------------------------------------------

STEERED = ["objective=control", "conditioner.dropout=0.5"]


@pytest.mark.parametrize(
    "base, adapter, hint",
    [("unet", "controlnet", "canny"), ("unet", "controlnet", "inpaint"), ("unet", "t2i_adapter", "depth"),
     ("dit", "controlnet", "segmentation"), ("pixart", "controlnet", "sketch")],
)  # fmt: skip
def test_controls_alone_are_trained_stored_and_published(bases, tmp_path, base, adapter, hint):
    fit(tmp_path, f"base={bases / base}", f"adapters={adapter}", f"hint={hint}", *STEERED, "density=cubic")
    model, optimizer = newest(tmp_path, "model"), newest(tmp_path, "optimizer")
    assert model and all(name.startswith("denoiser.net.controls.0.network.") for name in model)
    assert {name.rpartition(".")[0] for name in optimizer} == model.keys()
    frozen = {name.replace("denoiser.net.net.", "denoiser.net."): p for name, p in newest(tmp_path, "frozen").items()}
    assert same(frozen, newest(bases / base, "ema"))
    run = load_run(tmp_path)
    published = tmp_path / "adapter" / f"{adapter}.safetensors"
    assert published.exists() == (base == "unet")
    if published.exists():
        ours = run.objective.denoiser.net.controls[0].network.state_dict()
        assert same(load_model(published).state_dict(), ours)
    assert len(run.generate(["a red circle"], steps=2)) == 1  # of the base, without a hint


def test_previews_and_metrics_see_the_hints(bases, tmp_path):
    shown = ["metrics=hints", "metrics.hints.num_images=2", "preview=steered", "preview.count=2", "steps=2",
             "trainer.sample_every=2", "trainer.eval_every=2", "data.length=64"]  # fmt: skip
    fit(tmp_path, f"base={bases / 'unet'}", "adapters=[controlnet,lora]", *STEERED, *shown, "optimizer.lr=1.0")
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["hint_overlap"] <= 1 and last["hint_overlap"] != last["without_hint"]
    assert (tmp_path / "samples/step_00000002.png").exists()
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"lora.safetensors", "controlnet.safetensors"}


@pytest.mark.parametrize("name", ["lora_sd15", "controlnet_sd15", "t2i_adapter_sd15"])
def test_experiments_start_on_published_weights(systems, tmp_path, name):  # noqa: F811
    losses = tune(tmp_path, name, systems["sd15"], steps=2)
    assert len(losses) == 2 and list((tmp_path / "adapter").iterdir())
    sizes = {"lora_sd15": 3_188_736, "controlnet_sd15": 361_279_120, "t2i_adapter_sd15": 77_369_280}
    cfg = composed(name)
    with torch.device("meta"):
        net = make(cfg["network"], "network")
        [adapter] = [make(node, "adapters", net=net, downsample=8) for node in cfg["adapters"].values()]
        if isinstance(adapter, LoRA):
            adapter.inject({"network": net})
    trained = adapter.trainable().values() if isinstance(adapter, LoRA) else adapter.parameters()
    assert sum(p.numel() for p in trained) == sizes[name]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs, message",
    [
        (["adapters=lora", "adapters.lora.rank=0"], "adapter lora: rank=0, alpha=None; expected at least 1"),
        (["adapters=lora", "adapters.lora.targets=nothing"], "adapter lora: 'nothing' matches none of network's"),
        (["adapters=lora", "adapters.lora.targets=null"], "adapter lora: neither targets nor text_targets is set"),
        (["adapters=lora", "adapters.lora.text_targets=nothing"], "adapter lora: 'nothing' matches none of text's"),
        (["adapters=lora", "+adapters.lora.ranks=3"], "LoRA has no argument 'ranks'; did you mean 'rank'"),
        (["adapters=lora", "weights=file"], "weights=file and base=.*: a run begins with one of them"),
        (["adapters=lora", "objective=control"], "there are 0 adapters that a hint steers with, .* ControlObjective"),
        (["adapters=controlnet"], "there are 1 adapters that a hint steers with, .* DiffusionObjective: one of"),
        (["adapters=[controlnet,t2i_adapter]", "objective=control"], "there are 2 adapters that a hint steers with"),
        (["adapters=controlnet", "objective=control", "adapters.controlnet.num_blocks=2"], "num_blocks=2 is of trans"),
    ],
)
def test_settings_that_cannot_be_are_named_in_one_line(bases, tmp_path, knobs, message):
    with pytest.raises(LdmError, match=message) as error:
        fit(tmp_path, f"base={bases / 'unet'}", *knobs)
    assert "\n" not in str(error.value) and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "base, knobs, message",
    [
        ("dit", ["adapters=t2i_adapter"], "there is no T2I-Adapter for a DiT; expected a UNet"),
        ("dit", ["adapters=controlnet", "adapters.controlnet.num_blocks=9"], "num_blocks=9: expected 1 to 2"),
        ("pixart", ["adapters=controlnet", "adapters.controlnet.global_pool=true"], "global_pool=true is of UNets"),
    ],
)
def test_controls_for_another_base_are_refused(bases, tmp_path, base, knobs, message):
    with pytest.raises(LdmError, match=message):
        fit(tmp_path, f"base={bases / base}", "objective=control", *knobs)


def test_other_adapters_and_other_bases_are_refused(bases, tmp_path):
    with pytest.raises(LdmError, match="adapters go around the network of a diffusion model, which Autoencoder"):
        fit(tmp_path / "vae", "experiment=shapes_autoencoder", "image_size=16", "adapters=lora")
    fit(tmp_path / "lora", f"base={bases / 'unet'}", "adapters=lora")
    for other in (["adapters=lokr"], ["adapters=lora", "adapters.lora.rank=8"]):
        with pytest.raises(LdmError, match="cannot continue its checkpoint with other adapters: .*, there lora"):
            fit(tmp_path / "lora", f"base={bases / 'unet'}", *other, steps=5)
    with pytest.raises(LdmError, match="is a base and lora; give the base itself"):
        fit(tmp_path / "twice", f"base={tmp_path / 'lora'}", "adapters=lora")
