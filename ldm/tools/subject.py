"""What `sample.py` draws from: a run of ours, or published weights, each with its own way of being drawn from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldm.build import compose
from ldm.conditioning.clip import CLIPTextEncoder
from ldm.conditioning.prompts import EMPHASIS
from ldm.conditioning.stored import KnownTexts
from ldm.generate import Refiner, Run, load_run
from ldm.published import Options, load_published, parts_of, system_of
from ldm.utils.devices import pick_device
from ldm.utils.errors import ConfigError, WeightsError
from ldm.weights.pipeline import PREDICTIONS, process_of, published_scheduler, read_scheduler, read_settings
from ldm.weights.places import SYSTEMS
from ldm.weights.schedulers import GRIDS, OF_SAMPLERS, drawn_by

DIFFUSERS = {  # what its pipelines draw with where nothing is said, by system or family
    "sd15": ["guidance.scale=7.5"],
    "sd21": ["guidance.scale=7.5"],
    "sdxl": ["guidance.scale=5"],
    "sdxl_inpaint": ["guidance.scale=7.5"],
    "sdxl_refiner": ["guidance.scale=7.5"],
    "dit": ["guidance.scale=4", "formula=diffusers"],
    "pixart": ["steps=20", "guidance.scale=4.5"],
    "if": ["steps=100", "guidance.scale=7"],
    "if_ii_m": ["guidance.scale=4", "aug_level=0.25"],
    "if_ii_l": ["guidance.scale=4", "aug_level=0.25"],
    "if_iii_l": ["guidance.scale=4", "aug_level=0.25"],
}
OF_GRID = ("times", "sampler.even_steps", "sampler.combines", "dialect.start")
THEIRS = {ours: theirs for theirs, ours in PREDICTIONS.items()}
ADAPTERS = ("lora", "controlnet", "t2i_adapter", "composition", "every")
OF_WEIGHTS = ("kind", "embeddings", "tokenizer", "dtype", "variant", "refiner", "prompt_weights")  # no run has them


def as_published(cfg: dict, given: Sequence[str]) -> dict:
    """The config again, with what the authors of the published weights sampled with where `given`, the command's own
    overrides, do not say."""
    if not cfg["weights"]:
        return cfg
    if not isinstance(cfg["weights"], str):
        raise ConfigError(f"weights={cfg['weights']}: expected the path of one file or folder")
    name = system_of(cfg["weights"], cfg["kind"], parts_of(cfg), Options(**cfg["published"]))
    chosen = {override.partition("=")[0].lstrip("+~") for override in given}
    theirs = [line for line in compose("train", [f"system={name}"])["sampling"] if not _is_replaced(line, chosen)]
    if others := without_table(Path(cfg["weights"])):
        theirs = [line for line in others if not {line.partition("=")[0], line.partition(".")[0]} & chosen]
    elif "dialect=diffusers" in given and not name.startswith("sit"):  # which no pipeline of its draws
        theirs, given = as_diffusers(cfg, name, given)
    return {**compose("sample", [*theirs, *given]), "kind": name}


def without_table(path: Path) -> list[str]:
    """How a folder is drawn from whose scheduler is EDM's (Playground 2.5) or of a flow: no other grid fits it."""
    config = read_scheduler(path) if path.is_dir() else {}
    process = process_of(config).get("process")
    if process == "flow":
        return ["sampler=euler", "times=linspace"]
    if process is None:
        return []
    grid = ["times=logsnr" if config.get("sigma_schedule") == "exponential" else "times=karras", "guidance.scale=3"]
    if config["_class_name"] == "EDMEulerScheduler":
        return ["sampler=euler", *grid, "+dialect.initial.karras=prior", "+dialect.initial.logsnr=prior"]
    order = config.get("solver_order", 2)
    return ["sampler=dpm_solver", f"sampler.order={order}", "sampler.lower_order_final=true", *grid]


def as_diffusers(cfg: dict, system: str, given: Sequence[str]) -> tuple[list[str], list[str]]:
    """What diffusers' pipeline of a system draws with, and the command's own overrides less those that it expresses.

    Of a folder, its scheduler; of a file, the one that was published. A sampler or a grid that the command names is
    one with the same config. Raises WeightsError for a scheduler that has no equivalent.
    """
    path, groups = Path(cfg["weights"]), dict(line.split("=", 1) for line in given if "=" in line)
    family = SYSTEMS[system]
    config = (read_scheduler(path) if path.is_dir() else {}) or published_scheduler(system, read_settings(path))
    if family in ("sd15", "sd21"):  # what its pipelines change in a scheduler that says otherwise
        is_inpainting = bool(cfg["mask"]) or system.endswith("inpaint")
        config = config | {"steps_offset": 1} | ({"skip_prk_steps": True} if is_inpainting else {"clip_sample": False})
    if cfg["published"]["prediction"]:
        config = config | {"prediction_type": THEIRS[cfg["published"]["prediction"]]}
    sampler, times = groups.get("sampler"), groups.get("times")
    lines = []
    if sampler in (None, *OF_SAMPLERS):
        lines = drawn_by(config, str(path), sampler, times if times in GRIDS else None)
    if times not in (None, *GRIDS):  # a grid of which diffusers knows nothing
        lines = ["sampler=plms" if line == "sampler=pndm" else line for line in lines if not line.startswith(OF_GRID)]
    expressed = {"sampler"} if "sampler=pndm" in lines else set()
    expressed |= {"times"} if "times=schedule" in lines else set()
    kept = [line for line in given if line.partition("=")[0] not in expressed]
    names = {line.partition("=")[0].lstrip("+~") for line in kept}
    defaults = DIFFUSERS[system] if system in DIFFUSERS else DIFFUSERS[family]
    return [line for line in [*defaults, *lines] if line.partition("=")[0] not in names], kept


