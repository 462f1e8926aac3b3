"""Image folders in every layout, broken files, and an order of images that no worker, rank or restart can change."""

import io
import itertools
import json
import os
import pickle
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.images import ImageFolder
from ldm.data.loader import batches
from ldm.data.transforms import flip, resize_crop
from ldm.io.images import read_image
from ldm.utils.errors import ConfigError, DataError
from ldm.utils.images import labelled_grid, make_grid

DATA = Path(os.environ.get("LDM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (90, 90, 90), "white": (255,) * 3}


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (10, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def write(root: Path, contents: dict[str, bytes | str]) -> Path:
    for name, data in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def packed(root: Path) -> Path:
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in root.rglob("*") if p.is_file()):
            archive.write(file, Path(root.name) / file.relative_to(root))  # inside one outer folder, as people zip
    return path


def metadata(root: Path) -> Path:
    rows = [{"file_name": f"images/{name}.png", "text": f"a {name} field"} for name in COLOURS]
    images = {f"images/{name}.png": picture(colour) for name, colour in COLOURS.items()}
    return write(root, images | {"metadata.jsonl": "\n".join(map(json.dumps, rows))})


def sidecars(root: Path) -> Path:
    images = {f"{name}.png": picture(colour) for name, colour in COLOURS.items()}
    texts = {f"{name}.txt": f"\ufeffa {name}\r\n field\r\n" for name in COLOURS}
    return write(root, images | texts | {"README.txt": "no caption"})


def classes(root: Path) -> Path:
    kinds = {"warm": ["red"], "no_colour": ["white", "grey"], "cold": ["blue", "green"]}
    return write(root, {f"{kind}/{n}.png": picture(COLOURS[n]) for kind, names in kinds.items() for n in names})


# --- layouts


@pytest.mark.parametrize("layout", [metadata, sidecars])
@pytest.mark.parametrize("place", [Path, packed])
@pytest.mark.parametrize("cache", [False, True])
def test_captioned_layouts(tmp_path, layout, place, cache):
    data = ImageFolder(place(layout(tmp_path / "d")), image_size=4, cache=cache)
    shown = {data[i]["caption"]: data[i]["image"] for i in range(len(data))}
    assert shown.keys() == {f"a {name} field" for name in COLOURS} == set(data.captions())
    for name, colour in COLOURS.items():
        image = shown[f"a {name} field"]
        assert image.dtype == torch.uint8 and image.shape == (3, 4, 4)
        assert image[:, 2, 1].tolist() == list(colour)
    assert data.class_names is None and data.image_size == 4


@pytest.mark.parametrize("place", [Path, packed])
def test_one_folder_per_class(tmp_path, place):
    data = ImageFolder(place(classes(tmp_path / "d")), image_size=8)
    assert data.class_names == ["cold", "no_colour", "warm"]
    items = [data[i] for i in range(len(data))]
    assert [item["label"] for item in items] == [0, 0, 1, 1, 2]
    assert [item["caption"] for item in items] == ["cold", "cold", "no colour", "no colour", "warm"]
    assert sorted(data.prompts(3)) == ["cold", "no colour", "warm"] and len(data.prompts(7)) == 7


def test_images_without_words(tmp_path):
    data = ImageFolder(write(tmp_path, {"all/a.png": PNG, "all/b.JPG": PNG}), image_size=8)
    assert list(data[0]) == ["image", "size", "index"] and list(data.captions()) == [] and data.prompts(2) == []
    with pytest.raises(IndexError):
        data[2]


def test_an_image_may_have_several_captions_and_another_field(tmp_path):
    rows = [{"file_name": "./a.png", "words": w} for w in ("one", "two")]
    write(tmp_path, {"a.png": picture((0, 0, 0)), "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    assert list(ImageFolder(tmp_path, image_size=4, caption_field="words").captions()) == ["one", "two"]


def test_splits_are_disjoint_whole_and_stable(tmp_path):
    write(tmp_path, {f"{i:03d}.png": picture((i, i, i)) for i in range(60)})
    names = {s: {n.name for n in ImageFolder(tmp_path, image_size=2, split=s, held_out=0.3).samples}
             for s in ("train", "held_out", None)}  # fmt: skip
    assert names["train"] | names["held_out"] == names[None] and not names["train"] & names["held_out"]
    assert 6 <= len(names["held_out"]) <= 30
    write(tmp_path, {f"a{i:03d}.png": picture((i, i, i)) for i in range(60)})
    more = {n.name for n in ImageFolder(tmp_path, image_size=2, split="held_out", held_out=0.3).samples}
    assert names["held_out"] <= more


PNG = picture((9, 9, 9))
BAD_FOLDERS = {
    "empty": ({}, "found nothing"),
    "other files": ({"a.mp4": b"", "b.mp4": b"", "c": b""}, "2 .mp4, 1 no suffix"),
    "only broken": ({"a.png": b"x", "b.png": PNG[:45], "c.jpg": b""}, "are broken"),
    "missing sidecar": ({"a.png": PNG, "b.png": PNG, "a.txt": "cat"}, "'b.txt' for 'b.png' (1 of 2"),
    "empty sidecar": ({"a.png": PNG, "a.txt": " \n"}, "a.txt: the caption is empty"),
    "not UTF-8": ({"a.png": PNG, "a.txt": b"caf\xe9"}, "a.txt: not UTF-8 text (byte 0xe9 at position 3)"),
    "bad line": ({"a.png": PNG, "metadata.jsonl": '{"file_name": "a.png", "text": "x"}\n{'}, "metadata.jsonl:2"),
    "other field": ({"a.png": PNG, "metadata.jsonl": '{"file_name": "a.png", "words": "x"}'}, "['file_name', 'words']"),
    "outside": ({"a.png": PNG, "metadata.jsonl": '{"file_name": "../a.png", "text": "x"}'}, "no image '../a.png'"),
    "list": ({"a.png": PNG, "metadata.jsonl": "[1]"}, "every line is an object"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
@pytest.mark.parametrize("cache", [False, True])
def test_bad_folders(tmp_path, kind, cache):
    contents, words = BAD_FOLDERS[kind]
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError) as error:
        ImageFolder(write(tmp_path / "d", contents), image_size=4, cache=cache)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("setting", [{"image_size": 0}, {"split": "val"}, {"held_out": 1.5}, {"background": [0, 300]}])
def test_bad_settings(tmp_path, setting):
    with pytest.raises(ConfigError, match=f"data.{next(iter(setting))}"):
        ImageFolder(metadata(tmp_path), **{"image_size": 4} | setting)
    with pytest.raises(DataError, match="absent"):
        ImageFolder(tmp_path / "absent", image_size=4)
    with pytest.raises(DataError, match="no image of 5 is in split"):
        ImageFolder(tmp_path, image_size=4, split="held_out", held_out=0.0)


@pytest.mark.parametrize("cache", [False, True])
def test_a_broken_image_is_skipped_named_and_counted(tmp_path, caplog, cache):
    write(metadata(tmp_path), {"images/green.png": PNG[:45]})
    data = ImageFolder(tmp_path, image_size=4, cache=cache)
    shown = [data[i]["caption"] for i in range(5)] + [data[0]["caption"]]
    assert shown == ["a red field", "a blue field", "a blue field", "a grey field", "a white field", "a red field"]
    assert data[1]["image"][:, 0, 0].tolist() == [0, 0, 255]
    assert list(data.broken) == ["images/green.png"]
    assert caplog.text.count("green.png") == 1 and "(1 broken so far)" in caplog.text


def test_too_many_broken_images_stop_the_run(tmp_path):
    write(metadata(tmp_path), {"images/green.png": b"", "images/blue.png": b""})
    data = ImageFolder(tmp_path, image_size=4, max_bad_fraction=0.3)
    with pytest.raises(DataError, match="2 of 5 images are broken so far"):
        [data[i] for i in range(5)]


# --- transforms


def test_resize_crop_takes_the_centre_square():
    image = torch.zeros(3, 8, 16, dtype=torch.uint8)
    image[:, :, 4:12] = 200
    assert resize_crop(image, 8).eq(200).all() and resize_crop(image, 4).eq(200).all()
    assert resize_crop(image, 20).shape == (3, 20, 20)


def test_resize_agrees_with_pillow():
    image = torch.randint(0, 256, (3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((12, 12), Image.Resampling.BICUBIC)
    ours = resize_crop(image, 12).permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1


def test_flip_is_decided_by_each_image_s_key():
    images = torch.randint(0, 256, (64, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    keys = torch.arange(64) * 977
    both = flip(images, keys)
    mirrored = [torch.equal(both[i], images[i].flip(-1)) for i in range(64)]
    assert 16 < sum(mirrored) < 48
    assert all(mirrored[i] or torch.equal(both[i], images[i]) for i in range(64))
    assert torch.equal(both[5:9], flip(images[5:9], keys[5:9]))


# --- order


class Numbers(torch.utils.data.Dataset):
    """Item i is an image that says i."""

    image_size = 4

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        image = torch.arange(index, index + 48).view(3, 4, 4).to(torch.uint8)
        return {"image": image, "caption": str(index), "label": index}


def first(count: int, data, size: int, **options) -> list[dict]:
    stream = batches(data, size, seed=5, **options)
    taken = list(itertools.islice(stream, count))
    if options.get("workers"):
        stream.close()
    return taken


def same(a: dict, b: dict) -> bool:
    tensors = all(torch.equal(a[name], b[name]) for name in ("image", "label", "position"))
    return tensors and a["caption"] == b["caption"] and a["step"] == b["step"] and a.keys() == b.keys()


def test_every_epoch_shows_every_image_once_and_drops_none():
    drawn = torch.cat([batch["label"] for batch in first(15, Numbers(10), 4)])
    epochs = [sorted(drawn[i : i + 10].tolist()) for i in range(0, 60, 10)]
    assert epochs == [list(range(10))] * 6
    assert len({tuple(drawn[i : i + 10].tolist()) for i in range(0, 60, 10)}) == 6
    assert drawn[:20].tolist() == [8, 9, 0, 6, 1, 7, 4, 5, 2, 3, 1, 6, 2, 3, 0, 4, 7, 8, 5, 9]  # as ever: runs resume
    assert first(1, Numbers(3), 8)[0]["image"].shape == (8, 3, 4, 4)  # more in a batch than there are


def test_batches_have_the_promised_fields():
    batch = first(3, Numbers(10), 4)[2]
    assert batch["position"].tolist() == [8, 9, 10, 11] and batch["step"] == 2
    assert batch["image"].dtype == torch.uint8 and batch["label"].dtype == torch.int64
    assert batch["caption"] == [str(n) for n in batch["label"].tolist()]


@pytest.mark.parametrize("start", [0, 30])
def test_no_two_images_of_a_run_share_a_position(start):
    """Noise, times and dropout are keyed by it: a position that came again would bring the same noise again."""
    positions = torch.cat([batch["position"] for batch in first(30, Numbers(10), 4, start_step=start)])
    assert positions.tolist() == list(range(start * 4, (start + 30) * 4))


def test_the_order_does_not_depend_on_torch_s_generator():
    torch.manual_seed(1)
    before, one = torch.get_rng_state(), first(3, Numbers(10), 4, flip=True, workers=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert all(map(same, one, first(3, Numbers(10), 4, flip=True)))
    other = next(batches(Numbers(10), 4, seed=6))
    assert other["label"].tolist() != one[0]["label"].tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    assert all(map(same, first(9, Numbers(10), 4, flip=True), first(9, Numbers(10), 4, flip=True, workers=workers)))


@pytest.mark.parametrize("start, workers", [(1, 0), (4, 0), (7, 2)])
def test_starting_anywhere_continues_the_same_run(start, workers):
    whole = first(10, Numbers(7), 4, flip=True)
    assert all(map(same, whole[start:], first(10 - start, Numbers(7), 4, flip=True, start_step=start, workers=workers)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_batch(world_size):
    whole = first(6, Numbers(10), 4, flip=True)
    parts = [first(6, Numbers(10), 4, flip=True, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        for name in ("image", "label", "position"):
            assert torch.equal(batch[name], torch.cat([part[step][name] for part in parts]))
        assert batch["caption"] == sum((part[step]["caption"] for part in parts), [])


def test_a_zip_with_a_broken_image_reads_the_same_in_workers(tmp_path):
    path = packed(write(metadata(tmp_path / "d"), {"images/green.png": b"broken"}))
    plain, cached = (ImageFolder(path, image_size=4, cache=cache) for cache in (False, True))
    expected = [(b["image"].tolist(), b["caption"]) for b in first(6, plain, 3)]
    assert [(b["image"].tolist(), b["caption"]) for b in first(6, cached, 3)] == expected
    assert [(b["image"].tolist(), b["caption"]) for b in first(6, plain, 3, workers=2)] == expected
    again = pickle.loads(pickle.dumps(plain))  # as a spawned worker gets it
    assert torch.equal(again[2]["image"], plain[2]["image"])


class Fails(Numbers):
    def __getitem__(self, index: int) -> dict:
        raise DataError(f"item {index} cannot be read")


class Kills(Numbers):
    def __getitem__(self, index: int) -> dict:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Preempted(Numbers):
    signalled = False

    def __getitem__(self, index: int) -> dict:
        if index == 3 and not self.signalled:
            self.signalled = True
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                os.kill(os.getpid(), number)
        return super().__getitem__(index)


def test_errors_of_workers_arrive_as_one_line():
    with pytest.raises(DataError, match=r"^item \d cannot be read$"):
        first(1, Fails(5), 2, workers=1)
    with pytest.raises(DataError, match=r"^a data worker died or hung after 0 batches \(DataLoader worker") as error:
        first(1, Kills(5), 2, workers=1)
    assert "\n" not in str(error.value)


def test_workers_outlive_a_signal_to_the_whole_group():
    labels = [batch["label"].tolist() for batch in first(5, Preempted(5), 2, workers=1)]
    assert labels == [batch["label"].tolist() for batch in first(5, Numbers(5), 2)]


@pytest.mark.parametrize(
    "length, size, options, kind",
    [
        (0, 4, {}, DataError),
        (4, 0, {}, ConfigError),
        (4, 3, {"world_size": 2}, ConfigError),
        (4, 4, {"workers": -1}, ConfigError),
    ],
)
def test_impossible_batches(length, size, options, kind):
    with pytest.raises(kind):
        batches(Numbers(length), size, seed=0, **options)


# --- contact sheets


def test_make_grid_places_every_image():
    images = torch.stack([torch.full((3, 4, 6), value, dtype=torch.uint8) for value in (10, 20, 30, 40, 50)])
    grid = make_grid(images, columns=3, padding=2, background=255)
    assert grid.shape == (3, 2 * 6 + 2, 3 * 8 + 2) and grid.dtype == torch.uint8
    for i, value in enumerate((10, 20, 30, 40, 50)):
        top, left = 2 + (i // 3) * 6, 2 + (i % 3) * 8
        assert grid[:, top : top + 4, left : left + 6].eq(value).all()
    assert int(grid.ne(255).sum()) == images.numel()
    assert make_grid(images[:1]).shape == (3, 8, 10) and make_grid(images).shape == (3, 14, 26)


def test_labelled_grid_enlarges_and_writes():
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    labels = ["a red circle", "", "a very long caption that cannot possibly fit below so small an image " * 3]
    grid = labelled_grid(images, labels, columns=3)
    assert grid.shape[2] == 3 * (96 + 8) + 8 and grid.shape[1] > 96 + 8
    below = grid[:, 8 + 96 : -8]
    written = [bool(below[:, :, left : left + 96].lt(255).any()) for left in (8, 112, 216)]
    assert written == [True, False, True]


# --- the data that lies beside the repository


def test_emoji():
    if not (DATA / "emoji").is_dir():
        pytest.skip(f"needs the emoji data in {DATA}")
    data = ImageFolder(DATA / "emoji", image_size=64)
    assert len(data) == 3543 and len(set(data.captions())) > 3400
    batch = first(1, data, 8)[0]
    assert batch["image"].shape == (8, 3, 64, 64) and len(batch["caption"]) == 8
    assert batch["image"][:, :, 0, 0].eq(255).all()  # transparent corners are white
    assert read_image(DATA / "emoji" / data.samples[0][0]).shape == (3, 128, 128)


def test_cifar10():
    if not (DATA / "cifar10" / "test.zip").is_file():
        pytest.skip(f"needs the CIFAR-10 data in {DATA}")
    data = ImageFolder(DATA / "cifar10" / "test.zip", image_size=32)
    assert len(data) == 10_000 and data.class_names[0] == "airplane" and len(data.class_names) == 10
    batch = first(1, data, 16)[0]
    assert batch["caption"] == [data.class_names[label] for label in batch["label"].tolist()]
    assert batch["image"].shape == (16, 3, 32, 32) and batch["image"].float().std() > 20
