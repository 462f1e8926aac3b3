"""The text encoder of the latent-diffusion paper: a small transformer trained together with the denoiser.

arXiv:2112.10752, §3.3 and Appendix E.2.1: z = TokEmb(y) + PosEmb(y); in each block z += MHSA(LN(z)), z += MLP(LN(z));
a last LN. Attention is bidirectional ("unmasked" in the paper: not causal).
Deviation: padding is masked out, so the embedding of a text does not depend on the length it is padded to; the paper's
tokens are BERT's, ours come from the training captions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.conditioner import Encoder
from ldm.conditioning.tokenizers import Tokenizer
from ldm.nn.attention import SelfAttention
from ldm.nn.feedforward import MLP
from ldm.utils.errors import ConfigError


class Block(nn.Module):
    """Pre-norm transformer block, B L D -> B L D."""

    def __init__(self, width: int, num_heads: int, head_dim: int, mlp_ratio: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads, head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_ratio * width, width, activation=F.gelu)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        z = z + self.attention(self.norm1(z), mask)
        return z + self.mlp(self.norm2(z))


class TextTransformer(Encoder):
    """Captions -> context (B L D) and context_mask (B L bool); with `pooled`, also their masked mean, pooled (B D).

    The empty caption is BOS EOS and so a valid context. Raises ConfigError when head_dim does not divide the width or
    max_length leaves no room for a word.
    """

    field = "caption"
    null = ""

    def __init__(
        self,
        tokenizer: Tokenizer,
        width: int = 128,
        depth: int = 2,
        head_dim: int = 32,
        mlp_ratio: int = 4,
        max_length: int = 16,  # tokens, BOS and EOS included
        pooled: bool = False,
    ):
        super().__init__()
        if width % head_dim:
            raise ConfigError(f"text width {width} is not divisible by head_dim {head_dim}; choose a multiple")
        if max_length < 3:
            raise ConfigError(f"text max_length is {max_length}, expected at least 3: BOS, one word, EOS")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pooled = pooled
        self.dims = {"context_dim": width} | ({"pooled_dim": width} if pooled else {})
        self.tokens = nn.Embedding(len(tokenizer), width)
        self.positions = nn.Parameter(torch.empty(max_length, width))
        self.blocks = nn.ModuleList(Block(width, width // head_dim, head_dim, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.init_weights()

    def init_weights(self) -> None:
        # As strong as the tokens' N(0, 1): with 0.3 it takes twice as long to learn which word belongs to which.
        nn.init.normal_(self.positions)

    def forward(self, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        ids, mask = (x.to(device) for x in self.tokenizer.encode(captions, self.max_length))  # B L, B L
        z = self.tokens(ids) + self.positions  # B L D
        for block in self.blocks:
            z = block(z, mask)
        context = self.norm(z)  # B L D
        cond = {"context": context, "context_mask": mask}
        return cond | ({"pooled": _masked_mean(context, mask)} if self.pooled else {})


def _masked_mean(z: Tensor, mask: Tensor) -> Tensor:
    keep = mask.unsqueeze(-1).to(z.dtype)  # B L 1
    return (z * keep).sum(1) / keep.sum(1)  # B D
