"""T5 v1.1 base beside transformers': eight captions padded to 120 tokens, as the pipeline of PixArt feeds them.

The peer runs on its own weights, which are copied into ours, and computes the padding; so does ours in one case. In the
other it leaves out what nobody reads. No caption comes twice.
"""

import logging

import torch
from harness import arguments, assert_equal, interleave

from ldm.conditioning.t5 import T5Encoder, T5TextEncoder
from ldm.conditioning.t5_tokenizer import T5Tokenizer
from ldm.weights.t5 import from_transformers, to_config

logging.getLogger("transformers").setLevel(logging.ERROR)

BASE = {"width": 768, "depth": 12, "num_heads": 12, "head_dim": 64, "mlp_dim": 2048}
SMALL = {"width": 64, "depth": 2, "num_heads": 2, "head_dim": 32, "mlp_dim": 80}
LENGTH = 120
TEXTS = ["a b " * words for words in range(3, 11)]  # 7 to 21 tokens
CPU = torch.device("cpu")


def make_encoder(sizes: dict) -> T5TextEncoder:
    """Ours, with a vocabulary of two words; which pieces the ids stand for costs nothing."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁b", -1.0)]
    return T5TextEncoder(T5Encoder(**sizes), T5Tokenizer(vocab, 2), LENGTH).requires_grad_(False).eval()


def make_peer(network: T5Encoder, attention: str) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    return T5EncoderModel._from_config(T5Config(**to_config(network)), attn_implementation=attention).eval()


@torch.inference_mode()
def text(dtype: torch.dtype, args) -> None:
    ours = make_encoder(SMALL if args.small else BASE)
    peers = {f"transformers {name}": make_peer(ours.network, name) for name in ("sdpa", "eager")}
    theirs = peers["transformers sdpa"]
    ours.network.load_state_dict(from_transformers(theirs.state_dict(), ours.network.state_dict()))
    ids, mask = ours.tokenizer.encode(TEXTS, LENGTH)
    exact = theirs(ids, attention_mask=mask).last_hidden_state
    ours.to(dtype)
    for peer in peers.values():
        peer.load_state_dict(theirs.state_dict())
        peer.to(dtype)
    cases = {
        "ldm": lambda: ours.network(ids, mask),
        "ldm, texts": lambda: (ours.memory.rows.clear(), ours(TEXTS, CPU))[1]["context"],
    } | {name: lambda peer=peer: peer(ids, attention_mask=mask).last_hidden_state for name, peer in peers.items()}
    tol = 2e-5 if dtype == torch.float32 else 3e-2
    error = max(assert_equal(cases[name]()[mask], exact[mask], tol) for name in cases)
    timed = interleave(cases, rounds=2 if args.small else args.rounds or 7)
    name = f"t5_text/{str(dtype).removeprefix('torch.')}"
    timed.report(name, "ldm", list(peers), target=0.60 if dtype == torch.float32 else 1.05, error=error)
    timed.report(name, "ldm, texts", list(peers), target=0.25, error=error)


def main() -> None:
    args = arguments(__doc__)
    for dtype in (torch.float32, torch.bfloat16):
        if args.only in str(dtype):
            text(dtype, args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
