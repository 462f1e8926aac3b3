"""DiT, SiT, PixArt and T5 as published: recognised, completed by other paths, converted, or refused in one line."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.build import compose, make
from ldm.conditioning.t5 import T5Encoder
from ldm.conditioning.t5_tokenizer import T5Tokenizer
from ldm.generate import Sampling, generate, load_run
from ldm.models.dit import DiT
from ldm.models.pixart import PixArt
from ldm.published import load_published
from ldm.tools.convert import convert
from ldm.tools.subject import weigh
from ldm.training.distributed import ALONE
from ldm.utils.errors import ConfigError, DataError, LdmError, WeightsError
from ldm.weights import load_model, load_system, save_model
from ldm.weights.components import COMPONENTS
from ldm.weights.places import SYSTEMS
from ldm.weights.systems import identify
from tests.test_systems_weights import edit, write_hollow
from tests.test_t5_tokenizer import GAPS, KINDS, toy_vocabulary
from tests.test_weights import one_line, randomised, same, small_vae
from train import train

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 24  # of the text
PIXART = dict(width=192, depth=2, num_heads=3)
NETWORKS = {
    "dit": lambda: DiT(4, sample_size=8, width=128, depth=2, num_heads=2, num_classes=5),
    "alpha": lambda: PixArt(4, WIDTH, sample_size=64, **PIXART),
    "alpha 1024": lambda: PixArt(4, WIDTH, sample_size=128, interpolation=2.0, num_sizes=3, **PIXART),
    "sigma": lambda: PixArt(4, WIDTH, sample_size=32, interpolation=0.5, **PIXART),
    "sigma kv": lambda: PixArt(4, WIDTH, sample_size=128, interpolation=2.0, kv_ratio=2, kv_layers=[1], **PIXART),
}
KINDS_OF = {name: "dit" if name == "dit" else "pixart" for name in NETWORKS}


def network(name, seed=0):
    """All weights random, of a size that keeps what passes through."""
    net = randomised(NETWORKS[name](), seed)
    for parameter in net.parameters():
        parameter.data *= (parameter[0].numel() if parameter.ndim > 1 else 25) ** -0.5
    return net.eval()


def tokenizer():
    return T5Tokenizer([*toy_vocabulary(), *((gap, 0.0) for gap in GAPS)], 2, [*KINDS, *GAPS])


def text_encoder(width=WIDTH):
    return T5Encoder(width, 2, 2, 8, 40, vocab_size=len(toy_vocabulary()) + len(GAPS)).eval()


def original(net):
    row = COMPONENTS["dit" if isinstance(net, DiT) else "pixart"]
    return row.layouts["original"].write(net.state_dict()) | row.computed(net)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Paths of what the authors' files lack, the text encoder with its vocabulary beside it."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    for scale in (0.18215, 0.13025):
        save_model(small_vae(), root / f"vae {scale}", config={"scaling_factor": scale})
    for width in (WIDTH, 40):
        save_model(text_encoder(width), root / f"t5 {width}")
    (root / f"t5 {WIDTH}" / "tokenizer.json").write_text(tokenizer().to_json())
    return {"vae": root / "vae 0.18215", "text_encoder": root / f"t5 {WIDTH}"}


def beside(parts, net):
    return {"vae": parts["vae"]} if isinstance(net, DiT) else parts


# ------------------------------------------------------------------------------------------------- files of a network


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trips(name, tmp_path):
    """Ours -> each layout -> ours, bit for bit and number for number, from a file of others where that can tell."""
    net = network(name)
    arguments = COMPONENTS[KINDS_OF[name]].arguments
    paths = [tmp_path / "a.safetensors", tmp_path / "transformer"]
    for path, layout in zip(paths, ("original", "diffusers"), strict=True):
        if layout == "diffusers" and "kv" in name:
            with pytest.raises(WeightsError, match="has no place in diffusers' layout"):
                save_model(net, path, layout)
            return
        save_model(net, path, layout)
        again = load_model(path)
        assert same(again.state_dict(), net.state_dict()) and arguments(again) == arguments(net)
    convert(paths[0], tmp_path / "folder", "diffusers")
    convert(paths[1], tmp_path / "b.safetensors", "original")
    assert paths[0].read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = load_model(tmp_path / "folder")
    assert same(again.state_dict(), net.state_dict()) and arguments(again) == arguments(net)


@pytest.mark.parametrize("name", NETWORKS)
def test_files_of_the_authors(name, tmp_path):
    """Bare, or in a table beside other things; of the averaged weights and the others the averaged."""
    net, other = network(name), network(name, seed=1)
    lengths = {"alpha": 120, "alpha 1024": 120, "sigma": 300, "sigma kv": 300}
    null = {"y_embedder.y_embedding": torch.zeros(lengths[name], WIDTH)} if name != "dit" else {}
    raw, averaged = original(other) | null, original(net) | null
    rest = {"opt": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "args": argparse.Namespace(epochs=1400), "epoch": 3}
    files = {
        "bare.pt": averaged,
        "training.pt": {"model": raw, "ema": averaged, **rest},
        "training.pth": {"state_dict": raw, "state_dict_ema": averaged, **rest},
        "alone.pt": {"ema": averaged, **rest},
        "published.pth": {"state_dict": averaged},
    }
    for file, content in files.items():
        torch.save(content, tmp_path / file)
        again = load_model(tmp_path / file)
        assert same(again.state_dict(), net.state_dict())
        expected = COMPONENTS[KINDS_OF[name]].arguments(net)
        assert COMPONENTS[KINDS_OF[name]].arguments(again) == expected
    for file in ("training.pt", "training.pth"):
        assert same(load_model(tmp_path / file, ema=False).state_dict(), other.state_dict())
    for half in (torch.float16, torch.bfloat16):
        torch.save({key: tensor.to(half) for key, tensor in averaged.items()}, tmp_path / "half.pt")
        assert {p.dtype for p in load_model(tmp_path / "half.pt", dtype=None).parameters()} == {half}


def test_t5(tmp_path):
    net = text_encoder()
    for layout, name in (("original", "a.safetensors"), ("diffusers", "text_encoder_2")):
        save_model(net, tmp_path / name, layout)
        assert same(load_model(tmp_path / name).state_dict(), net.state_dict())
    state = COMPONENTS["t5"].layouts["diffusers"].write(net.state_dict())
    table = state["shared.weight"]
    whole = state | {"encoder.embed_tokens.weight": table, "decoder.final_layer_norm.weight": torch.zeros(2)}
    torch.save(whole | {"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "text_encoder_2/pytorch_model.bin")
    (tmp_path / "text_encoder_2/model.safetensors").unlink()
    edit(tmp_path / "text_encoder_2/config.json", architectures=["T5ForConditionalGeneration"])
    assert same(load_model(tmp_path / "text_encoder_2").state_dict(), net.state_dict())
    torch.save(whole | {"encoder.embed_tokens.weight": table + 1}, tmp_path / "text_encoder_2/pytorch_model.bin")
    with pytest.raises(WeightsError, match="are one table; the file is damaged"):
        load_model(tmp_path / "text_encoder_2")


def test_formulas(tmp_path):
    """The authors' by default, whatever the layout, but for what a folder of ours says of itself."""
    net = network("dit")
    torch.save(original(net), tmp_path / "a.pt")
    save_model(net, tmp_path / "folder")
    config = json.loads((tmp_path / "folder/config.json").read_text())
    assert config.pop("freq_shift") == 0 and config["norm_eps"] == 1e-6
    save_model(load_model(tmp_path / "a.pt", formula="diffusers"), tmp_path / "ours")
    assert numbers(load_model(tmp_path / "ours")) == (1, 1e-5)
    for path in (tmp_path / "a.pt", tmp_path / "folder", tmp_path / "ours"):
        (tmp_path / "folder/config.json").write_text(json.dumps(config | {"norm_eps": 1e-5}))  # as of diffusers
        assert numbers(load_model(path)) == ((0, 1e-6) if path.name != "ours" else (1, 1e-5))
        assert numbers(load_model(path, formula="diffusers")) == (1, 1e-5)
        assert numbers(load_model(path, formula="original")) == (0, 1e-6)
    with pytest.raises(ConfigError, match="formula=sit is not known; expected original or diffusers"):
        load_model(tmp_path / "a.pt", formula="sit")
    save_model(small_vae(), tmp_path / "vae")
    with pytest.raises(ConfigError, match="formula=diffusers is not known; expected none for vae"):
        load_model(tmp_path / "vae", formula="diffusers")


