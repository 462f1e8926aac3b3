"""CIFAR-10's batches as published: records of one byte and 3,072, or pickles that older Pythons and numpys wrote."""

import io
import pickle
from typing import Any

import numpy as np

from ldm.utils.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)
SIZE = 3 * 32 * 32


class _Array:
    """Stands for a numpy array: keeps the bytes it is given, makes nothing of them."""

    def __init__(self, *_: Any):
        self.data = b""

    def __setstate__(self, state: Any) -> None:
        last = state[-1] if isinstance(state, tuple) and state else b""
        self.data = last.encode("latin-1") if isinstance(last, str) else last


class _Unpickler(pickle._Unpickler):
    """Reads dictionaries, lists and arrays; whatever else a pickle names is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return _Array
        if (module, name) == ("_codecs", "encode"):  # of bytes, as Python 3 writes them for Python 2
            return lambda text, _: text.encode("latin-1")
        raise DataError(f"it would run {module}.{name}")


def read_records(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N 3 32 32) uint8 and labels (N,) of a file of the binary version. Raises DataError."""
    if not data or len(data) % (1 + SIZE):
        raise DataError(f"{name}: {len(data):,} bytes, expected records of {1 + SIZE:,}")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + SIZE)
    return _checked(rows[:, 1:], rows[:, 0], name)


def read_batch(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N 3 32 32) uint8 and labels (N,) of a file of the Python version; runs nothing. Raises DataError."""
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="latin-1").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        pixels, labels = np.frombuffer(batch["data"].data, np.uint8), np.array(batch["labels"], dtype=np.int64)
        pixels = pixels.reshape(-1, SIZE)
    except Exception as error:  # a damaged pickle ends in any of a dozen types
        raise DataError(f"{name}: not a batch of CIFAR-10 ({' '.join(str(error).split())[:100]})") from error
    return _checked(pixels, labels, name)


def _checked(pixels: np.ndarray, labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    if len(pixels) != len(labels) or not all(0 <= label < len(CLASSES) for label in labels):
        raise DataError(f"{name}: {len(pixels):,} images with {len(labels):,} labels, expected one of 0 to 9 for each")
    return pixels.reshape(-1, *SHAPE), labels
