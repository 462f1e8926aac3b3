"""Pipelines with adapters against diffusers': ControlNets, T2I-Adapters, LoRAs, one and several, and all together."""

import inspect
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from ldm.build import compose
from ldm.generate import generate
from ldm.io.tensors import read_tensors, write_tensors
from ldm.published import load_published
from ldm.sampling import Sampling
from ldm.tools.gallery import read_edit

diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")

from tests.parity import pipelines  # noqa: E402
from tests.parity.test_pipelines import OURS, PROMPTS, error, picture, pil, their_pipeline  # noqa: E402

PROMPT, SEED = PROMPTS[0], 7
SIZE = (64, 96)
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj", "fc1")
T2I = {"sd15": ("full_adapter", [32, 64, 64, 64], 8), "sdxl": ("full_adapter_xl", [64, 64, 128, 128], 16)}


def hint(seed):
    """H W 3 uint8."""
    g = torch.Generator().manual_seed(seed)
    return pil(torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=g))


@cache
def control(system, seed):
    return pipelines.randomised(diffusers.ControlNetModel.from_unet(their_pipeline(system).unet), seed)


@cache
def adapter(system, seed):
    kind, widths, factor = T2I[system]
    torch.manual_seed(seed)
    return diffusers.T2IAdapter(3, widths, 2, factor, kind).eval()  # torch's initialisation has no zeros


def lora(system, seed, path):
    """A LoRA of the UNet and the text encoder in diffusers' layout, without settings: scales of 1."""
    torch.manual_seed(seed)
    state = {}
    for part, module in adapted(their_pipeline(system)):
        rows, columns = module.weight.shape
        state[f"{part}.lora_A.weight"], state[f"{part}.lora_B.weight"] = torch.randn(3, columns), torch.randn(rows, 3)
    write_tensors(path, {key: 0.1 * tensor for key, tensor in state.items()})
    return path


def adapted(pipe):
    """Layers by their dotted names in a file."""
    for part in ("unet", "text_encoder"):
        for name, module in getattr(pipe, part).named_modules():
            if name.endswith(LAYERS):
                yield f"{part}.{name}", module


@contextmanager
def with_loras(pipe, loras):
    """W + sum of scale B A within the networks of a pipeline."""
    before = {part: module.weight.data for part, module in adapted(pipe)}
    for path, scale in loras:
        state = read_tensors(path)
        for part, module in adapted(pipe):
            delta = state[f"{part}.lora_B.weight"] @ state[f"{part}.lora_A.weight"]
            module.weight.data = module.weight.data + scale * delta
    yield
    for part, module in adapted(pipe):
        module.weight.data = before[part]


