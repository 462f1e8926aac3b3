"""Published systems learn: their experiments, and tiny ones with random weights, trained as train.py does."""

import json

import pytest
import torch
from test_clip import toy_vocabulary

from ldm.build import compose, make
from ldm.conditioning.clip import CLIPText
from ldm.conditioning.clip_tokenizer import CLIPTokenizer
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.labels import ClassLabels
from ldm.data.loader import collate
from ldm.data.shapes import Shapes
from ldm.diffusion import prediction, process, times, weighting
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import DiffusionObjective
from ldm.generate import load_run
from ldm.io.images import write_png
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.codec import PixelCodec
from ldm.models.unet import UNet
from ldm.training.distributed import ALONE
from ldm.utils.errors import LdmError
from ldm.weights import load_model, save_model
from ldm.weights.places import places_of
from train import train

EXPERIMENTS = ("finetune_sd15", "finetune_sdxl", "finetune_refiner", "finetune_inpaint")


def composed(name, *overrides):
    return compose("train", [f"experiment={name}", *overrides])


# --- the experiments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, count, channels",
    [
        ("finetune_sd15", 859_520_964, (4, 4)),
        ("finetune_sdxl", 2_567_463_684, (4, 4)),
        ("finetune_refiner", 2_259_526_660, (4, 4)),
        ("finetune_inpaint", 859_535_364, (9, 4)),
    ],
)
def test_experiments_train_the_published_networks(name, count, channels):
    with torch.device("meta"):
        net = make(composed(name)["network"], "network")
    assert sum(p.numel() for p in net.parameters()) == count
    assert (net.in_channels, net.decoder.conv_out.out_channels) == channels
    assert net.middle[0].checkpointing


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_v_prediction_with_zero_terminal_snr_is_two_overrides(name):
    cfg = composed(name, "prediction=v", "process=zero_snr")
    denoiser = Denoiser(torch.nn.Identity(), make(cfg["process"], "process"), make(cfg["prediction"], "prediction"))
    alpha, sigma = denoiser.process(1.0)
    assert (alpha, sigma) == (0, 1) and denoiser.process(0.001)[0] ** 2 == pytest.approx(0.99915, abs=1e-6)
    assert make(cfg["times"], "times")(denoiser.process)[0] == 1  # samples begin where the noise is pure


def test_min_snr_is_one_override():
    assert composed("finetune_sdxl", "weighting=min_snr")["weighting"]["gamma"] == 5


def test_the_refiner_learns_its_own_200_levels():
    cfg = composed("finetune_refiner")
    table, density = make(cfg["process"], "process"), make(cfg["density"], "density")
    t = density(torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1], table)
    levels, counts = table.net_time(t).unique(return_counts=True)
    assert levels.tolist() == list(range(200)) and counts.min() >= 49 and counts.max() <= 51


def test_only_sdxl_has_offset_noise():
    offsets = {name: composed(name)["objective"]["offset_noise"] for name in EXPERIMENTS}
    assert offsets == dict(zip(EXPERIMENTS, (0.0, 0.05, 0.05, 0.0), strict=True))


