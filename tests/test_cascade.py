"""Cascades: stages that chain, one in memory at a time, each image with its own seed; and what cannot be one."""

import gc
import json
import weakref

import pytest
import torch
from torch import nn

from ldm.build import compose
from ldm.cascade import Cascade, Stage
from ldm.conditioning.conditioner import Conditioner
from ldm.data.shapes import Shapes
from ldm.diffusion import prediction, process, times, weighting
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import DiffusionObjective
from ldm.diffusion.super_resolution import SuperResolutionObjective
from ldm.generate import Run
from ldm.io.images import read_image, write_png
from ldm.io.text import read_json
from ldm.models.codec import PixelCodec, to_float
from ldm.sampling import Sampling
from ldm.tools.measure_cascade import measure_cascade
from ldm.tools.stages import draw_cascade, report
from ldm.training.distributed import ALONE
from ldm.utils.errors import CheckpointError, ConfigError, WeightsError
from train import train


class Net(nn.Module):
    """Paints every pixel in a colour of its noise; enlarging, it keeps what it is given."""

    def __init__(self, enlarges):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.enlarges = enlarges

    def forward(self, x, t, low_res=None, aug_level=None):
        return (low_res if self.enlarges else x.mean((2, 3), keepdim=True).expand_as(x)) * self.weight


def objective(factor):
    denoiser = Denoiser(Net(factor is not None), process.VPCosine(), prediction.X0())
    parts = denoiser, PixelCodec(), Conditioner({}), times.uniform, weighting.unit
    return DiffusionObjective(*parts) if factor is None else SuperResolutionObjective(*parts, factor=factor)


def stage(size, factor=None, *, name=None, load=None, **knobs):
    kind = DiffusionObjective if factor is None else SuperResolutionObjective
    target = {"_target_": f"{kind.__module__}.{kind.__name__}"} | ({"factor": factor} if factor else {})
    config = {"image_size": size, "objective": target}
    load = load or (lambda: Run(objective(factor), config, step=7))
    return Stage(name or f"run{size}", config, load, SAMPLING, **knobs)


def three(**knobs):
    return [stage(8), stage(16, 2, **knobs), stage(64, 4, **knobs)]


SAMPLING = Sampling.named("ddim", 3, 1.0, None, "static")
PROMPTS, SEEDS = ["a", "b", "a"], [3, 4, 5]


# --- what it draws --------------------------------------------------------------------------------------------------


def test_each_stage_enlarges_what_the_one_before_it_drew():
    drawn = list(Cascade(three(aug_level=0.0)).draw(PROMPTS, SEEDS))
    assert [tuple(d.images.shape) for d in drawn] == [(3, 3, 8, 8), (3, 3, 16, 16), (3, 3, 64, 64)]
    colours = [d.images.float().mean((2, 3)) for d in drawn]
    assert colours[0].std(0).min() > 1  # every seed has its own
    for later in colours[1:]:
        torch.testing.assert_close(later, colours[0], atol=1.0, rtol=0)
    assert all(d.seconds > 0 and d.peak_bytes > 1e6 and d.step == 7 for d in drawn)
    assert report(drawn[2]).startswith("3 images of 64x64 in ")


def test_an_image_depends_on_its_prompt_and_seed_alone():
    whole = Cascade(three(aug_level=0.5)).generate(PROMPTS, SEEDS)
    assert torch.equal(Cascade(three(aug_level=0.5)).generate(PROMPTS, SEEDS), whole)
    alone = Cascade(three(aug_level=0.5, batch_size=1)).generate(PROMPTS[1:2], SEEDS[1:2])
    assert (alone[0].int() - whole[1].int()).abs().max() <= 1
    split = [stage(8, batch_size=2), *(stage(s, f, aug_level=0.5, batch_size=1) for s, f in ((16, 2), (64, 4)))]
    assert (Cascade(split).generate(PROMPTS, SEEDS).int() - whole.int()).abs().max() <= 1


def test_the_level_is_noise_that_the_next_stage_sees():
    clean, noisy = (Cascade(three(aug_level=level)).generate(["a"], [0]).float().std((2, 3)) for level in (0.0, 0.5))
    assert clean.max() < 1 < noisy.min()


