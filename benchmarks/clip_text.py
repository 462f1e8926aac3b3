"""CLIP ViT-L/14's text tower beside transformers': eight prompts of 77 tokens, and the same prompts asked for again.

The peer runs both of its attentions on its own weights, which are copied into ours. It gets ids; ours, where prompts
come again, gets the texts.
"""

import logging

import torch
from harness import arguments, assert_equal, interleave

from ldm.conditioning.clip import CLIPText, CLIPTextEncoder
from ldm.conditioning.clip_tokenizer import BOS, EOS, CLIPTokenizer
from ldm.weights.clip import from_transformers

logging.getLogger("transformers").setLevel(logging.ERROR)

SIZES = {"width": 768, "depth": 12, "num_heads": 12}
SMALL = {"width": 64, "depth": 2, "num_heads": 2}
TEXTS = [f"a photo of {count} red cats" for count in range(8)]
CPU = torch.device("cpu")


def make_encoder(sizes: dict) -> CLIPTextEncoder:
    """Ours, with a vocabulary of bytes; which words the ids stand for costs nothing."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), BOS, EOS]
    tokenizer = CLIPTokenizer({token: index for index, token in enumerate(tokens)}, [])
    return CLIPTextEncoder(CLIPText(**sizes, activation="quick_gelu"), tokenizer).requires_grad_(False).eval()


def make_peer(sizes: dict, attention: str) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=sizes["width"],
        intermediate_size=4 * sizes["width"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["num_heads"],
    )
    torch.manual_seed(0)
    return CLIPTextModel._from_config(config, attn_implementation=attention).eval()


@torch.inference_mode()
def text(dtype: torch.dtype, args) -> None:
    sizes = SMALL if args.small else SIZES
    ours, sdpa, eager = make_encoder(sizes), make_peer(sizes, "sdpa"), make_peer(sizes, "eager")
    ours.network.load_state_dict(from_transformers(sdpa.state_dict(), ours.network.state_dict()))
    ids = ours.tokenizer.encode(TEXTS)  # B 1 L
    exact = sdpa(ids[:, 0]).last_hidden_state  # in bfloat16 the peer's two attentions differ by 2.5e-2
    ours, sdpa, eager = (module.to(dtype) for module in (ours, sdpa, eager))
    eager.load_state_dict(sdpa.state_dict(), assign=True)
    cases = {
        "ldm": lambda: ours.encode(ids)["context"],
        "ldm, known prompts": lambda: ours(TEXTS, CPU)["context"],
        "transformers sdpa": lambda: sdpa(ids[:, 0]).last_hidden_state,
        "transformers eager": lambda: eager(ids[:, 0]).last_hidden_state,
    }
    peers = ["transformers sdpa", "transformers eager"]
    tol = 1e-4 if dtype == torch.float32 else 2e-2
    error = max(assert_equal(cases[name](), exact, tol) for name in cases)
    timed = interleave(cases, rounds=2 if args.small else args.rounds or 7)
    name = f"clip_text/{str(dtype).removeprefix('torch.')}"
    timed.report(name, "ldm", peers, target=0.95 if dtype == torch.float32 else 0.90, error=error)
    timed.report(name, "ldm, known prompts", peers, target=0.01, error=error)


def main() -> None:
    args = arguments(__doc__)
    for dtype in (torch.float32, torch.bfloat16):
        if args.only in str(dtype):
            text(dtype, args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
