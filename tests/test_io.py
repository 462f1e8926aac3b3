"""Bytes from outside: what is good reads exactly, what is not is one typed line, and nothing in a file is ever run."""

import io
import os
import random
import stat
import struct
import zipfile
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from ldm.io import files, text
from ldm.io.archives import DiskFolder, ZipFolder, open_folder
from ldm.io.images import FORMATS, read_image, read_png_text, write_png
from ldm.io.tensors import read_header, read_tensors, write_tensors
from ldm.utils.errors import DataError, WeightsError

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "shared": torch.arange(12.0).view(3, 4).t(),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "flag": torch.tensor([True, False, True]),
}


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


# --- tensors


def test_tensors_round_trip_in_a_file_anyone_can_read(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS | {"view": TENSORS["a"][1]}, {"step": 3, "text": "é"})
    ours, theirs = read_tensors(path), safetensors.torch.load_file(path)
    for name, tensor in TENSORS.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor) and torch.equal(theirs[name], tensor)
    header = read_header(path)
    assert header.ldm == {"step": 3, "text": "é"} and set(header.metadata) == {"format", "ldm"}
    assert header.shapes["shared"] == (4, 3) and header.dtypes["half"] == torch.bfloat16
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    write_tensors(tmp_path / "a.safetensors", TENSORS, {"x": 1, "y": 2})
    write_tensors(tmp_path / "b.safetensors", dict(reversed(TENSORS.items())), {"y": 2, "x": 1})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS)
    before = path.read_bytes()
    with pytest.raises(WeightsError) as error:
        write_tensors(path, {"z": torch.zeros(2, dtype=torch.complex64)})
    one_line(error, "'z'", "complex64")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def header(table: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(table)) + table.encode() + data


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
BAD_HEADERS = {
    "nothing": b"",
    "short prefix": b"abc",
    "huge header": struct.pack("<Q", 1 << 60) + b"{}",
    "not json": header("nonsense"),
    "not text": struct.pack("<Q", 2) + b"\xff\xfe",
    "list": header("[]"),
    "duplicate": header(f'{{"a":{ENTRY},"a":{ENTRY}}}', b"abcd"),
    "cut short": header(f'{{"a":{ENTRY}}}', b"abc"),
    "too long": header(f'{{"a":{ENTRY}}}', b"abcde"),
    "dtype": header('{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', b"abcd"),
    "negative": header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}'),
    "shape": header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"abcd"),
    "no number": header('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', b"abcd"),
    "zero times huge": header(f'{{"a":{{"dtype":"F32","shape":[0,{1 << 62}],"data_offsets":[0,0]}}}}'),
    "overlap": header(f'{{"a":{ENTRY},"b":{ENTRY}}}', b"abcd"),
    "entry": header('{"a":3}'),
    "name": header(f'{{"a\\u0000b":{ENTRY}}}', b"abcd"),
    "metadata": header('{"__metadata__":{"a":1}}'),
    "our metadata": header('{"__metadata__":{"ldm":"{"}}'),
    "deep": header("[" * 5000 + "]" * 5000),
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_malformed_safetensors_are_refused(tmp_path, kind):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD_HEADERS[kind])
    with pytest.raises(WeightsError) as error:
        read_tensors(path)
    one_line(error, "bad.safetensors")


def mutations(data: bytes, count: int):
    """Copies of data with a few bytes changed, or a piece missing."""
    draw = random.Random(0)
    for _ in range(count):
        bad = bytearray(data)
        if draw.random() < 0.3:
            start = draw.randrange(len(bad))
            del bad[start : start + draw.randint(1, 40)]
        for _ in range(draw.randint(1, 4)):
            bad[draw.randrange(len(bad) or 1)] = draw.randrange(256)
        yield bytes(bad)


@pytest.mark.parametrize("suffix, count", [("safetensors", 400), ("pt", 150)])
def test_mutated_weights_load_or_say_why(tmp_path, suffix, count):
    good, path = tmp_path / f"good.{suffix}", tmp_path / f"bad.{suffix}"
    if suffix == "pt":
        torch.save(TENSORS, good)
    else:
        write_tensors(good, TENSORS, {"a": 1})
    refused = 0
    for data in mutations(good.read_bytes(), count):
        path.write_bytes(data)
        try:
            read_tensors(path)
        except WeightsError as error:
            assert "bad." in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > count // 10


