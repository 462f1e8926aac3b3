"""DiT-S/2 and B/2 at 256 px (C3): one evaluation and one training step beside diffusers and the authors' block, eager.

The authors' code needs `timm`; `AuthorsDiT` stands in for it: the same operations in the same order out of torch's
modules, its attention by `scaled_dot_product_attention`. All three have the same weights and the same outputs, those of
diffusers' formula. The cases named "compiled" put ours, eager, beside the stand-in under `torch.compile`.
"""

import torch
import torch.nn.functional as F
from harness import arguments, assert_equal, interleave
from torch import Tensor, nn
from unet import training_step

from ldm.models.dit import DiT
from ldm.nn.embeddings import position_table, sinusoid, unpatchify
from ldm.weights.dit import dit_from_config, from_diffusers, to_original

SIZES = {"S/2": (12, 6), "B/2": (12, 12)}  # depth, heads of 64
SMALL = {"S/2": (2, 1)}
BATCH, SIDE, CLASSES = 4, 32, 1000


# --- The authors' network, in torch's modules -------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """As timm's, fused."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def ada_ln(dim: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, count * dim))


class AuthorsBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.mlp = Mlp(dim)
        self.adaLN_modulation = ada_ln(dim, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class AuthorsDiT(nn.Module):
    """The published names of parameters, so that the published layout fills it."""

    def __init__(self, dim: int, depth: int, num_heads: int):
        super().__init__()
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(4, dim, 2, stride=2)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(CLASSES + 1, dim)})
        self.pos_embed = nn.Parameter(position_table((16, 16), dim, base=16)[None], requires_grad=False)
        self.blocks = nn.ModuleList(AuthorsBlock(dim, num_heads, 1e-5) for _ in range(depth))
        self.final_layer = nn.ModuleDict({"adaLN_modulation": ada_ln(dim, 2), "linear": nn.Linear(dim, 2 * 2 * 8)})
        self.final_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder["mlp"](sinusoid(t, 256, freq_shift=1)) + self.y_embedder["embedding_table"](labels)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=1)
        return unpatchify(self.final_layer["linear"](modulate(self.final_norm(x), shift, scale)), (16, 16), 2)


# --- The cases --------------------------------------------------------------------------------------------------------


def make_nets(depth: int, heads: int) -> dict[str, nn.Module]:
    """Ours, diffusers' and the authors', with the same random weights, none of them zero."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    peer = DiTTransformer2DModel(heads, 64, out_channels=8, num_layers=depth, num_embeds_ada_norm=CLASSES)
    for block in peer.transformer_blocks:
        block.norm1.emb = peer.transformer_blocks[0].norm1.emb  # copies of it in files; training moves it once
    config = dict(peer.config)
    ours = DiT(**dit_from_config(config))
    ours.load_state_dict(from_diffusers(peer.state_dict(), ours.state_dict()))
    authors = AuthorsDiT(64 * heads, depth, heads)
    authors.load_state_dict(to_original(ours.state_dict(), SIDE))
    return {"ldm": ours, "diffusers": peer, "authors": authors}


def make_calls(nets: dict[str, nn.Module]) -> tuple[dict, Tensor]:
    torch.manual_seed(1)
    x, target = torch.randn(BATCH, 4, SIDE, SIDE), torch.randn(BATCH, 8, SIDE, SIDE)
    t, labels = torch.linspace(0, 999, BATCH), torch.arange(BATCH)
    calls = {
        "ldm": lambda: nets["ldm"](x, t, labels=labels),
        "diffusers": lambda: nets["diffusers"](x, t, labels, return_dict=False)[0],
        "authors": lambda: nets["authors"](x, t, labels),
    }
    return calls, target


def check(calls: dict) -> float:
    with torch.no_grad():
        outputs = {name: call() for name, call in calls.items()}
    return max(assert_equal(outputs["ldm"], peer, tol=1e-4) for peer in outputs.values())


def evaluation(name: str, sizes: tuple[int, int], args) -> None:
    nets = {kind: net.eval() for kind, net in make_nets(*sizes).items()}
    calls, _ = make_calls(nets)
    error = check(calls)
    with torch.inference_mode():
        timed = interleave(calls, rounds=2 if args.small else args.rounds or 7)
    timed.report(f"dit/evaluation/{name}", "ldm", ["diffusers", "authors"], target=0.88, error=error)


def training(name: str, sizes: tuple[int, int], args) -> None:
    nets = {kind: net.train() for kind, net in make_nets(*sizes).items()}
    nets["diffusers"].eval()  # in training mode it drops labels at random
    calls, target = make_calls(nets)
    error = check(calls)
    steps = {kind: training_step(nets[kind], call, target) for kind, call in calls.items()}
    timed = interleave(steps, rounds=2 if args.small else args.rounds or 7)
    timed.report(f"dit/training/{name}", "ldm", ["diffusers", "authors"], target=0.88, error=error)


def compiled(name: str, sizes: tuple[int, int], args) -> None:
    """Ours is not compiled; the first call of the peer holds its compilation."""
    nets = make_nets(*sizes)
    del nets["diffusers"]
    calls, target = make_calls(nets)
    error = check({kind: calls[kind] for kind in nets})
    nets["authors"].compile()
    rounds = 2 if args.small else args.rounds or 7
    with torch.inference_mode():
        timed = interleave({kind: calls[kind] for kind in nets}, rounds=rounds)
    timed.report(f"dit/evaluation/compiled peer/{name}", "ldm", ["authors"], target=0.97, error=error)
    torch.compiler.reset()
    steps = {kind: training_step(net, calls[kind], target) for kind, net in nets.items()}
    timed = interleave(steps, rounds=rounds)
    timed.report(f"dit/training/compiled peer/{name}", "ldm", ["authors"], target=0.97)


def main() -> None:
    args = arguments(__doc__)
    for name, sizes in (SMALL if args.small else SIZES).items():
        for kind in (evaluation, training, compiled):
            if args.only in f"{kind.__name__} {name}":
                kind(name, sizes, args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
