"""Stored latents and texts: the same training without the encoders, never from other weights or images, never half."""

import copy
import errno
import fcntl
import itertools
import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from test_data import picture, write
from torch import nn
from torch.utils.data import Subset

from ldm.conditioning.conditioner import Conditioner, Encoder
from ldm.conditioning.stored import StoredEncoder
from ldm.data.cache import StoredLatents, Table, Texts, exclusive, text_digest
from ldm.data.images import ImageFolder
from ldm.data.loader import batches, groups
from ldm.data.shapes import Shapes
from ldm.diffusion import prediction, process, times, weighting
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import DiffusionObjective
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.codec import LatentCodec, PixelCodec
from ldm.tools.precompute import fingerprint, precompute
from ldm.utils.errors import ConfigError, DataError

CPU = torch.device("cpu")


def codec(seed: int = 0) -> LatentCodec:
    torch.manual_seed(seed)
    net = AutoencoderKL(channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=2, attention=False, groups=4)
    made, made.encodings = LatentCodec(net), 0
    net.encoder.register_forward_hook(lambda *_: setattr(made, "encodings", made.encodings + len(_[1][0])))
    return made


class Calls(list):
    """What was read: no setting of the encoder."""


class Words(Encoder):
    """A text as its letters. As with CLIP, one text of more than 8 gives all texts of a call a second chunk."""

    field, null = "caption", None

    def __init__(self, seed: int = 0, gain: float = 1.0):
        super().__init__()
        torch.manual_seed(seed)
        self.network = nn.Embedding(256, 4).requires_grad_(False)
        self.gain, self.dims, self.read = gain, {"context_dim": 4, "pooled_dim": 4}, Calls()

    def forward(self, values, device):
        self.read += values
        length = 8 * max(-(-len(value or "") // 8) or 1 for value in values)
        ids = torch.tensor([list((value or "").ljust(length).encode()) for value in values])
        context = self.gain * self.network(ids) * torch.tensor([[[value is not None]] for value in values])
        return {"context": context, "context_mask": ids != 32, "pooled": context.mean(1)}


def conditioner(encoder: Encoder | None = None, **knobs) -> Conditioner:
    return Conditioner({"words": encoder or Words(**knobs)}, dropout=0.3)


SIZES = [(32, 32), (40, 30), (64, 20), (20, 50), (33, 31), (64, 16), (24, 24)]


def folder(root: Path, texts: tuple[str, ...] = ("red", "blue", "red", "green", "tan", "teal", "red")) -> Path:
    images = {f"{i}.png": picture((30 * i, 90, 200 - 20 * i), size) for i, size in enumerate(SIZES)}
    rows = [{"file_name": name, "text": text} for name, text in zip(images, texts, strict=True)]
    return write(root, images | {"metadata.jsonl": "\n".join(map(json.dumps, rows))})


def data(root: Path, **knobs) -> ImageFolder:
    return ImageFolder(folder(root) if not root.exists() else root, image_size=16, **knobs)


BUCKETS = {"buckets": True, "bucket_step": 8}


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --- tables


def test_rows_are_there_once_counted(tmp_path):
    table = Table(tmp_path / "t")
    rows = {"a": torch.randn(5, 2, 3), "b": torch.arange(5), "c": torch.tensor([True, False] * 2 + [True])}
    table.append(rows)
    assert len(table) == 0 and not (tmp_path / "t" / "header.json").exists()
    table.commit()
    table.append({name: value[:2] for name, value in rows.items()})  # as a writer that is killed before its commit
    for whole in (table, Table(tmp_path / "t"), pickle.loads(pickle.dumps(table)), copy.deepcopy(table)):
        assert len(whole) == 5
        for name, value in rows.items():
            assert torch.equal(whole.column(name), value)
            assert torch.equal(whole.read(name, torch.tensor([3, 0, 3])), value[[3, 0, 3]])
    again = Table(tmp_path / "t")
    again.append({name: value[2:4] for name, value in rows.items()})
    again.commit()
    assert torch.equal(Table(tmp_path / "t").column("b"), torch.tensor([0, 1, 2, 3, 4, 2, 3]))


def test_rows_are_on_disk_before_they_are_counted(tmp_path, monkeypatch):
    flushed, counted = set(), []

    def fsync(descriptor, original=os.fsync):
        flushed.add((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        original(descriptor)

    def replace(source, target, original=os.replace):
        files = [path.stat() for path in sorted(tmp_path.glob("*.bin"))]
        counted.append({(file.st_ino, file.st_size) for file in files} <= flushed)
        original(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    table = Table(tmp_path)
    for count in (3, 5):
        table.append({"a": torch.randn(count, 2), "b": torch.arange(count)})
        table.commit()
    assert counted == [True, True]


@pytest.mark.parametrize(
    "rows, words",
    [
        ({"a": torch.zeros(1, 3), "b": torch.zeros(1)}, "do not fit"),
        ({"a": torch.zeros(1, 2)}, "do not fit"),
        ({"a": torch.zeros(1, 2).half(), "b": torch.zeros(1)}, "do not fit"),
        ({"a": torch.full((1, 2), torch.inf), "b": torch.zeros(1)}, "a is not finite in torch.float32"),
    ],
)
def test_rows_that_do_not_belong(tmp_path, rows, words):
    table = Table(tmp_path / "t")
    table.append({"a": torch.zeros(2, 2), "b": torch.zeros(2)})
    with pytest.raises(DataError, match=words):
        table.append(rows)


@pytest.mark.parametrize(
    "change",
    [{"count": 3}, {"count": -1}, {"count": 1.5}, {"schema": 9}, {"columns": {"a": {"dtype": "object", "shape": []}}},
     {"columns": {"../a": {"dtype": "uint8", "shape": []}}}, {"columns": {"a": {"dtype": "uint8", "shape": [-1]}}}],
)  # fmt: skip
def test_damaged_tables(tmp_path, change):
    table = Table(tmp_path)
    table.append({"a": torch.zeros(2, 2)})
    table.commit()
    header = json.loads((tmp_path / "header.json").read_text())
    (tmp_path / "header.json").write_text(json.dumps(header | change))
    with pytest.raises(DataError, match="not a whole table .*delete it"):
        Table(tmp_path)
    (tmp_path / "header.json").write_text('{"count": ')
    with pytest.raises(DataError, match="header.json"):
        Table(tmp_path)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    table = Table(tmp_path / "file" / "t")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be written .*what is counted in it is safe"):
        table.append({"a": torch.zeros(1)})


def test_who_may_write_goes_on_without_locks_and_takes_away_what_was_left(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    left = tmp_path / "x" / "bucket-00" / f".tmp-{2**40}-header.json"  # no process has such a number
    left.parent.mkdir(parents=True)
    left.touch()
    with exclusive(tmp_path / "x"):
        assert not left.exists()


def test_writers_take_turns(tmp_path):
    if not os.fork():
        with exclusive(tmp_path / "x"):
            (tmp_path / "held").touch()
            time.sleep(0.3)
            (tmp_path / "done").touch()
            os._exit(0)  # a writer that dies holds nothing any more
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with exclusive(tmp_path / "x"):
        assert (tmp_path / "done").exists()
    os.wait()


# --- images


@pytest.mark.parametrize("knobs", [{}, BUCKETS], ids=["squares", "buckets"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stored_dataset_gives_the_moments_of_every_image(tmp_path, knobs, workers):
    plain, vae = data(tmp_path / "d", **knobs), codec()
    stored, _ = precompute(
        plain, vae, conditioner(), tmp_path / "c", batch_size=2, workers=workers, dtype=torch.float32
    )
    assert len(stored) == len(plain) == vae.encodings or workers
    for step, (ours, theirs) in enumerate(zip(batches(stored, 3, seed=1), batches(plain, 3, seed=1), strict=False)):
        images = theirs.pop("image")
        assert torch.allclose(ours.pop("moments"), vae.moments(images), atol=1e-4)
        assert ours.keys() == theirs.keys() == {"size", "index", "caption", "position", "step"}
        for name, value in theirs.items():
            assert torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value
        if step == 9:
            break
    assert (groups(stored) is None) == (not knobs)
    assert stored[3]["moments"].shape[0] == 4 and stored[3]["caption"] == plain[3]["caption"]
    if knobs:
        assert len(stored.tables) > 2 and len({s["moments"].shape for s in map(stored.__getitem__, range(7))}) > 2


def test_the_second_time_nothing_is_encoded(tmp_path):
    first = precompute(data(tmp_path / "d"), codec(), conditioner(), tmp_path / "c")
    before, vae, words = tree(tmp_path / "c"), codec(), Words()
    stored, given = precompute(data(tmp_path / "d"), vae, conditioner(words), tmp_path / "c")
    for batch in itertools.islice(batches(stored, 3, seed=0), 10):
        given(batch, key=0)
    assert vae.encodings == 0 and words.read == []
    assert tree(tmp_path / "c") == before and stored[2]["moments"].dtype == torch.float16
    assert torch.equal(stored[2]["moments"], first[0][2]["moments"])


def test_a_part_of_a_dataset_has_its_own(tmp_path):
    plain, vae = data(tmp_path / "d", **BUCKETS), codec()
    stored, _ = precompute(Subset(plain, range(2, 6)), vae, conditioner(), tmp_path / "c", dtype=torch.float32)
    assert len(stored) == 4 and vae.encodings == 4
    for i in range(4):
        assert torch.allclose(stored[i]["moments"], vae.moments(plain[i + 2]["image"][None])[0], atol=1e-4)
        assert stored[i]["caption"] == plain[i + 2]["caption"]


def test_a_broken_image_keeps_its_replacement_and_its_words(tmp_path):
    write(folder(tmp_path / "d"), {"1.png": b"broken"})
    stored, _ = precompute(data(tmp_path / "d"), codec(), conditioner(), tmp_path / "c", workers=1)
    assert torch.equal(stored[1]["moments"], stored[2]["moments"]) and stored[1]["index"] == 2
    assert stored[1]["caption"] == "red"


def test_datasets_that_are_drawn_can_be_stored(tmp_path):
    plain, vae = Shapes(image_size=16, length=6), codec()
    stored, _ = precompute(plain, vae, conditioner(), tmp_path, dtype=torch.float32)
    batch = next(batches(stored, 6, seed=0))
    for index, moments, caption in zip(batch["index"].tolist(), batch["moments"], batch["caption"], strict=True):
        assert torch.allclose(moments, vae.moments(plain[index]["image"][None])[0], atol=1e-4)
        assert caption == plain[index]["caption"]
    precompute(Shapes(image_size=16, length=6), vae, conditioner(), tmp_path, dtype=torch.float32)
    assert vae.encodings == 12  # 6 by the loop above
    precompute(Shapes(image_size=16, length=6, seed=1), vae, conditioner(), tmp_path, dtype=torch.float32)
    assert vae.encodings == 18


def test_a_kill_costs_only_what_was_not_counted(tmp_path, monkeypatch):
    plain, vae = data(tmp_path / "d", **BUCKETS), codec()
    moments = LatentCodec.moments

    def dies(self, images):
        if self.encodings >= 4:
            raise KeyboardInterrupt
        return moments(self, images)

    monkeypatch.setattr(LatentCodec, "moments", dies)
    monkeypatch.setattr("ldm.tools.precompute.COMMIT_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        precompute(plain, vae, conditioner(), tmp_path / "c", batch_size=1)
    monkeypatch.setattr(LatentCodec, "moments", moments)
    precompute(plain, vae, conditioner(), tmp_path / "c", batch_size=1)
    assert vae.encodings == 7
    whole = precompute(plain, codec(), conditioner(), tmp_path / "other", batch_size=1)[0]
    again = precompute(plain, codec(), conditioner(), tmp_path / "c", batch_size=1)[0]
    assert all(torch.equal(whole[i]["moments"], again[i]["moments"]) for i in range(7))


def test_touched_files_are_compared_and_changed_ones_named(tmp_path):
    precompute(data(tmp_path / "d"), codec(), conditioner(), tmp_path / "c")
    os.utime(tmp_path / "d" / "3.png")  # as a copy of the folder would be
    vae = codec()
    precompute(data(tmp_path / "d"), vae, conditioner(), tmp_path / "c")
    assert vae.encodings == 0
    before = tree(tmp_path / "c")
    write(tmp_path / "d", {"3.png": picture((1, 2, 3), SIZES[3])})
    os.utime(tmp_path / "d" / "3.png", (1, 1))
    with pytest.raises(DataError, match="image 3 and perhaps more changed since they were stored; delete that"):
        precompute(data(tmp_path / "d"), codec(), conditioner(), tmp_path / "c")
    assert tree(tmp_path / "c") == before


def other_codec(root):
    return data(root / "d"), codec(1)


def other_size(root):
    return ImageFolder(root / "d", image_size=8), codec()


def other_buckets(root):
    return data(root / "d", **BUCKETS), codec()


def other_background(root):
    return data(root / "d", background=(0, 0, 0)), codec()


def more_images(root):
    write(root / "d", {"7.png": picture((5, 5, 5))})
    rows = (root / "d" / "metadata.jsonl").read_text() + '\n{"file_name": "7.png", "text": "red"}'
    (root / "d" / "metadata.jsonl").write_text(rows)
    return data(root / "d"), codec()


@pytest.mark.parametrize("change", [other_codec, other_size, other_buckets, other_background, more_images])
def test_whatever_decides_latents_is_in_their_key(tmp_path, change):
    precompute(data(tmp_path / "d"), codec(), conditioner(), tmp_path / "c")
    before = tree(tmp_path / "c")
    changed, vae = change(tmp_path)
    precompute(changed, vae, conditioner(), tmp_path / "c")
    assert vae.encodings == len(changed)
    assert before.items() <= tree(tmp_path / "c").items()  # nothing is overwritten


def test_pixels_and_mirrored_images_are_not_stored(tmp_path):
    with pytest.raises(ConfigError, match="PixelCodec has no latents"):
        precompute(data(tmp_path / "d"), PixelCodec(), conditioner(), tmp_path / "c")
    stored, _ = precompute(data(tmp_path / "d"), codec(), conditioner(), tmp_path / "c")
    with pytest.raises(ConfigError, match="set flip=false"):
        next(batches(stored, 2, seed=0, flip=True))


def test_tables_of_another_dataset_are_refused(tmp_path):
    stored, _ = precompute(data(tmp_path / "d", **BUCKETS), codec(), conditioner(), tmp_path / "c")
    for tables in (stored.tables[:1], [stored.tables[0]] * 2):
        with pytest.raises(DataError, match="does not hold .* images once each"):
            StoredLatents(stored.dataset, tables)


# --- texts


def test_stored_texts_are_the_encoder_s(tmp_path):
    words = Words()
    stored, given = precompute(data(tmp_path / "d"), codec(), conditioner(words), tmp_path / "c", dtype=torch.float32)
    assert words.read == [None, "red", "blue", "green", "tan", "teal"]
    plain = conditioner()
    for batch in itertools.islice(batches(stored, 4, seed=2), 6):
        ours, theirs = given(batch, key=5), plain(batch, key=5)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(words.read) == 6


def test_other_texts_are_read_when_they_come(tmp_path):
    words = Words()
    _, given = precompute(data(tmp_path / "d"), codec(), conditioner(words), tmp_path / "c")
    words.read.clear()
    encoder = given.encoders["words"]
    cond = encoder(["red", "a long sentence"], CPU)
    assert words.read == ["red", "a long sentence"] and cond["context"].shape == (2, 16, 4)
    assert encoder.without("red") is None and (encoder.field, encoder.dims) == (words.field, words.dims)


def test_long_texts_stay_out_and_are_tried_once(tmp_path, caplog):
    write(folder(tmp_path / "d"), {"metadata.jsonl": "\n".join(
        json.dumps({"file_name": f"{i}.png", "text": text})
        for i, text in enumerate(["red", "a sentence, no?", "blue", "green", "tan", "teal", "grey"]))})  # fmt: skip
    stored, given = precompute(data(tmp_path / "d"), codec(), conditioner(), tmp_path / "c", batch_size=4)
    assert "1 captions are too long to be stored" in caplog.text
    batch = next(batches(stored, 7, seed=0))
    context = given(batch)["context"]
    assert context.shape == (7, 16, 4) and torch.equal(context, conditioner()(batch)["context"])
    words = Words()
    precompute(data(tmp_path / "d"), codec(), conditioner(words), tmp_path / "c", batch_size=4)
    assert words.read == []


def test_new_captions_are_added_to_the_old(tmp_path):
    precompute(data(tmp_path / "d"), codec(), conditioner(), tmp_path / "c")
    texts = ("red", "pink", "red", "green", "tan", "cyan", "red")
    words = Words()
    precompute(ImageFolder(folder(tmp_path / "e", texts), image_size=16), codec(), conditioner(words), tmp_path / "c")
    assert words.read == ["pink", "cyan"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"gain": 2.0}])
def test_whatever_decides_texts_is_in_their_key(tmp_path, change):
    precompute(data(tmp_path / "d"), codec(), conditioner(), tmp_path / "c", key={"tokenizer.json": b"a"})
    for words, key in ((Words(**change), b"a"), (Words(), b"b")):
        precompute(data(tmp_path / "d"), codec(), conditioner(words), tmp_path / "c", key={"tokenizer.json": key})
        assert len(words.read) == 6


def test_an_encoder_that_learns_is_left_alone(tmp_path):
    words = Words()
    words.network.requires_grad_(True)
    _, given = precompute(data(tmp_path / "d"), codec(), conditioner(words), tmp_path / "c")
    assert given.encoders["words"] is words and words.read == []


def test_a_checkpoint_is_the_same_with_and_without(tmp_path):
    plain = conditioner()
    _, given = precompute(data(tmp_path / "d"), codec(), conditioner(), tmp_path / "c")
    assert isinstance(given.encoders["words"], StoredEncoder)
    assert list(given.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in given.named_parameters()] == [name for name, _ in plain.named_parameters()]
    copied = copy.deepcopy(given)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    live = copied.encoders["words"](["unknown"], CPU)["context"]
    assert not live.any() and given.encoders["words"](["unknown"], CPU)["context"].any()
    copied.load_state_dict(plain.state_dict())
    ours, theirs = (c.encoders["words"](["unknown"], CPU)["context"] for c in (copied, plain))
    assert torch.equal(ours, theirs)
    assert given.double().encoders["words"](["red"], CPU)["context"].dtype == torch.float64


def test_texts_are_told_apart_by_all_of_their_bits(tmp_path):
    table = Table(tmp_path)
    names = [f"text {i}" for i in range(500)] + [None, ""]
    table.append({"digest": torch.tensor([text_digest(name) for name in names]), "x": torch.arange(502)})
    table.commit()
    texts = Texts(table)
    rows = texts.find(names)
    assert torch.equal(texts.read(rows)["x"], torch.arange(502))
    assert texts.find(["text 500", "Text 1", "\0"]).tolist() == [-1, -1, -1]


def test_fingerprints_see_weights_settings_and_classes():
    def net(**knobs):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 3, 3, **{"padding": 1} | knobs), nn.GroupNorm(1, 3))

    same, other = net(), net()
    other.eval().requires_grad_(False)
    assert fingerprint(same) == fingerprint(other) == fingerprint(copy.deepcopy(same))
    seen = {fingerprint(same), fingerprint(net(padding=0)), fingerprint(net(stride=2)), fingerprint(net().double())}
    other[1].eps = 1e-3
    seen.add(fingerprint(other))
    other[1].eps = 1e-5
    other[0].weight[0, 0, 0, 0] += 1e-4
    seen.add(fingerprint(other))
    assert len(seen) == 6


# --- training


class Net(nn.Module):
    """Depends on all that it is told."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, t, context, context_mask, pooled):
        told = (context * context_mask[..., None]).mean((1, 2)) + pooled.mean(1) + t
        return self.conv(x) + told[:, None, None, None]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3)], ids=str)
def test_the_loss_is_what_it_is_without(tmp_path, dtype, tolerance):
    plain, vae, given = data(tmp_path / "d", **BUCKETS), codec(), conditioner()
    denoiser = Denoiser(Net(), process.RectifiedFlow(), prediction.Flow())
    objective = DiffusionObjective(denoiser, vae, given, density=times.uniform, weighting=weighting.unit)
    before = [objective(batch)[0].item() for batch in itertools.islice(batches(plain, 3, seed=0), 4)]
    stored, _ = precompute(plain, vae, given, tmp_path / "c", dtype=dtype)
    assert isinstance(given.encoders["words"], StoredEncoder)
    vae.encodings = 0
    after = [objective(batch)[0].item() for batch in itertools.islice(batches(stored, 3, seed=0), 4)]
    assert after == pytest.approx(before, rel=tolerance) and vae.encodings == 0
