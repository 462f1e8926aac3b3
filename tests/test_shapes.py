"""Captioned shapes are what they say, and the checker sees exactly that."""

from itertools import product

import pytest
import torch

from ldm.build import make
from ldm.data.loader import facts
from ldm.data.phrases import NUMBERS, caption, leave_open, open_caption, parse
from ldm.data.scenes import (
    ATTRIBUTES,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    SPLITS,
    UNSEEN_PAIRS,
    Object,
    Scene,
    draw,
    held_out,
)
from ldm.data.shapes import Shapes, render
from ldm.metrics.blobs import describe
from ldm.metrics.shapes import PromptAccuracy, judge, short_prompts, stated
from ldm.utils.errors import ConfigError, DataError
from ldm.utils.seeding import keys, uniform

COMBINATIONS = list(product(SHAPES, COLOURS, SIZES, POSITIONS))
OTHERS = {"shape": SHAPES, "colour": list(COLOURS), "size": list(SIZES), "position": list(POSITIONS)[:5]}


def truth(count: int, size: int = 32, objects: int = 1, split: str = "train") -> tuple[torch.Tensor, list[str]]:
    scenes = draw(7, split, range(count), objects)
    return render(scenes, size), [caption(scene) for scene in scenes]


def scores(images: torch.Tensor, captions: list[str]) -> dict[str, float]:
    return {name: right.float().mean().item() for name, right in judge(images, captions).items()}


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    step = torch.arange(images.shape[-1])[:, None] - torch.arange(images.shape[-1])
    kernel = torch.exp(-0.5 * (step / max(sigma, 1e-3)).square())
    kernel = kernel / kernel.sum(1, keepdim=True)
    return (kernel @ images.float() @ kernel.T).round().to(torch.uint8)


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * noise).clamp(0, 255).round().to(torch.uint8)


# --- the data ---------------------------------------------------------------------------------------------------------


def test_an_item_is_the_same_alone_in_any_order_and_in_any_instance():
    forward = [Shapes(length=600, seed=3, objects=3)[i] for i in (0, 1, 300, 599)]
    data = Shapes(length=20000, seed=3, objects=3)
    for i, item in zip((599, 300, 1, 0), reversed(forward), strict=True):
        assert torch.equal(data[i]["image"], item["image"]) and data[i]["caption"] == item["caption"]
    scene = draw(3, "train", [300], 3)
    assert torch.equal(render(scene, 32)[0], forward[2]["image"])
    assert list(data.captions())[300] == forward[2]["caption"] == caption(scene[0])


def test_the_dataset_contract():
    data = Shapes(image_size=40, length=10)
    item = data[9]
    assert item["image"].shape == (3, 40, 40) and item["image"].dtype == torch.uint8
    assert data.class_names[item["label"]] in item["caption"]
    assert len(data) == len(list(data.captions())) == 10
    assert not torch.equal(Shapes(seed=1)[0]["image"], Shapes(seed=2)[0]["image"])
    with pytest.raises(IndexError):
        data[10]


@pytest.mark.parametrize(
    "bad", [{"split": "test"}, {"objects": 4}, {"objects": 0}, {"image_size": 8}, {"length": 0}, {"jitter": 2.0}]
)
def test_impossible_settings_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Shapes(**bad)


@pytest.mark.parametrize("objects", [1, 3])
def test_held_out_combinations_never_occur_in_training(objects):
    seen = {split: {o[:4] for s in draw(0, split, range(4000), objects) for o in s.objects} for split in SPLITS}
    assert not seen["train"] & seen["held_out"]
    assert all(held_out(*look) for look in seen["held_out"]) and not any(held_out(*look) for look in seen["train"])
    assert 1 / 12 < sum(held_out(*look) for look in COMBINATIONS) / len(COMBINATIONS) < 1 / 6


