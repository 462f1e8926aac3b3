"""What a file of weights is by its first bytes, whatever its name says: downloads come under wrong names, or halves."""

import os
import zipfile
from pathlib import Path

from ldm.utils.errors import WeightsError

PICKLES = (".pt", ".pth", ".ckpt", ".bin")
UNFINISHED = (".part", ".crdownload", ".download", ".aria2", ".incomplete", ".partial", ".opdownload")
SUFFIXES = {  # of files that have no mark of their own -> what they are
    ".onnx": "an ONNX graph", ".msgpack": "weights of Flax (msgpack)", ".tflite": "a TensorFlow Lite graph",
    ".pb": "a TensorFlow graph", ".mlmodel": "a Core ML model", ".npz": "an archive of numpy",
}  # fmt: skip
MARKS = {  # the first bytes -> what has them, and what to do
    b"version https://git-lfs": "a Git LFS pointer, which stands for the weights; fetch them with `git lfs pull`",
    b"GGUF": "a GGUF file, whose quantised weights are not read here; get the .safetensors of the same weights",
    b"\x89HDF": "a file of Keras or TensorFlow (HDF5); get the .safetensors of the same weights",
    b"\x93NUMPY": "an array of numpy; get the .safetensors of the weights",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it",
    b"\x89PNG": "a picture (PNG), not weights",
    b"\xff\xd8\xff": "a picture (JPEG), not weights",
    b"%PDF": "a PDF, not weights",
}
PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<body")


def format_of(path: str | os.PathLike) -> str:
    """safetensors or torch, by content, and by name where the content does not tell. WeightsError names other things.

    A file that is damaged counts as what its name says.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    if (suffix := path.suffix.lower()) in UNFINISHED:
        raise WeightsError(f"{path}: an unfinished download ({suffix}); download it again, to the end")
    if not head:
        raise WeightsError(f"{path}: an empty file (0 bytes); download it again")
    if head[8:9] == b"{":  # after the length of the header
        return "safetensors"
    if head[:2] == b"PK" or head[:1] == b"\x80" or head[257:262] == b"ustar":
        return "torch"
    if what := _other(head, suffix):
        raise WeightsError(f"{path}: {what}")
    if suffix in PICKLES:
        return "torch"
    if suffix in (".safetensors", ".sft"):
        return "safetensors"
    raise WeightsError(f"{path}: expected a file ending in .safetensors {' '.join(PICKLES)}")


def is_program(path: Path) -> bool:
    """Whether a file of torch's is a TorchScript program, whose tensors are members of classes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _other(head: bytes, suffix: str) -> str | None:
    """What a file is that holds no weights that can be read."""
    start = head.lstrip().lower()
    if what := next((what for mark, what in MARKS.items() if head.startswith(mark)), None):
        return what
    if start.startswith(PAGES):
        return "a web page (HTML), not weights; the download may need a login: get the file itself"
    if suffix in SUFFIXES:
        return f"{SUFFIXES[suffix]}; get the .safetensors of the same weights"
    text = head.decode("utf-8", errors="replace")
    if len(head) < 512 and len(text.split()) > 1 and all(c.isprintable() or c.isspace() for c in text):
        return f"a text, not weights: {' '.join(text.split())[:80]!r}; download it again"
    return None
