"""Changes of one weight W that depend on W itself: zero when training begins, as those of `lora_kinds` are.

DoRA       m (W + dW) / |W + dW| - W      arXiv:2402.09353, around any dW of `lora_kinds`
(IA)^3     v * W                          arXiv:2205.05638, v one number for each output, or for each input
GLoRA      s (W A1 A2 + B1 B2)            arXiv:2306.07967
OFT        R^T W - W                      arXiv:2306.07280, R of blocks on the diagonal, each a rotation
BOFT       R_m ... R_1 W - W              arXiv:2311.06243, each R_i of blocks that butterfly through the rows
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.adapters.lora_kinds import Change, Tensors


class DoRA(Change):
    """Eq. (5), arXiv:2402.09353: the direction of W + dW, its length m learned; the norm takes no gradient (§4.3).

    magnitude has size 1 in the axes that a norm runs over: (O 1 ...) one for each output, (1 I ...) for each input.
    """

    def __init__(self, change: Change, magnitude: Tensor):
        super().__init__()
        self.change = change
        self.magnitude = nn.Parameter(magnitude)

    def forward(self, weight: Tensor) -> Tensor:
        direction = weight + self.change(weight)
        return self.magnitude / norm_as(direction.detach(), self.magnitude) * direction - weight

    def tensors(self) -> Tensors:
        return self.change.tensors() | {"dora_scale": self.magnitude}


def norm_as(weight: Tensor, magnitude: Tensor) -> Tensor:
    """The norm over the axes in which `magnitude` has size 1; never zero, since layers may start at zero."""
    axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    return torch.linalg.vector_norm(weight, dim=axes, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)


def output_magnitude(weight: Tensor) -> Tensor:
    """One for each output, as §4 of arXiv:2402.09353 and PEFT have it: (O 1 ...)."""
    return norm_as(weight, weight.new_empty(len(weight), *[1] * (weight.ndim - 1), device="meta"))


class Stretch(Change):
    """(IA)^3: factor (O 1 ...) or (1 I ...), by how much each output or input grows."""

    def __init__(self, factor: Tensor):
        super().__init__()
        self.factor = nn.Parameter(factor)

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight

    def tensors(self) -> Tensors:
        factor, by_input = self.factor, len(self.factor) == 1
        vector = factor.flatten() if factor.ndim == 2 else factor.view(1, -1, *factor.shape[2:])
        return {"weight": vector, "on_input": torch.tensor(int(by_input))}


class GLoRA(Change):
    """s (W a1 a2 + b1 b2): a1 (I r), a2 (r I), b1 (O r), b2 (r I k k flat)."""

    def __init__(self, factors: Mapping[str, Tensor], scale: float = 1.0):
        super().__init__()
        self.factors = nn.ParameterDict({name: nn.Parameter(factor) for name, factor in factors.items()})
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        a1, a2, b1, b2 = (self.factors[name].to(weight.dtype) for name in ("a1", "a2", "b1", "b2"))
        inside = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
        return self.scale * (inside + (b1 @ b2).view(weight.shape))

    def tensors(self) -> Tensors:
        rank = torch.tensor(self.scale * len(self.factors["a2"]))
        return {f"{name}.weight": factor for name, factor in self.factors.items()} | {"alpha": rank}


class Rotation(Change):
    """Rows of W turned in groups: blocks (n b b) of OFT, (m n b b) of BOFT; then made longer by rescale (O 1 ...).

    Each block Q gives S = Q - Q^T, and Cayley's transform of S is a rotation. limit: of the norm of
    all S together, for each row; 0 is none.
    """

    def __init__(self, blocks: Tensor, rescale: Tensor | None = None, limit: float = 0.0):
        super().__init__()
        self.blocks = nn.Parameter(blocks)
        self.rescale = None if rescale is None else nn.Parameter(rescale)
        self.limit = limit  # of each row

    def forward(self, weight: Tensor) -> Tensor:
        turned = self._butterfly(weight) if self.blocks.ndim == 4 else self._diagonal(weight)
        if self.rescale is not None:
            turned = self.rescale.to(turned.dtype) * turned
        return (turned - weight).to(weight.dtype)

    def rotations(self) -> Tensor:
        """(I + S) (I - S)^-1 of each block, S skew-symmetric."""
        blocks = self.blocks.to(torch.promote_types(self.blocks.dtype, torch.float32))
        skew = blocks - blocks.mT
        if self.limit:  # COFT, as kohya's trainer and LyCORIS have it
            limit = self.limit * blocks.shape[-3] * blocks.shape[-1]
            skew = skew * (limit / (torch.linalg.vector_norm(skew) + 1e-8)).clamp_max(1)
        one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(one - skew, one + skew)  # the two commute

    def _diagonal(self, weight: Tensor) -> Tensor:
        r = self.rotations()
        rows = weight.to(r.dtype).unflatten(0, r.shape[:2])
        return torch.einsum("knm,kn...->km...", r, rows).flatten(0, 1)

    def _butterfly(self, weight: Tensor) -> Tensor:
        r = self.rotations()
        size = r.shape[-1]
        turned = weight.to(r.dtype)
        for i, blocks in enumerate(r):  # rows 2^i b/2 apart meet in one block
            apart = turned.unflatten(0, (-1, 2, 2**i * (size // 2))).transpose(1, 2)
            mixed = torch.einsum("bij,bj...->bi...", blocks, apart.flatten(0, 2).unflatten(0, (-1, size)))
            turned = mixed.flatten(0, 1).view(apart.shape).transpose(1, 2).flatten(0, 2)
        return turned

    def tensors(self) -> Tensors:
        found = {"oft_blocks": self.blocks, "alpha": torch.tensor(self.limit)}
        return found if self.rescale is None else found | {"rescale": self.rescale}
