"""What a diffusers pipeline holds besides its networks: settings, read and written; schedulers and vocabularies."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.conditioning.clip_tokenizer import BOS, EOS, LENGTH, read_clip_tokenizer
from ldm.conditioning.t5_tokenizer import read_t5_tokenizer
from ldm.io.files import replacing
from ldm.io.magic import format_of
from ldm.io.stored import index_tensors
from ldm.io.tensors import read_header
from ldm.io.text import read_config, write_json
from ldm.utils.errors import DataError, WeightsError
from ldm.weights.components import class_name
from ldm.weights.formats import Config
from ldm.weights.parts import MARKERS
from ldm.weights.places import SYSTEMS, places_of
from ldm.weights.schedulers import KINDS, NEAREST

CLASSES = {  # of a pipeline; of a system without a line here: those of its family
    "sd15": "StableDiffusionPipeline",
    "sd15_inpaint": "StableDiffusionInpaintPipeline",
    "sd21": "StableDiffusionPipeline",
    "sd21_inpaint": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl_inpaint": "StableDiffusionXLInpaintPipeline",
    "sdxl_refiner": "StableDiffusionXLImg2ImgPipeline",
    "dit": "DiTPipeline",
    "pixart": "PixArtAlphaPipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
    "if": "IFPipeline",
    "if_ii_m": "IFSuperResolutionPipeline",
    "if_ii_l": "IFSuperResolutionPipeline",
    "if_iii_l": "IFSuperResolutionPipeline",
}
TEXT_LENGTHS = {CLASSES["pixart"]: 120, CLASSES["pixart_sigma"]: 300}  # tokens of a caption
NOISING = "image_noising_scheduler"
VERSION = "0.30.0"  # of diffusers, whose form of these files is written; its inpainting asks for one
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COMMON = BETAS | {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
PNDM = COMMON | {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}
DDIM = COMMON | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
EULER = COMMON | {
    "_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "leading",
    "interpolation_type": "linear", "use_karras_sigmas": False,
}  # fmt: skip
LINEAR = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
DIT = LINEAR | {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "clip_sample": False}
PIXART = LINEAR | {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "epsilon"}
COSINE = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
IF = COSINE | {
    "prediction_type": "epsilon", "variance_type": "learned_range", "thresholding": True,
    "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5,
}  # fmt: skip
IF_ENLARGING = IF | {"sample_max_value": 1.0}
SCHEDULERS = {
    "sd15": PNDM, "sd15_inpaint": PNDM, "sd21": DDIM, "sd21_base": PNDM, "sd21_inpaint": PNDM, "sdxl": EULER,
    "sdxl_inpaint": EULER, "sdxl_refiner": EULER, "dit": DIT, "pixart": PIXART,
    "if": IF, "if_ii_m": IF_ENLARGING, "if_ii_l": IF_ENLARGING, "if_iii_l": IF_ENLARGING,
}  # fmt: skip
DEFAULTS = {  # of classes whose table is not LINEAR where nothing is said
    "HeunDiscreteScheduler": LINEAR | {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2DiscreteScheduler": LINEAR | {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2AncestralDiscreteScheduler": LINEAR | {"beta_start": 0.00085, "beta_end": 0.012},
    "LCMScheduler": BETAS, "TCDScheduler": BETAS,
}  # fmt: skip
EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
LONGEST = 100_000  # steps of a table
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
MODEL_SPEC = {"epsilon": "eps", "v": "v"}  # `modelspec.prediction_type` in the header of community files
SCHEDULE = {"rescale_betas_zero_snr": "zero_terminal_snr"} | {name: name for name in (*BETAS, "trained_betas")}
TYPES = {
    "prediction": (str,), "zero_terminal_snr": (bool,), "zero_null": (bool,), "scale": (int, float, list),
    "shift": (int, float, list), "num_train_timesteps": (int,), "beta_start": (int, float), "beta_end": (int, float),
    "beta_schedule": (str,), "text_length": (int,), "class_names": (list,), "trained_betas": (list,),
    "process": (str,), "sigma_min": (int, float), "sigma_max": (int, float), "sigma_data": (int, float),
    "rho": (int, float), "flow_shift": (int, float),
}  # fmt: skip
SCALES = {"scaling_factor": "scale", "shift_factor": "shift"}
LATENT_SCALES = {"sd15": 0.18215, "sd21": 0.18215, "sdxl": 0.13025, "sdxl_refiner": 0.13025}  # by family
NULL_CAPTION = "y_embedder.y_embedding"  # of PixArt's original files, as long as a caption
VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json")
TOKENIZERS = {"clip_text": read_clip_tokenizer, "t5": read_t5_tokenizer}


def read_settings(path: Path) -> Config:
    """What the files of a system say besides the networks: those of the settings of `TYPES` that they do say.

    Raises WeightsError for values that cannot be.
    """
    settings = _folder_settings(path) if path.is_dir() else _file_settings(path)
    for name, value in settings.items():
        if type(value) not in TYPES.get(name, ()) or (name == "prediction" and value not in PREDICTIONS.values()):
            raise WeightsError(f"{path}: says {str(name)[:60]}={str(value)[:60]}, which is no setting of a system")
    steps = max(settings.get("num_train_timesteps", 1), len(settings.get("trained_betas", [0])))
    if not 1 <= steps <= LONGEST or not all(type(b) in (int, float) for b in settings.get("trained_betas", [])):
        raise WeightsError(f"{path}: says a table of {steps} betas; expected numbers, 1 to {LONGEST} of them")
    return settings


def _folder_settings(path: Path) -> Config:
    scheduler = read_scheduler(path)
    settings = process_of(scheduler) | scales(_optional(path / "vae/config.json"))
    if settings.get("beta_schedule") == COSINE["beta_schedule"]:  # its betas begin and end where the cosine says
        settings = {name: value for name, value in settings.items() if name not in ("beta_start", "beta_end")}
    index = _optional(path / "model_index.json")
    settings |= _renamed(index, {"force_zeros_for_empty_prompt": "zero_null"}) | _class_names(index.get("id2label"))
    length = TEXT_LENGTHS.get(str(index.get("_class_name")))
    settings |= {"text_length": length} if length else {}
    kind = scheduler.get("prediction_type")
    return settings | ({"prediction": PREDICTIONS.get(str(kind), kind)} if kind else {})


def process_of(scheduler: Config) -> Config:
    """What the config of a scheduler says of the process: a table of betas, or that it is EDM's or a flow."""
    name = str(scheduler.get("_class_name"))
    if name.startswith("EDM"):
        return {"process": "edm"} | EDM | _renamed(scheduler, {word: word for word in EDM})
    if name.startswith("FlowMatch") or scheduler.get("use_flow_sigmas"):
        shifts = {"shift": "flow_shift", "flow_shift": "flow_shift"}
        return {"process": "flow"} | _renamed(scheduler, shifts)
    defaults = DEFAULTS.get(name, LINEAR) if name in KINDS or name in NEAREST else {}
    return defaults | _renamed(scheduler, SCHEDULE)


