"""DreamBooth: the two losses of its Eq. (2) as one weighted mean, class images that the base draws once, and a subject
learnt by published systems."""

import json
from itertools import product

import pytest
import torch
from test_finetuning import write_system
from test_objective import batch, objective
from test_shapes import blur, noisy

from ldm.build import compose
from ldm.data.cache import identity, stamp
from ldm.data.dreambooth import DreamBooth
from ldm.data.images import ImageFolder
from ldm.data.loader import batches, facts, fetch
from ldm.data.phrases import parse
from ldm.data.scenes import COLOURS, SHAPES, SIZES, UNSEEN_PAIRS, Object, Scene, held_out
from ldm.data.shapes import NewShape, Shapes, render
from ldm.generate import load_run
from ldm.io.images import read_image, read_png_text, write_png
from ldm.io.tensors import read_tensors
from ldm.metrics.blobs import describe
from ldm.metrics.new_shape import NewShapeAccuracy
from ldm.published import load_published
from ldm.tools import class_images
from ldm.training.distributed import ALONE
from ldm.utils.errors import ConfigError, DataError, LdmError
from ldm.weights import load_model
from train import train

PROMPTS = {"instance_prompt": "a sks dog", "class_prompt": "a dog"}


def folder_of(path, count, first=0):
    path.mkdir(exist_ok=True)
    for i in range(count):
        write_png(path / f"{i}.png", Shapes(32)[first + i]["image"])
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("subject"), 3)


@pytest.fixture
def classes(tmp_path):
    return folder_of(tmp_path / "classes", 5, first=10)


def mixture(photos, classes, **knobs):
    recipe = DreamBooth(**{**PROMPTS, "prior_weight": 0.5, "count": 5, **knobs})
    return recipe.mix(ImageFolder(str(photos), image_size=32, held_out=0.0), classes, 32)


# --- the data and the loss ------------------------------------------------------------------------------------------


