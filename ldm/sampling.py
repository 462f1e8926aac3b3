"""How to sample: the choices that no checkpoint fixes, and what reference programs do differently around them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ldm.build import compose, make
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import DiffusionObjective
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
    whole_indices: bool = False  # the network is shown whole indices of its table

    @classmethod
    def from_config(cls, cfg: dict) -> "Sampling":
        """The `sampler`, `times`, `guidance`, `threshold` and `dialect` nodes of a config."""
        dialect = make(cfg["dialect"], "dialect") if cfg.get("dialect") else Dialect()
        sampler, grid = cfg["sampler"]["_target_"].split(".")[-2], cfg["times"]["_target_"].split(".")[-1]
        times = dict(cfg["times"])
        if "final" in times and times["final"] is None:
            times["final"] = dialect.final.get(sampler)
        return cls(
            make(cfg["sampler"], "sampler"),
            make(times, "times"),
            make(cfg["guidance"], "guidance"),
            make(cfg["threshold"], "threshold") if cfg["threshold"] else None,
            dialect,
            dialect.initial.get(grid, dialect.initial.get(sampler, "prior")),
            sampler in dialect.whole_indices,
        )

    @classmethod
    def named(
        cls, sampler: str, steps: int, scale: float, times: str | None, threshold: str, dialect: str = "native"
    ) -> "Sampling":
        """By names of configs/, as a command line gives them; without `times`, the dialect's grid."""
        groups = [f"sampler={sampler}", f"threshold={threshold}", f"dialect={dialect}"]
        groups += [f"times={times}"] if times else []
        return cls.from_config(compose("sample", [*groups, f"steps={steps}", f"guidance.scale={scale}"]))

    def denoiser(self, objective: DiffusionObjective) -> Denoiser:
        """That of the objective, or the same network shown whole indices."""
        given = objective.denoiser
        if not self.whole_indices or given.process.num_steps is None:
            return given
        return Denoiser(given.net, WholeIndices(given.process), given.prediction, given.dtype)