def test_training_shows_every_pair_of_attribute_values():
    seen = [scene.objects[0][:4] for scene in draw(0, "train", range(5000))]
    names = list(OTHERS)
    for a, b in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
        assert {(look[a], look[b]) for look in seen} == set(product(OTHERS[names[a]], OTHERS[names[b]]))


def test_captions_read_back_on_every_combination():
    for look in COMBINATIONS:
        scene = Scene((Object(*look),))
        assert parse(caption(scene)) == scene


@pytest.mark.parametrize("objects", [2, 3])
def test_captions_of_several_objects_read_back(objects):
    for scene in draw(0, "train", range(500), objects):
        text, wanted = caption(scene), parse(caption(scene))
        assert caption(wanted) == text and wanted.relation == scene.relation
        assert [o[:3] for o in wanted.objects] == [o[:3] for o in scene.objects]
        if not wanted.relation:
            assert [o.position for o in wanted.objects] == [o.position for o in scene.objects]


def test_prompts_may_leave_attributes_open():
    assert parse("a red circle") == Scene((Object("circle", "red"),))
    assert parse("  An ORANGE ring in the center. ") == Scene((Object("ring", "orange", None, "centre"),))
    assert parse("a star to the left of a blue square") == Scene((Object("star"), Object("square", "blue")), "left of")
    assert len(parse("a star, a small ring and a blue cross at the top left").objects) == 3
    assert caption(parse("an orange ring")) == "an orange ring"


def open_captions(count: int, objects: int) -> list[tuple[Scene, str]]:
    """What is left of scenes, and how it is said."""
    scenes = draw(0, "train", range(count), objects, jitter=0.0, unseen=UNSEEN_PAIRS)
    numbers = uniform(keys(0, "test", torch.arange(count)), (NUMBERS,)).tolist()
    return [(leave_open(scene, u[2:]), open_caption(scene, u)) for scene, u in zip(scenes, numbers, strict=True)]


def without_jitter(thing: Object) -> Object:
    return thing._replace(jitter=Object().jitter)


@pytest.mark.parametrize("objects", [1, 3])
def test_open_captions_read_back_in_every_phrasing(objects):
    for left, text in open_captions(3000, objects):
        wanted = parse(text)
        assert wanted.relation == left.relation, text
        for found, thing in zip(wanted.objects, left.objects, strict=True):
            said = without_jitter(thing)._replace(position=None if left.relation else thing.position)
            assert found == said, text
            assert any(found[:4]) or left.relation, text


def test_open_captions_say_any_part_in_several_ways():
    captions = {text for _, text in open_captions(8000, 1)}
    for text in ("a red circle", "red circle", "the circle is red", "circle, red", "a circle on the left", "a circle"):
        assert text in captions
    assert {"something red on the left", "a red thing", "a small red circle on the left"} < captions
    said = {
        frozenset(name for name in ATTRIBUTES if getattr(left.objects[0], name)) for left, _ in open_captions(3000, 1)
    }
    assert len(said) == 2 ** len(ATTRIBUTES) - 1  # every part but nothing


@pytest.mark.parametrize(
    "prompt, thing",
    [
        ("Red circle.", Object("circle", "red")),
        ("the small circle is red", Object("circle", "red", "small")),
        ("the circle on the left is small", Object("circle", None, "small", "left")),
        ("circle, small, at the top", Object("circle", None, "small", "top")),
        ("something small and red", Object(None, "red", "small")),
        ("a thing in the center", Object(None, None, None, "centre")),
    ],
)
def test_phrasings_mean_what_they_say(prompt, thing):
    assert parse(prompt) == Scene((thing,))
    shown = without_jitter(thing)._replace(**{n: OTHERS[n][0] for n in ATTRIBUTES if getattr(thing, n) is None})
    assert scores(render([Scene((shown,))], 32), [prompt])["all"] == 1
    for name in ATTRIBUTES:
        if getattr(thing, name):
            other = next(value for value in OTHERS[name] if value != getattr(shown, name))
            assert scores(render([Scene((shown._replace(**{name: other}),))], 32), [prompt])[name] == 0


