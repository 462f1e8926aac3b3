"""Text -> CLIP's token ids: lower-cased byte pairs (arXiv:2103.00020, §2.4), read from a published vocabulary.

All CLIP and OpenCLIP text encoders share one vocabulary of 49,408 ids; only what they pad with differs.
"""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.io.files import read_bytes
from ldm.io.text import decode_text, parse_json
from ldm.utils.errors import DataError, WeightsError

BOS, EOS = SPECIAL = ("<|startoftext|>", "<|endoftext|>")
LENGTH = 77  # tokens that CLIP sees at once, BOS and EOS included
ROOM = LENGTH - 2
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_MAX_BYTES = 1 << 25  # of a vocabulary; the published ones have 1 to 2 MB
_CACHED_TEXTS = 65536

log = logging.getLogger(__name__)


class CLIPTokenizer:
    """An immutable vocabulary: id by token, merges of byte pairs, and tokens added after training, read as one each.

    Deviation: OpenAI's program repairs broken Unicode and HTML entities first; this one, as published tokenizer.json
    files do, only composes accents (NFC). Raises WeightsError when the parts are not CLIP's.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Sequence[str] = ()):
        if not isinstance(vocab, Mapping) or not all(token in vocab for token in SPECIAL):
            raise WeightsError(f"vocabulary without {' and '.join(SPECIAL)}; give that of a CLIP model")
        self.backend = _backend(vocab, merges, added)
        self.bos, self.eos = (vocab[token] for token in SPECIAL)
        self._warned = False
        # Prompts come again: a dictionary look-up instead of a tokenisation.
        self._ids = functools.lru_cache(_CACHED_TEXTS)(self._tokenize)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def __reduce__(self):
        return CLIPTokenizer.from_json, (self.to_json(),)

    def encode(self, texts: Sequence[str], pad: int | None = None, chunks: int = 1) -> Tensor:
        """Texts -> ids (B chunks 77) int64: each chunk is BOS, up to 75 tokens, EOS, then `pad` (None: EOS).

        A text too long for its chunks loses its last words; the first such text is logged. Raises DataError for what
        is not text.
        """
        pad = self.eos if pad is None else pad
        rows = [self._row(text, pad, chunks) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), chunks, LENGTH)

    def chunks(self, texts: Sequence[str]) -> int:
        """Chunks of 75 tokens that the longest of the texts needs."""
        return max((-(-len(self._ids(text)) // ROOM) for text in texts), default=1) or 1

    def to_json(self) -> str:
        """The file format of the `tokenizers` library: `from_json` reads it back."""
        return self.backend.to_str()

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer.json") -> "CLIPTokenizer":
        """The vocabulary, the merges and the added tokens of a tokenizer.json; its other settings are CLIP's anyway.

        Published ones for OpenCLIP mark "!", their padding, as a special token; here it stays punctuation.
        """
        table = parse_json(text, name, WeightsError)
        try:
            vocab, merges = table["model"]["vocab"], table["model"]["merges"]
            pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
            added = {token["id"]: token["content"] for token in table.get("added_tokens", ())}
        except (KeyError, TypeError, AttributeError):
            raise WeightsError(f"{name}: holds no byte-pair vocabulary; give the tokenizer of a CLIP model") from None
        return cls(vocab, pairs, [added[index] for index in sorted(added) if index >= len(vocab)])

    def _row(self, text: str, pad: int, chunks: int) -> list[int]:
        ids, row = self._ids(text), []
        if len(ids) > chunks * ROOM and not self._warned:
            self._warned = True
            needed = self.chunks([text])
            log.warning(
                f"prompt of {len(ids)} tokens cut to {chunks * ROOM}, {text[:40]!r}...; chunks={needed} keeps it whole"
            )
        for start in range(0, chunks * ROOM, ROOM):
            part = [self.bos, *ids[start : min(start + ROOM, chunks * ROOM)], self.eos]
            row += part + [pad] * (LENGTH - len(part))
        return row

    def _tokenize(self, text: str) -> tuple[int, ...]:
        if not isinstance(text, str):
            raise DataError(f"caption {text!r} is {type(text).__name__}, expected text; use '' where there is none")
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)


def read_clip_tokenizer(path: str | os.PathLike) -> CLIPTokenizer:
    """From a folder with vocab.json and merges.txt, or with a tokenizer.json, or from that file itself.

    Raises DataError for files that cannot be read, WeightsError for those that hold something else.
    """
    path = Path(path)
    if (path / "vocab.json").is_file():
        vocab = parse_json(_text(path / "vocab.json"), str(path / "vocab.json"), WeightsError)
        lines = _text(path / "merges.txt").split("\n")
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        return CLIPTokenizer(vocab, merges)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(f"{path}: no vocabulary there; expected vocab.json and merges.txt, or tokenizer.json")
    return CLIPTokenizer.from_json(_text(file), str(file))


def _text(path: Path) -> str:
    return decode_text(read_bytes(path, max_bytes=_MAX_BYTES), str(path))


def _backend(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Sequence[str]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    try:
        backend = Tokenizer(models.BPE(dict(vocab), list(merges), unk_token=EOS, end_of_word_suffix="</w>"))
    except Exception as error:  # the library raises plain Exception
        raise WeightsError(f"vocabulary and merges do not fit ({error}); take both from one CLIP model") from None
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.add_special_tokens(list(SPECIAL))
    backend.add_tokens([AddedToken(token, normalized=True) for token in added])
    return backend
