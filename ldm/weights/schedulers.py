"""A scheduler of diffusers, in our words: the sampler, the grid and the threshold that draw as it does.

`scheduler_config.json` names a class and what differs from that class's defaults, which are written here where they
matter. Every answer is a list of overrides of sample.yaml.
"""

import json
import math
from collections.abc import Callable
from typing import NamedTuple

from ldm.utils.errors import WeightsError
from ldm.weights.formats import Config

GRIDS = {  # of configs/times, as the words of a config that ask for them
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"use_karras_sigmas": True},
    "logsnr": {"use_exponential_sigmas": True},
}
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
NEAREST = {
    "DEISMultistepScheduler": "dpm_solver", "DPMSolverSinglestepScheduler": "dpm_solver",
    "DPMSolverSDEScheduler": "dpm_solver_sde", "SASolverScheduler": "dpm_solver_sde", "LMSDiscreteScheduler": "plms",
    "IPNDMScheduler": "plms", "KDPM2DiscreteScheduler": "heun", "KDPM2AncestralDiscreteScheduler": "euler_ancestral",
    "TCDScheduler": "lcm", "CMStochasticIterativeScheduler": "lcm", "DDIMInverseScheduler": "ddim",
    "RePaintScheduler": "ddpm", "UnCLIPScheduler": "ddpm",
}  # fmt: skip


VARIED = {"ddpm_large": ("sampler.variance",), "ddpm_learned": ("sampler.variance",),
          "dpm_solver_sde": ("sampler.stochastic",)}  # fmt: skip


class Drawing(NamedTuple):
    """How a scheduler draws."""

    sampler: str  # of configs/sampler
    knobs: Config  # of the sampler
    times: Config  # of times=schedule; empty: the sampler's own grid
    others: Config = {}


class Kind(NamedTuple):
    """A class of schedulers."""

    read: Callable[[Config, str], Drawing]
    defaults: Config  # of what is read, beyond COMMON
    sigmas: tuple[str, ...] = ()  # flags that it knows


COMMON = {"timestep_spacing": "linspace", "steps_offset": 0, "prediction_type": "epsilon", "thresholding": False,
          "clip_sample": False, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995,
          "sample_max_value": 1.0, "final_sigmas_type": "zero", "beta_schedule": "linear"}  # fmt: skip


def drawn_by(config: Config, where: str, sampler: str | None = None, times: str | None = None) -> list[str]:
    """Overrides of sample.yaml that draw as the scheduler of a config does; of none where it says nothing to that.

    sampler: one that the command chose, hence another class with the same config; times: a grid that it chose, one of
    `GRIDS`. Raises WeightsError for a class, or a word of one, that has no equivalent.
    """
    name = OF_SAMPLERS[sampler] if sampler else str(config.get("_class_name"))
    if name not in KINDS:
        nearest = f"sampler={NEAREST[name]} is the nearest" if name in NEAREST else "choose one with sampler=NAME"
        raise WeightsError(f"{where}: its scheduler {name[:60]} has no equivalent here; {nearest}")
    kind = KINDS[name]
    words = COMMON | kind.defaults | {word: value for word, value in config.items() if value is not None}
    words = {word: value for word, value in words.items() if word not in SIGMAS or word in kind.sigmas}
    _check(words, kind, where)
    if times:
        words |= dict.fromkeys(SIGMAS, False) | GRIDS[times]
    words |= {"skip_prk_steps": True} if sampler else {}
    drawing = kind.read(words, where)
    if times and not drawing.times or _sigmas(words) and not kind.sigmas:  # a grid that this class has not
        return _lines(_threshold(words, kind))
    knobs = {f"sampler.{knob}": value for knob, value in drawing.knobs.items()}
    if sampler and sampler.startswith(drawing.sampler):
        knobs = {knob: value for knob, value in knobs.items() if knob not in VARIED.get(sampler, ())}
    else:
        knobs = {"sampler": drawing.sampler} | knobs
    grid = {f"times.{knob}": value for knob, value in drawing.times.items()}
    grid = {"times": "schedule"} | grid if grid else {}
    return _lines(knobs | grid | drawing.others | _threshold(words, kind))


def _lines(settings: Config) -> list[str]:
    return [f"{key}={_written(value)}" for key, value in settings.items()]


def _written(value: object) -> str:
    """As an override says it."""
    return value if isinstance(value, str) else json.dumps(value)


def _check(words: Config, kind: Kind, where: str) -> None:
    """WeightsError for a word of another type than its default."""
    for word, default in (COMMON | kind.defaults).items():
        value = words[word]
        fits = type(value) in (int, float) if type(default) in (int, float) else type(value) is type(default)
        if not fits or value in (math.inf, -math.inf) or value != value:
            raise WeightsError(f"{where}: its scheduler says {word}={str(value)[:60]}; expected such as {default}")