def theirs(system, kind, scheduler, loras=(), **arguments):
    """Latents and decoded pictures of a pipeline of diffusers."""
    pipe, call = their_pipeline(system), {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"}
    kind = getattr(diffusers, kind)
    extra = {name: arguments.pop(name) for name in ("controlnet", "adapter") if name in arguments}
    wanted = inspect.signature(kind.__init__).parameters.keys() - {"scheduler", "self"}
    parts = {name: part for name, part in pipe.components.items() if name in wanted}
    pipe = kind(**parts, **extra, scheduler=pipelines.scheduler(scheduler, system))
    pipe.set_progress_bar_config(disable=True)
    if "strength" not in arguments:
        call |= {"height": SIZE[0], "width": SIZE[1]}
    generator = torch.Generator().manual_seed(SEED)
    with with_loras(pipe, loras), torch.no_grad():
        latents = pipe(prompt=PROMPT, generator=generator, **call, **arguments).images
        return latents, pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    @cache
    def load(system):
        folder = tmp_path_factory.mktemp(system)
        pipelines.save_folder(their_pipeline(system), folder)
        return load_published(folder)

    return load


@pytest.fixture
def ours(load, monkeypatch, tmp_path):
    """ours(system, scheduler, attached) -> latents and pictures, as sample.py goes."""
    seen = pipelines.watched(monkeypatch)

    def draw(system, scheduler, *knobs, **attached):
        run = load(system)
        run.attach(**attached)
        cfg = compose("sample", ["dialect=diffusers", *OURS[scheduler], "steps=4", "guidance.scale=5", *knobs])
        sampling, edit = Sampling.from_config(cfg), read_edit(cfg, SIZE)
        generate(run.objective, [PROMPT], [SEED], sampling, image_size=SIZE, edit=edit, attached=run.attached)
        run.detach()
        return seen

    return draw


@pytest.fixture
def saved(tmp_path):
    """saved(net, seed, **knobs) -> what `attach` is given of a ControlNet or adapter and the hint of that seed."""

    def save(net, seed, **knobs):
        net.save_pretrained(tmp_path / f"{type(net).__name__}-{seed}")
        hint(seed).save(tmp_path / f"{seed}.png")
        path, image = tmp_path / f"{type(net).__name__}-{seed}", tmp_path / f"{seed}.png"
        return {"path": path, "image": str(image), **knobs}

    return save


def agree(mine, expected):
    errors = [error(a, b) for a, b in zip(mine, expected, strict=True)]
    assert max(errors) <= 2e-4, errors


@pytest.mark.parametrize("system, scheduler", [("sd15", "pndm"), ("sd15", "euler"), ("sdxl", "ddim")])
def test_one_controlnet(system, scheduler, ours, saved):
    net, kind = control(system, 1), "XL" if system == "sdxl" else ""
    mine = ours(system, scheduler, controlnet=saved(net, 1, scale=0.8))
    expected = theirs(system, f"StableDiffusion{kind}ControlNetPipeline", scheduler, controlnet=net,
                      image=hint(1), controlnet_conditioning_scale=0.8)  # fmt: skip
    agree(mine, expected)


def test_several_controlnets_in_windows(ours, saved):
    nets = [control("sd15", seed) for seed in (1, 2)]
    attached = [saved(nets[0], 1, scale=0.7, window=[0, 0.5]), saved(nets[1], 2, scale=1.2, window=[0.25, 1])]
    expected = theirs(
        "sd15", "StableDiffusionControlNetPipeline", "ddim", controlnet=nets, image=[hint(1), hint(2)],
        controlnet_conditioning_scale=[0.7, 1.2], control_guidance_start=[0.0, 0.25], control_guidance_end=[0.5, 1.0],
    )  # fmt: skip
    agree(ours("sd15", "ddim", controlnet=attached), expected)


@pytest.mark.parametrize("system, scheduler", [("sd15", "euler"), ("sdxl", "ddim")])
def test_adapter(system, scheduler, ours, saved):
    net, kind = adapter(system, 3), "XL" if system == "sdxl" else ""
    expected = theirs(system, f"StableDiffusion{kind}AdapterPipeline", scheduler, adapter=net, image=hint(3),
                      adapter_conditioning_scale=0.6)  # fmt: skip
    agree(ours(system, scheduler, t2i_adapter=saved(net, 3, scale=0.6)), expected)


def test_several_adapters(ours, saved):
    nets = [adapter("sd15", seed) for seed in (3, 4)]
    expected = theirs("sd15", "StableDiffusionAdapterPipeline", "ddim", adapter=nets, image=[hint(3), hint(4)],
                      adapter_conditioning_scale=[0.6, 0.9])  # fmt: skip
    attached = [saved(net, seed, scale=scale) for net, seed, scale in zip(nets, (3, 4), (0.6, 0.9), strict=True)]
    agree(ours("sd15", "ddim", t2i_adapter=attached), expected)


def test_loras_merged_and_not(ours, tmp_path):
    """Of the UNet and the text encoder; two at once, each with its scale."""
    files = [(lora("sd15", seed, tmp_path / f"{seed}.safetensors"), scale) for seed, scale in ((5, 0.8), (6, 0.4))]
    expected = theirs("sd15", "StableDiffusionPipeline", "pndm", files)
    attached = [{"path": path, "scale": scale} for path, scale in files]
    agree(ours("sd15", "pndm", lora=attached), expected)


def test_all_together_on_a_picture(ours, saved, tmp_path):
    """Image to image with a LoRA in the base, a ControlNet beside it."""
    net, file = control("sd15", 1), lora("sd15", 5, tmp_path / "lora.safetensors")
    pil(picture(SIZE)).save(tmp_path / "photo.png")
    expected = theirs(
        "sd15", "StableDiffusionControlNetImg2ImgPipeline", "ddim", [(file, 0.8)], controlnet=net,
        image=pil(picture(SIZE)), control_image=hint(1), strength=0.5, controlnet_conditioning_scale=0.9,
    )  # fmt: skip
    mine = ours("sd15", "ddim", f"image={tmp_path}/photo.png", "strength=0.5", controlnet=saved(net, 1, scale=0.9),
                lora={"path": file, "scale": 0.8})  # fmt: skip
    agree(mine, expected)