def numbers(net):
    return net.embed.freq_shift, net.mlp_eps


def test_the_class_that_diffusers_had_before(tmp_path):
    for name in ("dit", "alpha"):
        net, folder = network(name), tmp_path / name
        save_model(net, folder)
        edit(folder / "config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
        assert type(load_model(folder)) is type(net)
    for norm in ("layer_norm", "ada_norm", None):
        edit(folder / "config.json", norm_type=norm)
        with pytest.raises(WeightsError) as error:
            load_model(folder)
        one_line(error, f"norm_type={norm} of", "expected ada_norm_zero (dit) or ada_norm_single (pixart)")
    edit(folder / "config.json", _class_name="DiTTransformer2DModel", norm_type="ada_norm_single")
    with pytest.raises(WeightsError, match="norm_type=ada_norm_single, this network is for 'ada_norm_zero' only"):
        load_model(folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patch_size": 3}, "sample_size=8 does not split into patches of patch_size=3"),
        ({"patch_size": 4}, "shapes differ"),
        ({"num_attention_heads": 3}, "shapes differ"),
        ({"attention_head_dim": 63}, "width=126 must be a multiple"),
        ({"num_layers": 3}, "missing"),
        ({"num_layers": 10**9}, "depth"),
        ({"num_embeds_ada_norm": 10**9}, "num_classes"),
        ({"norm_eps": "small"}, "mlp_eps=small"),
        ({"freq_shift": 10**9}, "freq_shift"),
        ({"out_channels": 5}, "5 channels come out of 4"),
        ({"activation_fn": "geglu"}, "activation_fn=geglu"),
    ],
)
def test_configs_of_other_transformers(tmp_path, changes, words):
    save_model(network("dit"), tmp_path / "transformer")
    edit(tmp_path / "transformer/config.json", **changes)
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path / "transformer")
    one_line(error, "transformer", words)


