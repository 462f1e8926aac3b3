"""Published sets of pictures, prepared from small archives of the forms that they are published in."""

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_data import picture

from ldm.build import compose, make
from ldm.io.cifar import CLASSES
from ldm.tools.prepare import emoji_name, main
from ldm.utils.errors import DataError

TABLE = [{"name": "HASH KEY", "unified": "0023-FE0F-20E3"}, {"name": "RAISED FIST", "unified": "270A"},
         {"name": "Chad Flag", "unified": "1F1F9-1F1E9"}]  # fmt: skip
FILES = {"0023-fe0f-20e3": "hash key", "270a": "raised fist", "270a-1f3fe": "raised fist medium-dark skin tone",
         "1f1f9-1f1e9": "Chad Flag", "1f600": "grinning face"}  # fmt: skip


def tarred(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def prepared(name: str, source: Path, root: Path, monkeypatch):
    """The dataset that data=NAME reads after the command."""
    assert main([name, str(source), str(root)]) == 0
    monkeypatch.setenv("LDM_DATA", str(root))
    node = compose("train", [f"data={name}", "image_size=8", "data.held_out=0", "data.cache=false"])["data"]
    return make(node, "data")


def test_emoji_of_a_package(tmp_path, monkeypatch):
    files = {f"package/img/google/64/{code}.png": picture((9, 9, 9)) for code in FILES}
    files |= {"package/img/google/sheets/16.png": b"x", "package/emoji.json": json.dumps(TABLE).encode()}
    data = prepared("emoji", tarred(tmp_path / "e.tgz", files), tmp_path / "data", monkeypatch)
    assert sorted(data.captions()) == sorted(FILES.values()) and data.class_names is None
    assert main(["emoji", str(tmp_path / "e.tgz"), str(tmp_path / "data")]) != 0  # nothing is overwritten


def test_emoji_of_a_repository(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "noto-emoji-main.zip", "w") as archive:
        for code in ("270a_1f3fe", "1f1f9_1f1e9", "0023_20e3", "1f469_200d_1f4bb"):
            archive.writestr(f"noto-emoji-main/png/128/emoji_u{code}.png", picture((9, 9, 9)))
            archive.writestr(f"noto-emoji-main/png/32/emoji_u{code}.png", b"x")
    data = prepared("emoji", tmp_path / "noto-emoji-main.zip", tmp_path / "data", monkeypatch)
    names = {"raised fist medium-dark skin tone", "flag TD", "keycap #", "woman personal computer"}
    assert set(data.captions()) == names


def test_names_without_a_table():
    assert emoji_name((0x1F3FE,), {}) == "emoji modifier fitzpatrick type-5 medium-dark skin tone"
    assert emoji_name((0xFFFFF,), {}) == ""


def binary(labels: list[int]) -> bytes:
    return b"".join(bytes([label]) + bytes([10 * label]) * 1024 + bytes(2048) for label in labels)


def pickled(labels: list[int]) -> bytes:
    pixels = np.concatenate([np.frombuffer(binary([label])[1:], np.uint8)[None] for label in labels])
    return pickle.dumps({b"data": pixels, b"labels": labels, b"batch_label": b"x"}, protocol=2)


@pytest.mark.parametrize("write, suffix, folder", [(binary, ".bin", "cifar-10-batches-bin"),
                                                   (pickled, "", "cifar-10-batches-py")])  # fmt: skip
@pytest.mark.parametrize("unpacked", [False, True])
def test_cifar10_of_either_version(tmp_path, monkeypatch, write, suffix, folder, unpacked):
    files = {f"data_batch_{i}{suffix}": write([i, 9]) for i in range(1, 6)} | {f"test_batch{suffix}": write([0])}
    source = tarred(tmp_path / "c.tar.gz", {f"{folder}/{name}": data for name, data in files.items()})
    if unpacked:
        source = tmp_path / folder
        source.mkdir()
        for name, data in files.items():
            (source / name).write_bytes(data)
    data = prepared("cifar10", source, tmp_path / "data", monkeypatch)
    assert len(data) == 10 and data.class_names == [CLASSES[i] for i in (1, 2, 3, 4, 5, 9)]
    for item in (data[i] for i in range(10)):
        assert item["image"][0, 0, 0] == 10 * CLASSES.index(item["caption"]) and not item["image"][1:].any()
    with zipfile.ZipFile(tmp_path / "data" / "cifar10" / "test.zip") as archive:
        assert archive.namelist() == ["airplane/0000.png"]


class Runs:
    def __reduce__(self):
        return print, ("run",)


BAD = {
    "no batch": ({"readme.html": b""}, "no data_batch_1 and no test_batch"),
    "other pickle": ({"data_batch_1": pickle.dumps([1])}, "not a batch of CIFAR-10"),
    "code": ({"data_batch_1": pickle.dumps({"data": Runs()}, 2)}, "would run"),
    "short": ({"data_batch_1.bin": b"123"}, "expected records of 3,073"),
    "label": ({"data_batch_1.bin": b"\x0a" + bytes(3072)}, "one of 0 to 9 for each"),
}


@pytest.mark.parametrize("kind", BAD)
def test_archives_of_something_else(tmp_path, capsys, kind):
    files, words = BAD[kind]
    assert main(["cifar10", str(tarred(tmp_path / "c.tar", files, "w")), str(tmp_path / "data")]) == DataError.exit_code
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out
    assert not (tmp_path / "data" / "cifar10").exists()


@pytest.mark.parametrize("name, words", [("emoji", "npm pack emoji-datasource-google"), ("cifar10", "cifar-10-python")])
def test_where_to_get_what_is_not_there(tmp_path, monkeypatch, name, words):
    monkeypatch.setenv("LDM_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"no such folder or .zip file; .*{words}.* -m ldm.tools.prepare {name} FILE"):
        make(compose("train", [f"data={name}"])["data"], "data")
