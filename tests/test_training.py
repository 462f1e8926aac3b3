"""The parts of the loop against closed forms, and the loop against everything that can go wrong around it."""

import copy
import json
import math
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import toy
from make_fixtures import STEPS, command
from torch import nn

from ldm.io.tensors import read_tensors
from ldm.training.distributed import ALONE
from ldm.training.ema import EMA
from ldm.training.logging import Isolated, MetricsLog
from ldm.training.loop import Hooks, Trainer, fit, gradients, micro_batch, prepare
from ldm.training.optim import adamw, clip_and_step, constant, cosine, set_lr
from ldm.training.run import RunDirectory
from ldm.training.signals import Interrupted
from ldm.utils.errors import CheckpointError, ConfigError, DataError, LdmError, NonFiniteError
from ldm.utils.seeding import key
from train import train

CPU = torch.device("cpu")
FIXTURES = Path(__file__).with_name("fixtures")
OFF = torch.amp.GradScaler("cpu", enabled=False)


def records(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


# --- EMA ------------------------------------------------------------------------------------------------------------


def ramp(ema: EMA, scalar: nn.Module, steps: int) -> float:
    """The average after the weight went 1, 2, ..., steps, starting from 0."""
    for step in range(1, steps + 1):
        nn.init.constant_(scalar.weight, step)
        ema.update(step)
    return ema.state_dict()["weight"].item()


@pytest.fixture
def scalar() -> nn.Module:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    return module


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
def test_ema_of_a_ramp(decay, scalar):
    d, n = decay, 40
    expected = n - d * (1 - d**n) / (1 - d)  # sum over k of (1 - d) d^(n - k) k
    assert ramp(EMA(scalar, decay=d, warmup=False), scalar, n) == pytest.approx(expected, rel=1e-5)


def test_ema_every_k_steps_decays_by_the_kth_power(scalar):
    d, k, n = 0.9, 5, 40
    expected, average = 0.0, ramp(EMA(scalar, decay=d, warmup=False, every=k), scalar, n)
    for step in range(k, n + 1, k):
        expected = d**k * expected + (1 - d**k) * step
    assert average == pytest.approx(expected, rel=1e-5)


def test_ema_warm_up_and_half_life(scalar):
    ema = EMA(scalar, decay=0.999)
    assert [ema.decay_at(n) for n in (1, 2, 10)] == [2 / 11, 3 / 12, 11 / 20]
    assert ema.decay_at(10**6) == 0.999
    assert ramp(EMA(scalar, decay=0.999), scalar, 1) == pytest.approx(9 / 11)
    ema = EMA(scalar, half_life_images=1000, batch_size=50, warmup=False)
    assert ema.decay_at(1) ** 20 == pytest.approx(0.5)
    for knobs in ({"decay": 1.0}, {"every": 0}, {"half_life_images": 0.0}):
        with pytest.raises(ConfigError):
            EMA(scalar, **knobs)


def test_ema_averages_low_precision_weights_in_float32(scalar):
    assert ramp(EMA(scalar.bfloat16(), decay=0.999, warmup=False), scalar, 1) == pytest.approx(1e-3)


def test_the_average_is_applied_to_a_copy():
    module = toy.Toy()
    ema = EMA(module, decay=0.5, warmup=False)
    before = copy.deepcopy(module.state_dict())
    for p in ema.state_dict().values():
        p.add_(1)
    applied = ema.applied(module)
    assert module.training and not applied.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(applied.net[0].weight, module.net[0].weight + 1)
    assert applied.codec.weight.data_ptr() == module.codec.weight.data_ptr()
    assert applied.seen.data_ptr() != module.seen.data_ptr()
    assert not any(p.requires_grad for p in applied.parameters())
    ema.copy_to(module)
    assert torch.equal(module.net[0].weight, applied.net[0].weight) and module.net[0].weight.requires_grad


# --- optimizer ------------------------------------------------------------------------------------------------------


def test_learning_rates():
    assert [constant(step, 100) for step in (1, 50, 100)] == [1, 1, 1]
    assert [constant(step, 100, warmup=4) for step in (1, 2, 4, 5)] == [0.25, 0.5, 1, 1]
    assert [cosine(step, 100, warmup=10) for step in (1, 10, 55, 100)] == pytest.approx([0.1, 1, 0.5, 0], abs=1e-12)
    assert [cosine(step, 100, final=0.2) for step in (0, 50, 100, 200)] == pytest.approx([1, 0.6, 0.2, 0.2])
    values = [cosine(step, 100, warmup=10) for step in range(1, 101)]
    assert max(values) == 1 and values[9:] == sorted(values[9:], reverse=True)
    assert cosine(5, 5, warmup=10) == 0.5  # a run shorter than its warm-up


def test_groups_of_adamw():
    module = nn.ModuleDict(
        {"linear": nn.Linear(2, 3), "norm": nn.GroupNorm(1, 2), "table": nn.Embedding(5, 2), "conv": nn.Conv2d(1, 1, 3)}
    )
    module.position = nn.Parameter(torch.zeros(1, 4, 2))
    module["frozen"] = nn.Linear(2, 2).requires_grad_(False)
    optimizer = adamw(module, lr=0.5, weight_decay=0.1)
    names = {id(p): name for name, p in module.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups[0.1] == {"linear.weight", "conv.weight"}
    assert groups[0.0] == {"linear.bias", "norm.weight", "norm.bias", "table.weight", "conv.bias", "position"}
    assert set_lr(optimizer, 0.1) == pytest.approx(0.05) and set_lr(optimizer, 0.1) == pytest.approx(0.05)
    with pytest.raises(ConfigError, match="nothing to train"):
        adamw(nn.Linear(1, 1).requires_grad_(False))


@pytest.mark.parametrize("clip", [0.0, 0.1, 1e9])
@pytest.mark.parametrize("fused", [True, False])
def test_clip_and_step_is_clip_then_step(fused, clip):
    ours, theirs = toy.Toy(), toy.Toy()
    optimizers = adamw(ours, lr=1e-2, fused=fused), adamw(theirs, lr=1e-2, fused=False)
    for step in range(4):
        for module in (ours, theirs):
            module.eval().zero_grad()
            module(toy.batch_of(step))[0].backward()
        norm, skipped = clip_and_step(optimizers[0], OFF, clip, torch.tensor(False))
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
        optimizers[1].step()
        assert torch.allclose(norm, expected) and not skipped
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("poison", ["gradient", "loss"])
def test_a_bad_step_moves_nothing(fused, poison):
    module = toy.Toy()
    optimizer = adamw(module, fused=fused)
    for step in range(3):
        before = copy.deepcopy([module.state_dict(), optimizer.state_dict()["state"]])
        module.zero_grad()
        module.eval()(toy.batch_of(step))[0].backward()
        bad = step == 1
        if bad and poison == "gradient":
            module.net[0].weight.grad[0, 0, 0, 0] = math.inf
        _, skipped = clip_and_step(optimizer, OFF, 1.0, torch.tensor(bad and poison == "loss"))
        assert bool(skipped) == bad
        same = torch.equal(module.net[0].bias, before[0]["net.0.bias"])
        assert same == bad
        if bad:
            state = optimizer.state_dict()["state"]
            assert all(torch.equal(state[i][k], v) for i in state for k, v in before[1][i].items())


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_large_batch(parts):
    module = toy.Toy(dropout=0.0)
    losses, grads = [], []
    for accumulate in (1, parts):
        trainer = Trainer(steps=1, batch_size=toy.BATCH, accumulate=accumulate)
        loss, logs = gradients(module, toy.batch_of(0), trainer, OFF)
        losses += [loss, logs["mse"]]
        grads.append([p.grad.clone() for p in module.parameters() if p.requires_grad])
    assert torch.allclose(torch.stack(losses), losses[0])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


# --- precision and bad numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_full_precision(precision, tmp_path):
    losses = {}
    for name in ("fp32", precision):
        toy.train(tmp_path / name, precision=name, save_every=0)
        losses[name] = [record["loss"] for record in records(tmp_path / name)]
    assert losses[precision][-1] == pytest.approx(losses["fp32"][-1], rel=0.05)  # fp16 first loses a step to its scale
    assert losses[precision] != losses["fp32"]


class Loud(toy.Toy):
    """Gradients that overflow float16 until the loss scale has come down."""

    def forward(self, batch):
        loss, logs = super().forward(batch)
        return loss * 1e3, logs


def test_the_float16_scale_comes_down_and_is_kept(tmp_path):
    toy.train(tmp_path, toy=Loud(), precision="fp16", max_bad_steps=0)
    scale = json.loads((tmp_path / "checkpoints/last/state.json").read_text())["scaler"]["scale"]
    assert scale < 65536
    assert records(tmp_path)[-1]["loss"] < records(tmp_path)[0]["loss"]
    toy.train(tmp_path, toy=Loud(), precision="fp16", max_bad_steps=0, steps=14)
    assert json.loads((tmp_path / "checkpoints/last/state.json").read_text())["scaler"]["scale"] == scale


def poisoned(bad_steps, value=math.nan):
    """Data that makes the loss of some steps (first = 1) not finite."""

    def source(start):
        for batch in toy.batches(start):
            if batch["step"] + 1 in bad_steps:
                batch["image"] = torch.full(batch["image"].shape, value)
            yield batch

    return source


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_stays_bad_stops_the_run(value, tmp_path):
    with pytest.raises(NonFiniteError, match="not finite at step 9 and the 2 before it; .*step_00000006") as error:
        toy.train(tmp_path, source=poisoned(range(7, 99), value), max_bad_steps=2)
    assert error.value.exit_code == 5 and "\n" not in str(error.value)
    toy.train(tmp_path)  # with the data mended, from the last good checkpoint
    toy.train(tmp_path / "whole")
    assert toy.digest(tmp_path) == toy.digest(tmp_path / "whole")


def test_a_few_bad_steps_are_skipped(tmp_path, capsys):
    toy.train(tmp_path, source=poisoned({5, 6, 9}), max_bad_steps=2)
    assert capsys.readouterr().err.count("the step was skipped") == 3
    assert [record["loss"] is None for record in records(tmp_path)] == [False] * 3 + [True] + [False] * 3


def test_a_run_of_nothing_but_bad_steps_fails(tmp_path):
    with pytest.raises(NonFiniteError, match="no checkpoint had been written"):
        toy.train(tmp_path, source=poisoned(range(99)), steps=2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fit_is_the_plain_loop(accumulate, tmp_path):
    """Data, learning rate, dropout, clipping and average of every step, written out."""
    steps, batch_size = 6, toy.BATCH
    toy.train(tmp_path, steps=steps, log_every=1, accumulate=accumulate, clip_norm=0.5)
    module = toy.Toy()
    prepare(module, module.net, Trainer(steps=steps, batch_size=batch_size), CPU)
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in weights.items()}
    optimizer, rates = adamw(module, lr=1e-2, fused=False), []
    for step in range(1, steps + 1):
        rates.append(set_lr(optimizer, 0.5 * (1 + math.cos(math.pi * step / steps))))
        torch.manual_seed(key(0, "model", step, 0))
        optimizer.zero_grad()
        batch = toy.batch_of(step - 1)
        for i in range(accumulate):
            (module(micro_batch(batch, i, accumulate, CPU))[0] / accumulate).backward()
        nn.utils.clip_grad_norm_(weights.values(), 0.5)
        optimizer.step()
        if step % 2 == 0:  # toy.train: decay 0.9, every 2 steps
            d = min(0.9, (1 + step) / (10 + step)) ** 2
            average = {name: d * average[name] + (1 - d) * p.detach() for name, p in weights.items()}
    assert [record["lr"] for record in records(tmp_path)] == pytest.approx(rates)
    for file, expected in {"model": weights, "ema": average}.items():
        stored = read_tensors(tmp_path / f"checkpoints/last/{file}.safetensors")
        for name, tensor in expected.items():
            torch.testing.assert_close(stored[name], tensor.detach(), rtol=1e-4, atol=1e-6)


# --- things around the loop -----------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(tmp_path):
    summary = toy.train(tmp_path, hooks=Hooks(on_eval=lambda step: {"score": step / 10}), eval_every=5)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 4, 5, 6, 8, 10, 12]
    assert {"step", "loss", "mse", "lr", "grad_norm", "images", "images_per_second"} == records(tmp_path)[0].keys()
    assert [record.get("score") for record in records(tmp_path)][3:] == [0.5, None, None, 1.0, 1.2]
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["step"] == 12 and summary["metrics"]["score"] == 1.2 and summary["metrics"]["images"] == 96
    assert (summary["parameters"], summary["parameters_frozen"]) == (235, 12)
    assert summary["images_per_second"] > 0 and summary["peak_memory_bytes"] > 1e6 and summary["wall_seconds"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0}, {"batch_size": 0}, {"accumulate": 3}, {"precision": "fp8"}, {"keep": 1}, {"accumulate": 0},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(options):
    with pytest.raises(ConfigError, match=f"trainer.({'|'.join(options)}|batch_size)="):
        Trainer(**{"steps": 1, "batch_size": 8, **options})


def test_prepare_leaves_frozen_parts_in_eval_mode():
    module = toy.Toy()
    module.codec = nn.Sequential(nn.Linear(1, 1).requires_grad_(False), nn.Dropout(0.5))
    prepare(module, module.net, Trainer(steps=1, batch_size=1, channels_last=True), CPU)
    assert module.training and module.net[2].training and not module.codec[1].training
    assert module.net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_data_that_ends_and_data_that_fails(tmp_path):
    def ends(start):
        for batch in toy.batches(start):
            if batch["step"] == 4:
                return
            yield batch

    def fails(start):
        yield from (toy.batch_of(step) for step in range(start, 5))
        raise DataError("a picture is missing")

    with pytest.raises(DataError, match="ended after step 4 of 12"):
        toy.train(tmp_path, source=ends)
    with pytest.raises(DataError, match="a picture is missing"):
        toy.train(tmp_path, source=fails)
    assert (tmp_path / "checkpoints/step_00000005/manifest.json").exists()
    toy.train(tmp_path)
    toy.train(tmp_path / "whole")
    assert toy.digest(tmp_path) == toy.digest(tmp_path / "whole")


class Hungry(toy.Toy):
    def forward(self, batch):
        if batch["step"] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().forward(batch)


def test_out_of_memory_saves_and_advises(tmp_path):
    with pytest.raises(ConfigError, match="out of memory in step 5 with 8 images per micro-batch; raise trainer.accum"):
        toy.train(tmp_path, toy=Hungry())
    assert (tmp_path / "checkpoints/step_00000004/manifest.json").exists()


def test_hooks_may_fail(tmp_path, capsys):
    def fail(step):
        raise ValueError("no fonts\nsecond line")

    toy.train(tmp_path, hooks=Hooks(on_sample=fail, on_eval=fail), sample_every=6, eval_every=6)
    err = capsys.readouterr().err
    assert err.count("warning: preview at step 6 failed (ValueError: no fonts); training goes on") == 1
    assert err.count("evaluation at step 12") == 1 and "second line" not in err
    assert len(records(tmp_path)) == 7


class Sink:
    """A logger that does what its name in `fault` says."""

    def __init__(self, fault="", seen=None):
        self.fault, self.seen = fault, seen if seen is not None else []
        if fault == "init":
            raise RuntimeError("no route to host")

    def log(self, step, record):
        if self.fault == "raise":
            raise SystemExit("wandb gave up")
        if self.fault == "hang":
            time.sleep(3600)
        self.seen.append(step)

    def image(self, step, path):
        self.seen.append(path)

    def close(self):
        self.seen.append("closed")


@pytest.mark.parametrize("fault", ["", "init", "raise", "hang"])
def test_loggers_may_fail_or_hang(fault, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ldm.training.logging.BUDGET", 0.3)
    seen = []
    hooks = Hooks(logger=lambda: Sink(fault, seen), on_sample=lambda step: f"{step}.png")
    begun = time.monotonic()
    toy.train(tmp_path, hooks=hooks, sample_every=12)
    assert time.monotonic() - begun < 5
    assert len(records(tmp_path)) == 7
    err = capsys.readouterr().err
    if fault:
        assert err.count("warning: the logger") >= 1
        assert ("did not finish" in err) == (fault == "hang")
    else:
        assert seen == [1, 2, 4, 6, 8, 10, 12, "12.png", "closed"] and "warning" not in err


def test_a_slow_logger_drops_records_instead_of_waiting(monkeypatch):
    monkeypatch.setattr("ldm.training.logging.PENDING", 3)
    monkeypatch.setattr("ldm.training.logging.BUDGET", 0.05)
    said = []
    isolated = Isolated(lambda: Sink("hang"), said.append)
    for step in range(100):
        isolated.log(step, {"loss": 1.0})
    assert isolated.dropped >= 96
    isolated.close()
    assert "did not finish" in said[-1]


def test_metrics_forget_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "a": 1}\n', b'{"step": 3, "b": 2}\n', b"garbage\n", b'{"step": 5}\n', b'{"step": 6, "lo']
    path.write_bytes(b"".join(lines))
    log = MetricsLog(path, 3)
    log.write({"step": 4})
    assert path.read_bytes() == b"".join(lines[:2]) + b'{"step": 4}\n'
    assert log.last == {"step": 4, "a": 1, "b": 2}


def test_a_refused_command_changes_nothing(tmp_path):
    run = Path(shutil.copytree(FIXTURES / "0.1/cascade", tmp_path / "run"))
    (run / "config.yaml").write_text("seed: 0\n")

    def refused(error, message, **network):
        cfg = command("cascade", STEPS + 1)
        cfg["network"] |= network
        with pytest.raises(error, match=message):
            train(cfg, run, CPU, ALONE)

    refused(CheckpointError, "not the network built here", channels=[16])
    with RunDirectory(run).lock():
        child = toy.forked(refused, ConfigError, "is being written by process")
        assert toy.wait(child) == 0
    assert (run / "config.yaml").read_text() == "seed: 0\n"
    assert {path.name for path in run.iterdir()} == {"0.png", "1.png", "checkpoints", "config.yaml", "run.lock"}
    train(command("cascade", STEPS + 1), run, CPU, ALONE)
    assert "steps: 41" in (run / "config.yaml").read_text()


def test_training_outside_the_main_thread_works(tmp_path):
    import threading

    result = []
    thread = threading.Thread(target=lambda: result.append(toy.train(tmp_path, steps=2)))
    thread.start()
    thread.join()
    assert result[0]["step"] == 2


def test_errors_are_one_line_and_have_exit_codes(tmp_path):
    module = toy.Toy()
    trainer = Trainer(steps=1, batch_size=toy.BATCH)
    with pytest.raises(LdmError):
        fit(module, lambda step: iter(()), adamw(module), trainer, RunDirectory(tmp_path))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert Interrupted(130).code == 130