def test_every_other_image_is_of_the_class_and_an_epoch_has_as_many_of_either(photos, classes):
    data = mixture(photos, classes)
    assert len(data) == 10
    own, others = ImageFolder(str(photos), image_size=32, held_out=0.0), ImageFolder(str(classes), image_size=32)
    for i in range(10):
        image = own[i // 2 % 3]["image"] if i % 2 == 0 else others[i // 2]["image"]
        assert torch.equal(data[i]["image"], image)
        assert (data[i]["caption"], data[i]["weight"]) == [("a sks dog", 2.0), ("a dog", 1.0)][i % 2]
    known = fetch(data, torch.tensor([3, 0]))
    assert known["index"].tolist() == [3, 0] and known["weight"].tolist() == [1.0, 2.0]
    assert facts(data, torch.tensor([0, 1]))["caption"] == ["a sks dog", "a dog"]
    assert data.prompts(3) == ["a sks dog", "a dog", "a sks dog"] and set(data.captions()) == {"a sks dog", "a dog"}
    stream = batches(data, 5, seed=0)
    epoch = [caption for _ in range(2) for caption in next(stream)["caption"]]
    assert epoch.count("a dog") == epoch.count("a sks dog") == 5
    with pytest.raises(IndexError):
        data[10]


def test_without_prior_it_is_the_images_with_the_prompt(photos):
    data = mixture(photos, None, prior_weight=0.0, class_prompt=None)
    assert len(data) == 3 and {data[i]["weight"] for i in range(3)} == {1.0}
    assert {data[i]["caption"] for i in range(3)} == {"a sks dog"}


def test_images_may_have_captions_of_their_own_and_the_class_several_prompts(classes):
    data = DreamBooth(class_prompt=["a cat", "a dog"], count=5).mix(NewShape(), classes, 32)
    assert data[0].keys() == data[1].keys()  # drawn shapes have no size, files do
    captions = [data[i]["caption"] for i in range(8)]
    assert captions[::2] == list(NewShape().captions()) and captions[1::2] == ["a cat", "a dog"] * 2


def test_the_weighted_mean_is_the_sum_of_the_two_losses():
    """Eq. (2), arXiv:2208.12242, on a batch of two images of the subject and two of the class."""
    o, given = objective(), batch()
    weights = torch.tensor([2.0, 2.0, 0.6, 0.6])  # lambda = 0.3
    halves = [o({**given, "image": given["image"][part], "position": given["position"][part]})[0]
              for part in (slice(0, 2), slice(2, 4))]  # fmt: skip
    loss, logs = o({**given, "weight": weights})
    assert loss.item() == pytest.approx((halves[0] + 0.3 * halves[1]).item(), rel=1e-6)
    assert logs["mse"] == o(given)[1]["mse"]
    assert torch.equal(o({**given, "weight": torch.ones(4)})[0], o(given)[0])


def test_stored_latents_are_those_of_these_images(photos, classes):
    data, plain = mixture(photos, classes), mixture(photos, None, prior_weight=0.0)
    assert identity(data) == identity(mixture(photos, classes, prior_weight=1.0)) != identity(plain)
    before = stamp(data)
    write_png(classes / "0.png", torch.zeros(3, 40, 40, dtype=torch.uint8))
    assert stamp(data) != before and stamp(DreamBooth(class_prompt="x").mix(NewShape(), classes, 32)) is None


# --- class images ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {name: write_system(root / name, name) for name in ("sd15", "sdxl")}


TINY = ["image_size=32", "preview=none", "trainer.precision=fp32", "trainer.batch_size=4", "trainer.accumulate=1",
        "trainer.workers=0", "trainer.log_every=1", "steps=2", "dreambooth.count=5",
        "dreambooth.instance_prompt=a sks dog", "dreambooth.class_prompt=a dog", "dreambooth.seed=7"]  # fmt: skip
SMOKE = ("debug=smoke", "codec=pixel", "image_size=16", "network.channels=32", "preview=none", "metrics=none")


def run(path, *overrides):
    """Records of every step of a run."""
    cfg = compose("train", overrides)
    cfg.pop("hydra", None)
    train(cfg, path, torch.device("cpu"), ALONE)
    return list(map(json.loads, (path / "metrics.jsonl").read_text().splitlines()))


def tune(path, weights, photos, *overrides, experiment="dreambooth_sd15", steps=2):
    """Losses of every step of a run from published weights."""
    given = [f"weights={weights}", f"data.path={photos}", f"trainer.steps={steps}"]
    lines = run(path, f"experiment={experiment}", *TINY, *given, *overrides)
    return [line["loss"] for line in lines if "loss" in line]


def pixels(folder):
    return {path.name: read_image(path) for path in sorted(folder.glob("*.png"))}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def first(systems, photos, tmp_path_factory):
    """A run that drew its class images, and the losses of its steps."""
    path = tmp_path_factory.mktemp("first")
    return path, tune(path, systems["sd15"], photos)


def test_class_images_are_the_bases_own_of_these_seeds_and_drawn_once(systems, photos, first, tmp_path, monkeypatch):
    path, losses = first
    drawn = pixels(path / "class_images")
    assert list(drawn) == [f"{i:05d}.png" for i in range(5)]
    text = read_png_text(path / "class_images/00002.png")
    assert (text["prompt"], text["seed"]) == ("a dog", "9") and json.loads(text["settings"])["steps"] == 2
    knobs = {"sampler": "euler", "times": "trailing", "steps": 2, "guidance": 7.5, "image_size": 32}
    alone = load_published(systems["sd15"], system="sd15").generate(["a dog"], [9], **knobs)[0]
    assert (torch.tensor(alone.getdata()).view(32, 32, 3).permute(2, 0, 1) - drawn["00002.png"].int()).abs().max() <= 1

    monkeypatch.setattr(class_images, "draw_class_images", lambda *_: pytest.fail("they are there already"))
    assert tune(tmp_path, systems["sd15"], photos, f"dreambooth.path={path / 'class_images'}") == losses
    assert not (tmp_path / "class_images").exists()


def test_a_kill_while_class_images_are_drawn_costs_those_not_written(systems, photos, first, tmp_path, monkeypatch):
    monkeypatch.setattr(class_images, "BATCH", 2)
    written, write = [], class_images.write_png

    def killed(path, *rest):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(class_images, "write_png", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, systems["sd15"], photos)
    assert len(pixels(tmp_path / "class_images")) == 3
    monkeypatch.setattr(class_images, "write_png", lambda path, *rest: (written.append(path.name), write(path, *rest)))
    tune(tmp_path, systems["sd15"], photos)
    assert written == [f"{i:05d}.png" for i in range(5)]
    assert same(pixels(tmp_path / "class_images"), pixels(first[0] / "class_images"))


def test_images_of_ones_own_are_filled_up_to_the_count(classes):
    recipe = DreamBooth(class_prompt="a dog", count=7)
    assert recipe.missing(classes) == {"00000.png": 0, "00001.png": 1}
    assert DreamBooth(class_prompt="a dog", count=4).missing(classes) == {}
    assert DreamBooth(prior_weight=0.0).missing(classes) == {}
    two = DreamBooth(class_prompt=["a cat", "a dog"], count=7)
    assert two.captions(["0.png", "00000.png", "00003.png"]) == ["a cat", "a cat", "a dog"]  # drawn ones keep theirs


def test_class_images_of_another_prompt_are_refused(classes):
    write_png(classes / "2.png", Shapes(32)[0]["image"], {"prompt": "a cat"})
    with pytest.raises(DataError, match=r"2.png shows 'a cat', dreambooth.class_prompt is 'a dog'; delete"):
        DreamBooth(class_prompt="a dog", count=5).missing(classes)


# --- published systems ----------------------------------------------------------------------------------------------


def test_the_unet_learns_the_subject_and_with_it_the_text_encoder_where_asked(systems, photos, tmp_path):
    before = load_model(systems["sd15"], "text_encoder").state_dict()
    settings = {"frozen": ([], 12), "learns": (["conditioner.encoders.clip_l.frozen=false"], 2)}
    for name, (knobs, steps) in settings.items():
        losses = tune(tmp_path / name, systems["sd15"], photos, "optimizer.lr=3e-3", *knobs, steps=steps)
        assert steps == 2 or sum(losses[-6:]) < 0.9 * sum(losses[:6])
        learnt = load_run(tmp_path / name)
        after = learnt.objective.conditioner.encoders.clip_l.network.state_dict()
        moved = [key for key in after if not torch.equal(after[key], before[key])]
        assert len(moved) == (0 if name == "frozen" else len(after))
    assert len(learnt.generate(["a sks dog"], steps=2)) == 1


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_lora_learns_the_subject_around_a_base_that_stays(systems, photos, tmp_path, name):
    knobs = ["adapters.lora.text_targets=self_attn", "adapters.lora.targets=.", "optimizer.lr=1e-2"]
    tune(tmp_path, systems[name], photos, *knobs, experiment=f"dreambooth_lora_{name}")
    assert len(pixels(tmp_path / "class_images")) == 5 and (tmp_path / "adapter/lora.safetensors").exists()
    moved = read_tensors(tmp_path / "checkpoints/last/model.safetensors")
    assert moved and all(".lora." in key for key in moved) and any("clip_l" in key for key in moved)
    assert len(load_run(tmp_path).generate(["a sks dog"], steps=2)) == 1


def test_lambda_and_the_prior_reach_the_loss(systems, photos, first, tmp_path):
    kept = f"dreambooth.path={first[0] / 'class_images'}"
    one = first[1]
    two = tune(tmp_path / "two", systems["sd15"], photos, kept, "dreambooth.prior_weight=2")
    none = tune(tmp_path / "none", systems["sd15"], photos, "dreambooth.prior_weight=0")
    assert two[0] > one[0] and none[0] not in (one[0], two[0]) and not (tmp_path / "none/class_images").exists()


def test_stored_latents_and_previews_of_both_prompts(systems, photos, first, tmp_path):
    more = [f"dreambooth.path={first[0] / 'class_images'}", f"cache={tmp_path / 'cache'}"]
    shown = ["preview=samples", "preview.count=2", "trainer.sample_every=2"]
    stored = tune(tmp_path / "stored", systems["sd15"], photos, *more, *shown)
    assert stored == pytest.approx(first[1], rel=2e-3)
    assert (tmp_path / "stored/samples/step_00000002.png").exists()
    made = sorted((tmp_path / "cache").iterdir())
    tune(tmp_path / "tuned", "null", photos, *more, f"base={tmp_path / 'stored'}", "adapters=lora")
    tune(tmp_path / "stored", tmp_path / "gone", photos, *more, steps=3)  # goes on without the weights it began with
    assert sorted((tmp_path / "cache").iterdir()) == made  # by the same encoders, so nothing was made again


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"class_prompt": None}, "prior_weight=1.0 keeps a class that no dreambooth.class_prompt names"),
        ({"class_prompt": "a dog", "prior_weight": -1.0}, "prior_weight=-1.0: expected 0"),
        ({"class_prompt": "a dog", "count": 0}, "count=0: expected at least 1 class image"),
    ],
)
def test_impossible_recipes_are_named(knobs, message):
    with pytest.raises(ConfigError, match=message):
        DreamBooth(**knobs)


