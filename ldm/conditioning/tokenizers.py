"""Captions -> token ids, with a vocabulary learnt from the training captions and kept in the checkpoint as JSON.

Two kinds share one class: whole words (`train_words`: small closed worlds) and byte pairs (`train_bpe`,
arXiv:1508.07909, over bytes: no word is unknown). Both lower-case, and frame every text as BOS ... EOS.
"""

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.utils.errors import CheckpointError, DataError, in_a_line

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

PAD, UNK, BOS, EOS = SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")
_CACHED_TEXTS = 65536

log = logging.getLogger(__name__)


class Tokenizer:
    """An immutable vocabulary. `backend` is a `tokenizers.Tokenizer` that knows the four special tokens."""

    def __init__(self, backend: "Backend"):
        self.backend = backend
        self.backend.encode_special_tokens = True  # "[PAD]" in a caption is five ordinary characters
        self.pad, self.unk, self.bos, self.eos = (backend.token_to_id(token) for token in SPECIAL)
        # Captions come again every epoch: a dictionary look-up instead of a tokenisation.
        self._ids = functools.lru_cache(_CACHED_TEXTS)(self._tokenize)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def __reduce__(self):
        return Tokenizer.from_json, (self.to_json(),)

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Texts -> ids (B L int64) and mask (B L bool, True = a token), L = max_length whatever the texts.

        A fixed length costs little at the sizes used here, compiles once, and makes text k of a batch the text alone.
        A longer text loses its last words, never its EOS. Raises DataError for what is not text.
        """
        rows = [self._ids(text, max_length) for text in texts]
        ids = torch.tensor(rows, dtype=torch.int64).view(len(rows), max_length)  # B L
        return ids, ids != self.pad

    def to_json(self) -> str:
        """The file format of the `tokenizers` library: `from_json` reads it back."""
        return self.backend.to_str()

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Raises CheckpointError when the text is not a tokenizer of ours."""
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(text)
            backend.encode("\N{SNOWMAN}")  # a vocabulary without its unknown token fails only when it meets one
        except Exception as error:  # the library raises plain Exception
            problem = f"tokenizer.json cannot be read ({in_a_line(error)})"
            raise CheckpointError(f"{problem}; take it from a whole checkpoint") from None
        if lacking := [token for token in SPECIAL if backend.token_to_id(token) is None]:
            raise CheckpointError(f"tokenizer.json lacks {', '.join(lacking)}; expected one saved by this project")
        return cls(backend)

    def _tokenize(self, text: str, max_length: int) -> tuple[int, ...]:
        if not isinstance(text, str):
            raise DataError(f"caption {text!r} is {type(text).__name__}, expected text; use '' where there is none")
        encoding = self.backend.encode(text, add_special_tokens=False)
        self._warn(text, encoding, max_length)
        ids = [self.bos, *encoding.ids[: max_length - 2], self.eos]
        return (*ids, *[self.pad] * (max_length - len(ids)))

    def _warn(self, text: str, encoding: "Encoding", max_length: int) -> None:
        if len(encoding.ids) > max_length - 2:
            lost = text[encoding.offsets[max_length - 2][0] :].strip()
            _warn_once("cut", f"caption cut to {max_length} tokens, lost {lost!r}; raise max_length to keep such words")
        if self.unk in encoding.ids:
            start, stop = encoding.offsets[encoding.ids.index(self.unk)]
            _warn_once("unknown", f"word {text[start:stop]!r} was not in the training captions; it is read as {UNK}")


def train_words(captions: Iterable[str], vocab_size: int = 4096, min_frequency: int = 1) -> Tokenizer:
    """One token per word or punctuation mark, the most frequent first (ties by spelling, so the order is fixed)."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.WordLevel(unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=list(SPECIAL), show_progress=False
    )
    return _train(backend, trainer, captions)


def train_bpe(captions: Iterable[str], vocab_size: int = 4096, min_frequency: int = 2) -> Tokenizer:
    """Byte-level BPE: frequent words become one token, any other is spelt in pieces. vocab_size >= 260 (256 bytes)."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE(unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    return _train(backend, trainer, captions)


def _train(backend: "Backend", trainer, captions: Iterable[str]) -> Tokenizer:
    from tokenizers import normalizers

    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise DataError("no captions to build a tokenizer from; add captions to the data or choose conditioner=none")
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.train_from_iterator(captions, trainer, length=len(captions))
    return Tokenizer(backend)


_warned: set[str] = set()


def _warn_once(kind: str, message: str) -> None:
    """One line of each kind per process: a data set with long captions would print thousands."""
    if kind not in _warned:
        _warned.add(kind)
        log.warning(message)
