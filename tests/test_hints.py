"""Hints are exact functions of images and scenes."""

import math
from types import SimpleNamespace

import pytest
import torch

from ldm.data import hints
from ldm.data.scenes import SHAPES, draw
from ldm.data.shapes import Shapes, render
from ldm.metrics.hints import HintOverlap, Steered, overlap
from ldm.utils.errors import ConfigError, DataError


def images(count=3, size=24, seed=0):
    """Smooth noise with a few edges, so that every direction and both thresholds occur."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=g)
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    fine[:, :, 5:15, 8:17] += 0.4
    return (255 * fine.clamp(0, 1)).to(torch.uint8)


def canny_by_hand(image, low, high):
    """The same detector, pixel by pixel in whole numbers: C H W uint8 -> H W bool."""
    channels, height, width = image.shape
    pixels = image.int().tolist()

    def at(c, y, x):
        return pixels[c][min(max(y, 0), height - 1)][min(max(x, 0), width - 1)]

    def slope(c, y, x):
        rows = [[at(c, y + j, x + i) for i in (-1, 0, 1)] for j in (-1, 0, 1)]
        dx = sum(w * (r[2] - r[0]) for w, r in zip((1, 2, 1), rows, strict=True))
        dy = sum(w * (b - a) for w, a, b in zip((1, 2, 1), rows[0], rows[2], strict=True))
        return dx, dy

    steepest = {(y, x): max((slope(c, y, x) for c in range(channels)), key=lambda s: abs(s[0]) + abs(s[1]))
                for y in range(height) for x in range(width)}  # fmt: skip
    strength = {place: abs(dx) + abs(dy) for place, (dx, dy) in steepest.items()}

    def ridge(y, x):
        (dx, dy), m = steepest[y, x], strength[y, x]
        tangent = math.tan(math.pi / 8)
        if abs(dy) < tangent * abs(dx):
            before, after = strength.get((y, x - 1), 0), strength.get((y, x + 1), 0)
            return m > before and m >= after
        if abs(dy) > abs(dx) / tangent:
            before, after = strength.get((y - 1, x), 0), strength.get((y + 1, x), 0)
            return m > before and m >= after
        side = -1 if (dx < 0) != (dy < 0) else 1
        return m > strength.get((y - 1, x - side), 0) and m > strength.get((y + 1, x + side), 0)

    weak = {place for place, m in strength.items() if m > low and ridge(*place)}
    found = [place for place in weak if strength[place] > high]
    seen = set(found)
    while found:
        y, x = found.pop()
        near = {(y + j, x + i) for j in (-1, 0, 1) for i in (-1, 0, 1)} & weak - seen
        seen |= near
        found += near
    return torch.tensor([[(y, x) in seen for x in range(width)] for y in range(height)])


@pytest.mark.parametrize("low, high", [(100, 200), (20, 60), (60, 60)])
def test_canny_equals_the_detector_written_pixel_by_pixel(low, high):
    given = images()
    found = hints.canny(given, low, high)
    assert found.shape == given.shape and set(found.unique().tolist()) == {0, 255}
    for image, edges in zip(given, found, strict=True):
        assert torch.equal(edges[0] == 255, canny_by_hand(image, low, high))
        assert torch.equal(edges[0], edges[1]) and torch.equal(edges[0], edges[2])


def test_edges_lie_where_the_scenes_change():
    """Every edge pixel touches an object's outline; nothing is found on a plain picture."""
    scenes = draw(0, "train", range(8), objects=3)
    edges = hints.canny(render(scenes, 64))[:, :1].float()
    inside = (hints.segmentation(scenes, 64).amax(1, keepdim=True) > 0).float()
    near = torch.nn.functional.max_pool2d(inside, 5, 1, 2) + torch.nn.functional.max_pool2d(-inside, 5, 1, 2)
    assert edges.sum() > 0 and (near[edges > 0] == 1).all()
    assert not hints.canny(torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)).any()
    assert not hints.sketch(torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)).any()


@pytest.mark.parametrize("make", [hints.canny, hints.sketch, hints.grey, lambda x: hints.palette(x, 4)])
def test_each_image_is_alone_and_left_as_it_was(make):
    given = images(4)
    before = given.clone()
    together = make(given)
    assert together.dtype == torch.uint8 and together.shape == given.shape
    assert torch.equal(together, torch.cat([make(image[None]) for image in given]))
    assert torch.equal(given, before)


