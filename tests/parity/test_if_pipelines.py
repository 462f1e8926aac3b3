"""DeepFloyd IF's pipelines against diffusers: prompts and seeds in, float images out, one stage and one after another.

Theirs draw noise from a list of generators in the order in which dialect=diffusers draws it: x_T, what noises the low
resolution, then a step's at a time.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch

from ldm.build import compose
from ldm.diffusion.guidance import dynamic_threshold
from ldm.diffusion.process import space_indices
from ldm.diffusion.times import RESPACINGS
from ldm.generate import Enlarging, Sampling, generate
from ldm.io.images import read_image
from ldm.models import codec
from ldm.published import load_published
from ldm.tools.convert import convert
from ldm.tools.stages import draw_cascade
from ldm.weights import load_model, load_system

diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")
pytest.importorskip("transformers", reason="the parity extra is not installed")
pytest.importorskip("bs4", reason="the parity extra is not installed")
pytest.importorskip("ftfy", reason="the parity extra is not installed")

from diffusers.pipelines.deepfloyd_if import timesteps  # noqa: E402

from tests.parity import if_pipelines as tiny  # noqa: E402
from tests.parity.test_systems_weights import same  # noqa: E402

PROMPTS = ("a photo of a <b>RED cat</b>!", "Cat")
SMALL, LARGE = (8, 12), (32, 48)


@dataclass(frozen=True)
class Case:
    """One call of a pipeline."""

    system: str = "if_i_m"
    layout: str = "folder"  # file: the authors' own, with the text encoder beside it
    steps: int | str = 5  # a name of IF's tables, else diffusers' own spacing
    prompts: tuple = PROMPTS
    negative: str | None = None
    guidance: float = 7.0
    percentile: float = 0.95
    level: float = 0.25  # of the noise on the low resolution
    seeds: tuple[int, ...] = (0, 7)

    @property
    def size(self):
        return SMALL if self.system == "if_i_m" else LARGE

    def overrides(self):
        times = ["times=respaced"] if isinstance(self.steps, str) else ["times=leading", "times.offset=0"]
        threshold = ["threshold=dynamic", f"threshold.percentile={self.percentile}",
                     f"threshold.cap={tiny.CAP[self.system]}"]  # fmt: skip
        knobs = [f"steps={self.steps}", f"guidance.scale={self.guidance}"]
        return ["dialect=diffusers", "sampler=ddpm_learned", *times, *threshold, *knobs]


@cache
def their_pipeline(system):
    diffusers.utils.logging.set_verbosity_error()
    return tiny.pipeline(system)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(system) -> its folder, and that of its authors."""
    root = tmp_path_factory.mktemp("published")

    @cache
    def save(system):
        pipe = their_pipeline(system)
        pipe.save_pretrained(root / system)
        tiny.save_original(pipe.unet, root / f"{system} original", system)
        return {"folder": root / system, "file": root / f"{system} original"}

    return save


@pytest.fixture(scope="module")
def load(saved):
    @cache
    def load(system, layout):
        parts = {"text_encoder": saved("if_i_m")["folder"]} if layout == "file" else {}
        run = load_published(saved(system)[layout], parts=parts)
        assert run.config["system"] == system
        return run.objective

    return load


@pytest.fixture
def seen(monkeypatch):
    """Images as they are before they are rounded to bytes."""
    images, rounded = [], codec.to_uint8
    monkeypatch.setattr(codec, "to_uint8", lambda x: (images.append(x), rounded(x))[1])
    return images


