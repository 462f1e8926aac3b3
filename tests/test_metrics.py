"""Distances of sets of images, the loss on a grid, arms of sampling, and the metrics of `sample.py`."""

import json
import math
import os
import socket

import pytest
import torch
from torch import nn

import sample
import train
from ldm.build import compose
from ldm.conditioning.clip import CLIPTextEncoder, CLIPVision
from ldm.conditioning.clip_image import preprocess
from ldm.conditioning.clip_tokenizer import CLIPTokenizer
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.tokenizers import train_words
from ldm.conditioning.words import BagOfWords
from ldm.data.loader import groups
from ldm.data.shapes import Shapes
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import DiffusionObjective
from ldm.diffusion.prediction import Eps, Flow
from ldm.diffusion.process import RectifiedFlow, linear
from ldm.metrics import distribution, statistics
from ldm.metrics.features import Extractor
from ldm.metrics.held_out import prompts_of, spread
from ldm.metrics.held_out_loss import HeldOutLoss
from ldm.metrics.pairs import ssim
from ldm.metrics.reconstruction import Reconstruction
from ldm.models.classifier import Classifier
from ldm.models.codec import PixelCodec
from ldm.models.inception import Inception, load_inception
from ldm.tools.extractors import classifier, clip
from ldm.tools.measure import sized
from ldm.tools.metrics import build_metrics, once
from ldm.training.classifier import ClassifierObjective
from ldm.utils.errors import ConfigError, DataError, WeightsError
from ldm.utils.images import psnr
from ldm.utils.seeding import keys, normal
from ldm.weights.load import save_model
from tests.test_cli import command, refused
from tests.test_clip import text_network, toy_vocabulary
from tests.toy import forked, wait


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- distances -----------------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_is_its_closed_form():
    """Commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2; in a rotated basis, which the distance must not see."""
    basis = torch.linalg.qr(noise(6, 6))[0]
    a, b, mean = (noise(6, seed=s).abs() + 0.1 for s in (1, 2, 3))
    one = torch.zeros(6, dtype=torch.float64), basis @ a.diag() @ basis.T
    two = basis @ mean, basis @ b.diag() @ basis.T
    expected = (mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    assert statistics.frechet_distance(one, two) == pytest.approx(expected, abs=1e-9)
    assert statistics.frechet_distance(two, two) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_samples_approaches_that_of_their_gaussians():
    x, y = noise(200_000, 2, seed=1), noise(200_000, 2, seed=2) * 2 + 1
    assert statistics.frechet_distance(*map(statistics.gaussian, (x, y))) == pytest.approx(2 + 2, rel=0.01)
    assert statistics.frechet_distance(*map(statistics.gaussian, (x, x))) == pytest.approx(0, abs=1e-9)


def test_too_few_images_are_named_and_so_is_the_way_out():
    with pytest.raises(DataError, match="8 images in 8 features.*more than 8 images, or metrics=kid"):
        statistics.gaussian(noise(8, 8))
    with pytest.raises(DataError, match="1 and 5 images"):
        statistics.kernel_distance(noise(1, 4), noise(5, 4))
    with pytest.raises(DataError, match="splits=10: expected an image in each"):
        statistics.inception_score(noise(9, 4))
    with pytest.raises(DataError, match="3 images with neighbours=3"):
        statistics.precision_recall(noise(3, 4), noise(9, 4))


def test_kernel_distance_is_unbiased():
    """Over many small sets of one distribution its mean is zero, within its standard error; a shift is seen."""
    pairs = [(noise(20, 8, seed=2 * k), noise(20, 8, seed=2 * k + 1)) for k in range(400)]
    values = torch.tensor([statistics.kernel_distance(x, y)[0] for x, y in pairs])
    assert values.mean().abs() < 4 * values.std() / math.sqrt(len(values))
    x, y = noise(300, 8, seed=1), noise(300, 8, seed=2)
    near, spread_ = statistics.kernel_distance(x, y, subsets=20, size=100)
    far, _ = statistics.kernel_distance(x, y + 0.5, subsets=20, size=100)
    assert far > near + 10 * spread_ / math.sqrt(20)


def test_inception_score_of_known_predictions():
    certain = 1e4 * torch.eye(7).repeat(30, 1)
    assert statistics.inception_score(certain, splits=1)[0] == pytest.approx(7)
    assert statistics.inception_score(torch.zeros(50, 7)) == pytest.approx((1.0, 0.0), abs=1e-12)
    in_order = 1e4 * torch.eye(5).repeat_interleave(40, 0)  # sorted by class, as folders are
    assert statistics.inception_score(in_order, splits=5)[0] > 4.5


def test_precision_and_recall_tell_lost_modes_from_wrong_images():
    real = noise(200, 2, seed=1) + 20 * (torch.arange(200) % 2)[:, None]  # two modes
    one_mode, with_strays = noise(200, 2, seed=2), noise(200, 2, seed=3) + 20 * (torch.arange(200) % 4)[:, None]
    precision, recall = statistics.precision_recall(real, one_mode)
    assert precision > 0.9 and recall == pytest.approx(0.5, abs=0.05)
    precision, recall = statistics.precision_recall(real, with_strays)
    assert precision == pytest.approx(0.5, abs=0.05) and recall > 0.9


def test_ssim_and_psnr_of_pairs():
    images = torch.randint(0, 256, (2, 3, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ssim(images, images), torch.ones(2, dtype=torch.float64))
    grey, brighter = (
        torch.full((1, 3, 16, 16), 100, dtype=torch.uint8),
        torch.full((1, 3, 16, 16), 150, dtype=torch.uint8),
    )
    x, y = 100 / 255, 150 / 255
    assert ssim(grey, brighter).item() == pytest.approx((2 * x * y + 1e-4) / (x * x + y * y + 1e-4))
    assert psnr(grey, brighter).item() == pytest.approx(20 * math.log10(255 / 50))
    with pytest.raises(DataError, match="11 pixels a side or more"):
        ssim(images[..., :8], images[..., :8])


def test_reconstruction_measures_pairs_of_held_out_images():
    class Darker(nn.Linear):
        def reconstruct(self, images):
            return images // 2

    data = Shapes(16, length=8)
    table = Reconstruction(4, perceptual=Gap())(None, data, Darker(1, 1))
    images = torch.stack([data[i]["image"] for i in (0, 2, 4, 6)])
    assert table["psnr"] == pytest.approx(psnr(images, images // 2).mean().item())
    assert table["ssim"] == pytest.approx(ssim(images, images // 2).mean().item())
    assert table["lpips"] == pytest.approx((images.double() - images // 2).abs().mean().item() / 127.5, rel=1e-5)


class Gap(nn.Module):
    def forward(self, x, y):
        return (x - y).abs().mean((1, 2, 3))


# --- features ------------------------------------------------------------------------------------------------------


class Counting:
    """Mean colours as features, and how often they were asked for."""

    def __init__(self):
        self.images = 0

    def __call__(self, images):
        self.images += len(images)
        return images.float().mean((2, 3)), None


def test_features_are_computed_once_and_kept(tmp_path):
    see = Counting()
    extractor = Extractor(see, "colours", batch_size=3, cache=str(tmp_path))
    images = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(extractor(images).features, images.float().mean((2, 3))) and see.images == 7
    extractor(images)
    assert see.images == 7, "the same tensor again"

    data = Shapes(16, length=20, split="held_out")
    first = extractor.reference(data, 8).features
    assert see.images == 15 and len(list(tmp_path.iterdir())) == 1
    again = Extractor(see, "colours", cache=str(tmp_path)).reference(Shapes(16, length=20, split="held_out"), 8)
    assert see.images == 15 and torch.equal(again.features, first)
    for other in (Shapes(16, length=20), Shapes(24, length=20, split="held_out")):  # another split, another size
        Extractor(see, "colours", cache=str(tmp_path)).reference(other, 8)
    Extractor(see, "other colours", cache=str(tmp_path)).reference(data, 8)
    assert Extractor(see, "colours", cache=str(tmp_path)).reference(data, 99).features.shape == (20, 3)
    assert len(list(tmp_path.iterdir())) == 5


def test_metrics_that_cannot_be_are_answered_in_a_line():
    extractor = Extractor(Counting(), "colours")
    data, told = Shapes(16, length=8), DrawsFrom("caption")
    draw = once(lambda prompts, seeds: torch.zeros(len(prompts), 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(DataError, match="network that knows classes, and colours does not"):
        distribution.InceptionScore(extractor, 4)(draw, data, told)
    with pytest.raises(DataError, match="colours reads no texts; use features=clip"):
        distribution.ClipScore(extractor, 4)(draw, data, told)
    with pytest.raises(DataError, match="captions, and the data has none"):
        distribution.ClipScore(extractor, 4)(draw, Pictures(), told)
    with pytest.raises(DataError, match="draws from a caption, and the data has only images"):
        distribution.KID(extractor, 4)(draw, Pictures(), told)
    with pytest.raises(ConfigError, match="holds no classifier .*train it: python train.py experiment=classifier_x"):
        classifier("nowhere/classifier_x")


class DrawsFrom:
    def __init__(self, *fields):
        self.conditioner = self
        self.fields = set(fields)


class Pictures(torch.utils.data.Dataset):
    """Without captions or classes."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {"image": torch.full((3, 16, 16), index, dtype=torch.uint8)}


def test_items_are_spread_and_prompts_are_theirs():
    data = Shapes(16, length=10)
    assert spread(data, 3).tolist() == [0, 3, 6] and spread(data, 12).tolist() == [*range(10), 0, 1]
    items = torch.tensor([4, 7])
    assert prompts_of(data, items, DrawsFrom("caption")) == [data[4]["caption"], data[7]["caption"]]
    assert prompts_of(data, items, DrawsFrom("label")) == [data.class_names[data[i]["label"]] for i in (4, 7)]
    assert prompts_of(Pictures(), items, DrawsFrom()) == ["", ""]


def test_clip_score_is_the_cosine_of_image_and_caption():
    directions = {"red": [1.0, 0.0, 0.0], "blue": [0.0, 0.6, 0.8]}

    def read(captions):
        return torch.tensor([next(v for word, v in directions.items() if word in c) for c in captions])

    extractor = Extractor(Counting(), "colours", read=read)
    draw = lambda prompts, seeds: torch.tensor([30, 40, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)  # noqa: E731
    table = distribution.ClipScore(extractor, 2)(draw, Told(["a red thing", "a blue thing"]), DrawsFrom("caption"))
    assert table["clip_score"] == pytest.approx(100 * (0.6 + 0.8 * 0.6) / 2)
    assert table["clip_s"] == pytest.approx(2.5 * (0.6 + 0.8 * 0.6) / 2)


class Told(Pictures):
    def __init__(self, captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        return super().__getitem__(index) | {"caption": self.captions[index]}


def test_clip_sees_and_reads_with_published_towers(tmp_path):
    """Both towers from folders, the vocabulary from its own; the embeddings are the networks' own."""
    tokenizer = CLIPTokenizer(*toy_vocabulary())
    reader, seer = text_network(tokenizer, projected=True), CLIPVision(32, 2, 4, 64, 32, "gelu", image_size=28)
    save_model(reader, tmp_path / "text"), save_model(seer.eval(), tmp_path / "vision")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = clip(
        *(str(tmp_path / name) for name in ("vision", "text", "tokenizer.json")), device="cpu", batch_size=2
    )
    with torch.no_grad():
        seen = seer.pool(seer(torch.stack([preprocess(image, 28) for image in images])))
        read = CLIPTextEncoder(reader, tokenizer, pooled=True)(["a red cat", "photo"], torch.device("cpu"))["pooled"]
    assert torch.allclose(extractor(images).features, seen, atol=1e-5) and extractor(images).logits is None
    assert torch.allclose(extractor.texts(["a red cat", "photo"]), read, atol=1e-5)
    with pytest.raises(DataError, match="of vision reads no texts"):
        clip(str(tmp_path / "vision"), device="cpu").texts(["a red cat"])


def test_images_of_several_sizes_are_no_set():
    class Bucketed(Pictures):
        pass

    groups.register(Bucketed, lambda data: torch.tensor([0, 0, 1, 1, 1]))
    with pytest.raises(DataError, match="set data.buckets=false"):
        Extractor(Counting(), "colours").reference(Bucketed(), 4)


def test_an_inception_file_that_is_none_is_refused(tmp_path):
    network = Inception()
    assert sum(p.numel() for p in network.parameters()) == 23_850_960 and len(network.state_dict()) == 566
    tensors = {n: t for n, t in network.state_dict().items() if not n.startswith("Mixed_7c")}
    torch.save(tensors, tmp_path / "short.pth")
    with pytest.raises(WeightsError, match="short.pth: not the Inception-v3 of 2015-12-05 .*Mixed_7c"):
        load_inception(str(tmp_path / "short.pth"))


# --- the classifier ------------------------------------------------------------------------------------------------


def test_words_are_told_from_each_other():
    captions = ["a red circle", "a blue square, small"]
    words = BagOfWords(train_words(captions))
    vocabulary = words.tokenizer.backend.get_vocab()
    bag = words([*captions, ""], torch.device("cpu"))["words"]
    assert bag.shape == (3, words.dims["num_classes"]) and bag.sum(1).tolist() == [3, 5, 0]
    assert bag[0, vocabulary["red"] - 4] == 1 and bag[1, vocabulary["red"] - 4] == 0


def test_the_classifier_learns_shapes_in_some_steps():
    data = Shapes(16, length=16, jitter=0.0)
    words = BagOfWords(train_words(data.captions()))
    torch.manual_seed(0)
    network = Classifier(3, words.dims["num_classes"], channels=(16, 32))
    objective = ClassifierObjective(network, PixelCodec(), Conditioner({"words": words}))
    batch = {"image": torch.stack([data[i]["image"] for i in range(16)]), "caption": list(data.captions())}
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    first = objective.evaluate(batch)
    for _ in range(130):
        loss, _ = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert objective.evaluate(batch)["f1"] > 0.8 > first["f1"]
    features, logits = network(torch.zeros(2, 3, 20, 24))  # of any size
    assert features.shape == (2, 32) and logits.shape == (2, words.dims["num_classes"])


def test_a_classifier_needs_something_to_tell():
    with pytest.raises(ConfigError, match="use conditioner=labels or conditioner=words"):
        ClassifierObjective(Classifier(3, 2), PixelCodec(), Conditioner({}))


# --- the loss on a grid --------------------------------------------------------------------------------------------


class Shrinks(nn.Module):
    """A network whose x0 is half of the true one, whatever it should predict: it knows the images."""

    def __init__(self, process, prediction, images):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.process, self.prediction, self.images = process, prediction, images
        self.calls = 0

    def forward(self, x, t):
        start = self.calls // 8 * 64  # eight levels a chunk
        self.calls += 1
        x0 = self.images[start : start + len(x)] / 2
        ratio = HeldOutLoss(strata=8).ratios()[(self.calls - 1) % 8]
        alpha, sigma = self.process(self.process.time(ratio))
        return self.prediction.target(x0, (x - alpha * x0) / sigma, alpha, sigma).float()


@pytest.mark.parametrize("process, prediction", [(RectifiedFlow(), Flow()), (linear(), Eps())])
def test_the_loss_on_a_grid_means_the_same_for_every_formulation(process, prediction):
    data = Shapes(16, length=80)
    images = torch.stack([data[i]["image"] for i in range(70)]).float() / 127.5 - 1
    net = Shrinks(process, prediction, images)
    objective = DiffusionObjective(Denoiser(net, process, prediction), PixelCodec(), Conditioner({}), None, None)
    table = HeldOutLoss(num_images=70)(None, data, objective)
    x0_mse = (images / 2).square().mean().item()
    ratios = torch.tensor([math.tan((k + 0.5) / 8 * math.pi / 2) for k in range(8)])
    for k, ratio in enumerate(ratios.tolist(), 1):
        assert table[f"held_out_x0_mse_{k}"] == pytest.approx(x0_mse, rel=1e-3)
        assert table[f"held_out_eps_mse_{k}"] == pytest.approx(x0_mse / ratio**2, rel=1e-3)
    assert table["held_out_x0_mse"] == pytest.approx(x0_mse, rel=1e-3)
    assert table["held_out_eps_mse"] == pytest.approx((x0_mse / ratios**2).mean().item(), rel=1e-3)


def test_every_run_meets_the_same_images_and_the_same_noise():
    seen = []

    class Sees(nn.Linear):
        def forward(self, x, t):
            seen.append(x.clone())
            return torch.zeros_like(x)

    for seed, process in ((0, RectifiedFlow()), (1, RectifiedFlow(shift=3.0))):
        objective = DiffusionObjective(
            Denoiser(Sees(1, 1), process, Flow()), PixelCodec(), Conditioner({}), None, None, seed=seed
        )
        HeldOutLoss(num_images=4, strata=3)(None, Shapes(16, length=8), objective)
    for one, two in zip(seen[:3], seen[3:], strict=True):
        assert torch.allclose(one, two, atol=1e-5)  # the same alpha and sigma at another t
    eps = normal(keys(0, "held_out_eps", torch.arange(4)), (3, 16, 16))
    x0 = torch.stack([Shapes(16, length=8)[i]["image"] for i in (0, 2, 4, 6)]).float() / 127.5 - 1
    assert torch.allclose(seen[1], 0.5 * x0 + 0.5 * eps, atol=1e-5)  # of three strata the middle one is at 45 degrees


# --- wiring --------------------------------------------------------------------------------------------------------


def test_several_metrics_are_keyed_and_drawn_once():
    cfg = compose("train", ["metrics=[shapes,held_out_loss]", "metrics.shapes.num_prompts=4"])
    assert list(cfg["metrics"]) == ["shapes", "held_out_loss"]
    metrics = build_metrics(cfg["metrics"])
    assert metrics["shapes"].num_prompts == 4 and isinstance(metrics["held_out_loss"], HeldOutLoss)
    assert build_metrics(compose("train", ["metrics=none"])["metrics"]) == {}

    calls = []
    draw = once(lambda prompts, seeds, small=None, **how: calls.append((prompts, how)) or torch.zeros(1))
    first = draw(["x"], range(1))
    assert draw(["x"], [0]) is first and len(calls) == 1
    draw(["x"], [0], sampling={"steps": 3}), draw(["x"], [1]), draw(["x"], [0], "a picture")
    assert len(calls) == 4


def test_arms_of_sampling_are_drawn_in_their_ways():
    arms = ["metrics=sampling_arms", "metrics.sampling_arms.shared=['steps=7','sampler=euler']",
            "+metrics.sampling_arms.arms.heun=['sampler=heun','steps=2']", "+metrics.sampling_arms.arms.plain=[]",
            "+metrics.sampling_arms.arms.w=['guidance.scale=9']"]  # fmt: skip
    (metric,) = build_metrics(compose("train", arms)["metrics"]).values()
    metric.metrics = {"steps": lambda draw, data, objective: {"x": draw([], [])["times"]["steps"]},
                      "w": lambda draw, data, objective: {"w": draw([], [])["guidance"]["scale"],
                                                          "how": draw([], [])["sampler"]["_target_"]}}  # fmt: skip
    table = metric(lambda prompts, seeds, sampling: sampling, None, None)
    assert {name: table[name] for name in ("heun/x", "plain/x", "w/x")} == {"heun/x": 2, "plain/x": 7, "w/x": 7}
    assert (table["plain/w"], table["w/w"]) == (5.0, 9)
    assert (table["heun/how"], table["w/how"]) == ("ldm.samplers.heun.sample", "ldm.samplers.euler.sample")


def test_arms_that_cannot_be_are_answered_before_training():
    with pytest.raises(ConfigError, match="sampler=heum; did you mean 'heun'"):
        build_metrics(
            compose("train", ["metrics=sampling_arms", "+metrics.sampling_arms.arms.a=['sampler=heum']"])["metrics"]
        )
    with pytest.raises(ConfigError, match="sampling_arms has no arms"):
        build_metrics(compose("train", ["metrics=sampling_arms"])["metrics"])


def test_other_metrics_for_the_arms():
    cfg = compose("train", ["metrics=[sampling_arms,kid]", "metrics@metrics.sampling_arms.metrics=[kid,frechet]"])
    inner = cfg["metrics"]["sampling_arms"]["metrics"]
    assert list(inner) == ["kid", "frechet"] and inner["kid"] == cfg["metrics"]["kid"]
    counted = sized(cfg["metrics"], 33)
    assert counted["kid"]["num_images"] == counted["sampling_arms"]["metrics"]["frechet"]["num_images"] == 33
    assert counted["kid"]["features"] == cfg["features"] and sized(cfg["metrics"], None) == cfg["metrics"]


# --- sample.py metrics=[...] -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Settings that name a run of pixels, and a classifier, both hardly trained."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = ["image_size=16", "data.length=24", "trainer.steps=1", "trainer.batch_size=4", "metrics=none"]
    tiny += ["preview=none", "ema=none"]
    command(train, *tiny, "codec=pixel", "network.channels=32", f"hydra.run.dir={folder / 'run'}")
    command(train, "experiment=classifier_shapes", *tiny, f"hydra.run.dir={folder / 'seen'}")
    return [f"run={folder / 'run'}", f"features.run={folder / 'seen'}", f"features.cache={folder / 'cache'}",
            "sampler=euler", "steps=2", "batch_size=5"]  # fmt: skip


def numbers(out) -> dict:
    return json.loads((out / "metrics.json").read_text())["numbers"]


def test_sample_measures_a_run_and_continues_where_it_was_stopped(runs, tmp_path, capsys):
    out = tmp_path / "out"
    command(sample, *runs, "metrics=[kid,held_out_loss]", "num_images=12", f"out={out}")
    assert "| kid " in capsys.readouterr().out and "| kid " in (out / "metrics.md").read_text()
    first, (drawn,) = numbers(out), out.glob("drawn-*")
    assert {"kid", "kid_std", "held_out_x0_mse_8"} <= set(first)
    files = sorted(drawn.iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(12)]
    for file in files[::3]:
        file.unlink()  # as if killed
    kept = {file: file.stat().st_mtime_ns for file in drawn.iterdir()}
    command(sample, *runs, "metrics=[kid,precision_recall]", "num_images=12", f"out={out}")
    assert all(file.stat().st_mtime_ns == at for file, at in kept.items()) and len(list(drawn.iterdir())) == 12
    assert numbers(out)["kid"] == pytest.approx(first["kid"], rel=1e-4) and "recall" in numbers(out)
    command(sample, *runs, "metrics=kid", "num_images=12", "guidance.scale=2", f"out={out}")
    assert len(list(out.glob("drawn-*"))) == 2, "other images in a folder of their own"


def test_ranks_draw_their_shares_and_the_first_one_measures(runs, tmp_path):
    out, alone = tmp_path / "out", tmp_path / "alone"
    arguments = [*runs, "metrics=[kid,sampling_arms]", "metrics@metrics.sampling_arms.metrics=kid", "num_images=9",
                 "+metrics.sampling_arms.arms.ddim=['steps=2']"]  # fmt: skip
    command(sample, *arguments, f"out={alone}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> None:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command(sample, *arguments, f"out={out}")

    assert [wait(child) for child in [forked(rank, 0), forked(rank, 1)]] == [0, 0]
    assert numbers(out) == pytest.approx(numbers(alone), rel=1e-4) and "ddim/kid" in numbers(out)
    assert sorted(p.relative_to(out) for p in out.rglob("*.png")) == sorted(
        p.relative_to(alone) for p in alone.rglob("*.png")
    )


def test_what_sample_cannot_measure_is_said(runs, tmp_path, capsys):
    out = f"out={tmp_path / 'out'}"
    code, line = refused(sample, capsys, *runs, "metrics=kid", "prompts=[a red circle]", out)
    assert code == 2 and "prompts and metrics are both set" in line
    code, line = refused(sample, capsys, *runs, "metrics=super_resolution", "num_images=2", out)
    assert code == 2 and "is of models that enlarge, not of DiffusionObjective" in line
    code, line = refused(sample, capsys, *runs, "metrics=frechet", "num_images=8", out)
    assert code == 3 and "their covariance has no full rank" in line
    code, line = refused(sample, capsys, *runs, "metrics=inception_score", "num_images=8", out)
    assert code == 3 and "network that knows classes" in line
