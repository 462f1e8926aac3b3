"""Folders as people lay them out: captions, classes and parts are found as meant, or one line says why not."""

import io
import json
import os
import sys
import types
import unicodedata
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data import picture, write

from ldm.data.cache import identity, stamp
from ldm.data.images import ImageFolder
from ldm.data.loader import summary
from ldm.tools.dataset import check_conditions, show_data, write_data
from ldm.utils.errors import DataError

PNG = picture((9, 9, 9))


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 60, 20)).save(out, kind)
    return out.getvalue()


def read(root: Path, contents: dict[str, bytes | str], **knobs) -> ImageFolder:
    return ImageFolder(write(root / "d", contents), **{"image_size": 4, "held_out": 0.0} | knobs)


def said(root: Path, data: ImageFolder) -> str:
    return summary(data).replace(str(root / "d"), "DATA")


def lines(*rows: dict) -> str:
    return "\n".join(map(json.dumps, rows))


# --- tables of captions

TABLES = {
    "comma": "file_name,text\na.png,one\nb.png,two\n",
    "bom, semicolons, CRLF": "\ufefffile_name;text\r\na.png;one\r\nb.png;two\r\n",
    "tabs": "file_name\ttext\na.png\tone\nb.png\ttwo",
    "quotes": '"file_name","text"\n"a.png","one"\n"b.png", "two"\n',
    "another column": "file_name,caption,width\na.png,one,3\nb.png,two,3\n",
    "prompt": "prompt,file_name\none,a.png\ntwo,b.png\n",
    "image": "image,text\na.png,one\nb.png,two\n",
    "case, backslash": "file_name,text\n.\\A.PNG,one\n.\\B.PNG,two\n",
    "spaces, empty lines": "file_name, text\n\na.png,  one \n,\nb.png,two\n\n",
}


@pytest.mark.parametrize("kind", TABLES)
def test_csv_is_read(tmp_path, kind):
    data = read(tmp_path, {"a.png": PNG, "b.png": PNG, "metadata.csv": TABLES[kind]})
    assert list(data.captions()) == ["one", "two"]
    assert "captions: 2 from metadata.csv, 2 of them different" in said(tmp_path, data)


def test_csv_keeps_commas_quotes_and_lines_in_quotes(tmp_path):
    table = 'file_name,text,aesthetic\na.png,"a ""red"", big\ncat",6.5\n'
    data = read(tmp_path, {"a.png": PNG, "metadata.csv": table})
    assert data[0]["caption"] == 'a "red", big cat' and data[0]["aesthetic"] == 6.5


def test_tables_of_several_folders(tmp_path):
    contents = {f"{part}/{name}": PNG for part in "pq" for name in ("a.png", "b.png")}
    tables = {"p/metadata.csv": "file_name,text\na.png,1\nb.png,2", "q/Metadata.JSONL": lines(
        {"file_name": "b.png", "text": "4"}, {"file_name": "a.png", "text": "3"})}  # fmt: skip
    data = read(tmp_path, contents | tables)
    assert {(s.name, s.caption) for s in data.samples} == {
        ("p/a.png", "1"), ("p/b.png", "2"), ("q/a.png", "3"), ("q/b.png", "4")}  # fmt: skip


def test_null_list_and_number(tmp_path):
    rows = [("a.png", None), ("b.png", ["x", " y ", None]), ("c.png", 7), ("d.png", ""), ("e.png", "z")]
    table = lines(*({"file_name": name, "text": text} for name, text in rows))
    data = read(tmp_path, {name: PNG for name, _ in rows} | {"f.png": PNG, "metadata.jsonl": table})
    assert list(data.captions()) == ["x", "y", "7", "z"]
    text = said(tmp_path, data)
    assert "left out: 2 without a caption in metadata.jsonl: a.png, d.png" in text
    assert "left out: 1 without a line in metadata.jsonl: f.png" in text and "DATA: 3 pictures are used" in text


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_in_either_unicode_form(tmp_path, form):
    name, other = (unicodedata.normalize(f, "café É.png") for f in (form, "NFD" if form == "NFC" else "NFC"))
    rows = lines({"file_name": other, "text": "a cup"})
    assert list(read(tmp_path, {name: PNG, "metadata.jsonl": rows}).captions()) == ["a cup"]
    (tmp_path / "d" / "metadata.jsonl").unlink()
    assert list(read(tmp_path, {other[:-3] + "TXT": "a mug"}).captions()) == ["a mug"]


