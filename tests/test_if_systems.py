"""DeepFloyd IF as published: recognised, its texts read once and before, drawn from alone and in cascades, trained."""

import gc
import json
import weakref

import pytest
import torch
import yaml

from ldm.build import compose
from ldm.conditioning.stored import KnownTexts
from ldm.conditioning.t5 import T5Encoder
from ldm.diffusion.process import space_indices
from ldm.generate import Sampling, generate, load_run
from ldm.io.images import read_image, write_png
from ldm.io.text import read_yaml
from ldm.models.if_unet import IFUNet
from ldm.published import load_published
from ldm.tools import embed, stages
from ldm.tools.convert import convert
from ldm.tools.embed import Reader, share_text_encoder
from ldm.tools.stages import draw_cascade, enlarges
from ldm.tools.subject import as_published, load_subject
from ldm.training.distributed import ALONE
from ldm.utils.errors import ConfigError, DataError, LdmError, WeightsError
from ldm.weights import load_model, load_system, save_model
from ldm.weights.components import COMPONENTS
from ldm.weights.formats_if import if_arguments
from ldm.weights.places import system_of
from ldm.weights.systems import identify
from tests.test_t5_tokenizer import toy_vocabulary
from tests.test_transformer_weights import tokenizer
from tests.test_weights import one_line, same
from train import train

WIDTH = 64  # of the text; the pooling has 64 heads
COMMON = dict(num_res_blocks=1, head_dim=64, context_dim=WIDTH, text_dim=32, text_norm="group", activation="gelu",
              learned_variance=True)  # fmt: skip
ENLARGES = dict(super_resolution=True, self_attention=False, skip_scale=0.7071)
SIZES = {
    "if_i_m": dict(channels=64, channel_mult=[1, 1], attention=[False, True]),
    "if_ii_m": dict(channels=64, channel_mult=[1, 1], attention=[False, True], **ENLARGES),
    "if_iii_l": dict(channels=64, channel_mult=[1] * 6, attention=[False] * 6, **ENLARGES),
}
PUBLISHED = {"if_i_l": (320, 4, False), "if_i_xl": (704, 4, False), "if_ii_l": (160, 5, True)}  # channels, levels


def network(name):
    torch.manual_seed(len(name))
    net = IFUNet(3, **COMMON, **SIZES[name]).eval()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return net


