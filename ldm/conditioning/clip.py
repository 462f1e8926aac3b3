"""CLIP's two towers, arXiv:2103.00020, as diffusion models read them. OpenCLIP's (arXiv:2212.07143) differ in the GELU.

    text      depth width heads  activation   parameters    in                       layer and norm of the context
    ViT-L/14     12   768    12  quick_gelu  123,060,480    SD 1.x; SDXL             last, normed; SDXL: skip 1, raw
    ViT-H/14     23  1024    16  gelu        340,387,840    SD 2.x: 23 of 24 blocks  last of the 23, normed
    bigG/14      32  1280    20  gelu        694,659,840    SDXL and its refiner     skip 1, raw; pooled is projected

    vision    depth width heads  mlp_dim  projection    parameters
    ViT-L/14     24  1024    16     4096         768    303,966,208
    ViT-H/14     32  1280    16     5120        1024    632,076,800
    bigG/14      48  1664    16     8192        1280  1,844,907,264

Pre-norm transformers; text attends causally, and over its padding too: every one of these systems was trained so.
"""

from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.clip_tokenizer import LENGTH, CLIPTokenizer, chunks_for, frame
from ldm.conditioning.conditioner import Encoder
from ldm.conditioning.memory import Memory
from ldm.conditioning.prompts import EMPHASIS, emphasise, parse
from ldm.nn.attention import SelfAttention
from ldm.nn.feedforward import MLP
from ldm.nn.linear import Linear
from ldm.utils.errors import ConfigError


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), OpenAI's GELU."""
    gate = (1.702 * x).sigmoid_()
    return x * gate if x.requires_grad else gate.mul_(x)  # a new tensor only where autograd keeps the gate


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}
Prompt = tuple[tuple[int, ...], tuple[float, ...]]  # ids, and what each weighs


class Block(nn.Module):
    """Pre-norm transformer block, B N D -> B N D."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, activation: str, causal: bool):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation is {activation!r}, expected one of: {', '.join(ACTIVATIONS)}")
        if width % num_heads:
            raise ConfigError(f"width {width} is not divisible into {num_heads} heads; choose another num_heads")
        self.causal = causal
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads, width // num_heads, bias=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_dim, width, activation=ACTIVATIONS[activation])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), causal=self.causal)
        return x + self.mlp(self.norm2(x))


class CLIPText(nn.Module):
    """Ids (B L) -> hidden states (B L D); `pool` continues to one vector per text. L is at most `length`."""

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        activation: str,
        projected: bool = False,  # the pooled vector; a file either has this matrix or not
        vocab_size: int = 49408,
        length: int = LENGTH,
        mlp_dim: int | None = None,  # None: 4 width
        projection_dim: int | None = None,  # None: width
    ):
        super().__init__()
        self.width = width
        self.pooled_dim = projection_dim or width if projected else width
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        mlp_dim = mlp_dim or 4 * width
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_dim, activation, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.projection = Linear(width, self.pooled_dim, bias=False) if projected else None
        self.init_weights()

    def init_weights(self) -> None:
        # As CLIP's training began; the layers inside keep torch's, since weights come from a file.
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, ids: Tensor, skip: int = 0) -> Tensor:
        """The hidden states `skip` blocks before the end, not normed."""
        x = self.tokens(ids) + self.positions[: ids.shape[-1]]  # B L D
        for block in islice(self.blocks, len(self.blocks) - skip):
            x = block(x)
        return x

    def pool(self, x: Tensor, eos: Tensor, skip: int = 0) -> Tensor:
        """`forward`'s result through the remaining blocks, normed, at the index eos (B,), projected: B D."""
        for block in islice(self.blocks, len(self.blocks) - skip, None):
            x = block(x)
        x = self.norm(x[torch.arange(len(x), device=x.device), eos])  # B D
        return x if self.projection is None else self.projection(x)


