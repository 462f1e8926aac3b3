"""The pickle inside a torch file, read without running anything: training checkpoints name classes nobody has.

Every class a pickle names becomes `Inert`, which takes whatever it is given and does nothing, but for the four names
that tables of tensors are made of. What only an attack would name is refused.
"""

import contextlib
import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.io.tensors import MAX_AXES, MAX_EXTENT, MAX_NAME, MAX_TENSORS
from ldm.utils.errors import WeightsError

MAX_PICKLE = 16 << 20  # bytes; that of Stable Diffusion with its optimizer has 2 MB
MAX_READS = 4_000_000  # of those bytes, one or more for each operation
LEGACY = 0x1950A86A20F9469CFC6C  # what files from before torch 1.6 begin with
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
WRAPPERS = (  # where trainers put the table of weights
    "state_dict", "model_state_dict", "module", "model", "generator", "net", "network", "params", "weights",
    "transformer", "unet", "vae", "autoencoder", "denoiser", "netG", "g",
)  # fmt: skip
AVERAGED = (  # and, beside it, that of averaged ones: named "ema.*"
    "ema", "state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "model_ema_state_dict", "params_ema",
    "generator_ema", "g_ema", "net_ema", "ema_net", "ema_params", "ema_weights", "averaged_model",
)  # fmt: skip
MAX_WRAPPERS = 5  # one in another
ROOM = MAX_NAME + 1  # of a name, so that one that is too long is seen to be
HARMLESS = {"_codecs", "argparse", "collections", "copyreg", "datetime", "enum", "functools", "pathlib", "typing"}
BUILTINS = {"bool", "bytearray", "complex", "dict", "float", "frozenset", "int", "list", "set", "slice", "tuple"}


class PickledTensor(NamedTuple):
    """What a pickle says of a tensor whose bytes are elsewhere."""

    storage: str
    dtype: torch.dtype
    offset: int  # elements, as the strides
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """Stands for any object of a class that is not needed: every way a pickle can make or fill it does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    add = append


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype


class _Source(io.BytesIO):
    """A pickle that can be read in so many pieces: each of its operations is one or more."""

    reads = 0

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise WeightsError(f"more than {MAX_READS:,} operations")
        return super().read(size)


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler, not the one in C: a few damaged bytes cannot make it allocate gigabytes.

    No key is hashed but texts and numbers: a tuple of tuples of tuples would be, in C, for ever.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def load_build(self) -> None:
        self.stack.pop()  # the state an object would be given

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _put(self.stack[-1], items)

    def load_dict(self) -> None:
        items, table = self.pop_mark(), {}
        _put(table, items)
        self.append(table)

    def load_additems(self) -> None:
        self.pop_mark()  # no set holds tensors

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Inert())

    def load_bytearray8(self) -> None:
        raise WeightsError("an array of bytes, which torch does not write")

    dispatch |= {pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
                 pickle.DICT[0]: load_dict, pickle.ADDITEMS[0]: load_additems, pickle.FROZENSET[0]: load_frozenset,
                 pickle.BYTEARRAY8[0]: load_bytearray8}  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _ordered
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _rebuild_parameter
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        package = module.partition(".")[0]
        is_stdlib = package in sys.stdlib_module_names or package in ("__builtin__", "nt")
        if package in ("builtins", "__builtin__") and name in BUILTINS or package in HARMLESS or not is_stdlib:
            return Inert
        raise WeightsError(f"it would run {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise WeightsError("a storage that torch does not write")
        self.storages[key] = _Storage(key, dtype)
        return self.storages[key]


def read_pickle(data: bytes, path: Path) -> dict[str, PickledTensor]:
    """The tensors a pickle describes by name, nested names joined by dots. Raises WeightsError; runs nothing."""
    if len(data) > MAX_PICKLE:
        raise WeightsError(f"{path}: a pickle of {len(data):,} bytes, at most {MAX_PICKLE:,} are read")
    with _refusing(path):
        return _tensors(_Unpickler(_Source(data)).load())


def read_legacy(data: bytes, path: Path) -> tuple[dict[str, PickledTensor], list[tuple[str, torch.dtype]], int]:
    """From before torch 1.6: the tensors, their storages in the order of the file, and where the first of them begins.

    data: the beginning of the file, which is a mark, a number, a table of sizes, the tensors and the storages' names.
    """
    source = _Source(data)
    with _refusing(path):
        if _Unpickler(source).load() != LEGACY:
            raise WeightsError("no file of torch's")
        _Unpickler(source).load(), _Unpickler(source).load()
        reader = _Unpickler(source)
        tensors, keys = _tensors(reader.load()), _Unpickler(source).load()
        return tensors, [(key, reader.storages[key].dtype) for key in keys], source.tell()


def _tensors(content: Any) -> dict[str, PickledTensor]:
    return dict(_named(_unwrapped(content), "", set()))


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except WeightsError as error:
        advice = "do not open it with anything else; get the .safetensors of the same weights"
        raise WeightsError(f"{path}: not a plain file of tensors ({error}); {advice}") from None
    except Exception as error:  # a damaged pickle ends in any of a dozen types, whose text may be of any length
        raise WeightsError(f"{path}: damaged or cut short ({type(error).__name__})") from error


def _put(table: Any, items: list) -> None:
    """Key, value, key, value, ... into a table; nothing that is no table is filled."""
    if isinstance(table, dict):
        pairs = zip(items[::2], items[1::2], strict=True)
        table.update((key, value) for key, value in pairs if type(key) in (str, int))


def _ordered(pairs: Any = ()) -> OrderedDict:
    """As old files have it, with its items as an argument."""
    table = OrderedDict()
    _put(table, [part for pair in pairs for part in pair])
    return table


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> PickledTensor:
    shape, stride = tuple(shape), tuple(stride)
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or len(shape) > MAX_AXES:
        raise WeightsError("a tensor without its storage")
    numbers = [offset, *shape, *stride]
    if not all(type(n) is int and 0 <= n < MAX_EXTENT for n in numbers):
        raise WeightsError(f"a tensor of an impossible shape, of {len(shape)} axes")
    return PickledTensor(storage.key, storage.dtype, offset, shape, stride)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _unwrapped(content: Any) -> Any:
    """The table of weights inside what a trainer saved, with that of averaged ones in it where there are both."""
    averaged = {}
    for _ in range(MAX_WRAPPERS):
        if _is_wrapper(content):
            tables = [content[name] for name in AVERAGED if isinstance(content.get(name), Mapping)]
            tables += [table[name] for table in tables for name in WRAPPERS if name in table]
            table = next(filter(_is_table, tables), None)
            averaged = averaged or ({"ema": table} if table else {})
            content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), content)
    return {**content, **averaged} if averaged and _is_table(content) else averaged or content


def _is_wrapper(content: Any) -> bool:
    return isinstance(content, Mapping) and not _is_table(content)


def _is_table(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(value, PickledTensor) for value in content.values())


def _named(content: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, PickledTensor]]:
    if isinstance(content, PickledTensor):
        if len(prefix) > MAX_NAME or not prefix.isprintable():
            raise WeightsError(f"a tensor named {prefix[:40]!r}")
        yield prefix or "tensor", content
    elif isinstance(content, Mapping) and id(content) not in seen:
        seen.add(id(content))
        if len(content) > MAX_TENSORS:
            raise WeightsError(f"{len(content):,} entries, at most {MAX_TENSORS:,} are read")
        for name, value in content.items():
            yield from _named(value, f"{prefix}.{name}"[:ROOM] if prefix else str(name)[:ROOM], seen)
