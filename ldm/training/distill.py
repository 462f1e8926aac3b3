"""Consistency distillation of any diffusion model: arXiv:2310.04378 (LCM), arXiv:2401.05252 (PixArt-delta).

    x_t --one DDIM step of the guided teacher--> x_s        loss = d( f(x_t, t), stop_gradient f_target(x_s, s) )

A student that agrees with itself along the teacher's path leads from anywhere on it to its end in one evaluation.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import stack
from ldm.diffusion.objective import DiffusionObjective
from ldm.diffusion.times import lcm, uniform
from ldm.diffusion.weighting import unit
from ldm.samplers.lcm import boundary
from ldm.training.ema import EMA
from ldm.utils import seeding
from ldm.utils.errors import ConfigError
from ldm.utils.tensors import pad_dims

TARGETS = ("student", "ema")


class DistillationObjective(DiffusionObjective):
    """objective(batch) -> (loss, logs): Algorithm 1 of arXiv:2310.04378; `denoiser` is the student.

    teacher: a denoiser of its own network, which becomes buffers here: nothing moves it and no checkpoint repeats it.
    solver_steps: DDIM steps from noise to data, each as long as the one taken here (k = 20 indices of 1000).
    scale: the teacher's guidance, w + 1; two numbers are the ends between which it is drawn for each image, and then w
    is the student's condition `guidance`. target: "student", as LCM-LoRA has it (arXiv:2311.05556), or "ema".
    Raises ConfigError for another target, and when "ema" has no average to `follow`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        codec: nn.Module,
        conditioner: nn.Module,
        teacher: Denoiser | None,  # None: to sample
        *,
        solver_steps: int = 50,
        scale: float | Sequence[float] = 5.5,
        target: str = "student",
        huber: float = 1e-3,
        sigma_data: float = 0.5,
        scaling: float = 10.0,
        seed: int = 0,
        stratified: bool = True,
    ):
        # Neither a density nor a weight is asked: times are the solver's, and all count the same.
        super().__init__(denoiser, codec, conditioner, uniform, unit, seed=seed, stratified=stratified)
        if target not in TARGETS:
            raise ConfigError(f"objective.target={target} is not known; use one of {', '.join(TARGETS)}")
        self.teacher = None if teacher is None else as_buffers(teacher)
        self.grid = lcm(denoiser.process, solver_steps, original=solver_steps)
        self.scale, self.target, self.huber = scale, target, huber
        self.sigma_data, self.scaling = sigma_data, scaling
        self.average: Callable[[], Mapping[str, Tensor]] | None = None

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = self.latents(batch)  # B C H W
        position = batch["position"].to(x0.device)
        t, s = self.solver_times(position)
        alpha, sigma = self.level(t, x0)
        x_t = alpha * x0 + sigma * self.noise(x0, position)
        cond, null = self.conditioner.pair(batch)
        scale, told = self.guidance(position)
        with torch.no_grad():
            x_s = self.teacher_step(x_t, t, s, pad_dims(scale, x0).to(x0.dtype), cond, null)
            target = self.consistency(self.target_denoiser(), x_s, s, cond | told)
        apart = self.consistency(self.denoiser, x_t, t, cond | told).float() - target.float()
        loss = ((apart**2 + self.huber**2).sqrt() - self.huber).mean()  # pseudo-Huber
        return loss, {"loss": loss.detach(), "mse": apart.detach().square().mean()}

    def solver_times(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """t_{n+k}, even over the solver's grid, and t_n one step below it; the lowest is that of the boundary."""
        grid = self.grid.to(position.device)
        step = (self.draws(position) * (len(grid) - 1)).long()
        return grid[step], grid[step + 1].clamp(min=self.denoiser.process.t_min)

    def guidance(self, position: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's scale (B,), and what the student is told of it."""
        if not isinstance(self.scale, Sequence):
            return torch.full(position.shape, float(self.scale), device=position.device), {}
        low, high = self.scale
        scale = low + (high - low) * seeding.uniform(seeding.keys(self.seed, "scale", position)).float()
        return scale, {"guidance": scale - 1}

    def teacher_step(self, x_t: Tensor, t: Tensor, s: Tensor, scale: Tensor, cond: dict, null: dict) -> Tensor:
        """DDIM from t to s along x0 = null + scale (cond - null), which is (1 + w) cond - w null."""
        x0 = self.teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), **stack(cond, null))
        x0_cond, x0_null = x0.chunk(2)
        x0 = torch.lerp(x0_null, x0_cond, scale)
        (alpha, sigma), (alpha_s, sigma_s) = self.level(t, x_t), self.level(s, x_t)
        return alpha_s * x0 + sigma_s * (x_t - alpha * x0) / sigma

    def consistency(self, denoise: Callable[..., Tensor], x: Tensor, t: Tensor, cond: dict) -> Tensor:
        """f(x, t), which is x itself at the boundary."""
        c_skip, c_out = boundary(self.denoiser.process, t, self.sigma_data, self.scaling)
        return pad_dims(c_skip, x).to(x.dtype) * x + pad_dims(c_out, x).to(x.dtype) * denoise(x, t, **cond)

    def target_denoiser(self) -> Callable[..., Tensor]:
        if self.target == "student":
            return self.denoiser
        if self.average is None:
            raise ConfigError("objective.target=ema needs the averaged weights of the run: use ema=default, or student")
        weights = {name.removeprefix("denoiser."): value for name, value in self.average().items()}
        return lambda x, t, **cond: functional_call(self.denoiser, weights, (x, t), cond)

    def follow(self, ema: EMA | None) -> None:
        """Take as target the run's average of this objective, wherever it moves."""
        if ema is not None:
            self.average = lambda: ema.state_dict()  # not the tensors: a copy of this objective need not copy them

    def level(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t (B,), to multiply x with."""
        alpha, sigma = self.denoiser.process(t)
        return pad_dims(alpha, x).to(x.dtype), pad_dims(sigma, x).to(x.dtype)

    def train(self, mode: bool = True) -> "DistillationObjective":
        """The teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


def as_buffers(module: nn.Module) -> nn.Module:
    """The module itself, its parameters now buffers outside the state dict: it moves between devices, that is all."""
    for part in module.modules():
        tensors = {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers(recurse=False))}
        for name, tensor in tensors.items():
            delattr(part, name)
            part.register_buffer(name, tensor.detach(), persistent=False)
    return module.eval()