def scales(config: Config) -> Config:
    """What the config.json of an autoencoder says of its latents: x = (z - shift) * scale. Raises WeightsError."""
    settings = _renamed(config, SCALES)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return settings
    count = config.get("latent_channels", 4)
    if not all(_is_numbers(each, count) for each in (mean, std)) or min(std) <= 0:
        raise WeightsError(f"latents_mean, latents_std of an autoencoder: expected {count} numbers each, std above 0")
    scale = settings.get("scale", 0.18215)
    return settings | {"shift": mean, "scale": [scale / each for each in std]}


def _is_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(each) in (int, float) for each in value)


def _class_names(table: Any) -> Config:
    """Of DiT's model_index.json, whose keys are the classes as text; nothing where not each has a name."""
    names = [table.get(str(i)) for i in range(len(table))] if isinstance(table, dict) else []
    return {"class_names": names} if names and all(isinstance(name, str) for name in names) else {}


def _file_settings(path: Path) -> Config:
    names = index_tensors(path)
    settings: Config = dict(setting for name, setting in MARKERS.items() if name in names)
    lengths = [stored.shape[0] for name, stored in names.items() if name.endswith(NULL_CAPTION)]
    settings |= {"text_length": lengths[0]} if lengths else {}
    if format_of(path) != "safetensors":
        return settings
    header = read_header(path)
    if kind := MODEL_SPEC.get(header.metadata.get("modelspec.prediction_type", "")):
        settings["prediction"] = kind
    ours = header.ldm.get("settings")
    return settings | (ours if isinstance(ours, dict) else {})


def read_scheduler(path: Path, name: str = "scheduler") -> Config:
    """scheduler_config.json of a pipeline folder, or nothing."""
    return _optional(path / name / "scheduler_config.json")


def read_vocabulary(path: Path, system: str) -> str:
    """A vocabulary of the kind that the system's text encoders share, as JSON. Raises WeightsError."""
    kind = next((place.kind for place in places_of(system) if place.kind in TOKENIZERS), None)
    if kind is None:
        raise WeightsError(f"{path}: the system {system} reads no text, so it has no use for a vocabulary")
    return TOKENIZERS[kind](path).to_json()


def read_tokenizer(folders: Iterable[Path], system: str) -> str | None:
    """The vocabulary in the first folder that has one."""
    there = (folder for folder in folders if any((folder / name).is_file() for name in VOCABULARIES))
    folder = next(there, None)
    return read_vocabulary(folder, system) if folder else None


