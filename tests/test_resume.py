"""A run that is stopped in any way, at any moment, and started again ends with the bits of an uninterrupted one."""

import builtins
import functools
import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
import toy

from ldm.io import checkpoints, files
from ldm.training import checkpoint, loop
from ldm.training.ema import EMA
from ldm.training.loop import Hooks
from ldm.training.optim import cosine
from ldm.training.signals import SIGNALS, Interrupted

MEMORY = Path("/dev/shm")
KILLS = int(os.environ.get("LDM_KILLS", "40"))
VARIANTS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "accumulate": {"accumulate": 2},
    "channels_last": {"channels_last": True},
}


@pytest.fixture
def tmp_path():
    """In memory where possible: these tests save thousands of times, and a disk takes 10 ms for every flush."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as path:
        yield Path(path)


def stopped_at(step: int, number: int = signal.SIGTERM):
    """Batches during which a signal arrives, once."""
    sent = []

    def source(start):
        for batch in toy.batches(start):
            if batch["step"] + 1 == step and not sent:
                sent.append(os.kill(os.getpid(), number))
            yield batch

    return source


def interrupted_run(path: Path, stops=(2, 5, 7), **options) -> str:
    for step in stops:
        with pytest.raises(Interrupted):
            toy.train(path, source=stopped_at(step), **options)
    toy.train(path, **options)
    return toy.digest(path)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("oracle")
    toy.train(path)
    return toy.digest(path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_bit_exact(variant, tmp_path):
    toy.train(tmp_path / "whole", **VARIANTS[variant])
    assert interrupted_run(tmp_path / "parts", **VARIANTS[variant]) == toy.digest(tmp_path / "whole")


def test_a_loss_scale_that_grows_is_resumed_exactly(tmp_path, monkeypatch):
    """Every fourth step in a row: what counts them is state too."""
    growing = functools.partial(torch.amp.GradScaler, init_scale=256.0, growth_interval=4)
    monkeypatch.setattr(torch.amp, "GradScaler", growing)
    toy.train(tmp_path / "whole", precision="fp16")
    state = json.loads((tmp_path / "whole/checkpoints/last/state.json").read_text())
    assert state["scaler"]["scale"] == 2048.0
    assert interrupted_run(tmp_path / "parts", precision="fp16") == toy.digest(tmp_path / "whole")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_step_and_saves_it(number, tmp_path):
    with pytest.raises(Interrupted) as stop:
        toy.train(tmp_path, source=stopped_at(4, number))
    assert stop.value.code == 128 + number
    assert checkpoints.verify(tmp_path / "checkpoints/last")["step"] == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_is_obeyed_at_once(tmp_path):
    def source(start):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        yield from toy.batches(start)

    assert toy.wait(toy.forked(lambda: toy.train(tmp_path, source=source))) == -signal.SIGTERM


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_may_say_so_twice(first, tmp_path):
    def source(start):
        for batch in toy.batches(start):
            if batch["step"] == 3:
                os.kill(os.getpid(), first)
                os.kill(os.getpid(), signal.SIGHUP)
            yield batch

    with pytest.raises(Interrupted) as stop:
        toy.train(tmp_path, source=source)
    assert stop.value.code == 128 + first
    assert checkpoints.verify(tmp_path / "checkpoints/last")["step"] == 4


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_is_ignored_at_the_start_stays_ignored(number, tmp_path, oracle):
    """As under nohup, and for Ctrl-C of a program that a script started in the background."""
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        toy.train(tmp_path, source=stopped_at(4, number))
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, previous)
    assert toy.digest(tmp_path) == oracle


def test_an_earlier_handler_gets_its_signal_after_the_save(tmp_path):
    seen = []
    previous = signal.signal(
        signal.SIGUSR1, lambda number, frame: seen.append(checkpoints.latest(tmp_path / "checkpoints")[0])
    )
    try:
        with pytest.raises(Interrupted):
            toy.train(tmp_path, source=stopped_at(4, signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert [path.name for path in seen] == ["step_00000004"]


def test_a_preview_is_cut_short_and_made_again(tmp_path, oracle):
    made = []

    def preview(step):
        if step == 6 and not made:
            made.append("half of it")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        made.append(step)

    hooks = Hooks(on_sample=preview, on_eval=lambda step: {"score": step / 2})
    options = {"hooks": hooks, "sample_every": 6, "eval_every": 6}
    with pytest.raises(Interrupted):
        toy.train(tmp_path / "parts", **options)
    toy.train(tmp_path / "parts", **options)
    toy.train(tmp_path / "whole", **options)
    assert made == ["half of it", 6, 12, 6, 12]
    assert toy.digest(tmp_path / "parts") == toy.digest(tmp_path / "whole")


def test_hooks_cannot_disturb_the_random_numbers(tmp_path, oracle):
    drawn = []
    toy.train(tmp_path, hooks=Hooks(on_sample=lambda step: drawn.append(torch.randn(step))), sample_every=2)
    assert len(drawn) == 6
    assert toy.digest(tmp_path) == oracle


# --- kill -9 --------------------------------------------------------------------------------------------------------


def kill_until_done(path: Path, rng: random.Random, longest: float) -> int:
    """Start the run again and again, killing it after random times, until it finishes; the number of kills."""
    kills = 0
    while True:
        child, deadline = toy.forked(toy.train, path), time.monotonic() + rng.uniform(0, longest)
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0
                return kills
            time.sleep(5e-4)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        directory, skipped = checkpoints.latest(path / "checkpoints")
        assert not skipped, "a kill left a torn checkpoint"


def test_killed_at_random_times(tmp_path, oracle):
    begun = time.monotonic()
    assert toy.wait(toy.forked(toy.train, tmp_path / "timed")) == 0
    longest, kills, runs = time.monotonic() - begun, 0, 0
    while kills < KILLS:
        path = tmp_path / str(runs)
        kills += kill_until_done(path, random.Random(runs), longest)
        assert toy.digest(path) == oracle
        assert not list((path / "checkpoints").glob(".tmp-*"))
        runs += 1
    print(f"{kills} kills in {runs} runs, each bit-equal")


# --- a crash at every call that reaches the disk --------------------------------------------------------------------

CALLS = ("open", "mkdir", "rename", "replace", "link", "symlink", "unlink", "rmdir", "fsync")


def crash_at(k: int, path: Path) -> None:
    """Train, and die at the k-th call, leaving a list of what had been flushed to disk by then."""
    count, flushed = 0, {identity(file) for file in (path / "checkpoints").rglob("*")}

    def wrap(name, module=os):
        original = getattr(module, name)

        def call(*arguments, **named):
            nonlocal count
            count += 1
            if count == k:
                (path / "flushed.json").write_text(json.dumps(sorted(flushed)))
                os._exit(9)
            if name == "fsync":
                flushed.add(identity(arguments[0]))
            return original(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    builtins.open = wrap("open", builtins)
    toy.train(path)


def cut_power(path: Path) -> None:
    """Lose what the disk may lose: files whose last write was not followed by fsync are cut in half."""
    flushed = {tuple(entry) for entry in json.loads((path / "flushed.json").read_text())}
    for file in (path / "checkpoints").rglob("*"):
        if file.is_file() and not file.is_symlink() and identity(file) not in flushed:
            os.truncate(file, file.stat().st_size // 2)


def identity(file) -> tuple:
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


@pytest.fixture(scope="module")
def half_way(oracle, tmp_path_factory) -> Path:
    """A run that stopped at step 10 of 12 with two checkpoints: what is left is one save, one prune, the summary."""
    path = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(Interrupted):
        toy.train(path, source=stopped_at(10))
    return path


def crashes(half_way: Path, tmp_path: Path, every: int = 1):
    """(k, run directory) after a crash at call k, for every k-th call of the rest of the run."""
    k, code = 1, 9
    while code == 9:
        path = shutil.copytree(half_way, tmp_path / str(k), symlinks=True)
        code = toy.wait(toy.forked(crash_at, k, path))
        if code == 9:
            yield k, path
        k += every
    assert code == 0


def test_crash_at_every_call(half_way, tmp_path, oracle):
    for k, path in crashes(half_way, tmp_path):
        for lose in (lambda path: None, cut_power):
            lose(path)
            directory, skipped = checkpoints.latest(path / "checkpoints")
            assert directory is not None and directory.name >= "step_00000010", f"call {k}"
            assert not skipped, f"call {k} left a torn checkpoint: {skipped}"
        if k % 10 == 0:
            toy.train(path)
            assert toy.digest(path) == oracle, f"call {k}"
    assert k > 50
    print(f"crashed at each of {k} calls")


# --- the oracle has teeth -------------------------------------------------------------------------------------------


def plant_fresh_average(patch):
    patch.setattr(EMA, "load_state_dict", lambda self, tensors: None)


def plant_fresh_optimizer(patch):
    patch.setattr(checkpoint, "_load_optimizer", lambda *arguments: None)


def plant_restarted_data(patch):
    patch.setattr(toy, "batches", lambda step, original=toy.batches: original(0))


def plant_dropout_seeded_by_session(patch):
    steps = itertools.count(1)
    patch.setattr(loop, "key", lambda seed, purpose, _, rank, key=loop.key: key(seed, purpose, next(steps), rank))


def plant_schedule_of_session(patch):
    steps = itertools.count(1)
    patch.setattr(loop, "set_lr", lambda optimizer, _, set_lr=loop.set_lr: set_lr(optimizer, cosine(next(steps), 12)))


def plant_forgotten_buffers(patch):
    def tensors(objective, original=checkpoint.tensors):
        trained, frozen = original(objective)
        return {name: tensor for name, tensor in trained.items() if name != "seen"}, frozen

    patch.setattr(checkpoint, "tensors", tensors)


def plant_repeated_records(patch):
    patch.setattr("ldm.training.logging._record", lambda line: {"step": 0})


PLANTED = [value for name, value in sorted(globals().items()) if name.startswith("plant_")]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_bugs_are_caught(plant, tmp_path, monkeypatch, oracle):
    def dies_in_step_6(start):
        for n, batch in enumerate(toy.batches(start)):
            if n == 5:
                os._exit(9)
            yield batch

    plant(monkeypatch)  # none of these bugs shows in a run that is never stopped
    assert toy.wait(toy.forked(lambda: toy.train(tmp_path, source=dies_in_step_6))) == 9
    toy.train(tmp_path, source=lambda start: toy.batches(start))
    assert toy.digest(tmp_path) != oracle


def test_a_planted_missing_flush_is_caught(half_way, tmp_path, monkeypatch):
    for module in (checkpoints, files):
        monkeypatch.setattr(module, "os", _NoFsync())
    for _, path in crashes(half_way, tmp_path, every=4):
        cut_power(path)
        if checkpoints.latest(path / "checkpoints")[1]:
            return
    pytest.fail("no crash without fsync left a torn checkpoint")


class _NoFsync:
    def __getattr__(self, name):
        return (lambda *_: None) if name == "fsync" else getattr(os, name)


def test_metrics_hold_each_step_once(tmp_path):
    interrupted_run(tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 4, 6, 8, 10, 12]