@pytest.mark.parametrize("objects", [1, 3])
def test_open_training_never_shows_nor_names_an_unseen_pair(objects):
    data = Shapes(length=2500, objects=objects, captions="open")
    shown = {thing[:4] for scene in data.scenes() for thing in scene.objects}
    assert not {look[:2] for look in shown} & set(UNSEEN_PAIRS) and not any(held_out(*look) for look in shown)
    assert not {thing[:2] for text in data.captions() for thing in parse(text).objects} & set(UNSEEN_PAIRS)
    assert {look[:2] for look in shown} | set(UNSEEN_PAIRS) == set(product(SHAPES, COLOURS))
    others = {
        thing[:4]
        for scene in Shapes(length=3000, split="held_out", captions="open").scenes()
        for thing in scene.objects
    }
    assert not others & shown and {look[:2] for look in others} > set(UNSEEN_PAIRS)


def test_unseen_pairs_leave_every_shape_and_colour_to_be_seen():
    assert sorted(shape for shape, _ in UNSEEN_PAIRS) == sorted(SHAPES)
    assert len({colour for _, colour in UNSEEN_PAIRS}) == len(UNSEEN_PAIRS)


def test_an_open_item_is_the_same_alone_and_shows_its_caption():
    data, alone = Shapes(length=600, captions="open"), Shapes(length=20000, captions="open")
    captions = list(data.captions())
    for i in (599, 300, 1, 0):
        assert data[i]["caption"] == alone[i]["caption"] == captions[i] and torch.equal(
            data[i]["image"], alone[i]["image"]
        )
    assert facts(data, torch.tensor([5, 300]))["caption"] == [captions[5], captions[300]]
    assert set(scores(torch.stack([data[i]["image"] for i in range(300)]), captions[:300]).values()) == {1.0}
    assert captions != list(Shapes(length=600, seed=1, captions="open").captions())


def test_configs_that_do_not_say_mean_full_captions():
    stored = {"_target_": "ldm.data.shapes.Shapes", "image_size": 32, "length": 50, "seed": 0, "split": "train",
              "objects": 1, "jitter": 1.0}  # fmt: skip
    assert list(make(stored, "data").captions()) == [caption(scene) for scene in draw(0, "train", range(50))]
    assert make(stored, "data").unseen == ()


@pytest.mark.parametrize("prompt", ["", "a dog", "the red circle is blue", "circle, star, red", "something", "a thing"])
def test_other_prompts_say_too_little_or_too_much(prompt):
    if prompt in ("something", "a thing"):
        assert parse(prompt) == Scene((Object(),))
    else:
        with pytest.raises(DataError):
            parse(prompt)


@pytest.mark.parametrize(
    "prompt", ["", "a dog", "a red", "two red circles", "a ring" + " and a ring" * 3, "a pink ring"]
)
def test_prompts_outside_the_grammar_are_refused_in_one_line(prompt):
    with pytest.raises(DataError) as error:
        parse(prompt)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_rendering_is_anti_aliased_and_independent_of_size(size):
    scenes = draw(0, "train", range(64), 3)
    fine = torch.nn.functional.avg_pool2d(render(scenes, 8 * size).float(), 8)
    error = (render(scenes, size).float() - fine).abs()
    assert error.mean() < 1.2 * 32 / size and error.amax() < 100  # coverage from distance errs only at sharp corners
    assert len(render([Scene((Object("circle", "black", "large", "centre"),))], size).unique()) > 5


# --- the checker ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objects", [1, 2, 3])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [32, 64])
def test_rendered_truth_is_always_right(size, split, objects):
    assert set(scores(*truth(300, size, objects, split)).values()) == {1.0}


