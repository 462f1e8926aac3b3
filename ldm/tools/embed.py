"""Texts read by a large text encoder before anything is drawn: in memory for one command, or in a file for many.

    python -m ldm.tools.embed OUT.safetensors --system if_i_xl --text-encoder PATH "a red circle" "a blue square"
    python sample.py weights=PATH embeddings=OUT.safetensors prompts="[a red circle, a blue square]"

DeepFloyd IF reads with T5-XXL: 19 GB that nobody needs while a U-Net draws.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.conditioning.stored import KnownTexts
from ldm.io.output import lasting_output
from ldm.published import DTYPES, read_texts
from ldm.utils.devices import pick_device
from ldm.utils.errors import ConfigError, LdmError, WeightsError
from ldm.weights.places import SYSTEMS
from ldm.weights.sources import components_in

READ_BEFORE = ("if", "pixart")  # families of which T5 alone reads the texts


class Reader:
    """The texts of one command, read once by each text encoder that its systems need."""

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        self._known: dict[Any, KnownTexts] = {}

    def __call__(self, cfg: Mapping[str, Any]) -> KnownTexts | None:
        """For the system of a stage's config; None where its text encoders stay beside the network."""
        if not reads_before(cfg):
            if cfg["embeddings"]:
                raise ConfigError(f"embeddings={cfg['embeddings']} are for what reads with T5 alone; leave it out")
            return None
        if cfg["embeddings"]:
            return KnownTexts.load(cfg["embeddings"])
        how = {name: cfg[name] for name in ("tokenizer", "dtype", "variant")}
        key = cfg["text_encoder"], SYSTEMS[cfg["kind"]], *how.values()
        if key not in self._known:
            device = pick_device(cfg["device"])
            self._known[key] = read_texts(self.texts, cfg["text_encoder"], cfg["kind"], device=device, **how)
        return self._known[key]


def reads_before(cfg: Mapping[str, Any]) -> bool:
    """Whether the texts of a stage's system are read, and its text encoder is let go, before its network is loaded."""
    return bool(cfg["weights"]) and SYSTEMS[cfg["kind"]] in READ_BEFORE


def share_text_encoder(stages: Sequence[dict]) -> list[dict]:
    """The stages with a path of the text encoder, where one is needed: the first there is serves those without.

    Raises WeightsError where there is none.
    """
    lacking = [cfg for cfg in stages if reads_before(cfg) and not (cfg["text_encoder"] or cfg["embeddings"])]
    having = (cfg["weights"] for cfg in lacking if "text_encoder" in components_in(Path(cfg["weights"])))
    shared = next(having, None) or next((cfg["text_encoder"] for cfg in stages if cfg["text_encoder"]), None)
    if lacking and not shared:
        raise WeightsError(
            f"{lacking[0]['weights']}: the system {lacking[0]['kind']} without its text encoder; "
            "give text_encoder=PATH, or what one has read, embeddings=FILE (python -m ldm.tools.embed)"
        )
    return [{**cfg, "text_encoder": shared} if any(cfg is one for one in lacking) else cfg for cfg in stages]


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ldm.tools.embed", description="Read texts for later.")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new .safetensors file")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="prompts, and negative ones; '' is always there")
    parser.add_argument("--system", required=True, choices=SYSTEMS, metavar="NAME", help="for which: if_i_xl")
    parser.add_argument("--text-encoder", required=True, metavar="PATH", help="a folder or a file of weights")
    parser.add_argument("--tokenizer", metavar="PATH", help="a vocabulary, where none is beside the text encoder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="to read with")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.out.exists() or chosen.out.suffix != ".safetensors":
            raise ConfigError(f"{chosen.out}: expected the name of a new .safetensors file")
        how = dict(tokenizer=chosen.tokenizer, dtype=chosen.dtype, device=pick_device(chosen.device))
        known = read_texts(chosen.texts, chosen.text_encoder, chosen.system, **how)
        known.save(chosen.out)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{chosen.out}: {len(known.rows)} texts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