def test_pickles_of_tensors(tmp_path):
    weight = torch.ones(2, 3)
    torch.save({"state_dict": {"net.w": weight, "net.b": torch.nn.Parameter(weight)}, "epoch": 3}, tmp_path / "a.ckpt")
    torch.save({"ema": {"w": weight}, "step": 1}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    assert set(read_tensors(tmp_path / "a.ckpt")) == {"net.w", "net.b"}
    assert torch.equal(read_tensors(tmp_path / "b.pt")["ema.w"], weight)


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, as_zip):
    canary = tmp_path / "canary"
    torch.save({"w": torch.ones(1), "x": Payload(canary)}, tmp_path / "a.pt", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(WeightsError) as error:
        read_tensors(tmp_path / "a.pt")
    one_line(error, "a.pt", "mkdir", "safetensors")
    assert not canary.exists()


def test_pickle_bombs_are_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(10**12)}, tmp_path / "view.pt")
    torch.save({"w": torch.zeros(10**5)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as source:
        with zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
            for name in source.namelist():
                bomb.writestr(name, source.read(name))
    for name, word in [("view.pt", "claim"), ("deflated.pt", "compressed")]:
        with pytest.raises(WeightsError) as error:
            read_tensors(tmp_path / name)
        one_line(error, name, word)


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pt", "model.gguf", "folder"])
def test_weights_that_are_not_there(tmp_path, name):
    with pytest.raises(WeightsError) as error:
        read_tensors(tmp_path / name)
    one_line(error, name)


# --- pictures


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def pixel(data: bytes, x: int = 0, y: int = 0, **options) -> list[int]:
    return read_image(data, **options)[:, y, x].tolist()


def png(depth: int, colour: int, row: bytes, *chunks: tuple[bytes, bytes], width: int = 2, height: int = 1) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""
    size = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", size), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_opaque_modes():
    assert pixel(encoded(Image.new("RGB", (4, 3), (10, 20, 30)))) == [10, 20, 30]
    assert pixel(encoded(Image.new("L", (4, 3), 77))) == [77, 77, 77]
    assert pixel(encoded(Image.new("1", (4, 3), 1))) == [255, 255, 255]
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert pixel(encoded(palette)) == [200, 100, 50]
    assert read_image(encoded(Image.new("RGB", (4, 3)))).shape == (3, 3, 4)


def test_sixteen_bits_are_scaled_not_clipped():
    grey = Image.fromarray(np.array([[0, 257, 40000, 65535]], dtype=np.uint16))
    assert read_image(encoded(grey))[0, 0].tolist() == [0, 1, 156, 255]
    assert pixel(png(16, 2, struct.pack(">6H", 40000, 0, 65535, 0, 0, 0))) == [156, 0, 255]


def test_cmyk_is_converted():
    red = pixel(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


def test_transparency_shows_the_background():
    colour, teal = (200, 100, 0, 128), (0, 128, 128)
    blend = [round((c * 128 + b * 127) / 255) for c, b in zip(colour, teal, strict=False)]
    got = pixel(encoded(Image.new("RGBA", (2, 2), colour)), background=teal)
    assert max(abs(a - b) for a, b in zip(got, blend, strict=True)) <= 1
    assert pixel(encoded(Image.new("RGBA", (2, 2), (200, 100, 0, 0)))) == [255, 255, 255]
    assert pixel(encoded(Image.new("LA", (2, 2), (50, 0))), background=teal) == list(teal)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert pixel(encoded(palette, transparency=1), background=teal) == list(teal)
    assert pixel(encoded(palette, transparency=0), background=teal) == [200, 100, 50]
    assert pixel(encoded(Image.new("L", (2, 2), 9), transparency=9), background=teal) == list(teal)
    two = png(16, 0, struct.pack(">2H", 40000, 300), (b"tRNS", struct.pack(">H", 300)))
    assert pixel(two) == [156] * 3 and pixel(two, x=1, background=teal) == list(teal)


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format):
    image = Image.new("RGB", (32, 24), (200, 60, 20))
    got = read_image(encoded(image, format))
    assert got.shape == (3, 24, 32) and got.dtype == torch.uint8
    assert max(abs(a - b) for a, b in zip(got[:, 12, 16].tolist(), (200, 60, 20), strict=True)) <= 4


def test_large_photographs_may_be_decoded_smaller():
    smooth = Image.fromarray(np.linspace(0, 255, 300 * 400).reshape(300, 400).astype(np.uint8)).convert("RGB")
    data = encoded(smooth, "JPEG", quality=95)
    whole, half = read_image(data), read_image(data, min_side=100)
    assert whole.shape == (3, 300, 400) and half.shape == (3, 150, 200)
    assert (whole.float()[:, ::2, ::2] - half.float()).abs().mean() < 2
    assert read_image(encoded(smooth), min_side=100).shape == (3, 300, 400)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_come_out_upright(orientation):
    """The corner that the EXIF tag calls top left is red, whichever way the pixels are stored."""
    upright = np.zeros((4, 6, 3), dtype=np.uint8)
    upright[0, 0], upright[0, -1] = (255, 0, 0), (0, 255, 0)
    stored = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
              6: np.rot90, 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read_image(encoded(image, exif=exif)).permute(1, 2, 0).numpy(), upright)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert pixel(encoded(frames[0], save_all=True, append_images=frames[1:])) == [255, 0, 0]


NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)))
BAD_IMAGES = {
    "empty": b"",
    "text": b"GIF89a is not read" * 20,
    "ico": encoded(Image.new("L", (16, 16)), "ICO"),
    "fractions": encoded(Image.new("F", (4, 4), 0.5), "TIFF"),
    "32 bits": encoded(Image.new("I", (4, 4), 1 << 20), "TIFF"),
    "25 Mpx": png(8, 2, b"", width=5000, height=5000),
    "cut png": NOISE[:-400],
    "cut jpeg": encoded(Image.open(io.BytesIO(NOISE)), "JPEG")[:-300],
    "flipped bit": NOISE[:600] + bytes([NOISE[600] ^ 1]) + NOISE[601:],
    "bomb": png(8, 2, b"", width=10_000, height=10_000),
    "sliver": png(8, 2, b"", width=1_000_000, height=1),
    "no pixels": png(8, 2, b"", width=0, height=5),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_refused(tmp_path, kind):
    path = tmp_path / "bad.png"
    path.write_bytes(BAD_IMAGES[kind])
    with pytest.raises(DataError) as error:
        read_image(path)
    one_line(error, "bad.png")


@pytest.mark.parametrize("format", FORMATS)
def test_mutated_images_load_or_say_why(format):
    image = Image.open(io.BytesIO(NOISE)).resize((16, 16))
    for data in mutations(encoded(image, format), 60):
        try:
            assert read_image(data, name="it").shape[0] == 3
        except DataError as error:
            assert "it:" in str(error) and "\n" not in str(error)


def test_png_text_round_trips(tmp_path):
    image = torch.randint(0, 255, (3, 5, 7), dtype=torch.uint8)
    write_png(tmp_path / "a.png", image, {"prompt": "naïve 猫 \n red", "seed": "0"})
    assert torch.equal(read_image(tmp_path / "a.png"), image)
    assert read_png_text(tmp_path / "a.png") == {"prompt": "naïve 猫 \n red", "seed": "0"}
    write_png(tmp_path / "b.png", image[:1])
    assert torch.equal(read_image(tmp_path / "b.png"), image[:1].expand(3, -1, -1))
    with pytest.raises(DataError, match="uint8"):
        write_png(tmp_path / "c.png", image.float())
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


# --- text


@pytest.mark.parametrize("data, word", [(b"caf\x92", "0x92"), ("cat".encode("utf-16"), "UTF-8"), (b"a\0b", "NUL")])
def test_text_that_is_not_utf8(data, word):
    with pytest.raises(DataError) as error:
        text.decode_text(data, "x.txt")
    one_line(error, "x.txt", word)


def test_text_and_json(tmp_path):
    assert text.decode_text("\ufeff a cat\r\n".encode(), "x") == "a cat"
    text.write_json(tmp_path / "a.json", {"b": [1, None, "é"], "a": {}})
    assert text.read_config(tmp_path / "a.json") == {"a": {}, "b": [1, None, "é"]}
    rows = list(text.parse_jsonl(b'{"a":1}\r\n\n{"a":2}', "t"))
    assert rows == [("t:1", {"a": 1}), ("t:3", {"a": 2})]


@pytest.mark.parametrize("bad", ["{", '{"a":1,"a":2}', "[NaN]", "[" * 40 + "]" * 40, "[" * 9000, "1" * 9000, ""])
def test_bad_json(bad):
    with pytest.raises(DataError) as error:
        text.parse_json(bad, "x.json")
    one_line(error, "x.json")


def test_numbers_that_are_none_can_be_left_out(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1, "b": -Infinity, "c": {"d": NaN}}')
    assert text.read_config(tmp_path / "a.json", lenient=True) == {"a": 1, "c": {}}
    (tmp_path / "b.json").write_text('{"a": [1, NaN]}')
    for lenient, name in ((False, "a.json"), (True, "b.json")):
        with pytest.raises(DataError, match="Infinity"):
            text.read_config(tmp_path / name, lenient=lenient)


@pytest.mark.parametrize("bad", ["[]", '{"a": ["${oc.env:HOME}"]}', '{"${x}": 1}', '{"a": "' + "x" * (1 << 20) + '"}'])
def test_bad_configs(tmp_path, bad):
    (tmp_path / "config.json").write_text(bad)
    with pytest.raises(DataError) as error:
        text.read_config(tmp_path / "config.json")
    one_line(error, "config.json")


# --- folders


def test_a_zip_reads_like_the_folder_it_was_made_of(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    for name in ("b.txt", "sub/a.txt", ".hidden", "sub/.x.png"):
        (tmp_path / "d" / name).write_text(name)
    (tmp_path / "d" / "sub" / "again").symlink_to(tmp_path / "d")  # a loop
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sub/", "")
        archive.writestr("__MACOSX/b.txt", "")
        for name in ("sub/a.txt", "b.txt", ".hidden"):
            archive.writestr(name, name)
    disk, packed = open_folder(tmp_path / "d"), open_folder(tmp_path / "d.zip")
    assert isinstance(disk, DiskFolder) and isinstance(packed, ZipFolder)
    for folder in (disk, packed):
        assert folder.names == ["b.txt", "sub/a.txt"]
        assert folder.read("sub/a.txt", max_bytes=100) == b"sub/a.txt"
        with pytest.raises(DataError):
            folder.read("sub/a.txt", max_bytes=3)
        with pytest.raises(DataError):
            folder.read("absent", max_bytes=3)


def test_hostile_zips(tmp_path):
    path = tmp_path / "bad.zip"
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("bomb.png", b"\0" * 3_000_000)
        archive.writestr("lzma.png", b"x", zipfile.ZIP_LZMA)
        archive.writestr("torn.png", b"123456789" * 9)
    data = path.read_bytes()
    at = data.index(b"torn.png") + 8
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    folder = ZipFolder(path)
    for name, word in [("link", "regular"), ("bomb", "unpacks"), ("lzma", "method"), ("torn", "torn")]:
        with pytest.raises(DataError) as error:
            folder.read(f"{name}.png", max_bytes=1 << 26)
        one_line(error, "bad.zip", word)
    path.write_bytes(data[:-30])
    with pytest.raises(DataError, match="zip"):
        ZipFolder(path)


def test_files_that_are_not_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    with pytest.raises(DataError, match="regular"):
        read_image(tmp_path / "pipe.png")
    for name in ("absent", "pipe.png"):
        with pytest.raises(DataError, match=name):
            open_folder(tmp_path / name)