@pytest.mark.parametrize("size", [24, 48, 100])
def test_rendered_truth_is_right_at_odd_sizes(size):
    assert scores(*truth(100, size))["all"] == 1


def test_shuffled_captions_score_chance():
    images, captions = truth(1200)
    found = scores(images, captions[1:] + captions[:1])
    # Neighbours are independent draws: chance is one over the number of values.
    for name, values in OTHERS.items():
        chance = 1 / len(values)
        assert abs(found[name] - chance) < 4 * (chance * (1 - chance) / len(images)) ** 0.5 + 0.01, name
    assert found["all"] < 0.01  # 1 / 480


@pytest.mark.parametrize(
    "damage, light, levels, end", [(blur, 0.8, (1.1, 1.4, 1.8, 2.4), 0.25), (noisy, 10, (20, 30, 45, 70), 0.7)]
)
def test_accuracy_bears_a_little_damage_and_falls_smoothly_under_more(damage, light, levels, end):
    images, captions = truth(300)
    assert scores(damage(images, light), captions)["all"] >= 0.995
    falling = [1.0, *(scores(damage(images, level), captions)["all"] for level in levels)]
    assert all(after <= before + 0.02 for before, after in zip(falling, falling[1:], strict=False)), falling
    assert all(before - after < 0.6 for before, after in zip(falling, falling[1:], strict=False)), falling
    assert falling[-1] < end, falling


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_one_wrong_attribute_is_caught_and_only_that(name):
    scenes = draw(11, "train", range(150))
    changed = []
    for i, scene in enumerate(scenes):
        (thing,), values = scene.objects, OTHERS[name]
        other = values[(values.index(getattr(thing, name)) + 1 + i % (len(values) - 1)) % len(values)]
        changed.append(scene._replace(objects=(thing._replace(**{name: other}),)))
    found = scores(render(changed, 32), [caption(scene) for scene in scenes])
    assert found[name] == 0 == found["all"]
    assert all(score == 1 for key, score in found.items() if key not in (name, "all")), found


def test_one_object_too_many_or_too_few_is_caught():
    scenes = [scene for scene in draw(11, "train", range(300), 3) if len(scene.objects) == 3]
    three, two = render(scenes, 32), render([scene._replace(objects=scene.objects[:2]) for scene in scenes], 32)
    asked = [caption(scene._replace(objects=scene.objects[:2])) for scene in scenes]
    found = scores(three, asked)
    assert found["count"] == 0 == found["all"] and found["shape"] == found["colour"] == found["position"] == 1
    found = scores(two, [caption(scene) for scene in scenes])
    assert found["count"] == 0 == found["all"] == found["shape"]


def test_a_reversed_relation_is_caught():
    scenes = [scene for scene in draw(11, "train", range(300), 2) if scene.relation]
    swapped = [scene._replace(objects=scene.objects[::-1]) for scene in scenes]
    distinct = torch.tensor([scene.objects[0][:3] != scene.objects[1][:3] for scene in scenes])
    right = judge(render(scenes, 32), [caption(scene) for scene in swapped])
    assert not right["all"][distinct].any() and right["count"].all()


def test_attributes_are_matched_to_their_own_object():
    scene = Scene((Object("circle", "red", "large", "left"), Object("square", "blue", "large", "right")))
    image = render([scene], 32)
    assert judge(image, ["a blue square and a red circle"])["all"].all()
    assert not judge(image, ["a red square and a blue circle"])["all"].any()


def test_garbage_shows_nothing():
    static = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blank = torch.full((50, 3, 32, 32), 245, dtype=torch.uint8)
    images, captions = truth(50)
    bar = blank.clone()
    bar[:, :, 14:18] = 60
    for bad in (static, blank, bar):
        assert scores(bad, captions)["all"] == 0 and scores(bad, captions)["shape"] == 0
    assert describe(blank) == [[]] * 50
    with pytest.raises(DataError, match="uint8"):
        judge(images.float(), captions)
    with pytest.raises(DataError, match="captions"):
        judge(images, captions[:3])