def test_other_transformers_are_named(tmp_path):
    state = original(network("dit"))
    for change, words in (
        (lambda s: s | {"blocks.0.extra": torch.zeros(2)}, "of no known part: 1 (blocks.0.extra); published.strict"),
        (lambda s: s | {"pos_embed": s["pos_embed"].flip(1)}, "pos_embed is not the fixed sin-cos table"),
        (lambda s: {k: v for k, v in s.items() if "blocks.1.mlp" not in k}, "missing 4"),
    ):
        torch.save(change(state), tmp_path / "a.pt")
        with pytest.raises(WeightsError) as error:
            load_model(tmp_path / "a.pt")
        one_line(error, words)


# ------------------------------------------------------------------------------------------------------------ systems

NAMES = {
    "dit": "dit_xl2_256",
    "alpha": "pixart_512",
    "alpha 1024": "pixart_1024",
    "sigma": "pixart_sigma_256",
    "sigma kv": "pixart_sigma_1024",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_systems_of_several_paths(name, parts, tmp_path):
    net = network(name)
    null = {"y_embedder.y_embedding": torch.zeros(300 if "sigma" in name else 120, WIDTH)} if name != "dit" else {}
    torch.save({"state_dict": original(net) | null}, tmp_path / "a.pth")
    others = beside(parts, net)
    assert identify(tmp_path / "a.pth", others) == NAMES[name]
    system = load_system(tmp_path / "a.pth", parts=others)
    assert same(system.networks["network"].state_dict(), net.state_dict())
    for slot, found in system.networks.items():
        node = json.loads(json.dumps(system.nodes[slot]))
        assert make(node, "network").state_dict().keys() == found.state_dict().keys()
    assert (system.tokenizer is None) == (name == "dit") and system.settings["scale"] == 0.18215
    run = load_published(tmp_path / "a.pth", parts=others)
    assert run.config["system"] == NAMES[name] and run.config["image_size"] == net.sample_size * 2  # a small codec
    if name != "dit":
        assert run.objective.conditioner.encoders["t5"].max_length == (300 if "sigma" in name else 120)


def test_every_system_has_a_config():
    assert {path.stem for path in (ROOT / "configs/system").glob("*.yaml")} == {*SYSTEMS, "none"}


def test_sigma_is_told_by_its_autoencoder_and_anything_by_its_name(parts, tmp_path):
    save_model(network("sigma"), tmp_path / "a.safetensors", "original")
    sdxl = {**parts, "vae": parts["vae"].with_name("vae 0.13025")}
    assert identify(tmp_path / "a.safetensors", parts) == "pixart_256"
    assert identify(tmp_path / "a.safetensors", sdxl) == "pixart_sigma_256"
    assert load_system(tmp_path / "a.safetensors", parts=parts, name="pixart_sigma_512").name == "pixart_sigma_512"
    null = {"y_embedder.y_embedding": torch.zeros(300, WIDTH)}
    torch.save({"state_dict": original(network("sigma")) | null}, tmp_path / "b.pth")
    convert(tmp_path / "b.pth", tmp_path / "b.safetensors", "original")
    assert identify(tmp_path / "b.safetensors", parts) == "pixart_sigma_256"  # our own files remember
    torch.save(original(network("dit")), tmp_path / "a.pt")
    vae = {"vae": parts["vae"]}
    run = load_published(tmp_path / "a.pt", system="sit_xl2_256", parts=vae)
    assert run.config["prediction"]["_target_"].endswith("Velocity") and run.objective.denoiser.process.net_time(1) == 0
    for path, wrong, given in (("a.pt", "pixart_512", vae), ("a.safetensors", "pixart_1024", parts)):
        with pytest.raises(WeightsError, match=f"holds the system .*, not {wrong}"):
            load_system(tmp_path / path, name=wrong, parts=given)


def test_parts_that_are_missing_or_others(parts, tmp_path):
    for file, name in (("a.pt", "dit"), ("a.pth", "alpha")):
        torch.save(original(network(name)), tmp_path / file)
    texts = {"vae": parts["vae"], "text_encoder": parts["text_encoder"].with_name("t5 40")}
    for file, given, words in (
        ("a.pt", {}, "the system dit_xl2_256 without vae; expected transformer, vae: give what is missing, as in vae="),
        ("a.pth", {}, "the system pixart_512 without vae, text_encoder"),
        ("a.pth", {"vae": parts["vae"]}, "without text_encoder; expected transformer, vae, text_encoder: give"),
        ("a.pth", texts, "text encoders of width 40, but its network reads text of 24"),
        ("a.pt", {"vae": parts["text_encoder"]}, "holds the component 'text_encoder', not 'vae'"),
        ("a.pt", {"vae": tmp_path / "gone"}, "no such file"),
    ):
        with pytest.raises(LdmError) as error:
            load_system(tmp_path / file, parts=given)
        one_line(error, words)
    with pytest.raises(WeightsError, match="has no place in an original file"):
        convert_all(tmp_path, parts)


def convert_all(tmp_path, parts):
    """A pipeline folder into one file, which nobody has."""
    (tmp_path / "all").mkdir()
    save_model(network("dit"), tmp_path / "all/transformer")
    save_model(small_vae(), tmp_path / "all/vae")
    convert(tmp_path / "all", tmp_path / "all.safetensors", "original")


@pytest.mark.parametrize("name, gigabytes", [("dit_xl2", 2.7 / 2), ("pixart_1024", 1.22), ("pixart_sigma_2k", 1.22)])
def test_published_files_are_known_by_their_headers(name, gigabytes, parts, tmp_path):
    with torch.device("meta"):
        node = compose("train", [f"network={name}"])["network"] | {"in_channels": 4}
        node |= {"num_classes": 1000, "context_dim": None} if name == "dit_xl2" else {}
        state = original(make(node, "network"))
    path = write_hollow(tmp_path / "a.safetensors", state)
    assert path.stat().st_size / 1e9 == pytest.approx(gigabytes, rel=0.1)
    expected = {"dit_xl2": "dit_xl2_256"}.get(name, name)
    with pytest.raises(WeightsError, match=f"the system {expected} without vae"):
        identify(path)


# ----------------------------------------------------------------------------------------------------------- in use


def sampling(*overrides):
    return Sampling.from_config(compose("sample", ["steps=2", *overrides]))


@pytest.fixture
def run(parts, tmp_path):
    def load(name, **knobs):
        torch.save(original(network(name)), tmp_path / "a.pt")
        return load_published(tmp_path / "a.pt", parts=beside(parts, network(name)), **knobs)

    return load


@pytest.mark.parametrize("system", [name for name in SYSTEMS if not name.startswith(("sd", "if"))])
def test_each_system_draws_as_its_authors_do(system, run):
    """With the sampler of its YAML, in a few steps."""
    kinds = {"dit": "dit", "sit": "dit", "pixart_1024": "alpha 1024", "pixart": "alpha"}
    model = run(next(kind for start, kind in kinds.items() if system.startswith(start)), system=system)
    lines = [line for line in model.config["sampling"] if not line.startswith("steps")]
    prompts = ["3", ""] if "dit" in kinds.get(system[:3], "") else ["a cat", "a red cat"]
    images = generate(model.objective, prompts, [0, 1], sampling(*lines, "steps=3"), image_size=(16, 32))
    assert images.shape == (2, 3, 16, 32) and (images[0] != images[1]).any()


def test_classes_captions_and_masks_that_do_not_fit(run, caplog):
    model = run("dit")
    with pytest.raises(DataError, match="label '6' is no class; expected 0..4, 5 for none"):
        model.generate(["6"], steps=1)
    with pytest.raises(DataError, match="label 'a cat' is no class"):
        model.generate(["a cat"], steps=1)
    with pytest.raises(ConfigError, match="does not split into patches of patch_size=2"):
        model.generate(["1"], steps=1, image_size=(18, 16))
    with pytest.raises(ConfigError, match="prompt_weights=a1111 is for CLIP"):
        weigh(model, "a1111")

    model = run("alpha")
    model.generate(["red cat " * 200, "a cat " * 200], steps=1, image_size=16)
    assert [record.message.split(",")[0] for record in caplog.records] == ["prompt of 401 tokens cut to 120"]
    net, x, t = model.objective.denoiser.net, torch.zeros(1, 4, 8, 8), torch.ones(1)
    with pytest.raises(ConfigError, match="`context` has width 25, but the PixArt was built with context_dim=24"):
        net(x, t, context=torch.zeros(1, 3, 25))
    with pytest.raises(ConfigError, match="`context_mask` drops every token of text 0"):
        net(x, t, context=torch.zeros(1, 3, WIDTH), context_mask=torch.zeros(1, 3, dtype=torch.bool))


def test_sample_py_completes_the_file_of_a_network(parts, tmp_path):
    """With the sampler that its authors use, but for what the command chooses."""
    torch.save(original(network("alpha")), tmp_path / "a.pt")
    command = [sys.executable, "sample.py", f"weights={tmp_path / 'a.pt'}", "prompts=[a red cat]", "image_size=[16,32]"]
    command += [f"{part}={path}" for part, path in parts.items()] + ["times=trailing", "steps=2", "device=cpu"]
    done = subprocess.run([*command, f"out={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "samples.json").read_text())
    assert (record["kind"], record["guidance"]["scale"], record["steps"]) == ("pixart_512", 4.5, 2)
    assert "dpm_solver" in record["sampler"]["_target_"] and "trailing" in record["times"]["_target_"]
    assert record["vae"] == str(parts["vae"])


@pytest.mark.parametrize("system, name", [("sit_xl2_256", "dit"), ("pixart_512", "alpha")])
def test_fine_tuning_starts_from_them(system, name, parts, tmp_path):
    """Their loss, from the authors' file; the run is drawn from without it, its frozen T5 read and not made first."""
    torch.save(original(network(name)), tmp_path / "a.pt")
    others = [f"{part}='{path}'" for part, path in beside(parts, network(name)).items()]
    tiny = ["data=shapes", "image_size=16", "limit=4", "preview=none", "metrics=none", "ema=none",
            "lr_schedule.warmup=0", "trainer.precision=fp32", "trainer.batch_size=2", "trainer.workers=0",
            "trainer.steps=2", "trainer.log_every=1"]  # fmt: skip
    cfg = compose("train", [f"system={system}", f"weights={tmp_path / 'a.pt'}", *others, *tiny])
    cfg.pop("hydra", None)
    train(cfg, tmp_path / "run", torch.device("cpu"), ALONE)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < float("inf") for loss in losses)
    again = load_run(tmp_path / "run")
    assert len(again.generate(["" if name == "dit" else "a cat"], steps=2)) == 1
    if name != "dit":
        encoder = again.objective.conditioner.encoders["t5"]
        assert same(encoder.network.state_dict(), load_model(parts["text_encoder"]).state_dict())
