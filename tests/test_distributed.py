"""Two processes over gloo: the gradients of one, the same decisions in the same step, and no waiting for the dead."""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import toy
from torch import nn

from ldm.io import checkpoints
from ldm.io.tensors import read_tensors
from ldm.training.distributed import ALONE, World, init, local_device
from ldm.training.ema import EMA
from ldm.training.loop import Hooks, Trainer, fit, gradients, prepare
from ldm.training.optim import adamw, cosine
from ldm.training.run import RunDirectory
from ldm.training.signals import Interrupted
from ldm.utils.errors import CheckpointError, ConfigError, DataError, LdmError, NonFiniteError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _warm():
    """What optimizers and DDP import when first used, once here instead of in every child."""
    importlib.import_module("torch._dynamo")
    adamw(toy.Toy())


def both(function, path: Path, timeout: float = 30.0) -> list[int]:
    """Exit codes of function(world, path) on two ranks."""

    def rank(number):
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
        world = init(CPU, timeout=timeout, rendezvous=f"file://{path}/rendezvous-{function.__name__}")
        function(world, path)
        world.close()

    return [toy.wait(child) for child in [toy.forked(rank, 0), toy.forked(rank, 1)]]


def shares(world: World):
    def source(step):
        while True:
            yield toy.batch_of(step, world.rank, world.size)
            step += 1

    return source


def train(world: World, path: Path, source=None, hooks=None, module=None, **options) -> nn.Module:
    """toy.train without dropout, whose masks depend on the rank, on any number of ranks."""
    trainer = Trainer(**{"steps": 6, "batch_size": toy.BATCH, "save_every": 2, "log_every": 2, **options})
    module = module or toy.Toy(dropout=0.0)
    prepare(module, module.net, trainer, CPU)
    average, optimizer = EMA(module, decay=0.9), adamw(module, lr=1e-2)
    fit(
        module, source or shares(world), optimizer, trainer, RunDirectory(path / "run"),
        lr_schedule=cosine, ema=average, hooks=hooks, world=world,
    )  # fmt: skip
    torch.save(average.state_dict(), path / f"ema{world.rank}.pt")
    return module