def low_resolution():
    return torch.randint(0, 256, (2, 3, *SMALL), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def theirs(case, image=None):
    pipe = their_pipeline(case.system)
    pipe.scheduler = tiny.scheduler(case.system)
    pipe.scheduler.register_to_config(dynamic_thresholding_ratio=case.percentile)
    arguments = {"guidance_scale": case.guidance, "output_type": "pt", "height": case.size[0], "width": case.size[1]}
    if isinstance(case.steps, str):
        arguments["timesteps"] = getattr(timesteps, f"{case.steps}_timesteps")
    else:
        arguments["num_inference_steps"] = case.steps
    if image is not None:
        arguments |= {"image": image, "noise_level": round(1000 * case.level)}
    if case.negative is not None:
        arguments["negative_prompt"] = [case.negative] * len(case.prompts)
    arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in case.seeds]
    return pipe(list(case.prompts), **arguments).images


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())  # of [-1, 1]


CASES = {
    "I": Case(),
    "I file": Case(layout="file", negative="red", steps=7),
    "I, no guidance": Case(guidance=1.0, prompts=("cat",), seeds=(5,)),
    "I fast27": Case(layout="file", steps="fast27", prompts=("cat",), seeds=(5,), guidance=3.0),
    "I smart27": Case(steps="smart27", prompts=("red cat",), seeds=(5,), guidance=1.0),
    "I, another percentile": Case(percentile=0.7, steps=10),
    "II": Case("if_ii_m", guidance=4.0),
    "II file": Case("if_ii_m", "file", guidance=4.0, level=0.7, negative="photo"),
    "II, no noise": Case("if_ii_m", "file", guidance=2.0, level=0.0),
    "II super27": Case("if_ii_m", steps="super27", prompts=("cat",), seeds=(5,), guidance=1.0, level=1 / 8),
}


@pytest.mark.parametrize("name", CASES)
def test_pipeline(name, load, seen):
    case = CASES[name]
    sampling, enlarging, image = Sampling.from_config(compose("sample", case.overrides())), None, None
    if case.system == "if_ii_m":
        small = low_resolution()[: len(case.prompts)]
        enlarging, image = Enlarging(small, case.level), small.float() / 127.5 - 1
    objective = load(case.system, case.layout)
    generate(objective, case.prompts, case.seeds, sampling, image_size=case.size, negative=case.negative,
             enlarging=enlarging)  # fmt: skip
    expected = theirs(case, image)
    assert expected.std() > 0.1 and (case.guidance == 1 or expected.abs().max() <= 1)
    print(name, error(seen[0], expected))
    assert error(seen[0], expected) <= 2e-4


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_cascade(layout, saved, seen, tmp_path):
    """I -> II by the command, which reads T5 once, against theirs with the bytes of ours in between."""
    first, second = Case(guidance=7.0), Case("if_ii_m", guidance=4.0, steps=4)
    paths = [saved(case.system)[layout] for case in (first, second)]
    given = [f"cascade={[str(path) for path in paths]}", "stages=[{steps:5},{steps:4}]", "seeds=[3]",
             "prompts=[a photo of a red cat, Cat]", f"image_size={list(SMALL)}", "device=cpu", "dialect=diffusers",
             "times=leading", "times.offset=0"]  # fmt: skip
    given += [f"text_encoder={saved('if_i_m')['folder']}"] if layout == "file" else []
    draw_cascade(compose("sample", given), given, tmp_path)
    prompts, seeds = ("a photo of a red cat", "Cat"), (3, 3)
    small = theirs(Case(prompts=prompts, seeds=seeds))
    assert error(seen[0], small) <= 2e-4
    drawn = torch.stack([read_image(tmp_path / f"stage_1/{i:04d}.png") for i in (0, 1)])
    assert (drawn - codec.to_uint8(small)).abs().max() <= 1
    large = theirs(Case("if_ii_m", guidance=4.0, steps=4, prompts=prompts, seeds=seeds), drawn.float() / 127.5 - 1)
    assert error(seen[1], large) <= 2e-4


