"""How the time of DiT-S/2 grows with tokens and with the batch, beside the law it should follow.

Tokens: a + b N + c N^2, fitted; residual at most 5 %, and local exponents of at most 1.55. Batch: no image gets dearer.
One JSON line each.
"""

import json

import numpy as np
import torch
from harness import arguments, cpu_seconds

from ldm.models.dit import DiT

SIDES = (16, 32, 64, 96)  # of latents: 64, 256, 1024, 2304 tokens
BATCHES = (1, 2, 4, 8, 16)


def seconds(net: DiT, batch: int, side: int, rounds: int) -> float:
    x, t, labels = torch.randn(batch, 4, side, side), torch.full((batch,), 500.0), torch.zeros(batch, dtype=torch.int64)
    with torch.no_grad():
        return min(cpu_seconds(lambda: net(x, t, labels=labels)) for _ in range(1 + rounds))


def main() -> None:
    args = arguments(__doc__)
    rounds = args.rounds or 2
    depth = 2 if args.small else 12
    net = DiT(4, width=384, depth=depth, num_heads=6, num_classes=1000).eval()
    tokens = np.array([(side // 2) ** 2 for side in SIDES], dtype=float)
    times = np.array([seconds(net, 1, side, rounds) for side in SIDES])
    powers = tokens[:, None] ** np.arange(3) / times[:, None]  # relative errors count
    law = np.linalg.lstsq(powers, np.ones(len(times)), rcond=None)[0]
    local = np.diff(np.log(times)) / np.diff(np.log(tokens))
    residual = round(float(abs(powers @ law - 1).max()), 3)
    line = {"bench": "tokens", "tokens": tokens.astype(int).tolist(), "seconds": times.round(4).tolist()}
    print(json.dumps({**line, "exponents": local.round(2).tolist(), "residual": residual}))
    each = [seconds(net, batch, 32, rounds) / batch for batch in BATCHES]
    print(json.dumps({"bench": "batch", "batch": BATCHES, "seconds_an_image": np.round(each, 4).tolist()}))


if __name__ == "__main__":
    main()