class CLIPTextEncoder(Encoder):
    """Captions -> context (B L D), L = 77 chunks, and with `pooled` the vector at the first chunk's EOS (B D).

    No context_mask: networks attend to the padding. A longer prompt continues in the next chunk, each encoded on its
    own; all prompts of a call get as many. With `zero_null` the condition of "no caption" is zeros instead of the
    encoded "" (SDXL base, which still encodes a "" that is given). What has been read is remembered (`Memory`).
    Raises DataError for what is not text, ConfigError for knobs that do not fit.
    """

    field = "caption"

    def __init__(
        self,
        network: CLIPText,
        tokenizer: CLIPTokenizer,
        skip: int = 0,  # blocks left out of the context: 1 is the penultimate layer, "clip skip 2"
        final_norm: bool = True,  # whether the context goes through the norm that ends the network
        pooled: bool = False,
        pad: int | None = None,  # the id after EOS; None: EOS again
        zero_null: bool = False,
        chunks: int | None = None,  # of 75 tokens; None: as many as the longest prompt of a call needs, and
        max_chunks: int = 8,  # at most so many; what is longer loses its last words
        emphasis: str | None = None,  # what "(word:1.3)" does: a1111, comfy or fooocus; None: it is text like any other
    ):
        super().__init__()
        check_skip(skip, network.blocks)
        if max_chunks < 1 or (chunks is not None and chunks < 1):
            raise ConfigError(f"chunks is {chunks}, max_chunks {max_chunks}; expected at least 1: 75 tokens")
        if tokenizer.eos >= (rows := network.tokens.num_embeddings):
            raise ConfigError(
                f"vocabulary ends with id {tokenizer.eos}, the network knows {rows}; use its own tokenizer"
            )
        self.network = network
        self.tokenizer = tokenizer
        self.skip = skip
        self.final_norm = final_norm
        self.pooled = pooled
        self.pad = pad
        self.chunks = chunks
        self.max_chunks = max_chunks
        self.emphasis = emphasis
        self.texts: tuple[str | None, str | None] = (None, None)  # read instead of prompts and of negative ones
        self.memory = Memory()
        self.null = None if zero_null else ""
        self.dims = {"context_dim": network.width} | ({"pooled_dim": network.pooled_dim} if pooled else {})

    @property
    def emphasis(self) -> str | None:
        return self._emphasis

    @emphasis.setter
    def emphasis(self, name: str | None) -> None:
        if name is not None and name not in EMPHASIS:
            raise ConfigError(f"emphasis is {name!r}, expected null or one of: {', '.join(EMPHASIS)}")
        self._emphasis = name

    def forward(self, captions: Sequence[str | None], device: torch.device) -> dict[str, Tensor]:
        prompts = self._frame(["" if text is None and self.null is None else text for text in captions])
        how = (self.skip, self.final_norm, self.pooled, self.pad, self.emphasis, device)
        cond = self.memory.recall(self.network, prompts, lambda new: self._read(new, device), *how)
        absent = torch.tensor([text is None for text in captions], dtype=torch.bool, device=device)
        return {name: _zeroed(value, absent) for name, value in cond.items()}

    def chosen(self, values: list, half: int) -> list:
        return values if self.texts[half] is None else [self.texts[half]] * len(values)

    def encode(self, ids: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Ids (B chunks L), and what they weigh in the context, -> the conditions of B texts."""
        hidden = self.network(ids.flatten(0, 1), self.skip)  # (B chunks) L D
        context = self.network.norm(hidden) if self.final_norm else hidden
        context = context.unflatten(0, ids.shape[:2])  # B chunks L D
        if weights is not None:
            empty = self.encode(self.tokenizer.encode([""], self.pad).to(ids.device))["context"][0]  # L D
            context = emphasise(context, empty, weights, self.emphasis)
        cond = {"context": context.flatten(1, 2)}  # B (chunks L) D
        if self.pooled:
            first = hidden.unflatten(0, ids.shape[:2])[:, 0]  # B L D
            cond["pooled"] = self.network.pool(first, self.find_eos(ids[:, 0]), self.skip)  # B D
        return cond

    def find_eos(self, ids: Tensor) -> Tensor:
        """Index of the first EOS: B L -> B. It is the largest id CLIP was trained with; tokens added later are not."""
        return ids.masked_fill(ids > self.tokenizer.eos, 0).argmax(-1)

    def _frame(self, texts: Sequence[str]) -> list[Prompt]:
        prompts = [self._tokenize(text) for text in texts]
        chunks = self._chunks(prompts)
        pad = self.tokenizer.eos if self.pad is None else self.pad
        return [
            (self.tokenizer.frame(ids, chunks, pad), frame(weights, chunks, 1.0, 1.0, 1.0)) for ids, weights in prompts
        ]

    def length(self, value: str) -> int:
        return self._chunks([self._tokenize(value)])

    def _chunks(self, prompts: Sequence[Prompt]) -> int:
        return self.chunks or min(self.max_chunks, chunks_for(len(ids) for ids, _ in prompts))

    def _tokenize(self, text: str) -> Prompt:
        parts = [(text, 1.0)] if self.emphasis is None else parse(text)
        pairs = [(index, weight) for part, weight in parts for index in self.tokenizer.ids(part)]
        return tuple(index for index, _ in pairs), tuple(weight for _, weight in pairs)

    def _read(self, prompts: Sequence[Prompt], device: torch.device) -> dict[str, Tensor]:
        ids, weights = (torch.tensor(rows).unflatten(-1, (-1, LENGTH)) for rows in zip(*prompts, strict=True))
        return self.encode(ids.to(device), None if (weights == 1).all() else weights.to(device))


class CLIPVision(nn.Module):
    """Normalised pixels (B 3 S S) -> hidden states (B 1+N D), the class token first; `pool` continues to B P."""

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        projection_dim: int,
        activation: str,
        image_size: int = 224,
        patch_size: int = 14,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ConfigError(f"image_size {image_size} is not divisible by patch_size {patch_size}; choose a multiple")
        self.width, self.projection_dim, self.image_size = width, projection_dim, image_size
        self.class_token = nn.Parameter(torch.empty(width))
        self.patches = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.positions = nn.Parameter(torch.empty(1 + (image_size // patch_size) ** 2, width))
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_dim, activation, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.projection = Linear(width, projection_dim, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.normal_(self.class_token, std=self.width**-0.5)
        nn.init.normal_(self.positions, std=self.width**-0.5)

    def forward(self, pixels: Tensor, skip: int = 0) -> Tensor:
        """The hidden states `skip` blocks before the end, not normed."""
        x = self.patches(pixels).flatten(2).mT  # B N D
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)  # B 1+N D
        x = self.norm_in(x + self.positions)
        for block in islice(self.blocks, len(self.blocks) - skip):
            x = block(x)
        return x

    def pool(self, x: Tensor, skip: int = 0) -> Tensor:
        """`forward`'s result through the remaining blocks; the class token normed and projected: B P."""
        for block in islice(self.blocks, len(self.blocks) - skip, None):
            x = block(x)
        return self.projection(self.norm(x[:, 0]))


def check_skip(skip: int, blocks: nn.ModuleList) -> None:
    if not 0 <= skip <= len(blocks):
        raise ConfigError(f"skip is {skip}, expected 0 to {len(blocks)}: the number of last blocks left out")


def _zeroed(value: Tensor, absent: Tensor) -> Tensor:
    """Zeros in the rows that are absent (B,)."""
    return value.masked_fill(absent.view(-1, *[1] * (value.ndim - 1)), 0)
