"""The words of a caption as a set: what a classifier of captioned images learns to find."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.conditioning.conditioner import Encoder
from ldm.conditioning.tokenizers import SPECIAL, Tokenizer


class BagOfWords(Encoder):
    """Captions -> words (B K): 1 where the caption has a word of the vocabulary, else 0."""

    field = "caption"
    null = ""

    def __init__(self, tokenizer: Tokenizer, max_length: int = 32):
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.dims = {"num_classes": len(tokenizer) - len(SPECIAL)}

    def forward(self, values: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        ids, _ = self.tokenizer.encode(values, self.max_length)  # B L
        words = torch.zeros(len(ids), len(self.tokenizer)).scatter_(1, ids, 1.0)
        return {"words": words[:, len(SPECIAL) :].to(device)}  # the special tokens come first