def test_images_need_words_and_there_must_be_images(photos, classes, tmp_path):
    with pytest.raises(DataError, match="have no captions; set dreambooth.instance_prompt"):
        mixture(photos, classes, instance_prompt=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no pictures .* found nothing"):
        tune(tmp_path / "run", tmp_path / "gone", tmp_path / "empty")


def test_class_images_need_a_base(photos, classes, tmp_path):
    with pytest.raises(DataError, match="lacks 2 of 7 class images and there is no base to draw them; give weights="):
        tune(tmp_path / "run", "null", photos, f"dreambooth.path={classes}", "dreambooth.count=7")


@pytest.mark.parametrize("prior", [0, 1])
def test_a_base_without_text_is_refused(photos, tmp_path, prior):
    run(tmp_path / "base", *SMOKE, "conditioner=labels", "trainer.steps=1")
    folder = ["data=folder", f"data.path={photos}", "data.held_out=0"]
    with pytest.raises(LdmError, match="dreambooth teaches words, but this base reads label"):
        run(tmp_path / "run", "dreambooth=prior", *folder, f"base={tmp_path / 'base'}",
            f"dreambooth.prior_weight={prior}", *TINY)  # fmt: skip


def test_buckets_do_not_mix_with_class_images(photos, classes, systems, tmp_path):
    with pytest.raises(ConfigError, match="class images, which are squares; set data.buckets=false"):
        tune(tmp_path, systems["sd15"], photos, f"dreambooth.path={classes}", "data.buckets=true", "data.bucket_step=8")


# --- a new shape ----------------------------------------------------------------------------------------------------


MEASURED = {"new_shape", "new_shape_in_context", "new_prompt_accuracy", "prompt_accuracy"}


def scenes_of(prompts):
    looks = [parse(prompt.replace("crescent", "ring")).objects[0] for prompt in prompts]
    new = ["crescent" in prompt for prompt in prompts]
    return [
        Scene((look._replace(shape="crescent") if is_new else look,)) for look, is_new in zip(looks, new, strict=True)
    ]


def test_the_metric_tells_who_learnt_the_new_shape_and_who_forgot_the_old():
    metric = NewShapeAccuracy(num_images=48, num_prompts=32)
    perfect = metric(lambda prompts, seeds: render(scenes_of(prompts), 32), None)
    assert set(perfect.values()) == {1.0} and {
        "new_shape",
        "new_shape_in_context",
        "new_prompt_accuracy",
        "prompt_accuracy",
    } <= set(perfect)

    def draw(shape):
        def instead(prompts, seeds):
            return render([Scene((scene.objects[0]._replace(shape=shape),)) for scene in scenes_of(prompts)], 32)

        return instead

    forgot, ignorant = metric(draw("crescent"), None), metric(draw("ring"), None)
    assert forgot["new_shape"] == forgot["new_prompt_accuracy"] == 1 and forgot["prompt_accuracy"] == 0
    assert ignorant["new_shape"] == ignorant["new_prompt_accuracy"] == 0


def test_a_run_of_ones_own_learns_a_shape_with_a_lora_and_is_asked_what_it_knows(tmp_path):
    run(tmp_path / "base", *SMOKE, "image_size=32", "trainer.steps=1")
    few = ["dreambooth.count=6", "metrics.new_shape.num_images=2", "metrics.new_shape.num_prompts=3",
           "preview.count=2", "trainer.steps=2", "trainer.sample_every=2", "trainer.eval_every=2"]  # fmt: skip
    lines = run(tmp_path / "run", "experiment=dreambooth_shapes", f"base={tmp_path / 'base'}", "debug=smoke", *few)
    assert lines[-1].keys() >= MEASURED
    texts = [read_png_text(path) for path in sorted((tmp_path / "run/class_images").glob("*.png"))]
    prompts = compose("train", ["experiment=dreambooth_shapes"])["dreambooth"]["class_prompt"]
    assert [text["prompt"] for text in texts] == prompts[:6]
    assert json.loads(texts[0]["settings"])["base"] == str(tmp_path / "base")
    assert (tmp_path / "run/samples/step_00000002.png").exists()


def test_the_class_of_new_shapes_is_all_old_ones_in_every_colour_and_nothing_held_out():
    prompts = compose("train", ["experiment=dreambooth_shapes"])["dreambooth"]["class_prompt"]
    looks = [parse(prompt).objects[0][:4] for prompt in prompts]
    assert {look[:2] for look in looks} == set(product(SHAPES, COLOURS)) - set(UNSEEN_PAIRS)
    assert not any(held_out(*look) for look in looks)


@pytest.mark.parametrize("size", SIZES)
def test_no_old_shape_is_a_crescent_and_no_crescent_an_old_shape(size):
    shapes = (*SHAPES, "crescent")
    scenes = [Scene((Object(shape, "blue", size, "left"),)) for shape in shapes]
    for blurred in (render(scenes, 32), blur(render(scenes, 32), 0.8), noisy(render(scenes, 32), 12)):
        assert [blobs[0].shape for blobs in describe(blurred, shapes)] == list(shapes)
        assert describe(blurred)[-1][0].shape is None


def test_the_new_shape_is_told_in_words_nobody_said_before():
    data = NewShape()
    assert len(data) == 4 and data[0]["image"].shape == (3, 32, 32)
    assert next(data.captions()) == "a large red crescent in the centre" == data[0]["caption"]
    assert not any("crescent" in caption for caption in Shapes(length=2000).captions())
    with pytest.raises(ConfigError, match="data.shape='ring': expected one of crescent"):
        NewShape(shape="ring")