def _is_replaced(line: str, chosen: set[str]) -> bool:
    """Whether the command chooses what a line sets, or the group it is a knob of; a dialect brings its own grid."""
    name = line.partition("=")[0]
    group = name.partition(".")[0]
    return bool({name, group} & chosen) or (group == "times" and "dialect" in chosen)


def load_subject(cfg: dict, texts: KnownTexts | None = None) -> tuple[Run, Refiner | None]:
    """The model that is drawn from, and the expert that takes over. Raises ConfigError or WeightsError.

    texts: read before, in place of a text encoder (`ldm.tools.embed`).
    """
    if bool(cfg["run"]) == bool(cfg["weights"]):
        problem = "both run and weights are set; give one of them" if cfg["run"] else "run is not set"
        raise ConfigError(f"{problem}: a run directory, e.g. run=runs/shapes/2026-01-01_12-00-00, or weights=FILE")
    if not isinstance(cfg["handover"], int | float) or not 0 <= cfg["handover"] <= 1:
        raise ConfigError(f"handover={cfg['handover']} must lie between 0 (all by the refiner) and 1 (nothing)")
    if cfg["refiner"] and not (cfg["kind"] or "").startswith("sdxl"):
        drawn = cfg["kind"] or "a run"
        raise ConfigError(f"refiner={cfg['refiner']} finishes what SDXL begins, not {drawn}; leave it out")
    if cfg["published"]["negative_2"] is not None and cfg["negative"] is None:
        raise ConfigError(f"published.negative_2={cfg['published']['negative_2']} stands beside negative=; give both")
    if cfg["prompt_weights"] not in (None, *EMPHASIS):
        raise ConfigError(f"prompt_weights={cfg['prompt_weights']}: expected null or one of {', '.join(EMPHASIS)}")
    if cfg["run"]:
        if unused := [name for name in OF_WEIGHTS if cfg[name] not in (None, "fp32")]:
            raise ConfigError(f"{', '.join(unused)} can be set for weights= only, and this is a run")
        run = load_run(cfg["run"], device=pick_device(cfg["device"]), ema=cfg["averaged"] is not False)
        attach(run, cfg)
        return run, None
    refiner = _published(cfg, cfg["refiner"], "sdxl_refiner", {}) if cfg["refiner"] else None
    if cfg["kind"] == "sdxl_refiner" and not cfg["image"]:
        raise WeightsError(
            f"{cfg['weights']} is SDXL's refiner, which draws nothing of its own: "
            "give it as refiner= beside weights= of a base, or give image= to change"
        )
    run = _published(cfg, cfg["weights"], cfg["kind"], parts_of(cfg), texts)
    attach(run, cfg)
    return run, refiner and Refiner(refiner.objective, cfg["handover"])


def attach(run: Run, cfg: dict) -> None:
    """The adapters of the command around the model that is drawn from, not around a refiner; says what they change."""
    given = {name: cfg[name] for name in ADAPTERS}
    if not given["lora"] and given["composition"] != "merge":
        raise ConfigError(f"composition={given['composition']} is of LoRAs, and lora is not set; give lora=FILE")
    hints = given["controlnet"] if isinstance(given["controlnet"], list) else [given["controlnet"]]
    decay = {"decay": cfg["dialect"]["guess_decay"]}
    given["controlnet"] = [decay | hint if isinstance(hint, dict) else hint for hint in hints if hint]
    if any(given[name] for name in ("lora", "controlnet", "t2i_adapter")):
        print("\n".join(run.attach(**given)), flush=True)


def _published(
    cfg: dict, weights: str, system: str, parts: dict[str, str], texts: KnownTexts | None = None
) -> Run:
    run = load_published(
        weights,
        system=system,
        tokenizer=cfg["tokenizer"],
        dtype=cfg["dtype"],
        device=pick_device(cfg["device"]),
        variant=cfg["variant"],
        ema=cfg["averaged"],
        parts=parts,
        formula=cfg["formula"] if weights == cfg["weights"] else None,
        texts=texts,
        options=options_of(cfg, is_refiner=system == "sdxl_refiner"),
    )
    if cfg["prompt_weights"]:
        weigh(run, cfg["prompt_weights"])
    return run


def options_of(cfg: dict, is_refiner: bool) -> Options:
    """What is said of the weights, or of a refiner beside them: each has its own prediction, layers and texts."""
    options = Options(**cfg["published"])
    scores = {"aesthetic_score": None, "negative_aesthetic_score": None}
    if is_refiner and cfg["kind"] != "sdxl_refiner":
        return replace(options, prediction=None, clip_skip=None, prompt_2=None, negative_2=None)
    return replace(options, **scores) if cfg["refiner"] else options


def weigh(run: Run, emphasis: str) -> None:
    """What (word:1.3) means to the text encoders. Raises ConfigError where it means nothing."""
    encoders = [e for e in run.objective.conditioner.encoders.values() if isinstance(e, CLIPTextEncoder)]
    if not encoders:
        raise ConfigError(f"prompt_weights={emphasis} is for CLIP, which {run.config['system']} does not read with")
    for encoder in encoders:
        encoder.emphasis = emphasis
