"""Published sets of pictures, brought into the form that data=emoji and data=cifar10 read:

    python -m ldm.tools.prepare emoji emoji-datasource-google-16.0.0.tgz      # of `npm pack emoji-datasource-google`
    python -m ldm.tools.prepare emoji noto-emoji-main.zip                     # github.com/googlefonts/noto-emoji
    python -m ldm.tools.prepare cifar10 cifar-10-python.tar.gz                # www.cs.toronto.edu/~kriz/cifar.html

SOURCE is an archive as it was downloaded, or the folder it was unpacked to. They go below DST: LDM_DATA, or data/.
"""

import argparse
import io
import json
import os
import posixpath
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.io.archives import read_members, write_zip
from ldm.io.cifar import CLASSES, read_batch, read_records
from ldm.io.folders import appearing
from ldm.io.text import decode_text, parse_json
from ldm.utils.errors import DataError, LdmError

Batches = list[tuple[np.ndarray, np.ndarray]]  # images N 3 32 32, labels N

SKINS = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
JOINERS = {0x200D, 0xFE0F}
LETTER_A, LETTER_Z = 0x1F1E6, 0x1F1FF  # two of these are a flag
KEYCAP = 0x20E3
EMOJI = re.compile(r"(?:.*/)?(?:img/google/64|png/128)/(?:emoji_u)?([0-9a-f]{2,6}(?:[-_][0-9a-f]{2,6})*)\.png", re.I)
BATCHES = re.compile(r"(?:.*/)?(data_batch_\d|test_batch)(\.bin)?")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ldm.tools.prepare", description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=PREPARED)
    parser.add_argument("source", type=Path, help="the archive as it was downloaded, or its folder")
    parser.add_argument("dst", type=Path, nargs="?", default=Path(os.environ.get("LDM_DATA", "data")))
    given = parser.parse_args(argv)
    try:
        count = PREPARED[given.name](given.source, given.dst / given.name)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{given.dst / given.name}: {count:,} pictures for data={given.name}")
    return 0


def prepare_emoji(source: Path, dst: Path) -> int:
    """Write images/*.png and metadata.jsonl; returns how many."""
    pictures, names = {}, {}
    wanted = lambda name: EMOJI.fullmatch(name) or posixpath.basename(name) == "emoji.json"  # noqa: E731
    for name, data in tqdm(read_members(source, wanted), "reading", unit=" files", delay=2):
        if match := EMOJI.fullmatch(name):
            pictures[tuple(int(code, 16) for code in re.split("[-_]", match[1]))] = data
        else:
            names = _names(data, name)
    if not pictures:
        raise DataError(f"{source}: no img/google/64/*.png and no png/128/*.png in it; give the whole package")
    rows = []
    with appearing(dst) as folder:
        (folder / "images").mkdir()
        for codes, data in sorted(pictures.items()):
            file = f"images/{'_'.join(f'{code:04x}' for code in codes)}.png"
            (folder / file).write_bytes(data)
            rows.append({"file_name": file, "text": emoji_name(codes, names)})
        (folder / "metadata.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
        )
    return len(rows)


def _names(data: bytes, name: str) -> dict[tuple[int, ...], str]:
    """The names in emoji-datasource's emoji.json by code points, without joiners."""
    table = parse_json(decode_text(data, name), name)
    try:
        codes = [[int(code, 16) for code in entry["unified"].split("-")] for entry in table]
        names = [entry["name"].lower() if entry["name"].isupper() else entry["name"] for entry in table]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{name}: not emoji-datasource's table ({error})") from error
    return {_plain(some): text for some, text in zip(codes, names, strict=True)}


def _plain(codes) -> tuple[int, ...]:
    return tuple(code for code in codes if code not in JOINERS)


def emoji_name(codes: tuple[int, ...], names: dict[tuple[int, ...], str]) -> str:
    """The caption of an emoji: its name in a table, or those of its characters, and its tones of skin."""
    plain = _plain(codes)
    tones = [f"{SKINS[code]} skin tone" for code in plain if code in SKINS]
    bare = tuple(code for code in plain if code not in SKINS) or plain
    if plain in names:
        return names[plain]
    if bare in names:
        words = [names[bare]]
    elif all(LETTER_A <= code <= LETTER_Z for code in bare):
        words = ["flag", "".join(chr(ord("A") + code - LETTER_A) for code in bare)]
    elif bare[-1] == KEYCAP:
        words = ["keycap", "".join(map(chr, bare[:-1]))]
    else:
        words = [unicodedata.name(chr(code), f"U+{code:X}").lower() for code in bare if code < 0xE0000]
    return " ".join([*words, *dict.fromkeys(tones)])


def prepare_cifar10(source: Path, dst: Path) -> int:
    """Write train.zip and test.zip with class/number.png; returns how many."""
    batches = {}
    for name, data in read_members(source, BATCHES.fullmatch):
        match = BATCHES.fullmatch(name)
        batches[match[1]] = (read_records if match[2] else read_batch)(data, f"{source}/{name}")
    missing = [name for name in ("data_batch_1", "test_batch") if name not in batches]
    if missing:
        raise DataError(f"{source}: no {' and no '.join(missing)} in it; give cifar-10-python.tar.gz as it is")
    with appearing(dst) as folder:
        test = [batches.pop("test_batch")]
        train = [batch for _, batch in sorted(batches.items())]
        return write_zip(folder / "train.zip", _files(train)) + write_zip(folder / "test.zip", _files(test))


def _files(batches: Batches) -> Iterator[tuple[str, bytes]]:
    """class/number.png of every image."""
    counts = dict.fromkeys(CLASSES, 0)
    for images, labels in tqdm(batches, "writing", unit=" batches", delay=2):
        for image, label in zip(images, labels, strict=True):
            kind, file = CLASSES[label], io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
            yield f"{kind}/{counts[kind]:04d}.png", file.getvalue()
            counts[kind] += 1


PREPARED = {"emoji": prepare_emoji, "cifar10": prepare_cifar10}

if __name__ == "__main__":
    sys.exit(main())
