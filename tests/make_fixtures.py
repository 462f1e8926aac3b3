"""Checkpoints of this version, kept so that later versions can read, finish and draw them: tests/fixtures/0.1/*.

    python tests/make_fixtures.py tests/fixtures/VERSION     writes them anew, with the code of today

They are not made again when the code changes: a checkpoint that somebody has does not change either. A version with
another layout of checkpoints adds a folder of its own beside the old one. tests/test_old_checkpoints.py reads them all.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm.build import compose  # noqa: E402
from ldm.cascade import Cascade, Stage  # noqa: E402
from ldm.generate import load_run  # noqa: E402
from ldm.io.images import write_png  # noqa: E402
from ldm.training.distributed import ALONE  # noqa: E402
from train import train  # noqa: E402

STEPS = 40
QUICK = [
    "image_size=16", "data.length=64", "preview=none", "metrics=none", "trainer.batch_size=4", "lr_schedule.warmup=0",
    "trainer.log_every=10", "conditioner.encoders.text.width=16", "conditioner.encoders.text.depth=1",
    "conditioner.encoders.text.head_dim=8", "optimizer.lr=3e-3",
]  # fmt: skip
FIRST_STAGE = ["debug=smoke", "network.channels=4", "network.groups=2", "trainer.steps=40", "trainer.batch_size=4"]
TRANSFORMER = ["network=dit_small", "network.width=16", "network.depth=1", "network.num_heads=2",
               "network.sample_size=4"]  # fmt: skip
EFFICIENT = ["network.channels=[8]", "network.num_res_blocks=[1]", "network.attention=[true]", "network.num_heads=2"]

RUNS = {  # what the commands said; the default run in both of its stages, a LoRA around it, a stage of a cascade
    "default": [*QUICK, *TRANSFORMER, f"first_stage={FIRST_STAGE}"],
    "lora": [*QUICK, "base=default", "adapters=lora", "adapters.lora.targets=attn"],
    "cascade": ["experiment=imagen_shapes_sr32", *QUICK, *EFFICIENT, "ema=none"],
}
PROMPTS, SEEDS = ["a large red circle at the top", "a blue square"], [3, 5]


def command(name: str, steps: int) -> dict:
    """The config of a run as its command composes it."""
    cfg = compose("train", [*RUNS[name], f"trainer.steps={steps}"])
    cfg.pop("hydra", None)
    return cfg


def draw(name: str, run: Path) -> torch.Tensor:
    """Pictures of a run, uint8 B 3 H W: every setting is said, so that no default of a later version changes them."""
    how = {"sampler": "ddim", "steps": 4, "guidance": 2.0, "threshold": "none"}
    if name == "cascade":
        small = torch.arange(3 * 8 * 8).view(3, 8, 8).to(torch.uint8)
        [stage] = Cascade([Stage.of_run(run, aug_level=0.1, **how)]).draw(PROMPTS, SEEDS, image=small)
        return stage.images
    pictures = load_run(run).generate(PROMPTS, SEEDS, times="trailing", dialect="native", **how)
    return torch.stack([torch.from_numpy(numpy.array(picture)).movedim(2, 0) for picture in pictures])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)  # so that no path of this machine is written down
        for name in RUNS:
            train(command(name, STEPS), Path(name), torch.device("cpu"), ALONE)
            checkpoint = f"checkpoints/step_{STEPS:08d}"
            shutil.copytree(Path(name, checkpoint), folder / name / checkpoint)
            for number, image in enumerate(draw(name, folder / name)):
                write_png(folder / name / f"{number}.png", image)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