def tensors(path: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return read_tensors(path / f"run/checkpoints/last/{name}.safetensors")


# --- equal to one process -------------------------------------------------------------------------------------------


def test_gradients_are_those_of_one_process(tmp_path):
    def measure(world, path):
        for accumulate in (1, 2):
            module = toy.Toy(dropout=0.0)
            trainer = Trainer(steps=1, batch_size=toy.BATCH, accumulate=accumulate)
            off = torch.amp.GradScaler("cpu", enabled=False)
            loss, _ = gradients(world.wrap(module), toy.batch_of(0, world.rank, world.size), trainer, off)
            grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
            torch.save(grads | {"loss": world.mean(loss)}, path / f"{accumulate}-{world.size}-{world.rank}.pt")

    assert both(measure, tmp_path) == [0, 0]
    measure(ALONE, tmp_path)
    for accumulate in (1, 2):
        one, *two = (torch.load(tmp_path / f"{accumulate}-{name}.pt") for name in ("1-0", "2-0", "2-1"))
        for name, value in one.items():
            assert torch.equal(two[0][name], two[1][name])
            assert torch.allclose(two[0][name], value, atol=1e-7), name


def test_training_equals_one_process_and_resumes_exactly(tmp_path):
    for name in ("one", "two", "parts"):
        (tmp_path / name).mkdir()

    def stops(world, path):
        def source(step):
            for batch in shares(world)(step):
                if batch["step"] == 2 and world.rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)  # one rank alone is told
                yield batch

        with pytest.raises(Interrupted) as stop:
            train(world, path, source)
        assert stop.value.code == 143

    train(ALONE, tmp_path / "one")
    assert both(train, tmp_path / "two") == [0, 0]
    assert both(stops, tmp_path / "parts") == [0, 0]
    assert checkpoints.verify(tmp_path / "parts/run/checkpoints/last")["step"] == 3
    assert both(train, tmp_path / "parts") == [0, 0]
    for name in ("model", "ema", "optimizer"):
        for key, value in tensors(tmp_path / "two", name).items():
            assert torch.equal(tensors(tmp_path / "parts", name)[key], value)
            if key != "seen":  # each rank counts its own images
                assert torch.allclose(tensors(tmp_path / "one", name)[key], value, atol=1e-5)
    averages = [torch.load(tmp_path / f"two/ema{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])
    lines = [
        [json.loads(line) for line in (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [r["step"] for r in lines[0]] == [r["step"] for r in lines[1]] == [1, 2, 4, 6]
    assert [r["loss"] for r in lines[0]] == pytest.approx([r["loss"] for r in lines[1]], rel=1e-4)


# --- one decision ---------------------------------------------------------------------------------------------------


def test_a_bad_loss_on_one_rank_stops_both(tmp_path):
    def poisoned(world, path):
        def source(step):
            for batch in shares(world)(step):
                if world.rank == 1 and batch["step"] >= 3:
                    batch["image"] = torch.full(batch["image"].shape, float("nan"))
                yield batch

        with pytest.raises(NonFiniteError, match="step 5 .*step_00000002|step 5 .*step_00000004"):
            train(world, path, source, max_bad_steps=1)

    assert both(poisoned, tmp_path) == [0, 0]


def test_a_failed_save_on_rank_0_is_known_to_both(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    def full(world, path):
        with pytest.raises(CheckpointError, match="No space left"):
            train(world, path, steps=2)

    monkeypatch.setattr(checkpoints, "_seal", fail)
    assert both(full, tmp_path) == [0, 0]
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_checkpoint_of_another_network_is_refused_by_both(tmp_path):
    train(ALONE, tmp_path)

    def other(world, path):
        with pytest.raises(CheckpointError, match="not the network built here"):
            train(world, path, module=toy.Toy(width=6))

    assert both(other, tmp_path) == [0, 0]


def test_hooks_and_writing_are_rank_0s_alone(tmp_path):
    def hooked(world, path):
        train(world, path, hooks=Hooks(on_sample=lambda step: (path / f"{world.rank}-{step}").touch()), sample_every=3)

    assert both(hooked, tmp_path) == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("*-*") if path.name[0] in "01") == ["0-3", "0-6"]


def test_a_run_started_by_torchrun_uses_its_numbers(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device("cuda") == torch.device("cuda", 3) and local_device("cpu") == CPU
    assert init(CPU) is ALONE
    assert ALONE.agree(3) == 3 and ALONE.first(lambda: 5) == 5


# --- a peer that is gone --------------------------------------------------------------------------------------------


def lines(path: Path) -> dict[int, list[str]]:
    return {rank: (path / f"said{rank}").read_text().splitlines() for rank in (0, 1)}


def as_entry_does(world: World, path: Path, *arguments, **options) -> None:
    """Train, and end with the line and the exit code of an error."""
    sys.stderr = open(path / f"said{world.rank}", "w")
    try:
        train(world, path, *arguments, **options)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    finally:
        sys.stderr.flush()
        world.close()


FAULTS = {  # on a rank, with the batch of step 4: (its exit code, the last line it says, what the other one says of it)
    "data": (3, "error: photo.png is broken", "has stopped"),
    "memory": (2, "error: out of memory in step 4", "has stopped"),
    "bug": (70, None, "has stopped"),
    "die": (9, None, "has stopped"),
    "hang": (6, "error: another rank of 2 has stopped", "does not answer (trainer.timeout)"),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_rank_waits_for_ever(fault, rank, tmp_path):
    class Full(toy.Toy):
        def forward(self, batch):
            if batch.get("full"):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(batch)

    def unlucky(world, path):
        def source(step):
            for batch in shares(world)(step):
                if batch["step"] == 3 and world.rank == rank:
                    if fault == "die":
                        os._exit(9)
                    if fault == "bug":
                        raise ValueError("on one rank")
                    if fault == "data":
                        raise DataError("photo.png is broken")
                    batch["full"] = fault == "memory"
                    time.sleep(4 if fault == "hang" else 0)
                yield batch

        as_entry_does(world, path, source, module=Full(dropout=0.0))

    begun = time.monotonic()
    codes, (code, own, others) = both(unlucky, tmp_path, timeout=2.0), FAULTS[fault]
    assert codes[rank] == code and codes[1 - rank] == 6 and time.monotonic() - begun < 25
    said = lines(tmp_path)
    assert said[1 - rank][-1].startswith("error: ") and others in said[1 - rank][-1]
    if own:
        assert said[rank][-1].startswith(own)
    assert not any("Traceback" in line or "gloo" in line for line in said[0] + said[1])
    # Rank 0 writes the last step that was finished, unless it is the one that is gone.
    kept = "step_00000002" if rank == 0 and fault == "die" else "step_00000003"
    assert checkpoints.latest(tmp_path / "run/checkpoints")[0].name == kept


def test_after_a_rank_was_lost_training_continues_with_the_same_bits(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()

    def loses(world, path):
        def source(step):
            for batch in shares(world)(step):
                if batch["step"] == 4 and world.rank == 1:
                    os._exit(9)
                yield batch

        as_entry_does(world, path, source)

    assert both(train, tmp_path / "whole") == [0, 0]
    assert both(loses, tmp_path / "parts") == [6, 9]
    assert both(train, tmp_path / "parts") == [0, 0]
    for name in ("model", "ema", "optimizer"):
        for key, value in tensors(tmp_path / "whole", name).items():
            if key != "seen":  # each rank counts its own images
                assert torch.equal(tensors(tmp_path / "parts", name)[key], value)


def test_ranks_wait_longer_for_an_evaluation_than_for_a_step(tmp_path):
    def slow(world, path):
        train(world, path, hooks=Hooks(on_eval=lambda step: time.sleep(3)), eval_every=3, steps=3)

    assert both(slow, tmp_path, timeout=1.0) == [0, 0]


@pytest.mark.parametrize("timeout", [0, -1.0, "long", None])
def test_an_impossible_timeout_is_refused(timeout, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="trainer.timeout="):
        init(CPU, timeout=timeout)
