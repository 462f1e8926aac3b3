"""The encoder of T5 v1.1 (arXiv:1910.10683, with the gates of arXiv:2002.05202) and of mT5 (arXiv:2010.11934).

            depth width heads mlp_dim     T5 parameters   mT5 parameters
    small       8   512     6    1024        35,332,800      146,940,608
    base       12   768    12    2048       109,628,544      277,040,256
    large      24  1024    16    2816       341,231,104      564,446,720
    xl         24  2048    32    5120     1,223,527,424    1,669,958,656   mT5: Hunyuan-DiT
    xxl        24  4096    64   10240     4,762,310,656    5,655,173,120   T5: Imagen, IF, PixArt, SD3, FLUX

Every head is 64 wide, whatever the width. The vocabularies have 32,128 and 250,112 rows; all else is the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.captions import clean_caption
from ldm.conditioning.conditioner import Encoder
from ldm.conditioning.memory import Memory
from ldm.conditioning.t5_tokenizer import T5Tokenizer
from ldm.nn.attention import SelfAttention
from ldm.nn.linear import Linear
from ldm.utils.errors import ConfigError

EXACT = 8  # distances with a bucket of their own, 0 to 7; then 8 buckets up to 128, spaced by 16^(1/8) = sqrt(2)
EDGES = (*range(1, EXACT + 1), 12, 16, 23, 32, 46, 64, 91)  # where buckets 1, 2, ... 15 begin
ROUND = 8  # lengths are rounded up to a multiple of it: what matrix units want
MEMORY_BYTES = 1 << 28  # of remembered float32 contexts: 136 texts of 120 tokens from T5-XXL


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467) of the float32 stream, computed there and given in the weight's type."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.float(), self.eps).to(self.weight.dtype)


class RelativeBias(nn.Module):
    """What is added to the scores of every layer, by how far a token is behind or before another: length L -> H L L."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(2 * (len(EDGES) + 1), num_heads))

    def forward(self, length: int) -> Tensor:
        position = torch.arange(length, device=self.table.device)
        return self.table.t()[:, bucket(position - position[:, None])]


def bucket(distance: Tensor) -> Tensor:
    """Row of the table for key - query: 0 to 15 for the query and keys before it, 16 to 31 for keys after it."""
    row = torch.bucketize(distance.abs(), torch.tensor(EDGES, device=distance.device), right=True)
    return row + (distance > 0) * (len(EDGES) + 1)


class GatedMLP(nn.Module):
    """(GELU(x W_0) * x W_1) W_o without biases, Eq. (6) of arXiv:2002.05202: B N D -> B N D."""

    def __init__(self, width: int, mlp_dim: int):
        super().__init__()
        self.wi = Linear(width, 2 * mlp_dim, bias=False)  # W_0, then W_1
        self.wo = Linear(mlp_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.wi(x).chunk(2, dim=-1)  # B N mlp_dim
        gate = F.gelu(gate, approximate="tanh")
        h = gate * value if gate.requires_grad else gate.mul_(value)  # a new tensor only where autograd keeps the gate
        if h.dtype != torch.float16:
            return self.wo(h)
        with torch.autocast(h.device.type, enabled=False):  # what comes out exceeds float16's largest, 65504
            return F.linear(h.float(), self.wo.weight.float())


class Block(nn.Module):
    """Pre-norm transformer block, B N D -> B N D. Its scores are not scaled: that is in the weights of the queries."""

    def __init__(self, width: int, num_heads: int, head_dim: int, mlp_dim: int):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attention = SelfAttention(width, num_heads, head_dim, out_bias=False, scale=1.0)
        self.norm2 = RMSNorm(width)
        self.mlp = GatedMLP(width, mlp_dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class T5Encoder(nn.Module):
    """Ids (B L) and a mask (B L, True = keep) -> hidden states (B L D), normed, of any length.

    The residual stream is float32 in any precision: in trained weights it reaches 3e5, four times float16's largest.
    """

    def __init__(self, width: int, depth: int, num_heads: int, head_dim: int, mlp_dim: int, vocab_size: int = 32128):
        super().__init__()
        self.width = width
        self.tokens = nn.Embedding(vocab_size, width)
        self.position = RelativeBias(num_heads)
        self.blocks = nn.ModuleList(Block(width, num_heads, head_dim, mlp_dim) for _ in range(depth))
        self.norm = RMSNorm(width)
        self.init_weights(head_dim)

    def init_weights(self, head_dim: int) -> None:
        # As T5's training began; the layers inside keep torch's where the size is alike: weights come from a file.
        nn.init.normal_(self.tokens.weight)
        nn.init.normal_(self.position.table, std=self.width**-0.5)
        for block in self.blocks:
            queries = block.attention.qkv.weight.chunk(3)[0]
            nn.init.normal_(queries, std=(self.width * head_dim) ** -0.5)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.tokens(ids).float()  # B L D
        bias = self.position(ids.shape[-1])[None]  # 1 H L L
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], -torch.inf)  # B H L L
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


class T5TextEncoder(Encoder):
    """Captions -> context (B L D) and context_mask (B L), L = `length` tokens with the end mark, whatever the captions.

    mask: T5 does not see the padding. context_mask: nor does the network, which gets a mask, and zeros for the padding;
    without it the network reads what T5 made of the padding. What has been read is remembered (`Memory`).

                 length  mask   context_mask  clean        length  mask   context_mask  clean
        PixArt      120  true   true          true   SD3      256  false  false         false
        its Sigma   300  true   true          true   FLUX     512  false  false         false
        IF           77  true   false         true

    Raises DataError for what is not text, ConfigError for a length below 2 and a tokenizer of another model.
    """

    field = "caption"
    null = ""

    def __init__(
        self,
        network: T5Encoder,
        tokenizer: T5Tokenizer,
        length: int = 120,
        mask: bool = True,
        context_mask: bool = True,
        clean: bool = False,  # captions as PixArt and IF clean theirs
    ):
        super().__init__()
        if length < 2:
            raise ConfigError(f"length is {length}, expected at least 2 tokens: one and the end mark")
        if len(tokenizer) > (rows := network.tokens.num_embeddings):
            raise ConfigError(f"vocabulary of {len(tokenizer)} ids, the network knows {rows}; use its own tokenizer")
        self.network = network
        self.tokenizer = tokenizer
        self.max_length = length
        self.mask = mask
        self.context_mask = context_mask
        self.clean = clean
        self.memory = Memory(max(1, MEMORY_BYTES // (4 * length * network.width)))
        self.dims = {"context_dim": network.width}

    def forward(self, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        if self.clean:
            captions = [clean_caption(text) for text in captions]
        prompts = [self.tokenizer.ids(text, self.max_length) for text in captions]
        how = (self.max_length, self.mask, self.context_mask, device)
        return self.memory.recall(self.network, prompts, lambda new: self._read(new, device), *how)

    def _read(self, prompts: Sequence[tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
        ids, mask = (rows.to(device) for rows in self.tokenizer.pad(prompts, self.max_length))  # B L
        if not (self.mask and self.context_mask):  # all of the padding is read by somebody
            context = self.network(ids, mask if self.mask else None)  # B L D
            return {"context": context, "context_mask": mask} if self.context_mask else {"context": context}
        longest = max(map(len, prompts))
        used = min(-(-longest // ROUND) * ROUND, self.max_length)
        context = self.network(ids[:, :used], mask[:, :used]).masked_fill(~mask[:, :used, None], 0)
        return {"context": F.pad(context, (0, 0, 0, self.max_length - used)), "context_mask": mask}
