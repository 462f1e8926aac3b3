"""Text -> T5's token ids: unigram pieces (arXiv:1804.10959), from a published `spiece.model` or `tokenizer.json`.

T5 v1.1 has 32,000 pieces and 100 marks for gaps, mT5 250,100 of both. There is no mark for the beginning; ids of all
these models: padding 0, end 1, unknown 2.
"""

import base64
import binascii
import functools
import logging
import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.io.files import read_bytes
from ldm.io.text import decode_text, parse_json
from ldm.utils.errors import DataError, WeightsError, in_a_line, reading

PAD, EOS = "<pad>", "</s>"
GAPS = tuple(f"<extra_id_{i}>" for i in reversed(range(100)))  # what T5 learnt to fill; in mT5 among the pieces
FILES = ("tokenizer.json", "spiece.model")
UNIGRAM = 1  # of ModelProto's kinds of model
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of its kinds of pieces; 1 is an ordinary one
_MAX_BYTES = 1 << 26  # of a vocabulary: mT5's has 4 MB, as JSON 16 MB
_CACHED_TEXTS = 65536

log = logging.getLogger(__name__)


class T5Tokenizer:
    """An immutable vocabulary: pieces with their log-probabilities, the row of the unknown one, those that are
    `special` (found in a text before all else; new ones get the next ids), the table that normalises characters.

    Raises WeightsError when the parts are not a T5's.
    """

    def __init__(
        self, vocab: Sequence[tuple[str, float]], unknown: int, special: Sequence[str] = (), charsmap: bytes = b""
    ):
        self.backend = _backend(vocab, unknown, special, charsmap)
        self.pad_id, self.eos = (self.backend.token_to_id(token) for token in (PAD, EOS))
        if self.pad_id is None or self.eos is None:
            raise WeightsError(f"vocabulary without {PAD} and {EOS}; give that of a T5 model")
        self._warned = False
        self._tokens = functools.lru_cache(_CACHED_TEXTS)(self._tokenize)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def __reduce__(self):
        return T5Tokenizer.from_json, (self.to_json(),)

    def encode(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Texts -> ids (B length) int64 and mask (B length), True = a token: each is cut, ended and padded."""
        return self.pad([self.ids(text, length) for text in texts], length)

    def ids(self, text: str, length: int) -> tuple[int, ...]:
        """At most `length` tokens, the last EOS; the first text cut is logged. DataError for what is not text."""
        if not isinstance(text, str):
            raise DataError(f"caption {text!r} is {type(text).__name__}, expected text; use '' where there is none")
        ids = self._tokens(text)
        if len(ids) > (room := length - 1) and not self._warned:
            self._warned = True
            lost = self.backend.decode(ids[room : room + 20])
            log.warning(f"prompt of {len(ids) + 1} tokens cut to {length}, lost {lost[:60]!r}...; shorten it")
        return (*ids[:room], self.eos)

    def pad(self, rows: Sequence[tuple[int, ...]], length: int) -> tuple[Tensor, Tensor]:
        """Rows of ids -> ids and mask (B length)."""
        ids = [[*row, *[self.pad_id] * (length - len(row))] for row in rows]
        used = torch.tensor([len(row) for row in rows], dtype=torch.int64)[:, None]  # B 1
        return torch.tensor(ids, dtype=torch.int64).view(len(rows), length), torch.arange(length) < used

    def to_json(self) -> str:
        """The file format of the `tokenizers` library: `from_json` reads it back."""
        return self.backend.to_str()

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer.json") -> "T5Tokenizer":
        """The pieces, the special tokens and the normalisation of a tokenizer.json; its other settings are T5's anyway.

        Raises WeightsError.
        """
        table = parse_json(text, name, WeightsError)
        try:
            vocab = [(piece, float(score)) for piece, score in table["model"]["vocab"]]
            unknown = table["model"]["unk_id"]
            special = {int(token["id"]): str(token["content"]) for token in table.get("added_tokens", ())}
            charsmap = base64.b64decode(_find(table.get("normalizer"), "precompiled_charsmap") or "")
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
            raise WeightsError(f"{name}: holds no unigram vocabulary; give the tokenizer of a T5 model") from None
        tokenizer = cls(vocab, unknown, [special[index] for index in sorted(special)], charsmap)
        if moved := [token for index, token in special.items() if tokenizer.backend.token_to_id(token) != index]:
            raise WeightsError(f"{name}: the id of {moved[0]!r} is not where its place is; fetch the file again")
        return tokenizer

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)


def read_t5_tokenizer(path: str | os.PathLike | None = None) -> T5Tokenizer:
    """From a folder with tokenizer.json or spiece.model, or from such a file.

    Raises DataError for a file that cannot be read, WeightsError for one that holds something else, and without a path.
    """
    if path is None:
        raise WeightsError(
            f"no vocabulary of T5 was given; set tokenizer.path to a folder with {' or '.join(FILES)}, such as that of "
            "google/t5-v1_1-xxl"
        )
    path = Path(path)
    file = next((path / name for name in FILES if (path / name).is_file()), path)
    if not file.is_file():
        raise WeightsError(f"{path}: no vocabulary there; expected {' or '.join(FILES)}")
    data = read_bytes(file, max_bytes=_MAX_BYTES)
    if file.suffix == ".json":
        return T5Tokenizer.from_json(decode_text(data, str(file)), str(file))
    with reading(file, "not the SentencePiece model of a T5; fetch the file again", WeightsError):
        return _parse_model(data)


def _parse_model(data: bytes) -> T5Tokenizer:
    """SentencePiece's ModelProto. Read of it: the pieces, the kind of model, the table of characters."""
    vocab, kinds, charsmap = [], [], b""
    for field, value in _fields(data):
        if field == 1:  # SentencePiece: piece, score, type
            piece = dict(_fields(value))
            vocab.append((piece[1].decode() if 1 in piece else "", struct.unpack("<f", piece.get(2, bytes(4)))[0]))
            kinds.append(piece.get(3, 1))
        elif field == 2 and (kind := dict(_fields(value)).get(3, UNIGRAM)) != UNIGRAM:  # TrainerSpec: model_type
            raise ValueError(f"model type {kind}, expected {UNIGRAM}: unigram")
        elif field == 3:  # NormalizerSpec: precompiled_charsmap
            charsmap = dict(_fields(value)).get(2, b"")
    if kinds.count(UNKNOWN) != 1:
        raise ValueError(f"{len(kinds)} pieces, {kinds.count(UNKNOWN)} of them for the unknown, expected 1")
    special = [piece for (piece, _), kind in zip(vocab, kinds, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    has_gaps = any(piece.endswith(GAPS[-1]) for piece, _ in vocab)
    return T5Tokenizer(vocab, kinds.index(UNKNOWN), special if has_gaps else [*special, *GAPS], charsmap)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffers message: whole numbers as int, all else as bytes. Raises ValueError."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind} at byte {position}")
        size, position = _varint(data, position) if kind == 2 else ({1: 8, 5: 4}[kind], position)
        if position + size > len(data):
            raise ValueError(f"{position + size - len(data)} bytes are missing at its end")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A whole number of up to 64 bits, seven in a byte, the lowest first; and the position behind it."""
    number = 0
    for i, byte in enumerate(data[position : position + 10]):
        number |= (byte & 127) << 7 * i
        if byte < 128:
            return number, position + i + 1
    raise ValueError(f"a number without end at byte {position}")


def _find(node: Any, key: str) -> Any:
    """The value of a key in nested objects of JSON, or None."""
    if isinstance(node, dict) and key in node:
        return node[key]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next((found for child in children if (found := _find(child, key)) is not None), None)


def _backend(vocab: Sequence[tuple[str, float]], unknown: int, special: Sequence[str], charsmap: bytes) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if not all(math.isfinite(score) for _, score in vocab):
        raise WeightsError("vocabulary with a score that is no number; fetch the tokenizer again")
    try:
        backend = Tokenizer(models.Unigram(list(vocab), unknown, byte_fallback=False))
        if charsmap:
            _check_charsmap(charsmap)
            backend.normalizer = normalizers.Precompiled(charsmap)
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    except Exception as error:  # the library raises plain Exception
        raise WeightsError(f"vocabulary cannot be used ({in_a_line(error)}); fetch the tokenizer again") from None
    spaces = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    backend.decoder = decoders.Metaspace(**spaces)
    return backend


def _check_charsmap(charsmap: bytes) -> None:
    """Its size, a trie as a double array of 32-bit units, texts for its leaves: all links must lead inside, since the
    library follows them unchecked. Raises ValueError.
    """
    size = int.from_bytes(charsmap[:4], "little")
    texts = charsmap[4 + size :]
    if not size or size % 1024 or not texts:  # units come in blocks of 256, so that any byte finds one
        raise ValueError(f"table of characters: {len(charsmap)} bytes with a trie of {size}")
    units = torch.frombuffer(bytearray(charsmap[4 : 4 + size]), dtype=torch.int32).long() & 0xFFFFFFFF
    is_leaf = units >> 31 == 1
    children = torch.arange(len(units)) ^ (units >> 10 << ((units >> 6) & 8))
    starts = (units[is_leaf] & 0x7FFFFFFF).tolist()
    inside = all(start < len(texts) and texts[start] & 0xC0 != 0x80 for start in starts)  # at a whole character
    if (children[~is_leaf] >= len(units)).any() or not inside:
        raise ValueError("table of characters: a link leads out of it")
