"""Pictures as cameras, phones and other programs leave them: damaged side data never matters, memory is bounded."""

import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_io import encoded, pixel, png

from ldm.io import images
from ldm.io.images import read_image, read_size
from ldm.utils.errors import DataError


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_damaged_exif_shows_as_in_every_viewer(format, exif):
    data = encoded(Image.new("RGB", (30, 20), (200, 60, 20)), format, exif=exif)
    assert read_image(data).shape == (3, 20, 30) and read_size(data) == (20, 30)


@pytest.mark.parametrize("size", [1 << 10, 3 << 20])
def test_long_texts_and_profiles_of_a_png(size):
    packed = zlib.compress(b"a" * size)
    chunks = [(b"tEXt", b"workflow\0" + b"a" * size), (b"zTXt", b"prompt\0\0" + packed), (b"iCCP", b"x\0\0" + packed),
              (b"iTXt", b"prompt\0\1\0\0\0" + packed)]  # fmt: skip
    for chunk in chunks:
        data = png(8, 2, bytes(range(6)), *[chunk] * (30 if chunk[0] == b"tEXt" else 1))
        assert pixel(data) == [0, 1, 2] and read_size(data) == (1, 2)


def test_a_profile_of_any_size_in_a_jpeg():
    assert pixel(encoded(Image.new("RGB", (8, 8)), "JPEG", icc_profile=os.urandom(2 << 20))) == [0, 0, 0]


def test_modes_are_converted_in_strips_as_at_once(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 4), dtype=np.uint8)
    palette = Image.fromarray(noise[..., :3]).quantize(7)
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray((noise[..., 0].astype(np.uint16) << 8) + noise[..., 1])
    files = [encoded(Image.fromarray(noise), exif=exif), encoded(palette, transparency=3), encoded(grey),
             encoded(Image.fromarray(noise[..., 0]).convert("1"), "TIFF"), encoded(palette, "GIF")]  # fmt: skip
    whole = [read_image(file, background=(0, 128, 128)) for file in files]
    monkeypatch.setattr(images, "STRIP", 70)
    for file, image in zip(files, whole, strict=True):
        assert torch.equal(read_image(file, background=(0, 128, 128)), image)
    assert whole[0].shape == (3, 30, 40) and whole[2][0, 5, 7] == noise[5, 7, 0] + (noise[5, 7, 1] - 128.0 > 127)


def test_memory_is_in_proportion_to_the_picture(tmp_path):
    """Pictures of a few kB that decode to 24 million pixels, in a process of their own."""
    for mode in ("P", "I;16"):
        image = Image.new(mode, (6000, 4000))
        image.save(tmp_path / f"{mode[0]}.png", compress_level=1, **({"transparency": 0} if mode == "P" else {}))
    code = (
        "import resource, sys; from ldm.io.images import read_image; from pathlib import Path; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
        "[read_image(path) for path in sorted(Path(sys.argv[1]).iterdir())]; print((peak() - before) >> 10)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert int(run.stdout) < 4 * 72 + 200, run.stderr


def tiled(width: int, height: int, tile: int) -> bytes:
    """A TIFF written by hand: grey, deflated, in one tile."""
    data = zlib.compress(bytes(tile * tile) if tile < 1000 else b"")
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 200, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + data


def test_tiles_larger_than_their_picture_are_refused():
    assert read_image(tiled(64, 64, 64)).shape == (3, 64, 64)
    with pytest.raises(DataError, match="tiles of 60000 x 60000 pixels, at most"):
        read_image(tiled(64, 64, 60_000))
