"""Aspect-ratio buckets: SDXL's table, images cut as little as can be, and batches of one bucket that lose nothing."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data import PNG, picture, write
from torch.utils.data import Dataset, Subset

from ldm.data.buckets import bucket_shapes, covering, describe, micro_conditions, nearest_bucket
from ldm.data.images import ImageFolder
from ldm.data.loader import batches, groups
from ldm.data.transforms import resize_crop
from ldm.io.images import read_image, read_size
from ldm.metrics.held_out import spread, spread_batch
from ldm.utils.errors import ConfigError

# --- the table


def test_sdxl_s_buckets():
    """App. I of arXiv:2307.01952."""
    sides = {512: (1856, 1920, 1984, 2048), 576: (1664, 1728, 1792), 640: (1536, 1600), 704: (1344, 1408, 1472),
             768: (1280, 1344), 832: (1152, 1216), 896: (1088, 1152), 960: (1024, 1088)}  # fmt: skip
    tall = {(height, width) for width, heights in sides.items() for height in heights}
    assert set(bucket_shapes(1024)) == tall | {(w, h) for h, w in tall} | {(1024, 1024)}


@pytest.mark.parametrize("size, step", [(512, 64), (256, 64), (64, 8), (32, 8), (32, 4)])
def test_buckets_of_any_size(size, step):
    shapes = bucket_shapes(size, step)
    assert (size, size) in shapes and len(set(shapes)) == len(shapes) > 1
    for height, width in shapes:
        assert height % step == width % step == 0 and (width, height) in shapes
        assert 0.9 * size**2 <= height * width <= size**2 and 0.25 <= height / width <= 4


@pytest.mark.parametrize("size, step", [(100, 64), (32, 0), (32, 64)])
def test_impossible_steps(size, step):
    with pytest.raises(ConfigError, match=f"bucket_step={step} must divide image_size={size}"):
        bucket_shapes(size, step)


@pytest.mark.parametrize(
    "size, bucket",
    [((500, 500), (1024, 1024)), ((3000, 4000), (896, 1152)), ((4000, 3000), (1152, 896)),
     ((1080, 1920), (768, 1344)), ((100, 2000), (512, 2048))],
)  # fmt: skip
def test_nearest(size, bucket):
    shapes = bucket_shapes(1024)
    assert shapes[nearest_bucket(size, shapes)] == bucket


def test_micro_conditions_are_sdxl_s():
    assert micro_conditions((512, 512), (1024, 1024)).tolist() == [512, 512, 0, 0, 1024, 1024]
    assert micro_conditions((600, 900), (64, 64)).tolist() == [600, 900, 0, 16, 64, 64]  # resized to 64 x 96
    assert micro_conditions((3000, 1000), (1024, 512)).tolist() == [3000, 1000, 256, 0, 1024, 512]  # to 1536 x 512
    assert micro_conditions((4000, 3000), (1152, 896)).dtype == torch.int64


def test_covering_covers_and_no_more():
    for size, shape in itertools.product([(7, 900), (333, 444), (1, 1), (2000, 1999)], bucket_shapes(64, 8)):
        height, width = covering(size, shape)
        assert height >= shape[0] and width >= shape[1] and (height == shape[0] or width == shape[1])


def test_the_report_counts_images_and_what_is_cut():
    shapes = [(64, 64), (48, 80)]
    text = describe([(64, 64), (64, 96), (60, 100)], [0, 0, 1], shapes).splitlines()
    assert text[1].split() == ["64", "x", "64", "2", "16.7%", "33.3%"]
    assert text[2].split() == ["48", "x", "80", "1", "0.0%", "0.0%"]
    assert text[3] == "3 images in 2 of 2 buckets; 11.1% of the pixels are cut off"


# --- pixels


def test_resize_crop_to_any_shape_takes_the_middle():
    image = torch.zeros(3, 40, 100, dtype=torch.uint8)
    image[:, :, 10:90] = 200
    assert resize_crop(image, 20, 40).eq(200).all() and resize_crop(image, 40, 80).eq(200).all()
    assert resize_crop(image, 10, 25).shape == (3, 10, 25)
    assert resize_crop(image.mT, 40, 20).eq(200).all()
    for height, width in [(7, 3), (1, 60), (64, 64)]:
        assert resize_crop(torch.zeros(3, 1, 5, dtype=torch.uint8), height, width).shape == (3, height, width)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_those_of_the_upright_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_size(tmp_path / "a.jpg") == tuple(read_image(tmp_path / "a.jpg").shape[1:])


SIZES = {"wide": (96, 32), "tall": (20, 60), "square": (50, 50), "photo": (60, 45)}  # width, height


def folder(root: Path, copies: int = 1) -> Path:
    images = {f"{name}{i}.png": picture((10 * i, 50, 90), size) for name, size in SIZES.items() for i in range(copies)}
    rows = [{"file_name": name, "text": name, "aesthetic": 5 + i / 4} for i, name in enumerate(images)]
    return write(root, images | {"metadata.jsonl": "\n".join(map(json.dumps, rows))})


def test_every_image_comes_in_the_shape_nearest_to_its_own(tmp_path, caplog):
    caplog.set_level("INFO")
    data = ImageFolder(folder(tmp_path), image_size=32, buckets=True, bucket_step=8)
    for item in (data[i] for i in range(4)):
        name = item["caption"].rstrip("0123456789.png")
        width, height = SIZES[name]
        shape = tuple(item["image"].shape[1:])
        assert shape == data.shapes[nearest_bucket((height, width), data.shapes)]
        assert item["size"].tolist() == micro_conditions((height, width), shape).tolist()
    assert {tuple(data[i]["image"].shape[1:]) for i in range(4)} >= {(16, 64), (64, 16), (32, 32)}
    assert "4 images in" in caplog.text and "of the pixels are cut off" in caplog.text


def test_plain_folders_know_sizes_and_scores_too(tmp_path):
    data = ImageFolder(folder(tmp_path), image_size=16)
    assert groups(data) is None
    batch = next(batches(data, 4, seed=0))
    assert batch["size"].dtype == torch.int64 and batch["aesthetic"].dtype == torch.float32
    rows = dict(zip(batch["caption"], batch["size"].tolist(), strict=True))
    assert rows["wide0.png"] == [32, 96, 0, 16, 16, 16] and rows["tall0.png"] == [60, 20, 16, 0, 16, 16]
    scores = dict(zip(batch["caption"], batch["aesthetic"].tolist(), strict=True))
    assert scores == {"wide0.png": 5.0, "tall0.png": 5.25, "square0.png": 5.5, "photo0.png": 5.75}


def test_a_shrunk_jpeg_keeps_its_size(tmp_path):
    Image.new("RGB", (800, 600)).save(tmp_path / "a.jpg")
    assert ImageFolder(tmp_path, image_size=32)[0]["size"].tolist() == [600, 800, 0, 5, 32, 32]


@pytest.mark.parametrize("cache", [False, True])
def test_a_broken_image_is_replaced_in_its_bucket_s_shape(tmp_path, cache):
    write(folder(tmp_path, 2), {"wide0.png": PNG[:45], "square1.png": b""})
    data = ImageFolder(tmp_path, image_size=32, buckets=True, bucket_step=8, cache=cache)
    shown = [data[i] for i in range(8)]
    for group, item in zip(data.groups.tolist(), shown, strict=True):
        assert tuple(item["image"].shape[1:]) == data.shapes[group]
    assert {data.samples[i].name for i, item in enumerate(shown) if item["index"] != i} == {"wide0.png", "square1.png"}
    for batch in itertools.islice(batches(data, 3, seed=1), 8):
        assert batch["image"].shape[0] == 3


def test_metrics_and_scales_of_images_of_many_shapes(tmp_path):
    data = ImageFolder(folder(tmp_path, 3), image_size=32, buckets=True, bucket_step=8)
    batch = spread_batch(data, 8)
    assert batch["image"].shape == (3, 3, *data.shapes[int(data.groups.mode().values)]) and len(spread(data, 8)) == 8
    plain = ImageFolder(tmp_path, image_size=16)
    assert spread(plain, 5).tolist() == [0, 2, 4, 6, 8] and spread_batch(plain, 20)["image"].shape[0] == 12


# --- order


class Grouped(Dataset):
    """Item i belongs to bucket kinds[i] and shows it in the width of its image."""

    def __init__(self, kinds: list[int]):
        self.kinds = kinds

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.zeros(3, 1, 1 + self.kinds[index], dtype=torch.uint8), "label": index}


@groups.register
def _(dataset: Grouped):
    return torch.tensor(dataset.kinds)


KINDS = [0] * 23 + [1] * 9 + [2] * 4 + [3]


def labels(count: int, kinds=KINDS, size: int = 4, **options) -> list[list[int]]:
    stream = batches(Grouped(kinds), size, seed=3, **options)
    return [batch["label"].tolist() for batch in itertools.islice(stream, count)]


@pytest.mark.parametrize("kinds, size", [(KINDS, 4), (KINDS, 1), (KINDS, 64), ([0, 1], 3), ([5] * 7, 2)])
def test_batches_are_of_one_bucket_and_epochs_lose_nothing(kinds, size):
    steps, seen, ahead = 0, Counter(), Counter(kinds)
    for epoch in range(1, 4):
        until = sum(math.ceil(epoch * count / size) for count in ahead.values())
        for batch in labels(until, kinds, size)[steps:]:
            assert len({kinds[item] for item in batch}) == 1 and len(batch) == size
            seen.update(batch)
        steps = until
        for item, kind in enumerate(kinds):  # at least once an epoch, and a bucket is never a batch ahead
            assert seen[item] >= epoch
            assert sum(seen[i] for i, k in enumerate(kinds) if k == kind) < epoch * ahead[kind] + size


def test_every_image_is_drawn_as_often_as_any_other():
    seen = Counter(sum(labels(37 * 4), []))  # 16 epochs, of 37 images in batches of 4
    assert set(seen) == set(range(37)) and set(seen.values()) == {16}


@pytest.mark.parametrize("start, workers", [(1, 0), (5, 2), (13, 0), (40, 0)])
def test_any_start_and_any_workers(start, workers):
    stream = batches(Grouped(KINDS), 4, seed=3, start_step=start, workers=workers)
    assert [next(stream)["label"].tolist() for _ in range(6)] == labels(start + 6)[start:]


def test_ranks_share_the_bucket_of_a_step():
    whole, parts = labels(20), [labels(20, rank=rank, world_size=2) for rank in range(2)]
    assert whole == [a + b for a, b in zip(*parts, strict=True)]


def test_buckets_take_turns_in_another_order_every_epoch():
    order = [KINDS[batch[0]] for batch in labels(200)]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes > 60 and Counter(order)[0] == pytest.approx(200 * 23 / 37, abs=4)


def test_a_part_of_a_dataset_keeps_its_buckets():
    part = Subset(Grouped(KINDS), range(20, 37))
    for batch in itertools.islice(batches(part, 4, seed=0), 12):
        assert len({KINDS[item] for item in batch["label"].tolist()}) == 1 and batch["label"].min() >= 20
