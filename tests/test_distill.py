"""Consistency distillation and its sampler: published numbers, closed forms, and a student that learns."""

import copy

import pytest
import torch
from torch import nn

from ldm.diffusion import prediction, process, times
from ldm.diffusion.denoiser import Denoiser, GaussianDenoiser
from ldm.models.codec import PixelCodec
from ldm.samplers import ddim
from ldm.samplers import lcm as sampler
from ldm.training.distill import DistillationObjective
from ldm.training.ema import EMA
from ldm.utils.errors import ConfigError
from ldm.utils.seeding import Noise

SD = process.scaled_linear()


class Codec(PixelCodec):
    """Moments are latents."""

    def draw(self, moments, generator=None):
        return moments


class Conditioner(nn.Module):
    """A class shifts the mean; the null class is 0."""

    def pair(self, batch):
        return {"labels": batch["label"]}, {"labels": 0 * batch["label"]}


class Exact(nn.Module):
    """The network that gives x0 = E[x0 | x_t] for data N(labels, 1/4)."""

    def __init__(self, p=SD):
        super().__init__()
        self.p, self.one = p, nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t_net, *, labels):
        t = (t_net.double() + 1) / 1000
        return self.dropout(self.one * GaussianDenoiser(self.p, mean=labels.view(-1, 1, 1, 1))(x, t).to(x.dtype))


class Student(nn.Module):
    """x0 = gain(t) x + shift(t), one pair of numbers for each of the solver's times; may be told the guidance."""

    def __init__(self, steps=50):
        super().__init__()
        self.steps = steps
        self.gain = nn.Parameter(torch.full((steps + 1,), 0.5))
        self.shift = nn.Parameter(torch.zeros(steps + 1))
        self.told = None

    def forward(self, x, t_net, *, labels, guidance=None):
        self.told = guidance
        step = ((t_net + 1) * self.steps / 1000).round().long()
        return (self.gain[step] * x.movedim(0, -1) + self.shift[step] * labels).movedim(-1, 0)


def batch(step=0, size=16, label=0.0):
    position = torch.arange(size) + size * step
    noise = torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    return {"moments": label + 0.5 * noise, "label": torch.full((size,), label), "position": position, "step": step}


def objective(student=None, teacher=None, **knobs):
    pair = (Denoiser(net, SD, prediction.X0()) for net in (student or Student(), teacher or Exact()))
    d, t = pair
    return DistillationObjective(d, Codec(), Conditioner(), t, **{"scale": 1.0, **knobs})


# --- what is published ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps,indices", {
    1: [999], 2: [999, 499], 4: [999, 759, 499, 259], 8: [999, 879, 759, 639, 499, 379, 259, 139],
}.items())  # fmt: skip
def test_published_times(steps, indices):
    assert [round(1000 * t - 1) for t in times.lcm(SD, steps)[:-1].tolist()] == indices
    continuous = times.lcm(process.RectifiedFlow(), steps)
    assert continuous.tolist() == pytest.approx([(index + 1) / 1000 for index in indices] + [0])


def test_times_need_enough_of_the_solvers():
    assert times.lcm(SD, 50)[-2].item() == pytest.approx(20 / 1000)
    with pytest.raises(ConfigError, match="original=50"):
        times.lcm(SD, 51)


def test_the_boundary():
    assert sampler.boundary(SD, 1 / 1000, 0.5, 10.0) == (1.0, 0.0)
    c_skip, c_out = sampler.boundary(SD, 20 / 1000, 0.5, 10.0)
    assert c_skip == pytest.approx(6.925e-6, rel=1e-3) and c_out == pytest.approx(0.9999965, abs=1e-7)
    t = torch.tensor([20 / 1000, 1 / 1000], dtype=torch.float64)
    assert sampler.boundary(SD, t, 0.5, 10.0)[0].tolist() == pytest.approx([c_skip, 1.0])
    assert sampler.boundary(process.RectifiedFlow(), 1e-3, 0.5, 10.0) == (1.0, 0.0)


def test_the_pairs_of_times_are_the_solvers():
    o = objective()
    t, s = o.solver_times(torch.arange(5000))
    indices = (1000 * t - 1).round()
    assert indices.unique().tolist() == list(range(19, 1000, 20))
    torch.testing.assert_close(1000 * s - 1, (indices - 20).clamp(min=0), rtol=0, atol=1e-9)
    assert indices.eq(19).sum().item() == pytest.approx(100, abs=2)


def test_the_teachers_step_is_that_of_guided_ddim():
    o, b = objective(scale=5.5), batch(label=0.4)
    x, scale = b["moments"], torch.full((16, 1, 1, 1), 5.5)
    cond, null = o.conditioner.pair(b)
    t, s = (torch.full((16,), at, dtype=torch.float64) for at in (0.5, 0.48))

    def guided(x, t):
        with_label, without = (GaussianDenoiser(SD, mean)(x, t) for mean in (0.4, 0.0))
        return with_label + 4.5 * (with_label - without)  # w = 4.5 (arXiv:2401.05252)

    expected = ddim.sample(guided, SD, x, torch.tensor([0.5, 0.48], dtype=torch.float64))
    torch.testing.assert_close(o.teacher_step(x, t, s, scale, cond, null), expected, rtol=1e-4, atol=1e-5)