@pytest.mark.parametrize("percentile, cap", [(0.95, 1.5), (0.95, 1.0), (0.995, None), (0.5, 3.0)])
def test_dynamic_threshold(percentile, cap):
    """Against diffusers', and both against sorted float64 values."""
    x = 4 * torch.randn(5, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([0.1, 0.3, 0.6, 1, 9]).view(5, 1, 1, 1)
    ours = dynamic_threshold(lambda x, t, variance=False: x, percentile=percentile, cap=cap)(x, 0.5)
    values = x.double().abs().flatten(1).sort(dim=1).values
    place = percentile * (values.shape[1] - 1)
    low, high = values[:, int(place)], values[:, int(place) + 1]
    limit = (low + (place % 1) * (high - low)).clamp(min=1, max=cap).view(-1, 1, 1, 1)
    expected = torch.minimum(torch.maximum(x.double(), -limit), limit) / limit
    assert error(ours.double(), expected) <= 1e-6
    if cap:
        knobs = dict(dynamic_thresholding_ratio=percentile, sample_max_value=cap, thresholding=True)
        assert error(ours, diffusers.DDPMScheduler(**knobs)._threshold_sample(x)) <= 1e-6


def public(scheduler):
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


@pytest.mark.parametrize("name", RESPACINGS)
def test_respacings_are_the_authors(name):
    assert space_indices(1000, RESPACINGS[name])[::-1] == getattr(timesteps, f"{name}_timesteps")


@pytest.mark.parametrize("system", tiny.SYSTEMS)
def test_layouts_hold_the_same(system, load, saved):
    folder, file = (load(system, layout).state_dict() for layout in ("folder", "file"))
    assert same(folder, file)
    alone = load_model(saved(system)["file"] / "pytorch_model.bin")
    assert same(alone.state_dict(), load(system, "folder").denoiser.net.state_dict())


@pytest.mark.parametrize("system", tiny.SYSTEMS)
def test_ours_is_theirs_bit_for_bit(system, saved, tmp_path):
    """Theirs -> ours -> both layouts -> theirs, with the schedulers and the vocabulary."""
    pipe, folder = their_pipeline(system), saved(system)["folder"]
    convert(folder, tmp_path / "again", "diffusers")
    back = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(back) is type(pipe) and same(back.unet.state_dict(), pipe.unet.state_dict())
    assert same(back.text_encoder.state_dict(), pipe.text_encoder.state_dict())
    assert back.tokenizer("photo cat").input_ids == pipe.tokenizer("photo cat").input_ids
    assert public(back.scheduler) == public(tiny.scheduler(system))
    ours, theirs = load_system(folder), load_system(tmp_path / "again")
    assert ours.settings == theirs.settings and ours.nodes == theirs.nodes and ours.tokenizer == theirs.tokenizer
    if system != "if_i_m":
        assert public(back.image_noising_scheduler) == public(pipe.image_noising_scheduler)
    convert(folder, tmp_path / "authors" / "model.safetensors", "original", "unet")
    again = load_model(tmp_path / "authors")
    assert same(again.state_dict(), load_model(folder).state_dict())
    convert(tmp_path / "authors", tmp_path / "net", "diffusers")
    assert same(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "net").state_dict(), pipe.unet.state_dict())


@pytest.mark.parametrize("system", tiny.SYSTEMS)
def test_authors_files_become_a_pipeline(system, saved, tmp_path):
    """With a text encoder in the folder; the schedulers are those that were published."""
    import shutil

    shutil.copytree(saved(system)["file"], tmp_path / "src")
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(saved("if_i_m")["folder"] / name, tmp_path / "src" / name)
    convert(tmp_path / "src", tmp_path / "dst", "diffusers")
    back, expected = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "dst"), tiny.scheduler(system).config
    assert same(back.unet.state_dict(), their_pipeline(system).unet.state_dict())
    for name in ("beta_schedule", "variance_type", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"):
        assert back.scheduler.config[name] == expected[name]
    if system != "if_i_m":
        assert back.image_noising_scheduler.config.beta_schedule == "squaredcos_cap_v2"
