"""Noise-conditioning augmentation when sampling, Fig. A.13 of arXiv:2205.11487: which aug_level serves a stage best?

Of captioned shapes: what the stage makes of true low resolutions, and of those that another model drew.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.io.images import read_image, read_png_text
from ldm.metrics.shapes import judge
from ldm.metrics.super_resolution import held_out
from ldm.utils.errors import DataError
from ldm.utils.images import psnr


class AugLevels:
    """At each level: PSNR and prompt accuracy of enlarged held-out images, as "true_0.1/psnr" and so on, and with
    `drawn`, a folder that sample.py has written, prompt accuracy of its images enlarged, as "drawn_0.1/...".
    """

    def __init__(self, levels: Sequence[float] = (0.0, 0.1, 0.3, 0.5), num_images: int = 64, drawn: str | None = None):
        self.levels, self.num_images, self.drawn = levels, num_images, drawn

    def __call__(self, draw, data, objective: nn.Module) -> dict[str, float]:
        images, small, prompts = held_out(data, self.num_images, objective)
        given, asked = read_drawn(Path(self.drawn), self.num_images) if self.drawn else (None, [])
        table = {}
        for level in self.levels:
            larger = draw(prompts, range(len(prompts)), small, level)
            table[f"true_{level:g}/psnr"] = psnr(images, larger).mean().item()
            table[f"true_{level:g}/prompt_accuracy"] = accuracy(larger, prompts)
            if self.drawn:
                larger = draw(asked, range(len(asked)), given, level)
                table[f"drawn_{level:g}/prompt_accuracy"] = accuracy(larger, asked)
        return table


def read_drawn(folder: Path, count: int) -> tuple[Tensor, list[str]]:
    """The first images (B 3 H W uint8) below a folder that sample.py wrote, and the prompts that their files hold."""
    texts = {path: read_png_text(path).get("prompt") for path in sorted(folder.rglob("*.png"))}
    prompts = dict([(path, prompt) for path, prompt in texts.items() if prompt is not None][:count])
    if not prompts:
        raise DataError(f"{folder} holds no images of sample.py; draw some: python sample.py run=DIR metrics=shapes")
    return torch.stack([read_image(path) for path in prompts]), list(prompts.values())


def accuracy(images: Tensor, prompts: Sequence[str]) -> float:
    return judge(images, prompts)["all"].float().mean().item()
