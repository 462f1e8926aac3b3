"""Ways to damage files of one kind or another, for `fuzz.py`: each takes good content and a source of chance."""

import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Damage = Callable[[Path, random.Random], None]
ODD = [
    None, True, -1, 0, 1, 3, 65536, 10**12, 2**63, 10**40, 1.5, -0.0, 1e300, float("inf"), float("nan"), "", "x", "\0",
    "../../x", "${oc.env:HOME}", "???", "é" * 300, "os.system", "2001-01-01", [], {}, [[]], [1, "x"], {"": {}},
    {"_target_": "os.system"},
]  # fmt: skip
LIMITS = [0, 1, 0x7F, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
YAML_TRAPS = [
    "&a [*a]", "*b", "!!timestamp x", "!!int ''", "!!bool x", "!!binary x", "!!set {a, b}", "!!omap [a: 1]",
    "2001-13-45", "!!python/object/apply:os.system [x]", "1:61:61", "0x", ".inf", "<<: 3", "? [a]\n: b", "{" * 300,
    "- " * 300, "'", "|\n x", "%YAML 9.9", "---\n---", "\t", "!!float ''", "9" * 5000, "=", "~: ~", "&a {x: 1}",
]  # fmt: skip
OPERATIONS = [
    b"}", b"]", b")", b"(", b"2", b"0", b"1", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"s", b"u", b"a", b"e", b"Q",
    b"K\x01", b"M\xff\xff", b"\x8a\xff" + b"\xff" * 255, b"X\x01\0\0\0a", b"N", b"\x88", b"\x8f", b"\x90", b"\x91",
    b"\x96" + struct.pack("<Q", 1 << 34), b"\x8e" + struct.pack("<Q", 1 << 60), b"B\xff\xff\xff\x7f", b"\x81", b"\x92",
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"h\0",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"})" + b"2\x86" * 40 + b"K\x01s", b"(" + b"2\x86" * 60, b"\x82\x01",
    b")" + b"2\x86" * 50 + b"\x85\x91", b"]" * 5000, b"(" * 3000 + b"t" * 3000, b"I" + b"9" * 5000 + b"\n", b"p0\n",
]  # fmt: skip


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes: flipped, cut, repeated, overwritten with numbers that are limits."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(out) + 1), rng.choice([1, 2, 4, 8, 64, 1000])
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + length]
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            out[at:at] = out[at : at + length] * rng.choice([1, 2, 100])
        elif kind == 4:
            out[at : at + length] = rng.randbytes(length)
        else:
            out[at : at + 8] = struct.pack(rng.choice("<>") + "Q", rng.choice(LIMITS))
    return bytes(out)


def spoilt_value(value: Any, rng: random.Random) -> Any:
    """A JSON value with one to three entries anywhere replaced, left out, renamed or repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return odd(rng)
        node, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind < 5:
            node[key] = odd(rng)
        elif kind == 5:
            del node[key]
        elif isinstance(node, dict):
            node[rng.choice([str(key) + "x", "", *map(str, node)])] = node[key] if kind == 6 else node.pop(key)
        else:
            node += node[: rng.randrange(50)] * rng.choice([1, 50])
        value = json.loads(json.dumps(value))  # nothing is in two places, of which one might be in the other
    return value


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(items):
        yield node, key
        yield from _places(child)


def odd(rng: random.Random) -> Any:
    """A value that nobody expects, of its own."""
    value = json.loads(json.dumps(rng.choice(ODD)))
    for _ in range(rng.choice([0] * 20 + [1, 2, 40, 200])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def spoilt_text(text: str, rng: random.Random) -> bytes:
    """JSON with an entry changed, or its text with bytes changed."""
    if rng.random() < 0.25:
        return spoilt(text.encode(), rng)
    return json.dumps(spoilt_value(json.loads(text), rng)).encode()


def spoilt_yaml(text: str, rng: random.Random) -> bytes:
    """YAML's own traps put into lines, or what JSON allows."""
    if rng.random() < 0.4:
        return spoilt_text(text, rng)
    lines = [f"{key}: {json.dumps(value)}" for key, value in json.loads(text).items()]
    for _ in range(rng.randint(1, 3)):
        at, trap = rng.randrange(len(lines)), rng.choice(YAML_TRAPS)
        lines[at] = rng.choice([f"{lines[at].split(':')[0]}: {trap}", trap, lines[at] + trap, trap + lines[at]])
    return "\n".join(lines).encode()


def only(name: str, change: Callable[[bytes, random.Random], bytes]) -> Damage:
    """Damage to one file of a folder; `name` may be a pattern."""

    def damage(folder: Path, rng: random.Random) -> None:
        path = rng.choice(sorted(path for path in folder.rglob(name) if path.is_file()))
        path.write_bytes(change(path.read_bytes(), rng))

    return damage


def texts(*names: str, change: Callable[[str, random.Random], bytes] = spoilt_text) -> Damage:
    """Damage to one of some text files."""

    def damage(folder: Path, rng: random.Random) -> None:
        path = folder / rng.choice(names)
        path.write_bytes(change(path.read_text(), rng))

    return damage


def spoilt_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Its table changed and fitted in again, or bytes of it."""
    if rng.random() < 0.3:
        head = 8 + struct.unpack("<Q", data[:8])[0]
        return spoilt(data[:head], rng) + data[head:]
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    if rng.random() < 0.1:
        name = rng.choice(list(table))
        table[name] = {"dtype": "F32", "shape": [1] * rng.choice([9, 10**4, 10**5]), "data_offsets": [0, 4]}
    header = json.dumps(spoilt_value(table, rng)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def spoilt_pickle(data: bytes, rng: random.Random) -> bytes:
    """Operations put into a pickle or taken out of it; or bytes."""
    if rng.random() < 0.3:
        return spoilt(data, rng)
    starts = [position for _, _, position in pickletools.genops(data)]
    for _ in range(rng.randint(1, 4)):
        at = rng.choice(starts)
        data = data[:at] + rng.choice(OPERATIONS) * rng.choice([1, 1, 1, 2, 30]) + data[at + rng.choice([0, 0, 1, 5]) :]
    return data


def spoilt_archive(data: bytes, rng: random.Random) -> bytes:
    """A zip with its pickle or an entry changed, or packed; or bytes."""
    if rng.random() < 0.3:
        return spoilt(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = rng.choice([*names, *[name for name in names if name.endswith("data.pkl")] * len(names)])
        for name in names:
            content = old.read(name)
            if name == chosen:
                content = spoilt_pickle(content, rng) if name.endswith(".pkl") else rng.choice(_ENTRIES)(content, rng)
            packed = name == chosen and rng.random() < 0.1
            new.writestr(name, content, rng.choice([8, 12, 14]) if packed else 0)
    return out.getvalue()


_ENTRIES = [spoilt, lambda data, rng: b"", lambda data, rng: bytes(rng.choice([10, 1 << 20, 1 << 26]))]