def test_a_stage_can_be_drawn_again_from_the_image_it_was_given():
    drawn = list(Cascade(three()).draw(["a"], [9]))
    again = Cascade([stage(64, 4)]).generate(["a"], [9], image=drawn[1].images[0])
    assert torch.equal(again, drawn[2].images)


def test_other_sizes_and_other_shapes():
    drawn = list(Cascade(three()).draw(["a"], [0], image_size=[8, 12]))
    assert [tuple(d.images.shape[2:]) for d in drawn] == [(8, 12), (16, 24), (64, 96)]


def test_one_model_at_a_time_is_in_memory():
    alive, at_once = weakref.WeakSet(), []

    def loading(factor, size):
        def load():
            gc.collect()
            run = Run(objective(factor), {}, step=1)
            alive.add(run.objective)
            at_once.append(len(alive))
            return run

        return stage(size, factor, load=load)

    Cascade([loading(None, 8), loading(2, 16), loading(4, 64)]).generate(["a"], [0])
    assert at_once == [1, 1, 1]


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stages, message",
    [
        ([], "a cascade of no stages"),
        ([(64, None), (8, None)], "stage 2, run8, enlarges nothing: only the first"),
        ([(8, None), (64, 4), (16, 2)], "stage 2, run64, enlarges 16x16 pixels, but run8 draws 8x8"),
        ([(8, None), (32, 2)], "run32, enlarges 16x16 pixels, but run8 draws 8x8; give the stages from small to large"),
    ],
)
def test_stages_that_do_not_chain_are_refused_before_anything_is_drawn(stages, message):
    with pytest.raises(ConfigError, match=message) as error:
        Cascade([stage(size, factor) for size, factor in stages])
    assert "\n" not in str(error.value)