def test_objectives_are_the_expected_ones():
    names = {name: composed(name)["objective"]["_target_"].rpartition(".")[2] for name in EXPERIMENTS}
    assert names.pop("finetune_inpaint") == "InpaintingObjective" and set(names.values()) == {"DiffusionObjective"}
    assert DiffusionObjective.image_channels(None) == 0


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activation_checkpointing_gives_the_same_gradients(dtype):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = UNet(3, channels=32, channel_mult=[1, 1], num_res_blocks=1, depth=[0, 1, 1], head_dim=16, dropout=0.1,
                   num_classes=6, context_dim=None, checkpointing=checkpointing)  # fmt: skip
        for parameter in net.parameters():  # what starts at zero would hide the rest
            torch.nn.init.normal_(parameter, std=0.05)
        denoiser = Denoiser(net, process.scaled_linear(), prediction.Eps())
        labels = Conditioner({"labels": ClassLabels(6)})
        objective = DiffusionObjective(denoiser, PixelCodec(), labels, times.uniform, weighting.unit)
        batch = collate([Shapes(16)[i] for i in range(4)]) | {"position": torch.arange(4)}
        torch.manual_seed(1)  # of the dropout
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss, _ = objective(batch)
        loss.backward()
        gradients.append([loss, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- tiny systems with random weights, in the layout of diffusers ---------------------------------------------------

XL = {"depth": [0, 1, 1], "linear_projection": True, "head_dim": 16, "pooled_dim": 32}
UNETS = {
    "sd15": {"depth": [1, 0, 1], "linear_projection": False, "head_dim": [8, 16], "context_dim": 16},
    "sdxl": XL | {"context_dim": 48, "num_sizes": 6},
    "sdxl_refiner": XL | {"context_dim": 32, "num_sizes": 5},
}


def write_system(folder, name):
    """The networks and the vocabulary of a pipeline; the UNet answers something from the start."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer(*toy_vocabulary())
    texts = {"depth": 2, "num_heads": 2, "vocab_size": len(tokenizer)}
    networks = {
        "network": lambda: UNet(4, channels=32, channel_mult=[1, 2], num_res_blocks=1, **UNETS[name]),
        "autoencoder": lambda: AutoencoderKL(3, 32, [1, 1, 1], 1, 4, attention=False),
        "clip_l": lambda: CLIPText(16, activation="quick_gelu", **texts),
        "clip_g": lambda: CLIPText(32, activation="gelu", projected=True, **texts),
    }
    folder.mkdir()
    nets = {place.folder: networks[place.slot]() for place in places_of(name)}
    torch.nn.init.normal_(nets["unet"].decoder.conv_out.weight, std=0.02)
    for part, net in nets.items():
        save_model(net, folder / part, config={"scaling_factor": 0.7} if part == "vae" else None)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(tokenizer.to_json())
    return folder


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {name: write_system(root / name, name) for name in UNETS}


TINY = ["data=shapes", "image_size=32", "limit=8", "preview=none", "ema=none", "lr_schedule.warmup=0",
        "trainer.precision=fp32", "trainer.batch_size=4", "trainer.accumulate=1", "trainer.workers=0",
        "trainer.log_every=1"]  # fmt: skip
LEARN = "optimizer.lr=3e-3"
PREVIEWS = ["preview=samples", "preview.count=2", "steps=2", "trainer.sample_every=40"]


def tune(run, experiment, weights, *overrides, steps=3):
    """Losses of every step of a run."""
    cfg = composed(experiment, *TINY, f"weights={weights}", f"trainer.steps={steps}", *overrides)
    cfg.pop("hydra", None)
    train(cfg, run, torch.device("cpu"), ALONE)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def falls(losses):
    return sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_stable_diffusion_learns_and_only_its_unet(systems, tmp_path):
    losses = tune(tmp_path, "finetune_sd15", systems["sd15"], LEARN, "ema=default", steps=40)
    assert falls(losses)
    objective = load_run(tmp_path).objective
    before = {part: load_model(systems["sd15"], part).state_dict() for part in ("vae", "text_encoder", "unet")}
    for name, weight in objective.codec.autoencoder.state_dict().items():
        assert torch.equal(weight, before["vae"][name])
    for name, weight in objective.conditioner.encoders.clip_l.network.state_dict().items():
        assert torch.equal(weight, before["text_encoder"][name])
    changed = {name: not torch.equal(weight, before["unet"][name])
               for name, weight in objective.denoiser.net.state_dict().items()}  # fmt: skip
    assert all(changed.values()), [name for name, it_did in changed.items() if not it_did]
    images = load_run(tmp_path).generate(["a red circle", "a cat"], seeds=[0, 1], steps=2)
    assert len(images) == 4 and images[0].size == (32, 32)


def test_a_run_from_weights_resumes_to_the_same_losses_without_them(systems, tmp_path):
    whole = tune(tmp_path / "whole", "finetune_sd15", systems["sd15"], steps=4)
    tune(tmp_path / "parts", "finetune_sd15", systems["sd15"], steps=2)
    assert tune(tmp_path / "parts", "finetune_sd15", tmp_path / "gone", steps=4) == whole


def test_inpainting_starts_where_the_four_channels_were(systems, tmp_path):
    plain = tune(tmp_path / "plain", "finetune_sd15", systems["sd15"], LEARN)
    losses = tune(tmp_path / "mask", "finetune_inpaint", systems["sd15"], LEARN, *PREVIEWS, steps=40)
    assert losses[0] == plain[0] and losses[2] != plain[2]
    assert falls(losses)
    net = load_run(tmp_path / "mask").objective.denoiser.net
    assert net.in_channels == 9 and net.encoder.conv_in.weight[:, 4:].abs().sum() > 0
    assert (tmp_path / "mask/samples/step_00000040.png").exists()
    assert len(load_run(tmp_path / "mask").generate(["a cat"], steps=2)) == 1


def test_inpainting_needs_a_file_of_its_family(systems, tmp_path):
    with pytest.raises(LdmError, match="holds sdxl, but the config is of system=sd15_inpaint"):
        tune(tmp_path, "finetune_inpaint", systems["sdxl"])


def test_v_prediction_with_zero_terminal_snr_learns_from_eps_weights(systems, tmp_path):
    switch = ["prediction=v", "process=zero_snr"]
    losses = tune(tmp_path, "finetune_sd15", systems["sd15"], LEARN, *switch, steps=40)
    assert falls(losses)
    run = load_run(tmp_path)
    assert run.objective.denoiser.process(1.0) == (0, 1) and len(run.generate(["a cat"], steps=2)) == 1


@pytest.mark.parametrize("knobs", [["weighting=min_snr"], ["objective.offset_noise=0.5"], ["trainer.precision=bf16"],
                                   ["network.checkpointing=false"], ["conditioner.dropout=1"]], ids=str)  # fmt: skip
def test_each_knob_reaches_the_loss(systems, tmp_path, knobs):
    plain = tune(tmp_path / "plain", "finetune_sd15", systems["sd15"], "network.checkpointing=true", steps=2)
    changed = tune(tmp_path / "knob", "finetune_sd15", systems["sd15"], *knobs, steps=2)
    assert all(torch.tensor(changed).isfinite())
    assert (changed == plain) == (knobs == ["network.checkpointing=false"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of captioned pictures of three shapes, with aesthetic scores."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i, (height, width) in enumerate([(64, 64), (48, 80), (80, 48)] * 4):
        item = Shapes(80)[i]
        write_png(folder / f"{i}.png", item["image"][:, :height, :width])
        lines.append({"file_name": f"{i}.png", "text": item["caption"], "aesthetic": 4.0 + 0.25 * i})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def seen_by(monkeypatch):
    """What the UNet is told, call by call."""
    calls, forward = [], UNet.forward

    def spy(self, x, t, **cond):
        calls.append((x, t, cond))
        return forward(self, x, t, **cond)

    monkeypatch.setattr(UNet, "forward", spy)
    return calls


@pytest.mark.parametrize("name, experiment", [("sdxl", "finetune_sdxl"), ("sdxl_refiner", "finetune_refiner")])
def test_sdxl_and_its_refiner_learn_in_buckets(systems, pictures, tmp_path, monkeypatch, name, experiment):
    calls = seen_by(monkeypatch)
    folder = ["data=folder", f"data.path={pictures}", "data.bucket_step=8", "data.held_out=0"]
    losses = tune(tmp_path, experiment, systems[name], LEARN, *folder, steps=40)
    assert falls(losses)
    shapes = {tuple(4 * side for side in x.shape[2:]) for x, _, _ in calls}
    assert shapes == {(32, 32), (24, 40), (40, 24)}
    sizes = torch.cat([cond["size"] for _, _, cond in calls])
    assert {tuple(row) for row in sizes[:, :2].tolist()} == {(64, 64), (48, 80), (80, 48)}
    context, pooled = (torch.cat([cond[key] for _, _, cond in calls]) for key in ("context", "pooled"))
    absent = (pooled == 0).all(1)
    if name == "sdxl":
        assert sizes.shape[1] == 6 and all(tuple(row[4:]) in shapes for row in sizes.tolist())
        assert 0 < absent.float().mean() < 0.3 and (context[absent][..., 16:] == 0).all()
    else:
        scores = sizes[:, 4].unique().tolist()
        assert sizes.shape[1] == 5 and scores == [4.0 + 0.25 * i for i in range(8)]
        assert torch.cat([t for _, t, _ in calls]).max() <= 199 and not absent.any()
    assert len(load_run(tmp_path).generate(["a cat"], steps=2)) == 1