def _threshold(words: Config, kind: Kind) -> Config:
    if words["thresholding"] and "thresholding" in kind.defaults:
        return {"threshold": "dynamic", "threshold.percentile": words["dynamic_thresholding_ratio"],
                "threshold.cap": words["sample_max_value"]}  # fmt: skip
    if words["clip_sample"] and "clip_sample" in kind.defaults:
        return {"threshold": "static", "threshold.limit": words["clip_sample_range"]}
    return {}


def _chosen(words: Config, where: str, word: str, known: dict) -> object:
    """What one of our knobs is for a word of theirs."""
    if words[word] not in known:
        expected = " or ".join(str(each) for each in known)
        raise WeightsError(f"{where}: its scheduler says {word}={str(words[word])[:60]}; expected {expected}")
    return known[words[word]]


def _without(words: Config, where: str, *names: str) -> None:
    """WeightsError for what is asked for and not built."""
    for name in names:
        if words.get(name):
            asked = f"its scheduler says {name}={str(words[name])[:60]}"
            raise WeightsError(f"{where}: {asked}, which has no equivalent here; choose sampler= and times=")


def _indices(words: Config, where: str, **knobs) -> Config:
    spacing = _chosen(words, where, "timestep_spacing", {name: name for name in ("leading", "trailing", "linspace")})
    return {"spacing": spacing, "offset": words["steps_offset"], "final": "clean", "extra": 0, "rounded": True} | knobs


def _sigmas(words: Config) -> str | None:
    """The spread of sigmas that the flags ask for."""
    spreads = {"use_karras_sigmas": "karras", "use_lu_lambdas": "exponential", "use_exponential_sigmas": "exponential",
               "use_beta_sigmas": "beta"}  # fmt: skip
    return next((spread for flag, spread in spreads.items() if words.get(flag)), None)


# --- the classes ---------------------------------------------------------------------------------------------------

EVEN = {"even_steps": "${steps}"}


def _ddim(words: Config, where: str) -> Drawing:
    return Drawing("ddim", EVEN, _indices(words, where, final="clean" if words["set_alpha_to_one"] else "alpha0"))


def _pndm(words: Config, where: str) -> Drawing:
    if not words["skip_prk_steps"]:
        raise WeightsError(f"{where}: its PNDMScheduler says skip_prk_steps=false, Runge-Kutta steps, which have no "
                           "equivalent here; sampler=plms is the nearest")  # fmt: skip
    combines = _chosen(words, where, "prediction_type", {"epsilon": "eps", "v_prediction": "v"})
    final = "clean" if words["set_alpha_to_one"] else "alpha0"
    times = _indices(words, where, final=final, doubled=True)
    return Drawing("pndm", EVEN | {"combines": combines}, times, {"dialect.start": "pndm"})


def _ddpm(words: Config, where: str) -> Drawing:
    variances = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large",
                 "learned_range": "learned"}  # fmt: skip
    knobs = {"variance": _chosen(words, where, "variance_type", variances), "noisy_end": True}
    return Drawing("ddpm", knobs, _indices(words, where))


def _stepping_on_sigma(words: Config, where: str) -> Config:
    """The grid of Euler and its kin."""
    _without(words, where, "use_flow_sigmas")
    initial = "prior" if words["timestep_spacing"] == "leading" else "sigma"
    final = _chosen(words, where, "final_sigmas_type", {"zero": "clean", "sigma_min": "alpha0"})
    return _indices(words, where, rounded=False, sigmas=_sigmas(words), final=final, initial=initial, finite=True)


def _euler(words: Config, where: str) -> Drawing:
    _chosen(words, where, "interpolation_type", {"linear": "linear"})
    if words["timestep_type"] == "continuous" and words["prediction_type"] == "v_prediction":
        raise WeightsError(f"{where}: its scheduler says timestep_type=continuous, EDM's times, for v; not built")
    ends = {name: words.get(name) for name in ("sigma_min", "sigma_max")}
    return Drawing("euler", {}, _stepping_on_sigma(words, where) | ends)


def _euler_ancestral(words: Config, where: str) -> Drawing:
    return Drawing("euler_ancestral", {}, _stepping_on_sigma(words | {"final_sigmas_type": "zero"}, where))


def _heun(words: Config, where: str) -> Drawing:
    return Drawing("heun", {}, _stepping_on_sigma(words | {"final_sigmas_type": "zero"}, where))