def text_encoder(width=WIDTH):
    torch.manual_seed(0)
    return T5Encoder(width, 2, 2, 8, 40, vocab_size=len(toy_vocabulary()) + 100).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders: T5, each system as diffusers has it and as its authors do; the first stage has the text encoder."""
    root = tmp_path_factory.mktemp("if")
    save_model(text_encoder(), root / "t5")
    (root / "t5" / "tokenizer.json").write_text(tokenizer().to_json())
    save_model(text_encoder(40), root / "t5 narrow")
    (root / "t5 narrow" / "tokenizer.json").write_text(tokenizer().to_json())
    for name in SIZES:
        save_model(network(name), root / f"{name} file" / "model.safetensors", "original")
        save_model(network(name), root / name / "unet")
    save_model(text_encoder(), root / "if_i_m" / "text_encoder")
    (root / "if_i_m" / "tokenizer").mkdir()
    (root / "if_i_m" / "tokenizer" / "tokenizer.json").write_text(tokenizer().to_json())
    return root


def command(*sources, lines=()):
    """Config and overrides of a command that draws two steps of two prompts, small."""
    source = [f"cascade=[{','.join(map(str, sources))}]"] if len(sources) > 1 else [f"weights={sources[0]}"]
    given = [*source, "prompts=[red cat, a photo]", "seeds=[1]", "steps=2", "device=cpu", "image_size=8", *lines]
    return compose("sample", given), given


def drawn(folder):
    return torch.stack([read_image(file) for file in sorted(folder.glob("0*.png"))])


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_both_layouts_hold_the_same(name, saved):
    net, parts = network(name), {"text_encoder": saved / "t5"}
    for path in (saved / name, saved / f"{name} file", saved / f"{name} file" / "model.safetensors"):
        again = load_model(path)
        assert same(again.state_dict(), net.state_dict()) and if_arguments(again) == if_arguments(net)
        assert identify(path, parts) == name


@pytest.mark.parametrize("name, numbers", PUBLISHED.items())
def test_sizes_are_told_apart(name, numbers, tmp_path):
    """By a file of the authors without their config.yml."""
    channels, levels, enlarges_ = numbers
    sizes = dict(channels=channels, channel_mult=[1] * (levels - 1) + [2], attention=[False] * levels)
    with torch.device("meta"):
        net = IFUNet(3, **COMMON | sizes | (ENLARGES if enlarges_ else {}))
    state = COMPONENTS["if"].layouts["original"].write(net.state_dict())
    arguments = COMPONENTS["if"].from_shapes({key: tuple(tensor.shape) for key, tensor in state.items()})
    assert system_of("if", arguments, {}) == name


def test_config_yml(saved, tmp_path):
    """What the authors wrote beside a file decides; odd ones are refused in one line; without it shapes tell."""
    folder, params = tmp_path / "stage", read_yaml(saved / "if_ii_m file" / "config.yml")["params"]
    folder.mkdir()
    torch.save(
        COMPONENTS["if"].layouts["original"].write(network("if_ii_m").state_dict()), folder / "pytorch_model.bin"
    )
    with pytest.raises(WeightsError, match="no config.json"):
        load_model(folder)
    expected = if_arguments(network("if_ii_m"))
    assert if_arguments(load_model(folder / "pytorch_model.bin")) == expected
    (folder / "config.yml").write_text(yaml.safe_dump({"params": params | {"activation": "silu", "att_pool_heads": 4}}))
    for path in (folder, folder / "pytorch_model.bin"):
        assert if_arguments(load_model(path)) == expected | {"activation": "silu", "pool_heads": 4}
    for text, words in {
        "params: [": "not the YAML expected here",
        "- 1": "holds a YAML list",
        "a: &x [1]\nb: *x": "a reference to another entry",
        "model: 3": "says no 'params'",
        "params: {activation: gelu}": "KeyError: 'att_pool_heads'",
        yaml.safe_dump({"params": params | {"activation": "relu"}}): "activation='relu' is unknown",
        yaml.safe_dump({"params": params | {"att_pool_heads": 48}}): "pool_heads=48 does not divide",
        yaml.safe_dump({"params": params | {"num_head_channels": 7}}): "head_dim=7",
    }.items():
        (folder / "config.yml").write_text(text)
        with pytest.raises(WeightsError) as error:
            load_model(folder)
        one_line(error, str(folder), words)
    (folder / "more.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match="2 files of weights beside config.yml, expected one"):
        load_model(folder)


def test_conversion(saved, tmp_path, capsys):
    convert(saved / "if_i_m", tmp_path / "pipeline", "diffusers")
    ours, theirs = load_system(saved / "if_i_m"), load_system(tmp_path / "pipeline")
    assert all(same(ours.networks[name].state_dict(), theirs.networks[name].state_dict()) for name in ours.networks)
    scheduler = json.loads((tmp_path / "pipeline/scheduler/scheduler_config.json").read_text())
    assert scheduler["variance_type"] == "learned_range" and scheduler["sample_max_value"] == 1.5
    convert(saved / "if_i_m", tmp_path / "a" / "model.safetensors", "original", "unet")
    first, again = saved / "if_i_m file", tmp_path / "a"
    assert all(
        (first / name).read_bytes() == (again / name).read_bytes() for name in ("model.safetensors", "config.yml")
    )
    with pytest.raises(WeightsError, match="config.yml: describes another file already"):
        convert(saved / "if_ii_m", tmp_path / "a" / "second.safetensors", "original")
    assert not (tmp_path / "a" / "second.safetensors").exists()


# --- texts ----------------------------------------------------------------------------------------------------------


def test_texts_read_before_are_those_read_beside_the_network(saved, tmp_path, capsys):
    out = tmp_path / "texts.safetensors"
    arguments = [str(out), "red cat", "a photo", "--system", "if_i_m", "--text-encoder", str(saved / "t5")]
    assert embed.main([*arguments, "--device", "cpu"]) == 0 and "3 texts" in capsys.readouterr().out
    known, sampling = KnownTexts.load(out), Sampling.named("ddpm_learned", 2, 3.0, "respaced", "dynamic")
    beside = load_published(saved / "if_i_m")
    images = [
        generate(run.objective, ["red cat", "a photo"], [0, 1], sampling, image_size=8)
        for run in (beside, load_published(saved / "if_i_m", texts=known))
    ]
    assert (images[0].int() - images[1].int()).abs().max() <= 1
    cond, null = beside.objective.conditioner.pair({"caption": ["red cat"]})
    assert torch.allclose(
        known(["red cat", ""], "cpu")["context"], torch.cat([cond["context"], null["context"]]), atol=1e-5
    )
    assert embed.main([*arguments, "--device", "cpu"]) == 2 and "a new .safetensors file" in capsys.readouterr().err


def test_texts_that_do_not_fit(saved, tmp_path):
    def known(width=WIDTH, **changes):
        how = {"length": 77, "mask": True, "context_mask": False, "clean": True} | changes
        return KnownTexts(["", "cat"], {"context": torch.zeros(2, 77, width)}, how)

    with pytest.raises(ConfigError, match="read with {'length': 120.*but if_i_m needs {'length': 77"):
        load_published(saved / "if_i_m", texts=known(length=120))
    with pytest.raises(WeightsError, match="texts of width 40, but its network reads text of 64"):
        load_published(saved / "if_i_m", texts=known(width=40))
    with pytest.raises(DataError, match="the text 'dog' has not been read"):
        known()(["cat", "dog"], "cpu")
    with pytest.raises(WeightsError, match="holds no texts that were read"):
        KnownTexts.load(saved / "if_i_m file" / "model.safetensors")
    with pytest.raises(WeightsError, match="text encoders of width 40, but its network reads text of 64"):
        load_published(saved / "if_i_m file", parts={"text_encoder": saved / "t5 narrow"})


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def alive(monkeypatch):
    """Which T5 are in memory whenever a U-Net computes, and how many were ever loaded."""
    encoders, during = [], []
    built, forward = T5Encoder.__init__, IFUNet.forward

    def counted(self, *arguments, **knobs):
        encoders.append(weakref.ref(self))
        built(self, *arguments, **knobs)

    def watched(self, *arguments, **knobs):
        gc.collect()
        during.append(sum(encoder() is not None for encoder in encoders))
        return forward(self, *arguments, **knobs)

    monkeypatch.setattr(T5Encoder, "__init__", counted)
    monkeypatch.setattr(IFUNet, "forward", watched)
    return encoders, during


def test_a_cascade_reads_its_texts_once_and_before(saved, tmp_path, alive):
    """From diffusers' folders, from the authors' files, and from texts in a file: the same images."""
    texts, t5 = tmp_path / "texts.safetensors", saved / "t5"
    how = ["--system", "if_i_m", "--text-encoder", str(t5), "--device", "cpu"]
    assert embed.main([str(texts), "red cat", "a photo", *how]) == 0
    encoders, during = alive
    ways = {"": ([], 1), " file": ([f"text_encoder={t5}"], 1), " file, embeddings": ([f"embeddings={texts}"], 0)}
    for way, (lines, reads) in ways.items():
        encoders.clear()
        sources = [saved / f"{name}{way.partition(',')[0]}" for name in ("if_i_m", "if_ii_m")]
        draw_cascade(*command(*sources, lines=lines), tmp_path / f"out{way}")
        assert len(encoders) == reads and during and not any(during)
    small, large = ([drawn(tmp_path / f"out{way}" / f"stage_{n}") for way in ways] for n in (1, 2))
    assert small[0].shape == (2, 3, 8, 8) and large[0].shape == (2, 3, 32, 32) and large[0].float().std() > 1
    assert all(torch.equal(images, same[0]) for same in (small, large) for images in same)
    record = json.loads((tmp_path / "out" / "stage_2" / "samples.json").read_text())[0]
    assert record["aug_level"] == 0.25 and record["threshold"]["cap"] == 1 and record["guidance"]["scale"] == 4
    assert record["sampler"]["variance"] == "learned" and record["steps"] == 2


def test_one_stage(saved, alive):
    cfg, given = command(saved / "if_i_m")
    cfg = as_published(cfg, given)
    assert cfg["kind"] == "if_i_m" and cfg["threshold"]["percentile"] == 0.95 and not enlarges(cfg)
    [cfg] = share_text_encoder([cfg])
    run, _ = load_subject(cfg, Reader(["red cat"])(cfg))
    assert not [encoder for encoder in alive[0] if encoder() is not None]
    assert generate(run.objective, ["red cat"], [0], Sampling.from_config(cfg), image_size=8).shape == (1, 3, 8, 8)
    assert compose("sample", compose("train", ["system=if_i_m"])["sampling"])["steps"] == 150


def test_what_enlarges_is_drawn_from_with_an_image(saved, tmp_path):
    cfg, given = command(saved / "if_ii_m", lines=[f"text_encoder={saved / 't5'}", "image_size=null"])
    assert enlarges(as_published(cfg, given))
    with pytest.raises(ConfigError, match="enlarges 64x64 pixels and has none to enlarge.*or give image=FILE"):
        draw_cascade(cfg, given, tmp_path)
    write_png(tmp_path / "small.png", torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8))
    draw_cascade(*command(saved / "if_ii_m", lines=[*given[1:], f"image={tmp_path / 'small.png'}"]), tmp_path)
    assert drawn(tmp_path / "stage_1").shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    "names, lines, message",
    [
        (("if_ii_m", "if_i_m"), [], "stage 2, .*if_i_m, enlarges nothing: only the first"),
        (("if_i_m", "if_iii_l"), [], "if_iii_l, enlarges 256x256 pixels, but .*if_i_m draws 64x64"),
        (("if_i_m file", "if_ii_m"), [], "the system if_i_m without its text encoder; give text_encoder=PATH, or"),
        (("if_i_m", "if_ii_m"), ["embeddings=nowhere.safetensors"], "nowhere.safetensors: cannot be read"),
        (("if_i_m", "if_ii_m"), ["text_encoder='{t5 narrow}'"], "texts of width 40, but its network reads text of 64"),
    ],
)
def test_what_cannot_be_drawn(saved, tmp_path, names, lines, message):
    lines = [line.replace("{t5 narrow}", str(saved / "t5 narrow")) for line in lines]
    with pytest.raises(LdmError, match=message) as error:
        draw_cascade(*command(*(saved / name for name in names), lines=lines), tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.png"))


def test_a_damaged_stage_leaves_the_images_of_those_before_it(saved, tmp_path, monkeypatch):
    (tmp_path / "broken" / "unet").mkdir(parents=True)
    for file in (saved / "if_ii_m" / "unet").iterdir():
        (tmp_path / "broken" / "unet" / file.name).write_bytes(file.read_bytes())
    cfg, given = command(saved / "if_i_m", tmp_path / "broken")
    weights = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    whole, seen = weights.read_bytes(), []
    write = stages.write_gallery

    def then_break(*arguments, **knobs):
        write(*arguments, **knobs)
        seen.append(weights.write_bytes(whole[:-8]))

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(WeightsError, match="stage 2 of 2, .*broken: .*cut short"),
    ):
        patch.setattr(stages, "write_gallery", then_break)
        draw_cascade(cfg, given, tmp_path / "out")
    assert seen and drawn(tmp_path / "out" / "stage_1").shape == (2, 3, 8, 8)


def test_respacings():
    assert space_indices(1000, "10,10,0,0") == [*space_indices(250, 10), *(250 + i for i in space_indices(250, 10))]
    with pytest.raises(ConfigError, match="needs at least one step"):
        space_indices(1000, "0,0")


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", [("if_i_m", 16), ("if_ii_m", 16)])
def test_it_learns_with_its_variance(saved, tmp_path, name, size):
    lines = [f"system={name}", f"weights={saved / name}", f"text_encoder={saved / 't5'}", f"image_size={size}"]
    tiny = ["trainer.steps=2", "trainer.batch_size=2", "trainer.log_every=1", "preview=none", "metrics=none",
            "ema=none", "data.length=8", "limit=8"]  # fmt: skip
    cfg = compose("train", [*lines, *tiny])
    cfg.pop("hydra", None)
    train(cfg, tmp_path, torch.device("cpu"), ALONE)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["vlb"] > 0 and row["loss"] > row["mse"] for row in logged if "loss" in row)
    run = load_run(tmp_path)
    assert not same(run.objective.denoiser.net.state_dict(), network(name).state_dict())
