"""T5's tokens: rows, cuts, the files a vocabulary comes in, and files that hold none."""

import json
import pickle
import struct

import pytest

from ldm.conditioning.t5_tokenizer import GAPS, T5Tokenizer, read_t5_tokenizer
from ldm.utils.errors import WeightsError

WORDS = ("photo", "cat", "red", "of", "a")
LETTERS = sorted(set("".join(WORDS)) | set("bgs!0"))
KINDS = {"<pad>": 3, "</s>": 3, "<unk>": 2}


def toy_vocabulary():
    """Marks, words with the space before them, the space, letters."""
    pieces = [(f"▁{word}", -2.0 - index) for index, word in enumerate(WORDS)]
    return [*((mark, 0.0) for mark in KINDS), *pieces, ("▁", -6.0), *((letter, -9.0) for letter in LETTERS)]


def toy_charsmap(old="é", new="e"):
    """A trie of one path, the bytes of `old`, whose leaf points at `new`: what SentencePiece compiles for one rule."""
    units, node = [0] * 256 * (len(old.encode()) + 1), 0
    for step, byte in enumerate(old.encode(), start=1):
        units[node] |= (node ^ 256 * step) << 10
        node = 256 * step ^ byte
        units[node] = byte
    units[node] |= (node ^ 256) << 10 | 1 << 8  # a leaf hangs below it, at the first free place
    units[256] = 1 << 31
    return struct.pack(f"<{len(units) + 1}I", 4 * len(units), *units) + new.encode() + b"\0"


def message(*fields):
    """Protocol buffers: (number, int, float, text or bytes)."""
    data = b""
    for number, value in fields:
        if isinstance(value, int):
            data += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            data += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            value = value.encode() if isinstance(value, str) else value
            data += varint(number << 3 | 2) + varint(len(value)) + value
    return data


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def toy_model(vocab=None, charsmap=b"", kind=1):
    pieces = [message((1, piece), (2, score), (3, KINDS.get(piece, 1))) for piece, score in vocab or toy_vocabulary()]
    return message(*((1, piece) for piece in pieces), (2, message((3, kind))), (3, message((1, "toy"), (2, charsmap))))


@pytest.fixture(scope="module")
def tokenizer():
    return T5Tokenizer(toy_vocabulary(), 2, KINDS)


def test_rows_of_tokens(tokenizer):
    index = {piece: i for i, (piece, _) in enumerate(toy_vocabulary())}
    ids, mask = tokenizer.encode(["a  red\tcat ", "", "a猫"], 6)
    assert ids.tolist() == [
        [index["▁a"], index["▁red"], index["▁cat"], 1, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [index["▁a"], 2, 1, 0, 0, 0],
    ]
    assert mask.sum(-1).tolist() == [4, 1, 3] and tokenizer.encode([], 6)[0].shape == (0, 6)
    written = tokenizer.encode(["a<pad>a"], 6)
    assert written[0][0, 1] == 0 and written[1].sum() == 4  # padding that is written is a token as any other


def test_a_text_without_room_is_cut_with_one_line_and_keeps_its_end(tokenizer, caplog):
    fresh = pickle.loads(pickle.dumps(tokenizer))
    ids, mask = fresh.encode(["a cat " * 100, "red " * 100], 10)
    assert mask.all() and ids[:, -1].tolist() == [1, 1]
    lost = ("cat a " * 10)[:60]
    assert [record.message for record in caplog.records] == [
        f"prompt of 201 tokens cut to 10, lost {lost.strip()!r}...; shorten it"
    ]


def test_vocabulary_from_any_of_its_files(tmp_path):
    charsmap = toy_charsmap()
    (tmp_path / "spiece.model").write_bytes(toy_model(charsmap=charsmap))
    first = read_t5_tokenizer(tmp_path)
    assert len(first) == len(toy_vocabulary()) + 100
    assert first.backend.token_to_id("<extra_id_0>") == len(first) - 1  # the last, as published
    assert first.ids("réd <extra_id_99>", 9) == (*first.ids("red", 9)[:-1], len(toy_vocabulary()), 1)
    (tmp_path / "tokenizer.json").write_text(first.to_json(), encoding="utf-8")
    others = [read_t5_tokenizer(tmp_path), read_t5_tokenizer(tmp_path / "spiece.model")]
    others += [read_t5_tokenizer(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(first))]
    for other in others:
        assert other.ids("a réd café photo!", 99) == first.ids("a réd café photo!", 99) and len(other) == len(first)
        assert other.to_json() == first.to_json()


def test_marks_for_gaps_are_added_only_where_they_lack(tmp_path):
    """mT5 has them among its pieces, with a space before each."""
    vocab = [*toy_vocabulary(), *((f"▁{gap}", 0.0) for gap in GAPS)]
    (tmp_path / "spiece.model").write_bytes(toy_model(vocab))
    assert len(read_t5_tokenizer(tmp_path / "spiece.model")) == len(vocab)


def test_what_is_no_vocabulary_is_named(tmp_path):
    model = toy_model(charsmap=toy_charsmap())
    bad = {
        "not the SentencePiece model": [b"", b"\xff" * 20, model[:-1], model[:200], b"version https://git-lfs"],
        "model type 2, expected 1": [toy_model(kind=2)],
        "pieces, 0 of them for the unknown": [message((1, message((1, "a"), (2, 0.0))))],
        "without <pad> and </s>": [message((1, message((1, "a"), (3, 2))))],
        "a score that is no number": [toy_model([*toy_vocabulary(), ("x", float("nan"))])],
        "a trie of": [toy_model(charsmap=b"x" * 9)],
        "leads out of it": [toy_model(charsmap=toy_charsmap().replace(b"\0\0\0\x80", b"\x09\0\0\x80"))],
    }
    for words, models in bad.items():
        for data in models:
            (tmp_path / "spiece.model").write_bytes(data)
            with pytest.raises(WeightsError, match=words):
                read_t5_tokenizer(tmp_path / "spiece.model")
    table = json.loads(T5Tokenizer(toy_vocabulary(), 2, [*KINDS, "<new>"]).to_json())
    vocab = table["model"]["vocab"]
    changes = [{"model": {}}, {"model": {"vocab": {"a": 1}, "unk_id": 0}}, {"model": {"vocab": vocab, "unk_id": 999}}]
    changes += [{"added_tokens": [{"id": 500, "content": "<far>"}]}, {"added_tokens": [3]}, {"model": None}]
    changes += [{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA!"}}]
    for change in changes:
        with pytest.raises(WeightsError):
            T5Tokenizer.from_json(json.dumps(table | change))
    for text in ("[]", "{", "3"):
        with pytest.raises(WeightsError):
            T5Tokenizer.from_json(text)
    with pytest.raises(WeightsError, match="no vocabulary there; expected tokenizer.json or spiece.model"):
        read_t5_tokenizer(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="no vocabulary of T5 was given; set tokenizer.path"):
        read_t5_tokenizer()
