"""Text -> CLIP's token ids: lower-cased byte pairs (arXiv:2103.00020, §2.4), read from a published vocabulary.

All CLIP and OpenCLIP text encoders share one vocabulary of 49,408 ids; only what they pad with differs.
"""

import functools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldm.io.files import read_bytes, read_gzip
from ldm.io.text import decode_text, parse_json
from ldm.utils.errors import DataError, WeightsError, in_a_line

BOS, EOS = SPECIAL = ("<|startoftext|>", "<|endoftext|>")
LENGTH = 77  # tokens that CLIP sees at once, BOS and EOS included
ROOM = LENGTH - 2
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
PUBLISHED = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's file
MERGES = 48894  # of its lines: 2 x 256 bytes + merges + 2 marks = 49,408 ids
PACKAGES = ("clip", "open_clip")  # which bring that file
SNAPSHOTS = (  # folders of the Hugging Face cache with the same vocabulary in another form
    "models--openai--clip-vit-*/snapshots/*",
    "models--laion--CLIP-ViT-*/snapshots/*",
    "models--*stable-diffusion*/snapshots/*/tokenizer",
)
_MAX_BYTES = 1 << 25  # of a vocabulary; the published ones have 1 to 2 MB
_CACHED_TEXTS = 65536

log = logging.getLogger(__name__)
T = TypeVar("T")


class CLIPTokenizer:
    """An immutable vocabulary: id by token, merges of byte pairs, and tokens added after training, read as one each.

    Deviation: OpenAI's program repairs broken Unicode and HTML entities first; this one, as published tokenizer.json
    files do, only composes accents (NFC). Raises WeightsError when the parts are not CLIP's.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Sequence[str] = ()):
        if not isinstance(vocab, Mapping) or not all(type(vocab.get(token)) is int for token in SPECIAL):
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
        rows = [self.frame(self.ids(text), chunks, pad) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), chunks, LENGTH)

    def ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a text alone, however many. Raises DataError for what is not text."""
        if not isinstance(text, str):
            raise DataError(f"caption {text!r} is {type(text).__name__}, expected text; use '' where there is none")
        return self._ids(text)

    def frame(self, ids: tuple[int, ...], chunks: int, pad: int) -> tuple[int, ...]:
        """Ids -> 77 for each of `chunks`. What does not fit is lost, and the first such text is logged."""
        if len(ids) > (room := chunks * ROOM) and not self._warned:
            self._warned = True
            lost = self.backend.decode(ids[room : room + 20])
            log.warning(
                f"prompt of {len(ids)} tokens cut to {room}, lost {lost[:60]!r}...; "
                f"{chunks_for([len(ids)])} chunks of {ROOM} hold it all"
            )
        return frame(ids, chunks, self.bos, self.eos, pad)

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
            added = {int(token["id"]): str(token["content"]) for token in table.get("added_tokens", ())}
            known = len(vocab)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise WeightsError(f"{name}: holds no byte-pair vocabulary; give the tokenizer of a CLIP model") from None
        return cls(vocab, pairs, [added[index] for index in sorted(added) if index >= known])

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)


def chunks_for(lengths: Iterable[int]) -> int:
    """Chunks of 75 tokens that hold the longest of these texts; at least one."""
    return max((-(-length // ROOM) for length in lengths), default=1) or 1


def frame(items: Sequence[T], chunks: int, first: T, last: T, pad: T) -> tuple[T, ...]:
    """Per chunk: first, up to 75 items, last, then `pad` up to 77."""
    row: list[T] = []
    for start in range(0, chunks * ROOM, ROOM):
        part = [first, *items[start : start + ROOM], last]
        row += part + [pad] * (LENGTH - len(part))
    return tuple(row)


def read_clip_tokenizer(path: str | os.PathLike | None = None) -> CLIPTokenizer:
    """From a folder with vocab.json and merges.txt or a tokenizer.json, from that file, or from OpenAI's .txt.gz.

    Single-file checkpoints bring no vocabulary; without a path it is looked for on this machine (`find_vocabulary`).
    Raises DataError for files that cannot be read, WeightsError for those that hold something else.
    """
    path = Path(path) if path is not None else find_vocabulary()
    if path.suffix == ".gz":
        return _read_published(path)
    if (path / "vocab.json").is_file():
        vocab = parse_json(_text(path / "vocab.json"), str(path / "vocab.json"), WeightsError)
        if not isinstance(vocab, dict):
            raise WeightsError(f"{path / 'vocab.json'}: holds a JSON {type(vocab).__name__}, expected ids by token")
        lines = _text(path / "merges.txt").split("\n")
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        return CLIPTokenizer(vocab, merges, _added(path / "added_tokens.json", len(vocab)))
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(f"{path}: no vocabulary there; expected vocab.json and merges.txt, or tokenizer.json")
    return CLIPTokenizer.from_json(_text(file), str(file))


def _added(path: Path, known: int) -> list[str]:
    """Tokens beyond the vocabulary, in the order of their ids, where a folder names any."""
    table = parse_json(_text(path), str(path), WeightsError) if path.is_file() else {}
    if not isinstance(table, dict) or not all(isinstance(index, int) for index in table.values()):
        raise WeightsError(f"{path}: expected a table of tokens and their ids")
    return sorted((token for token, index in table.items() if index >= known), key=table.get)


def find_vocabulary() -> Path:
    """CLIP's vocabulary as an installed package or the Hugging Face cache holds it. Raises WeightsError."""
    for package in PACKAGES:
        spec = find_spec(package)  # found, not imported
        for folder in (spec.submodule_search_locations if spec else None) or ():
            if (path := Path(folder) / PUBLISHED).is_file():
                return _found(path)
    for pattern in SNAPSHOTS:
        for folder in sorted(_hub().glob(pattern)):
            if (folder / "merges.txt").is_file() or (folder / "tokenizer.json").is_file():
                return _found(folder)
    raise WeightsError(
        "the weights bring no vocabulary and none was found here; pip install clip-anytorch, or give tokenizer=PATH "
        f"(vocab.json with merges.txt, tokenizer.json, or {PUBLISHED})"
    )


def _found(path: Path) -> Path:
    log.info(f"CLIP's vocabulary: {path}")
    return path


def _hub() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _read_published(path: Path) -> CLIPTokenizer:
    """A heading, then one merge a line, of which CLIP uses the first; bytes, bytes that end a word, merges, marks."""
    lines = decode_text(read_gzip(path, max_bytes=_MAX_BYTES), str(path)).split("\n")[1 : MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    if len(merges) < MERGES or any(len(pair) != 2 for pair in merges):
        raise WeightsError(f"{path}: holds no {MERGES:,} merges of two parts each; expected OpenAI's {PUBLISHED}")
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), *SPECIAL]
    return CLIPTokenizer({token: index for index, token in enumerate(tokens)}, merges)


def _byte_letters() -> list[str]:
    """A visible character for each byte: itself where it is one, else those from U+0100 on; in the order of ids."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]


def _text(path: Path) -> str:
    return decode_text(read_bytes(path, max_bytes=_MAX_BYTES), str(path))


def _backend(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Sequence[str]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        backend = Tokenizer(models.BPE(dict(vocab), list(merges), unk_token=EOS, end_of_word_suffix="</w>"))
    except Exception as error:  # the library raises plain Exception
        problem = f"vocabulary and merges do not fit ({in_a_line(error)})"
        raise WeightsError(f"{problem}; take both from one CLIP model") from None
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    backend.add_special_tokens(list(SPECIAL))
    backend.add_tokens([AddedToken(token, normalized=True) for token in added])
    return backend
