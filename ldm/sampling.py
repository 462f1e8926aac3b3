"""How to sample: the choices that no checkpoint fixes, and what reference programs do differently around them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from ldm.build import compose, make
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import DiffusionObjective
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.times import WholeIndices
from ldm.samplers.edit import STARTS
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import Noise, TorchNoise


@dataclass
class Dialect:
    """What one reference program does differently from the others around the same sampler; configs/dialect."""

    noise: str = "keyed"  # by seed and purpose; torch: one torch.Generator(seed) on the CPU for each image, as others
    posterior: str = "mode"  # latents of a given picture: mode, sample
    start: str = "diffusers"  # of image to image: how many steps above the first one it is noised (samplers/edit.py)
    known: str = "fresh"  # noise of what a mask keeps, at each step: fresh, first
    empty: str = "system"  # without a negative prompt: as the system was trained; encode: always the encoded ""
    initial: Mapping[str, str] = field(default_factory=dict)  # of a grid, else a sampler: scale of the first noise
    final: Mapping[str, str] = field(default_factory=dict)  # of a sampler: where grids end whose `final` is left open
    whole_indices: Sequence[str] = ()  # samplers that show the network whole indices of its table
    one_more: Sequence[str] = ()  # samplers whose grid is laid out for one step more where its `extra` is left open
    clips_x0_alone: Sequence[str] = ()  # samplers that keep the network's eps where a threshold clips its x0
    clips_latents: bool = False  # a threshold is for latents too
    guess_decay: float | None = 0.825  # of a ControlNet's guess mode; null: from 1 to 0.1 over its residuals

    def __post_init__(self):
        choices = {"noise": ("keyed", "torch"), "posterior": ("mode", "sample"), "start": tuple(STARTS),
                   "known": ("fresh", "first"), "empty": ("system", "encode")}  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"dialect.{name}={getattr(self, name)}: expected one of {', '.join(known)}")
        if odd := set(self.initial.values()) - {"prior", "sigma"}:
            raise ConfigError(f"dialect.initial has {', '.join(sorted(odd))}: expected prior or sigma")

    def streams(self, seeds: Sequence[int]) -> Callable[[str], Noise]:
        """purpose -> noise of these images; torch's generators know no purposes, only an order."""
        shared = TorchNoise(seeds) if self.noise == "torch" else None
        return lambda purpose: shared or Noise(seeds, purpose)


@dataclass
class Sampling:
    """How to sample: the choices that no checkpoint fixes."""

    sampler: Callable  # sample(denoise, process, x_T, times, *, generator, callback)
    times: Callable  # times(process) -> descending grid
    guidance: Callable  # guidance(denoiser, cond, null) -> denoise
    threshold: Callable | None = None  # threshold(denoise) -> denoise
    dialect: Dialect = field(default_factory=Dialect)
    initial: str = "prior"  # scale of the first noise: prior, sqrt(alpha^2 + sigma^2); sigma
    whole_indices: str | None = None  # the network is shown whole indices of its table: round, truncate

    @classmethod
    def from_config(cls, cfg: dict) -> "Sampling":
        """The `sampler`, `times`, `guidance`, `threshold` and `dialect` nodes of a config."""
        dialect = make(cfg["dialect"], "dialect") if cfg.get("dialect") else Dialect()
        sampler, grid = cfg["sampler"]["_target_"].split(".")[-2], cfg["times"]["_target_"].split(".")[-1]
        times = dict(cfg["times"])
        if "final" in times and times["final"] is None:
            times["final"] = dialect.final.get(sampler)
        if "extra" in times and times["extra"] is None:
            times["extra"] = int(sampler in dialect.one_more)
        sample = make(cfg["sampler"], "sampler")
        threshold = make(cfg["threshold"], "threshold") if cfg["threshold"] else None
        if threshold and sampler in dialect.clips_x0_alone:
            sample, threshold = partial(sample, clip=threshold(lambda x0, t: x0)), None
        return cls(
            sample,
            make(times, "times"),
            make(cfg["guidance"], "guidance"),
            threshold,
            dialect,
            dialect.initial.get(grid, dialect.initial.get(sampler, "prior")),
            ("truncate" if grid == "logsnr" else "round") if sampler in dialect.whole_indices else None,
        )

    def __post_init__(self):
        if isinstance(self.times, Schedule):
            self.initial = self.times.initial

    @classmethod
    def named(
        cls,
        sampler: str,
        steps: int,
        scale: float,
        times: str | Sequence[float] | None,  # falling indices if all are whole, else sigma / alpha
        threshold: str,
        dialect: str = "native",
    ) -> "Sampling":
        """By names of configs/, as a command line gives them; without `times`, the dialect's grid."""
        if times is not None and not isinstance(times, str):
            name = "timesteps" if all(type(each) is int for each in times) else "sigmas"
            cfg = compose("sample", [f"sampler={sampler}", f"threshold={threshold}", f"dialect={dialect}", "times=list",
                                     f"times.{name}={list(times)}", f"guidance.scale={scale}"])  # fmt: skip
            return cls.from_config(cfg)
        groups = [f"sampler={sampler}", f"threshold={threshold}", f"dialect={dialect}"]
        groups += [f"times={times}"] if times else []
        return cls.from_config(compose("sample", [*groups, f"steps={steps}", f"guidance.scale={scale}"]))

    def denoiser(self, objective: DiffusionObjective) -> Denoiser:
        """That of the objective, or the same network shown the times of a schedule, or whole indices."""
        given = objective.denoiser
        if isinstance(self.times, Schedule):
            process = self.times.shown_by(given.process)
        elif self.whole_indices and given.process.num_steps is not None:
            process = WholeIndices(given.process, self.whole_indices)
        else:
            return given
        return Denoiser(given.net, process, given.prediction, given.dtype)