def _multistep(words: Config, where: str) -> Config:
    """The grid of DPM-Solver and UniPC: one step more, sigmas over the whole table, whole indices shown."""
    _without(words, where, "use_flow_sigmas", "use_dynamic_shifting")
    final = _chosen(words, where, "final_sigmas_type", {"zero": "clean", "sigma_min": "alpha0"})
    rounds = words.get("use_karras_sigmas") or words.get("use_lu_lambdas")
    return _indices(words, where, extra=1, sigmas=_sigmas(words), ends="table", final=final, finite=True,
                    shown="round" if rounds else "truncate")  # fmt: skip


def _dpm_solver(words: Config, where: str) -> Drawing:
    algorithms = {"dpmsolver++": ("x0", False), "deis": ("x0", False), "sde-dpmsolver++": ("x0", True),
                  "dpmsolver": ("eps", False), "sde-dpmsolver": ("eps", True)}  # fmt: skip
    extrapolates, stochastic = _chosen(words, where, "algorithm_type", algorithms)
    if extrapolates == "eps" and words["final_sigmas_type"] == "zero":
        raise WeightsError(f"{where}: its scheduler says algorithm_type={words['algorithm_type']}, which cannot end in "
                           "clean data; it needs final_sigmas_type=sigma_min, or choose sampler=")  # fmt: skip
    solver = _chosen(words, where, "solver_type", {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint",
                                                   "bh1": "midpoint", "bh2": "midpoint"})  # fmt: skip
    knobs = {"order": words["solver_order"], "solver": solver, "extrapolates": extrapolates, "stochastic": stochastic}
    knobs |= {name: words[name] for name in ("lower_order_final", "euler_at_final")}
    times = _multistep(words, where)
    if times["shown"] == "round" and words["beta_schedule"] == "squaredcos_cap_v2":
        times["shown"] = "truncate"
    lowest = words.get("lambda_min_clipped")
    is_clipped = type(lowest) in (int, float) and math.isfinite(lowest)
    return Drawing("dpm_solver", knobs, times | ({"lambda_min": lowest} if is_clipped else {}))


def _unipc(words: Config, where: str) -> Drawing:
    _without(words, where, "disable_corrector", "solver_p", "shift_terminal")
    _chosen(words, where, "predict_x0", {True: True})
    _chosen(words, where, "solver_type", dict.fromkeys(("bh2", "midpoint", "heun", "logrho")))
    times = _multistep(words, where) | {name: words.get(name) for name in ("sigma_min", "sigma_max")}
    if times["sigmas"] and times["final"] == "alpha0":
        times["final"] = "last"
    knobs = {"order": words["solver_order"], "lower_order_final": words["lower_order_final"]}
    return Drawing("unipc", knobs, times)


def _lcm(words: Config, where: str) -> Drawing:
    others = {"times": "lcm", "times.original": words["original_inference_steps"]}
    return Drawing("lcm", {"scaling": words["timestep_scaling"]}, {}, others)


KARRAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
CLIPS, THRESHOLDS = {"clip_sample": True, "thresholding": False}, {"thresholding": False}
LEADING = {"timestep_spacing": "leading"}
DDIM = Kind(_ddim, LEADING | CLIPS | {"set_alpha_to_one": True})
DDPM = Kind(_ddpm, LEADING | CLIPS | {"variance_type": "fixed_small"})
KINDS = {
    "DDIMScheduler": DDIM,
    "DDIMParallelScheduler": DDIM,
    "DDPMScheduler": DDPM,
    "DDPMParallelScheduler": DDPM,
    "PNDMScheduler": Kind(_pndm, LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False}),
    "EulerDiscreteScheduler": Kind(_euler, {"interpolation_type": "linear", "timestep_type": "discrete"}, KARRAS),
    "EulerAncestralDiscreteScheduler": Kind(_euler_ancestral, {}),
    "HeunDiscreteScheduler": Kind(_heun, {"clip_sample": False}, KARRAS),
    "DPMSolverMultistepScheduler": Kind(
        _dpm_solver,
        THRESHOLDS | {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint",
                      "lower_order_final": True, "euler_at_final": False},
        SIGMAS,
    ),
    "UniPCMultistepScheduler": Kind(
        _unipc,
        THRESHOLDS | {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "lower_order_final": True},
        KARRAS,
    ),
    "LCMScheduler": Kind(_lcm, CLIPS | {"clip_sample": False, "original_inference_steps": 50, "timestep_scaling": 10}),
}  # fmt: skip
OF_SAMPLERS = {
    "ddim": "DDIMScheduler", "ddim_eta1": "DDIMScheduler", "ddpm": "DDPMScheduler", "ddpm_large": "DDPMScheduler",
    "ddpm_learned": "DDPMScheduler", "dpm_solver": "DPMSolverMultistepScheduler",
    "dpm_solver_sde": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler",
    "heun_churn": "HeunDiscreteScheduler", "lcm": "LCMScheduler", "plms": "PNDMScheduler", "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}  # fmt: skip
