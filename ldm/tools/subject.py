"""What `sample.py` draws from: a run of ours, or published weights, each with its own way of being drawn from."""

from hydra.core.hydra_config import HydraConfig

from ldm.build import compose
from ldm.generate import Refiner, Run, load_run
from ldm.published import load_published, system_of
from ldm.utils.devices import pick_device
from ldm.utils.errors import ConfigError, WeightsError


def as_published(cfg: dict) -> dict:
    """The config again, with what the authors of the published weights sampled with where the command does not say."""
    if not cfg["weights"]:
        return cfg
    name = system_of(cfg["weights"], cfg["kind"])
    given = list(HydraConfig.get().overrides.task)
    chosen = {override.partition("=")[0].lstrip("+~") for override in given}
    theirs = [line for line in compose("train", [f"system={name}"])["sampling"] if line.partition("=")[0] not in chosen]
    return {**compose("sample", [*theirs, *given]), "kind": name}


def load_subject(cfg: dict) -> tuple[Run, Refiner | None]:
    """The model that is drawn from, and the expert that takes over. Raises ConfigError or WeightsError."""
    if bool(cfg["run"]) == bool(cfg["weights"]):
        problem = "both run and weights are set; give one of them" if cfg["run"] else "run is not set"
        raise ConfigError(f"{problem}: a run directory, e.g. run=runs/shapes/2026-01-01_12-00-00, or weights=FILE")
    if cfg["run"]:
        return load_run(cfg["run"], device=pick_device(cfg["device"]), ema=cfg["ema"]), None
    refiner = _published(cfg, cfg["refiner"], "sdxl_refiner") if cfg["refiner"] else None
    if cfg["kind"] == "sdxl_refiner" and not cfg["image"]:
        raise WeightsError(
            f"{cfg['weights']} is SDXL's refiner, which draws nothing of its own: "
            "give it as refiner= beside weights= of a base, or give image= to change"
        )
    return _published(cfg, cfg["weights"], cfg["kind"]), refiner and Refiner(refiner.objective, cfg["handover"])


def _published(cfg: dict, weights: str, system: str) -> Run:
    run = load_published(
        weights,
        system=system,
        tokenizer=cfg["tokenizer"],
        dtype=cfg["dtype"],
        device=pick_device(cfg["device"]),
        variant=cfg["variant"],
        ema=cfg["ema"],
    )
    for encoder in run.objective.conditioner.encoders.values():
        if encoder.field == "caption":
            encoder.emphasis = cfg["prompt_weights"]
    return run
