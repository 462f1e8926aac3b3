"""What the notebooks draw from: denoisers that need no training, and runs that need seconds of it."""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.build import compose
from ldm.diffusion.denoiser import GaussianDenoiser
from ldm.diffusion.prediction import V
from ldm.diffusion.process import Process
from ldm.generate import Run, load_run
from ldm.training.distributed import ALONE
from ldm.training.optim import adamw

ROOT = Path(__file__).resolve().parents[1]


class ExactDenoiser:
    """E[x0 | x_t] of data that are `points` (P ...), each with Gaussian noise of deviation std: what a network learns.

    denoiser(x_t, t, labels=...): of the points with that label (P,); the label after the last one is all of them.
    """

    def __init__(self, process: Process, points: Tensor, labels: Tensor | None = None, std: float = 0.0):
        self.process, self.points, self.std = process, points, std
        self.labels = torch.zeros(len(points), dtype=torch.long) if labels is None else labels
        self.null = int(self.labels.max()) + 1
        self.prediction = V()  # what guidance's rescaling takes a network to predict

    def __call__(self, x_t: Tensor, t: float, *, labels: Tensor | None = None, variance: bool = False) -> Tensor:
        alpha, sigma = self.process(float(t))
        near = torch.cdist(x_t.flatten(1), alpha * self.points.flatten(1)).square()  # B P
        logits = -near / (2 * ((alpha * self.std) ** 2 + sigma**2))
        if labels is not None:
            allowed = (labels[:, None] == self.labels) | (labels == self.null)[:, None]  # B P
            logits = logits.masked_fill(~allowed, -torch.inf)
        mean = (logits.softmax(1) @ self.points.flatten(1)).view_as(x_t)
        return GaussianDenoiser(self.process, mean, self.std)(x_t, torch.tensor(float(t), dtype=x_t.dtype))


class Counted:
    """A denoiser that counts its evaluations, which is what a picture costs."""

    def __init__(self, denoise: Callable):
        self.denoise, self.evaluations = denoise, 0

    def __call__(self, x: Tensor, t: float, **options) -> Tensor:
        self.evaluations += 1
        return self.denoise(x, t, **options)


def spiral(count: int = 400) -> Tensor:
    """Points along two turns of a spiral within the square of side 2: (count 2) float64."""
    turn = torch.linspace(0.02, 1, count, dtype=torch.float64).sqrt()
    angle = 4 * torch.pi * turn
    return torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1)


def as_if_trained(net: nn.Module, std: float = 0.05) -> nn.Module:
    """Layers that start at zero, which would hide all others, drawn at random."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std)
    return net


def train(objective: nn.Module, batch: Callable[[int], dict], steps: int, lr: float = 2e-3) -> list[float]:
    """The losses of so many steps of AdamW on what is not frozen; `fit` without checkpoints, reports and schedules."""
    optimizer = adamw(objective, lr=lr)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss, _ = objective(batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(name: str, *overrides: str) -> Run:
    """What `python train.py hydra.run.dir=runs/NAME ...` leaves; what is finished there is not trained again."""
    sys.path.insert(0, str(ROOT))
    import train as program

    path, progress = Path("runs", name), io.StringIO()
    with contextlib.redirect_stderr(progress):
        program.train(compose("train", overrides), path, torch.device("cpu"), ALONE)
    return load_run(path)