# --- the parts -----------------------------------------------------------------------------------------------------


def test_the_teacher_is_no_part_of_what_is_trained_stored_or_dropped_out():
    o = objective().train()
    assert {name for name, _ in o.named_parameters()} == set(o.state_dict()) == {
        "denoiser.net.gain", "denoiser.net.shift"
    }  # fmt: skip
    assert torch.equal(o(batch())[0], o(batch())[0]) and o.denoiser.training and not o.teacher.net.dropout.training
    assert o.to(torch.float64).teacher.net.one.dtype == torch.float64
    assert DistillationObjective(o.denoiser, Codec(), Conditioner(), None).teacher is None  # to sample


def test_a_drawn_scale_is_told_to_the_student():
    o = objective(scale=[3.0, 15.0])
    loss, _ = o(batch(label=0.4))
    scale, told = o.guidance(batch()["position"])
    assert torch.equal(o.denoiser.net.told, told["guidance"]) and torch.equal(told["guidance"], scale - 1)
    assert 3 <= scale.min() < 7 and 11 < scale.max() < 15
    assert loss != objective(scale=9.0)(batch(label=0.4))[0]
    o = objective(scale=9.0)
    assert o(batch())[0].isfinite() and o.denoiser.net.told is None


def test_the_target_is_the_average_where_asked():
    plain, averaged = objective(), objective(target="ema")
    with pytest.raises(ConfigError, match="ema=default"):
        averaged(batch())
    ema = EMA(averaged, decay=0.5, warmup=False)
    averaged.follow(ema)
    assert torch.equal(plain(batch())[0], averaged(batch())[0]), "they begin as one"
    with torch.no_grad():
        for o in (plain, averaged):
            o.denoiser.net.gain.mul_(2)
    assert not torch.equal(plain(batch())[0], averaged(batch())[0])
    for step in range(1, 60):
        ema.update(step)
    torch.testing.assert_close(plain(batch())[0], averaged(batch())[0])
    averaged(batch())[0].backward()
    assert averaged.denoiser.net.gain.grad.abs().sum() > 0
    assert copy.deepcopy(averaged).average()["denoiser.net.gain"] is averaged.average()["denoiser.net.gain"]
    with pytest.raises(ConfigError, match="target=teacher"):
        objective(target="teacher")


def test_a_perfect_student_has_nothing_to_learn_but_the_solvers_error():
    """f(x, t) = the exact end of the path: what is left falls with the square of the step."""
    losses = []
    for steps in (25, 50, 100):
        o = objective(solver_steps=steps, huber=0.0)
        o.consistency = lambda denoise, x, t, cond: GaussianDenoiser(SD, 0.0).solve(x, t[:, None, None, None], 0.0)
        losses.append(o(batch(size=64))[0].item())
    assert losses[0] > 3 * losses[1] > 9 * losses[2]


# --- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["student", "ema"])
def test_a_distilled_gaussian_is_sampled_in_one_step_and_in_four(target):
    """A student that begins as its teacher ends where the solver does; for data N(0.4, 1/4) both are linear in x."""
    o, steps = objective(begun_as_teacher(10), solver_steps=10, target=target), 300
    ema = EMA(o, decay=0.8, warmup=False)
    o.follow(ema)
    optimizer, losses = torch.optim.Adam(o.parameters()), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        loss, _ = o(batch(step, size=40, label=0.4))
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        ema.update(step + 1)
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    x_T, labels = Noise(range(64), "x_T")(torch.empty(64, 1, 8, 8)), torch.full((64,), 0.4)
    judge, grid = GaussianDenoiser(SD, mean=0.4), times.lcm(SD, 10, original=10)
    solved = ddim.sample(judge, SD, x_T, grid)
    for steps in (1, 4):
        grid = times.lcm(SD, steps, original=10)
        with torch.no_grad():
            x = sampler.sample(lambda x, t: o.denoiser(x, t, labels=labels), SD, x_T, grid, generator=Noise(range(64)))
        assert x.std().item() == pytest.approx(solved.std().item(), rel=0.06), steps
        assert x.mean().item() == pytest.approx(solved.mean().item(), abs=0.02), steps
    assert solved.std() > 0.37 and judge(x_T, 1.0).std() < 0.05, "the teacher in one step has only the mean to say"


def begun_as_teacher(steps):
    student = Student(steps)
    t = (torch.arange(steps + 1, dtype=torch.float64) / steps).clamp(min=1 / 1000)
    alpha, sigma = SD(t)
    gain = alpha / 4 / (alpha**2 / 4 + sigma**2)
    with torch.no_grad():
        student.gain.copy_(gain), student.shift.copy_(1 - alpha * gain)
    return student
