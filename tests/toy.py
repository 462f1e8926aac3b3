"""A tiny objective with everything a real one has (dropout, an embedding, a frozen codec, a buffer), and its data."""

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import nn

from ldm.training.ema import EMA
from ldm.training.loop import Trainer, fit, prepare
from ldm.training.optim import adamw, cosine
from ldm.training.run import RunDirectory
from ldm.utils.seeding import keys, uniform

BATCH = 8


class Toy(nn.Module):
    def __init__(self, width: int = 4, dropout: float = 0.1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(width, 3, 3)
        )
        self.labels = nn.Embedding(4, 3)
        self.codec = nn.Conv2d(3, 3, 1).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: dict):
        x = self.codec(batch["image"].float() / 127.5 - 1)  # B C H W
        self.seen += len(x)
        y = self.net(x + self.labels(batch["label"])[:, :, None, None])
        loss = (y - x[:, :, 1:-1, 1:-1]).square().mean()
        return loss, {"mse": loss.detach()}


def batch_of(step: int, rank: int = 0, size: int = 1) -> dict:
    """The batch after `step` finished steps, or one rank's share of it."""
    share = BATCH // size
    position = torch.arange(step * BATCH + rank * share, step * BATCH + (rank + 1) * share)
    image = (uniform(keys(1, "image", position), (3, 6, 6)) * 255).to(torch.uint8)
    return {"image": image, "label": position % 4, "caption": ["x"] * share, "position": position, "step": step}


def batches(step: int):
    while True:
        yield batch_of(step)
        step += 1


def train(path: Path, *, source=batches, hooks=None, toy=None, ema=True, resume=None, **options) -> dict:
    """One call of fit, as the entry point makes it."""
    trainer = Trainer(**{"steps": 12, "batch_size": BATCH, "save_every": 3, "log_every": 2, **options})
    toy = toy or Toy()
    prepare(toy, toy.net, trainer, torch.device("cpu"))
    config = {"network": {"_target_": "tests.toy.Toy"}}
    run = RunDirectory(path, config, files={"tokenizer.json": b"{}"}, resume=resume)
    average = EMA(toy, decay=0.9, every=2) if ema else None
    return fit(toy, source, adamw(toy, lr=1e-2), trainer, run, lr_schedule=cosine, ema=average, hooks=hooks)


def digest(path: Path) -> str:
    """A hash of all that a finished run has to reproduce; times differ."""
    sums = []
    for name in ("model", "frozen", "ema", "optimizer"):
        sums.append(hashlib.sha256((path / "checkpoints/last" / f"{name}.safetensors").read_bytes()).hexdigest())
    state = json.loads((path / "checkpoints/last/state.json").read_text())
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for record in [state, *lines]:
        record.pop("seconds", None), record.pop("images_per_second", None)
    return "\n".join([*sums, json.dumps([state, lines], sort_keys=True)])


def forked(function, *arguments) -> int:
    """Start function(*arguments) in a child, quietly, and return its process id: torch is not imported again."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1), os.dup2(silence, 2)
        function(*arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