def vocabularies(path: Path) -> list[Path]:
    """Folders of a pipeline, or beside an encoder, that may hold a vocabulary."""
    return [path / "tokenizer", path / "tokenizer_2", path, path.parent / "tokenizer"] if path.is_dir() else []


def write_pipeline(folder: Path, system: str, settings: Config, source: Path, tokenizer: str | None) -> None:
    """All of a pipeline but its networks, which are in the folder: model_index.json, the scheduler (where the source
    has none, the published one), and for each text encoder its vocabulary."""
    kind = CLASSES.get(system) or CLASSES["pixart_sigma" if "sigma" in system else SYSTEMS[system]]
    index = {"_class_name": kind, "_diffusers_version": VERSION}
    schedulers = {"scheduler": read_scheduler(source) or published_scheduler(system, settings)}
    if kind == CLASSES["if_ii_m"]:  # by which it noises what it enlarges
        schedulers[NOISING] = read_scheduler(source, NOISING) or COSINE
    for name, config in schedulers.items():
        (folder / name).mkdir()
        write_json(folder / name / "scheduler_config.json", config)
        index[name] = ["diffusers", config.get("_class_name", "PNDMScheduler")]
    for place in places_of(system):
        config = read_config(folder / place.folder / "config.json")
        is_text = place.kind in TOKENIZERS
        index[place.folder] = ["transformers" if is_text else "diffusers", class_name(config)]
        if is_text:
            name = place.folder.replace("text_encoder", "tokenizer")
            written = "T5TokenizerFast" if place.kind == "t5" else "CLIPTokenizer"
            index[name] = ["transformers", written] if tokenizer else [None, None]
            if tokenizer and place.kind == "t5":
                write_t5_tokenizer(folder / name, tokenizer)
            elif tokenizer:
                write_tokenizer(folder / name, tokenizer, EOS if place.slot == "clip_l" else "!")
    write_json(folder / "model_index.json", index | _pipeline_knobs(system, settings))


def _pipeline_knobs(system: str, settings: Config) -> Config:
    """Arguments of the pipeline's class, and the parts that it has not."""
    if SYSTEMS[system] in ("dit", "pixart"):
        names = settings.get("class_names")
        return {"id2label": {str(i): name for i, name in enumerate(names)}} if names else {}
    if not system.startswith("sdxl"):
        absent = ("safety_checker", "feature_extractor", *(["watermarker"] if SYSTEMS[system] == "if" else []))
        return {"requires_safety_checker": False, **dict.fromkeys(absent, [None, None])}
    is_refiner = system == "sdxl_refiner"
    knobs = {"force_zeros_for_empty_prompt": settings.get("zero_null", not is_refiner)}
    if system != "sdxl":
        knobs["requires_aesthetics_score"] = is_refiner
    return knobs | ({"text_encoder": [None, None], "tokenizer": [None, None]} if is_refiner else {})


def published_scheduler(system: str, settings: Config) -> Config:
    """scheduler_config.json as its authors published it, but with the settings that the files say."""
    config = SCHEDULERS.get(system) or SCHEDULERS[SYSTEMS[system]]
    config = config | {name: settings[name] for name in BETAS if name in settings}
    kinds = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    config |= {"prediction_type": kinds[settings["prediction"]]} if "prediction" in settings else {}
    if settings.get("zero_terminal_snr"):
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def write_t5_tokenizer(folder: Path, tokenizer: str) -> None:
    """The files from which transformers makes a T5Tokenizer."""
    marks = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    folder.mkdir()
    with replacing(folder / "tokenizer.json") as file:
        file.write(tokenizer.encode())
    write_json(folder / "tokenizer_config.json", marks | {"tokenizer_class": "T5TokenizerFast", "extra_ids": 100})


def write_tokenizer(folder: Path, tokenizer: str, pad: str) -> None:
    """The files from which transformers makes a CLIPTokenizer; `pad` is the token after the end of a prompt."""
    table = json.loads(tokenizer)
    vocab = table["model"]["vocab"]
    added = {token["content"]: token["id"] for token in table["added_tokens"] if token["content"] not in vocab}
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in table["model"]["merges"])
    marks = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    config = marks | {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH}
    folder.mkdir()
    write_json(folder / "vocab.json", vocab)
    with replacing(folder / "merges.txt") as file:
        file.write("\n".join(["#version: 0.2", *pairs, ""]).encode())
    write_json(folder / "special_tokens_map.json", marks)
    write_json(folder / "tokenizer_config.json", config)
    if added:
        write_json(folder / "added_tokens.json", added)


def _optional(path: Path) -> Config:
    try:  # lenient: DPM-Solver's scheduler has lambda_min_clipped=-Infinity
        return read_config(path, lenient=True) if path.is_file() else {}
    except DataError as error:
        raise WeightsError(str(error)) from error


def _renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> Config:
    """The entries that have a name here and a value, under our names."""
    return {ours: config[name] for name, ours in names.items() if config.get(name) is not None}