def test_the_first_stage_needs_something_to_enlarge_just_when_it_enlarges():
    with pytest.raises(ConfigError, match="stage 1, run16, enlarges 8x8 pixels and has none to enlarge"):
        Cascade([stage(16, 2), stage(64, 4)]).draw(["a"], [0])
    with pytest.raises(ConfigError, match="stage 1, run8, draws images of its own"):
        Cascade(three()).draw(["a"], [0], image=torch.zeros(3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("level", [-0.1, 1.5, "much", float("nan")])
def test_levels_outside_0_to_1_are_refused(level):
    with pytest.raises(ConfigError, match="run16: aug_level=.* must lie between 0"):
        stage(16, 2, aug_level=level)


def test_a_stage_that_cannot_be_read_is_named_and_the_finished_ones_stay():
    def broken():
        raise WeightsError("model.safetensors is cut off")

    cascade, finished = Cascade([stage(8), stage(16, 2, name="runs/b", load=broken)]), []
    with pytest.raises(WeightsError, match="^stage 2 of 2, runs/b: model.safetensors is cut off$"):
        for drawn in cascade.draw(["a"], [0]):
            finished.append(drawn.images)
    assert len(finished) == 1 and finished[0].shape == (1, 3, 8, 8)


# --- runs, from the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base of 16 px and two enlarging stages, after one step of training."""
    root = tmp_path_factory.mktemp("runs")
    tiny = ["trainer.steps=1", "trainer.batch_size=2", "preview=none", "metrics=none", "ema=none", "data.length=8"]
    knobs = {
        "base": ["network.channels=[16,16]", "network.num_res_blocks=[1,1]"],
        "sr32": ["network.channels=[16,16]", "network.num_res_blocks=[1,1]", "network.attention=[false,true]"],
    }
    knobs["sr64"] = [*knobs["sr32"], "objective.crop=32"]
    for name, own in knobs.items():
        cfg = compose("train", [f"experiment=imagen_shapes_{name}", *tiny, *own])
        cfg.pop("hydra", None)
        train(cfg, root / name, torch.device("cpu"), ALONE)
    return root


def command(runs, *lines, names=("base", "sr32", "sr64")):
    given = [f"cascade=[{','.join(str(runs / name) for name in names)}]", "prompts=[a red circle]", "seeds=[0,1]",
             "steps=2", "device=cpu", *lines]  # fmt: skip
    return compose("sample", given), given


def test_the_command_draws_all_stages_and_keeps_their_images(runs, tmp_path, capsys):
    cfg, given = command(runs, "stages=[{},{steps:3,aug_level:0.2},{guidance.scale:1}]")
    draw_cascade(cfg, given, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith(f"stage 2 of 3, {runs / 'sr32'}: 2 images of 32x32 in ")
    assert "GiB at most" in lines[2] and lines[2].endswith("stage_3/")
    for number, size in enumerate((16, 32, 64), 1):
        folder = tmp_path / f"stage_{number}"
        assert read_image(folder / "0001.png").shape == (3, size, size)
        record = json.loads((folder / "samples.json").read_text())[1]
        assert record["seed"] == 1 and record["step"] == 1 and record["steps"] == (3 if number == 2 else 2)
        assert record["aug_level"] == (0.2 if number == 2 else None)
    knobs = ("base", 2, 5.0, None), ("sr32", 3, 5.0, 0.2), ("sr64", 2, 1.0, None)
    again = [Stage.of_run(runs / n, steps=s, guidance=g, threshold="none", aug_level=a) for n, s, g, a in knobs]
    images = Cascade(again).generate(["a red circle"] * 2, [0, 1])
    assert (images[1].int() - read_image(tmp_path / "stage_3" / "0001.png").int()).abs().max() <= 1


def test_a_picture_is_enlarged_by_the_upper_stages(runs, tmp_path):
    write_png(tmp_path / "small.png", torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8))
    cfg, given = command(runs, f"image={tmp_path / 'small.png'}", names=("sr32", "sr64"))
    draw_cascade(cfg, given, tmp_path)
    assert read_image(tmp_path / "stage_2" / "0000.png").shape == (3, 64, 64)


def test_the_command_judges_every_stage(runs, tmp_path, capsys):
    """On the same prompts: the first stage's images are those of stage 1 drawn alone, and each is drawn once."""
    lines = ["metrics=[shapes,saturation]", "num_images=3", "prompts=[]"]
    cfg, given = command(runs, *lines)
    measure_cascade(cfg, [line for line in given if "prompts=[a" not in line], tmp_path / "out")
    numbers = read_json(tmp_path / "out" / "metrics.json")["numbers"]
    printed = capsys.readouterr().out
    assert printed.count("stage 2 of 3") == 1 and "stage_3/prompt_accuracy 0" in printed
    base = Stage.of_run(runs / "base", steps=2, guidance=5.0, threshold="none")
    prompts = Shapes(16).prompts(3)
    images = Cascade([base]).generate(prompts, range(3))
    assert numbers["stage_1/saturation"] == pytest.approx((to_float(images).abs() > 0.98).float().mean().item())
    assert {"stage_2/prompt_accuracy", "stage_3/saturation"} < set(numbers)
    cfg, given = command(runs, "metrics=shapes")
    with pytest.raises(ConfigError, match="prompts and metrics are both set"):
        measure_cascade(cfg, given, tmp_path)


def test_errors_of_the_command_name_the_stage(runs, tmp_path):
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    for cascade, error, message in (
        (["sr32", "base"], ConfigError, "stage 2, .*base, enlarges nothing"),
        (["base", "sr64"], ConfigError, "sr64, enlarges 32x32 pixels, but .*base draws 16x16"),
        (["base", str(tmp_path / "new")], CheckpointError, "new holds no checkpoint"),
        (["base", str(tmp_path / "nowhere")], CheckpointError, "nowhere holds no checkpoint"),
    ):
        cfg, given = command(runs, names=cascade)
        with pytest.raises(error, match=message):
            draw_cascade(cfg, given, tmp_path)
    for line, message in (("stages=[{}]", "stages=.* has 1 entries for 3 stages"), ("run=x", "both cascade and run"),
                          ("aug_level=2", "aug_level=2 must lie")):  # fmt: skip
        cfg, given = command(runs, line)
        with pytest.raises(ConfigError, match=message):
            draw_cascade(cfg, given, tmp_path)


def test_a_damaged_stage_leaves_the_images_of_those_before_it(runs, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(runs / "sr32", broken, symlinks=True)
    weights = next(broken.glob("checkpoints/step_*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    cfg, given = command(runs, names=("base", str(broken)))
    with pytest.raises(CheckpointError, match="broken"):
        draw_cascade(cfg, given, tmp_path / "out")