def test_prompt_accuracy_of_a_perfect_and_of_a_careless_generator():
    data = Shapes()
    asked = []

    def perfect(prompts, seeds):
        asked.extend(zip(prompts, seeds, strict=True))
        return render([parse(prompt) for prompt in prompts], 32)

    metric = PromptAccuracy(num_prompts=40)
    found = metric(perfect, data)
    names = {f"{name}_accuracy" for name in ("prompt", "count", *ATTRIBUTES)}
    assert set(found) == names and set(found.values()) == {1.0}
    assert all(held_out(*parse(prompt).objects[0][:4]) for prompt, _ in asked) and len(set(asked)) == 40
    red = torch.cat([render([Scene((Object("circle", "red", "large", "centre"),))], 32)] * 40)
    careless = metric(lambda prompts, seeds: red, data)
    assert careless["prompt_accuracy"] < 0.1 and careless["count_accuracy"] == 1
    assert careless["colour_accuracy"] == pytest.approx(sum("red" in prompt for prompt, _ in asked) / 40)


def test_accuracy_of_open_data_tells_short_from_whole_and_seen_from_unseen():
    asked = []

    def perfect(prompts, seeds):
        asked.append(prompts)
        wanted = [parse(prompt).objects[0] for prompt in prompts]
        at = [list(POSITIONS)[seed % 5] for seed in seeds]
        return render([Scene((Object(w.shape, w.colour, w.size or "large", w.position or p),))
                       for w, p in zip(wanted, at, strict=True)], 32)  # fmt: skip

    def only_seen(prompts, seeds):
        """All red where training never showed the pair."""
        pairs = [parse(prompt).objects[0][1::-1] for prompt in prompts]
        unseen = [pair[::-1] in UNSEEN_PAIRS for pair in pairs]
        red = [p.replace(c, "red") if new else p for p, (c, _), new in zip(prompts, pairs, unseen, strict=True)]
        return perfect(red, seeds)

    metric, data = PromptAccuracy(num_prompts=100), Shapes(captions="open")
    found = metric(perfect, data)
    assert found.pop("places_drawn") == 5 and found.pop("sizes_drawn") == 1 and set(found.values()) == {1.0}
    whole, seen, unseen, varied = asked
    assert {parse(prompt).objects[0][:2] for prompt in unseen} == set(UNSEEN_PAIRS)
    assert not {parse(prompt).objects[0][:2] for prompt in seen} & set(UNSEEN_PAIRS)
    assert all(all(parse(prompt).objects[0][:4]) for prompt in whole) and set(varied) == {"a red circle"}
    asked.clear()
    wrong = metric(only_seen, data)
    assert wrong["seen_pairs_accuracy"] == wrong["short_seen_accuracy"] == 1 and wrong["unseen_pairs_accuracy"] == 0
    assert wrong["short_unseen_accuracy"] == wrong["short_unseen_colour_accuracy"] == 0
    assert wrong["short_unseen_shape_accuracy"] == wrong["short_unseen_size_accuracy"] == 1
    assert "short_seen_accuracy" not in metric(perfect, Shapes())  # full captions: as ever


def test_short_prompts_are_of_the_given_pairs_and_leave_something_open():
    prompts = [parse(prompt).objects[0] for prompt in short_prompts([("star", "red"), ("ring", "blue")], 60)]
    assert {thing[:2] for thing in prompts} == {("star", "red"), ("ring", "blue")}
    assert not any(all(thing[:4]) for thing in prompts) and 20 < sum(not any(thing[2:4]) for thing in prompts) < 40


def test_accuracy_counts_only_what_captions_speak_of():
    said = stated(["a red circle", "a star above a ring"])
    assert said["colour"].tolist() == [True, False] and said["relation"].tolist() == [False, True]