def test_sketch_turns_with_the_picture():
    given = images()
    turned = hints.sketch(given.rot90(1, (2, 3))).rot90(-1, (2, 3))
    assert (turned.int() - hints.sketch(given).int()).abs().max() <= 1
    assert not torch.equal(hints.sketch(given, width=0.5), hints.sketch(given, width=2.0))


def test_grey_and_palette_of_known_pictures():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 8, 8)
    assert (hints.grey(red) == 76).all()
    assert torch.equal(hints.palette(red, 4), red)
    ramp = torch.arange(16, dtype=torch.uint8)[None, None, None].expand(1, 3, 16, 16) * 10
    assert hints.palette(ramp, 8)[0, 0, 0].tolist() == [35] * 8 + [115] * 8
    assert len(hints.palette(images(1, 24), 7).flatten(2).unique(dim=2)[0, 0]) <= 9  # 3 x 3 cells, the rest stretched


def test_inpainting_hints_mark_the_hole():
    given, mask = images(2), torch.zeros(2, 1, 24, 24)
    mask[:, :, 3:7] = 1
    hint = hints.inpaint(given, mask)
    assert (hint[:, :, 3:7] == -1).all() and torch.equal(hint[:, :, 7:], given[:, :, 7:].float() / 255)
    with pytest.raises(DataError, match="the mask is 12x24 pixels, its image 24x24"):
        hints.inpaint(given, mask[:, :, ::2])


def test_segmentation_and_depth_tell_kind_and_size():
    data = Shapes(64, length=80, objects=3)
    scenes = data.scenes()
    kinds, near = hints.segmentation(scenes, 64), hints.depth(scenes, 64)
    assert torch.equal(kinds.amax(1) > 0, near.amax(1) > 0)
    colour_of = {}
    for scene, painted, far in zip(scenes, kinds, near, strict=True):
        colours = {tuple(c) for c in painted.flatten(1).t().tolist()} - {(0, 0, 0)}
        assert len(colours) == len({thing.shape for thing in scene.objects})
        assert set(far.unique().tolist()) - {0} == {255 if thing.size == "large" else 181 for thing in scene.objects}
        if len(scene.objects) == 1:
            colour_of.setdefault(scene.objects[0].shape, set()).update(colours)
    assert set(colour_of) == set(SHAPES) and all(len(colours) == 1 for colours in colour_of.values())
    covered = (near[:, 0] > 0).float()
    drawn = torch.stack([data[i]["image"] for i in range(80)]).float()
    contrast = (drawn - drawn[:, :, :1, :1]).norm(dim=1) > 60
    overlap = (contrast & (covered > 0)).sum() / (contrast | (covered > 0)).sum()
    assert overlap > 0.9


def test_knobs_that_cannot_be():
    given = images(1)
    for make, message in (
        (lambda: hints.canny(given, 200, 100), "low=200, high=100"),
        (lambda: hints.sketch(given, width=0), "width=0"),
        (lambda: hints.palette(given, 64), "cell=64; expected 1 to 24"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_overlap_of_lines():
    lines = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    lines[0, :, 4], lines[1, :, 5], lines[2, :, 12] = 255, 255, 255
    given = lines[:1].expand(4, -1, -1, -1)
    assert overlap(given, lines).tolist() == [1.0, 0.5, 0.0, 0.0]
    assert overlap(given, lines, reach=0).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert overlap(lines[3:], lines[3:]).tolist() == [1.0]  # nothing asked for, nothing drawn


def test_images_are_judged_by_edges_of_held_out_ones():
    data = Shapes(32, length=32, split="held_out")
    objective = SimpleNamespace(hints=lambda batch: hints.canny(batch["image"]))

    def obey(prompts, seeds, hints=None):
        assert set(prompts) == {""} and len(list(seeds)) == 16
        return torch.stack([data[i if hints is not None else i + 1]["image"] for i in range(0, 32, 2)])

    scores = HintOverlap(num_images=16)(obey, data, objective)
    assert scores["hint_overlap"] == 1 and scores["without_hint"] < 0.4

    def two(prompts, seeds, hints=None):
        return obey([""] * 16, range(16), hints)[::8]

    images, labels = Steered(2)(two, data, objective)
    assert labels == ["hint", "without", "with", "image"] * 2 and torch.equal(images[2], images[3])