def test_parquet_needs_pyarrow_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="metadata.parquet: pyarrow.*pip install pyarrow, or save it as metadata.csv"):
        read(tmp_path, {"a.png": PNG, "metadata.parquet": b"PAR1"})
    rows = types.SimpleNamespace(to_pylist=lambda: [{"file_name": "a.png", "text": ["one", "two"]}])
    fake = types.SimpleNamespace(BufferReader=bytes, parquet=types.SimpleNamespace(read_table=lambda data: rows))
    monkeypatch.setitem(sys.modules, "pyarrow", fake)
    assert list(read(tmp_path, {}).captions()) == ["one", "two"]


BAD = {
    "unquoted comma": ({"metadata.csv": "file_name,text\na.png,a cat, asleep"}, "csv:2: 3 values for 2 columns"),
    "no header": ({"metadata.csv": "a.png,x\na.png,y"}, "no column 'file_name'"),
    "other caption": ({"metadata.csv": "file_name,words\na.png,y"}, "set data.caption_field"),
    "open quote": ({"metadata.csv": 'file_name,text\na.png,"y'}, "metadata.csv:"),
    "latin": ({"metadata.csv": "file_name,text\na.png,caf\xe9".encode("latin-1")}, "save it as UTF-8"),
    "absent": ({"metadata.csv": "file_name,text\nb.png,x\na.png,y\nc.png,z"}, "'b.png' in .* .2 of 3 lines"),
    "empty": ({"metadata.jsonl": ""}, "metadata.jsonl has 0 lines for 1 pictures"),
    "all null": ({"metadata.jsonl": '{"file_name": "a.png", "text": null}'}, "none with a caption"),
    "table": ({"metadata.jsonl": '{"file_name": "a.png", "text": {"en": "x"}}'}, "expected a text or a list"),
    "truth": ({"metadata.jsonl": '{"file_name": "a.png", "text": true}'}, "the caption is True"),
    "nameless": ({"metadata.jsonl": '{"file_name": 3, "text": "x"}'}, "expected the name of a picture"),
    "score": ({"metadata.csv": "file_name,text,aesthetic\na.png,x,good"}, "expected a number such as 6.5"),
    "two": ({"metadata.csv": "file_name,text\na.png,x", "metadata.jsonl": "{}"}, "keep one of them"),
    "zip in a folder": ({"a.png": None, "a.zip": b"x"}, "found 1 .zip; give the .zip as data.path"),
    "mostly loose": ({"b.png": PNG, "c.png": PNG, "x/1.png": PNG, "y/1.png": PNG}, "3 of 5 pictures .a.png, b.png, c"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_one_line_says_what_is_wrong(tmp_path, kind):
    contents, words = BAD[kind]
    contents = {name: data for name, data in ({"a.png": PNG} | contents).items() if data is not None}
    with pytest.raises(DataError, match=words) as error:
        read(tmp_path, contents)
    assert "\n" not in str(error.value)


# --- sidecars


@pytest.mark.parametrize("image, text", [("a.png", "a.caption"), ("A.PNG", "A.TXT"), ("a.JPG", "A.Txt"),
                                         ("a.png", "a.png.txt"), ("a.tar.png", "a.tar.txt")])  # fmt: skip
def test_caption_files(tmp_path, image, text):
    data = read(tmp_path, {f"{part}/{image}": PNG for part in "pq"} | {f"{part}/{text}": "a portrait" for part in "pq"})
    assert set(data.captions()) == {"a portrait"} and data.class_names == ["p", "q"]


def test_of_two_caption_files_one_is_named_as_left_out(tmp_path):
    data = read(tmp_path, {"a.png": PNG, "a.txt": "x", "a.caption": "y"})
    assert list(data.captions()) == ["x"] and "left out: 1 .caption files: a.caption" in said(tmp_path, data)


# --- classes, parts, kohya's folders


def test_stray_pictures_are_no_class(tmp_path):
    names = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "cover.png"]
    for outer in ("", "pets/"):
        data = read(tmp_path / f"{outer}x", {"cover.png": PNG} | {outer + name: PNG for name in names})
        assert data.class_names == ["cat", "dog"] and set(data.captions()) == {"cat", "dog"} and len(data) == 4
        assert "above the class folders: " in summary(data) and "cover.png" in summary(data)


def test_the_topmost_folders_are_the_classes(tmp_path):
    names = ["cat/indoor/1.png", "cat/outdoor/1.png", "dog/indoor/1.png", "dog/2.png"]
    data = read(tmp_path, {f"all/{name}": PNG for name in names})
    assert data.class_names == ["cat", "dog"] and [data[i]["label"] for i in range(4)] == [0, 0, 1, 1]
    assert "classes: 2: cat (2), dog (2)" in said(tmp_path, data)


@pytest.mark.parametrize("held_out, others", [("val", ["test"]), ("test", []), ("Validation", ["Test"])])
def test_parts_are_no_classes(tmp_path, held_out, others):
    parts = ["train", held_out, *others]
    contents = {f"set/{part}/{kind}/{i}.png": PNG for part in parts for kind in ("cat", "dog") for i in range(2)}
    read(tmp_path, contents | {"set/x.png": PNG})
    names = {split: [s.name for s in read(tmp_path, {}, split=split, held_out=None).samples]
             for split in ("train", "held_out", None)}  # fmt: skip
    assert {name.split("/")[1] for name in names["train"]} == {"train"} and len(names["train"]) == 4
    assert {name.split("/")[1] for name in names["held_out"]} == {held_out} and len(names[None]) == 8
    data = read(tmp_path, {}, split="train", held_out=None)
    assert data.class_names == ["cat", "dog"] and "held out: 4 (in folders for that)" in summary(data)
    assert "beside train/: set/x.png" in summary(data)
    assert all(f"left out: 4 in {part}/, which is kept for tests" in summary(data) for part in others)


def test_a_class_may_be_called_test(tmp_path):
    assert read(tmp_path, {"train/1.png": PNG, "plane/1.png": PNG}).class_names == ["plane", "train"]
    assert read(tmp_path / "b", {"valid/1.png": PNG, "test/1.png": PNG}).class_names == ["test", "valid"]


def test_kohya_s_folders_repeat_and_name(tmp_path):
    contents = {"10_sks dog/a.png": PNG, "10_sks dog/b.png": PNG, "10_sks dog/b.caption": "sks dog sits",
                "3_a_cat/c.png": PNG}  # fmt: skip
    data = read(tmp_path, contents)
    assert [s.caption for s in data.samples] == ["sks dog"] * 10 + ["sks dog sits"] * 10 + ["a cat"] * 3
    assert data.class_names == ["a cat", "sks dog"] and len(data) == 23
    assert "repeats: 10_sks dog 10 times, 3_a_cat 3 times; 23 in an epoch" in said(tmp_path, data)
    alone = read(tmp_path / "one", {"img/5_sks/a.png": PNG, "img/5_sks/b.png": PNG})
    assert list(alone.captions()) == ["sks"] * 10 and alone.class_names is None


@pytest.mark.parametrize("names", [["0_cat", "1_dog"], ["1_cat", "2_dog"], ["001_cat", "007_dog"], ["10_cat", "dog"]])
def test_numbered_classes_are_no_repeats(tmp_path, names):
    data = read(tmp_path, {f"{name}/a.png": PNG for name in names})
    assert len(data) == 2 and data.class_names == names and "repeats" not in summary(data)


def test_few_pictures_are_all_trained_on(tmp_path):
    read(tmp_path, {f"{i:03d}.png": PNG for i in range(99)})
    few = read(tmp_path, {}, held_out=None, split="train")
    assert len(few) == 99 and "held out: none; previews and metrics use pictures that are trained on" in summary(few)
    assert len(read(tmp_path, {}, held_out=0.3, split="train")) < 99  # a number that is given is obeyed
    more = read(tmp_path, {"x.png": PNG}, held_out=None, split="train")
    assert 80 < len(more) < 100 and "chosen by name" in summary(more)
    assert len(read(tmp_path / "one", {"a.png": PNG}, held_out=None, split="train")) == 1


# --- kinds of files


@pytest.mark.parametrize("suffix, kind", [("gif", "GIF"), ("BMP", "BMP"), ("tif", "TIFF"), ("tiff", "TIFF"),
                                          ("jfif", "JPEG"), ("jpe", "JPEG")])  # fmt: skip
def test_other_kinds_of_pictures(tmp_path, suffix, kind):
    data = read(tmp_path, {f"a.{suffix}": encoded(kind), "b.png": PNG})
    assert len(data) == 2 and (data[0]["image"][:, 1, 1] - torch.tensor([200, 60, 20])).abs().max() <= 6
    assert ("first frame only: of 1 .gif files" in summary(data)) == (suffix == "gif")


def test_what_is_left_out_is_counted_and_named(tmp_path):
    contents = {"a.png": PNG, "b.png": b"", "c.heic": b"x", ".DS_Store": b"", "Thumbs.db": b"", "._a.png": b"x",
                "__MACOSX/._a.png": b"", "s/desktop.ini": b"", "notes.pdf": b"", "Makefile": b""}  # fmt: skip
    write(tmp_path / "d", contents)
    os.symlink(tmp_path / "absent", tmp_path / "d" / "x.png")
    data = read(tmp_path, {})
    text = said(tmp_path, data)
    for words in ("1 pictures are used, 10 x 8 pixels", "1 .heic files: c.heic", "1 .pdf files: notes.pdf",
                  "1 files without a suffix: Makefile", "1 links to nothing: x.png",
                  "5 hidden or of the system: .DS_Store, ._a.png, Thumbs.db, ...",
                  "1 that cannot be read"):  # fmt: skip
        assert words in text.replace("__MACOSX/._a.png", "._a.png") or words in text, text
    assert "b.png" in text and len(text.splitlines()) < 24
    assert stamp(data) != stamp(read(tmp_path, {"a.png": PNG + b" "}))


def test_files_that_go_while_they_are_read_do_not_stop_the_cache(tmp_path):
    data = read(tmp_path, {"a.png": PNG, "b.png": PNG})
    before = stamp(data)
    (tmp_path / "d" / "b.png").unlink()
    assert stamp(data) != before and data[1]["index"] == 0


def test_names_that_are_not_utf8(tmp_path, caplog):
    root = os.fsencode(tmp_path / "d")
    for folder in (b"caf\xe9", b"the"):
        os.makedirs(root + b"/" + folder)
        for name in (b"\xe0.png", b"b.png"):
            Path(os.fsdecode(root + b"/" + folder + b"/" + name)).write_bytes(PNG if name != b"b.png" else b"")
    data = ImageFolder(str(tmp_path / "d"), image_size=4, split="train", max_bad_fraction=0.9)
    assert data.class_names == ["café", "the"] and set(data.captions()) == {"café", "the"}
    show_data(data)
    write_data(data, tmp_path)
    text = (tmp_path / "data.txt").read_text("utf-8") + caplog.text + data.class_names[0] + identity(data)
    text.encode()  # nothing that cannot be written to a log
    assert stamp(data) and [data[i]["index"] for i in range(4)] and "café" in text


def test_zips_of_other_systems(tmp_path):
    path = tmp_path / "w.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("pets\\cat\\1.png", "pets\\dog\\1.png", "pets\\", "pets\\Thumbs.db"):
            archive.writestr(zipfile.ZipInfo(name), b"" if name[-1] in "\\b" else PNG)
    data = ImageFolder(str(path), image_size=4)
    assert data.class_names == ["cat", "dog"] and data[1]["label"] == 1
    utf8 = tmp_path / "m.zip"  # UTF-8 without the flag that says so
    with zipfile.ZipFile(utf8, "w") as archive:
        archive.writestr("XX/1.png", PNG)
        archive.writestr("dog/1.png", PNG)
    utf8.write_bytes(utf8.read_bytes().replace(b"XX/1", "é/1".encode()))
    assert ImageFolder(str(utf8), image_size=4).class_names == ["dog", "é"]


def test_larger_pictures_only_where_it_is_said(tmp_path):
    data = read(tmp_path, {"a.png": picture((1, 2, 3), (60, 50)), "b.png": PNG}, max_pixels=2000)
    assert data[0]["index"] == 1 and "60 x 50 pixels, at most 2,000 are decoded" in summary(data)
    assert read(tmp_path, {}, max_pixels=3000)[0]["index"] == 0
    assert read(tmp_path, {}, max_pixels=2000, buckets=True, bucket_step=2)[0]["index"] == 1


# --- before a run

TEXT = {"encoders": {"text": {"_target_": "ldm.conditioning.words.BagOfWords"}}}
LABELS = {"encoders": {"labels": {"_target_": "ldm.conditioning.labels.ClassLabels", "class_names": "???"}}}


def trained_on(*names: str) -> dict:
    return {"encoders": {"labels": {**LABELS["encoders"]["labels"], "class_names": list(names)}}}


def test_a_model_that_reads_what_is_not_there_is_refused_before_training(tmp_path):
    plain = read(tmp_path, {"a.png": PNG, "b.png": PNG})
    for conditioner, words in ((TEXT, "2 pictures have no caption"), (LABELS, "2 pictures have no label")):
        with pytest.raises(DataError, match=words):
            check_conditions(plain, conditioner, {}, loose=False)
    check_conditions(plain, {}, {}, loose=False)


def test_classes_keep_their_numbers(tmp_path):
    data = read(tmp_path, {"ant/1.png": PNG, "cat/1.png": PNG})
    for stored in ({}, trained_on("ant", "cat")):
        check_conditions(data, LABELS, stored, loose=False)
    for names, words in ((["cat", "dog"], "new: ant; gone: dog"), (["ant"], "new: cat"), (["cat", "ant"], "order")):
        with pytest.raises(DataError, match=words):
            check_conditions(data, LABELS, trained_on(*names), loose=False)
        with pytest.raises(DataError, match=words):
            check_conditions(data, trained_on(*names), {}, loose=False)  # a base's
    check_conditions(data, trained_on("tench", "goldfish"), {}, loose=True)  # ImageNet's folders are numbers


def test_class_folders_named_as_variables(tmp_path):
    data = read(tmp_path, {"cat/1.png": PNG, "price ${x/1.png": PNG})
    with pytest.raises(DataError, match="class folder 'price .* is named as Hydra names variables; rename it"):
        check_conditions(data, LABELS, {}, loose=False)
    check_conditions(data, TEXT, {}, loose=False)


def test_the_summary_is_said_once_and_stands_in_the_run(tmp_path, caplog):
    caplog.set_level("INFO")
    data = read(tmp_path, {"a.png": PNG, "b.png": PNG})
    for run in ("run", "run/autoencoder"):
        (tmp_path / run).mkdir()
        show_data(data)
        write_data(data, tmp_path / run)
        assert (tmp_path / run / "data.txt").read_text().startswith(f"{tmp_path / 'd'}: 2 pictures are used")
    assert caplog.text.count("2 pictures are used") == 1
