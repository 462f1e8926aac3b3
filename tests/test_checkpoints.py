"""Checkpoint directories: complete or absent, verified before they are believed, of the network that reads them."""

import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import toy

from ldm.io import checkpoints
from ldm.io.checkpoints import commit, latest, point_last, prune, step_directory, verify
from ldm.io.tensors import read_tensors
from ldm.training.checkpoint import find, load_config, load_files, load_weights
from ldm.training.run import RunDirectory
from ldm.utils.errors import CheckpointError, ConfigError, NonFiniteError


def make(parent: Path, step: int, size: int = 100) -> Path:
    return commit(step_directory(parent, step), lambda path: (path / "data").write_bytes(bytes(size)), step)


def files(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    toy.train(path)
    return path


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


# --- directories ----------------------------------------------------------------------------------------------------


def test_commit_verify_latest_prune(tmp_path):
    for step in (1, 2, 10, 9):
        point_last(make(tmp_path, step))
    assert latest(tmp_path) == (step_directory(tmp_path, 10), [])
    assert os.readlink(tmp_path / "last") == "step_00000009"
    (tmp_path / ".tmp-step_00000011-1-ab").mkdir()
    prune(tmp_path, 2)
    assert files(tmp_path) == [
        "last", "step_00000009", "step_00000009/data", "step_00000009/manifest.json",
        "step_00000010", "step_00000010/data", "step_00000010/manifest.json",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="at least 2"):
        prune(tmp_path, 1)


def test_prune_counts_only_whole_checkpoints(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    (tmp_path / "step_00000003/data").unlink()
    prune(tmp_path, 2)
    assert [step for step, _ in checkpoints.steps(tmp_path)] == [4, 3, 2]
    assert latest(tmp_path)[0] == step_directory(tmp_path, 4)


def test_a_damaged_checkpoint_is_replaced_and_a_whole_one_is_not(tmp_path):
    (make(tmp_path, 1) / "data").write_bytes(b"broken")
    make(tmp_path, 1)
    verify(tmp_path / "step_00000001")
    with pytest.raises(CheckpointError, match="already is a complete checkpoint"):
        make(tmp_path, 1, size=5)
    assert verify(tmp_path / "step_00000001")["files"]["data"]["size"] == 100
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"schema": 9, "files": {}}', "[" * 5000, '{"schema": 1}'])
def test_a_bad_manifest_is_one_line(manifest, tmp_path):
    directory = make(tmp_path, 1)
    (directory / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError) as error:
        verify(directory)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/b"])
def test_a_manifest_cannot_point_outside(name, tmp_path):
    directory = make(tmp_path, 1)
    (tmp_path / "outside").write_text("x")
    entry = {"sha256": checkpoints.sha256(tmp_path / "outside"), "size": 1}
    (directory / "manifest.json").write_text(json.dumps({"schema": 1, "step": 1, "files": {name: entry}}))
    with pytest.raises(CheckpointError, match="missing"):
        verify(directory)


def test_every_flipped_bit_and_every_cut_is_found(run):
    newest, older = (directory for _, directory in checkpoints.steps(run / "checkpoints"))
    rng = random.Random(0)
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for _ in range(40):
            broken = bytearray(whole)
            broken[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            for data in (broken, whole[: rng.randrange(len(whole))]):
                path.unlink()  # frozen tensors share their file with the older checkpoint
                path.write_bytes(data)
                found, skipped = latest(run / "checkpoints")
                if found != older:  # a flip that means the same: white space in the manifest
                    assert path.name == "manifest.json" and json.loads(data) == json.loads(whole)
        path.unlink()
        assert latest(run / "checkpoints")[0] == older
        path.write_bytes(whole)
    assert latest(run / "checkpoints") == (newest, [])


# --- disk full ------------------------------------------------------------------------------------------------------


def with_full_disk(path: Path) -> None:
    """Train in a process whose files may not grow beyond 1500 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    toy.train(path, steps=30)


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(run):
    before = files(run / "checkpoints")

    def train():
        try:
            with_full_disk(run)
        except CheckpointError as error:
            os._exit(42 if "File too large" in str(error) and "\n" not in str(error) else 43)

    assert toy.wait(toy.forked(train)) == 42
    assert files(run / "checkpoints") == before
    assert latest(run / "checkpoints")[0].name == "step_00000012"


def test_a_save_that_fails_is_tried_again_and_then_fatal(tmp_path, monkeypatch, capsys):
    original, failures = checkpoints._seal, []

    def failing(times):
        def seal(*arguments):
            if len(failures) < times:
                failures.append(1)
                raise OSError(28, "No space left on device")
            original(*arguments)

        return seal

    monkeypatch.setattr(checkpoints, "_seal", failing(2))
    toy.train(tmp_path / "a")
    assert "step_00000003: No space left on device" in capsys.readouterr().err
    assert [step for step, _ in checkpoints.steps(tmp_path / "a/checkpoints")] == [12, 9]
    failures.clear()
    monkeypatch.setattr(checkpoints, "_seal", failing(3))
    with pytest.raises(CheckpointError, match="step_00000009: No space left"):
        toy.train(tmp_path / "b")
    assert files(tmp_path / "b/checkpoints") == []


def test_a_run_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        toy.train(tmp_path / "file" / "run")


# --- what a checkpoint holds ----------------------------------------------------------------------------------------


def test_contents(trained):
    last = trained / "checkpoints/last"
    assert set(os.listdir(last)) == {
        "model.safetensors", "frozen.safetensors", "ema.safetensors", "optimizer.safetensors",
        "state.json", "config.json", "tokenizer.json", "manifest.json",
    }  # fmt: skip
    names = {"net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias", "labels.weight"}
    assert set(read_tensors(last / "model.safetensors")) == names | {"seen"}
    assert set(read_tensors(last / "ema.safetensors")) == names
    assert set(read_tensors(last / "frozen.safetensors")) == {"codec.weight", "codec.bias"}
    kinds = {f"{name}.{kind}" for name in names for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert set(read_tensors(last / "optimizer.safetensors")) == kinds
    assert load_config(last) == {"network": {"_target_": "tests.toy.Toy"}}
    assert load_files(last) == {"tokenizer.json": "{}"}
    mask = os.umask(0o022)
    os.umask(mask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~mask for path in last.iterdir())


def test_unchanged_frozen_tensors_are_shared_and_changed_ones_are_not(trained, tmp_path):
    newest, older = (directory / "frozen.safetensors" for _, directory in checkpoints.steps(trained / "checkpoints"))
    assert newest.samefile(older)
    changed = toy.Toy()

    def source(step):  # as a teacher that follows its student is: frozen, but not constant
        for batch in toy.batches(step):
            changed.codec.bias.data.add_(1)
            yield batch

    toy.train(tmp_path / "b", toy=changed, source=source)
    newest, older = (directory / "frozen.safetensors" for _, directory in checkpoints.steps(tmp_path / "b/checkpoints"))
    assert not newest.samefile(older)


def test_damaged_frozen_tensors_are_not_shared(tmp_path):
    toy.train(tmp_path)
    run = tmp_path
    shared = run / "checkpoints/last/frozen.safetensors"
    data = bytearray(shared.read_bytes())
    data[-1] ^= 1

    def source(step):
        shared.write_bytes(data)  # in place: both checkpoints are damaged while the run goes on
        return toy.batches(step)

    toy.train(run, source=source, steps=15)
    assert verify(run / "checkpoints/last")["step"] == 15


class Wrapped(torch.nn.Module):
    """Named as torch.compile names what it wraps."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, x):
        return self._orig_mod(x)


def test_wrappers_leave_no_trace_in_names(tmp_path):
    wrapped, plain = toy.Toy(), toy.Toy()
    wrapped.net = Wrapped(wrapped.net)
    toy.train(tmp_path, toy=wrapped, steps=3)
    assert load_weights(find(tmp_path), plain, ema=False) == 3
    assert torch.equal(plain.net[0].weight, wrapped.net._orig_mod[0].weight)


def test_sampling_gets_the_average_and_the_frozen_tensors(trained):
    last, fresh = trained / "checkpoints/last", toy.Toy()
    fresh.codec.bias.data.zero_()
    assert load_weights(last, fresh) == 12
    assert torch.equal(fresh.net[0].weight, read_tensors(last / "ema.safetensors")["net.0.weight"])
    assert torch.equal(fresh.codec.bias, read_tensors(last / "frozen.safetensors")["codec.bias"])
    load_weights(last, fresh, ema=False)
    assert torch.equal(fresh.net[0].weight, read_tensors(last / "model.safetensors")["net.0.weight"])


# --- what is refused ------------------------------------------------------------------------------------------------


def test_another_network_is_refused_by_name(run):
    with pytest.raises(CheckpointError) as error:
        toy.train(run, toy=toy.Toy(width=6))
    text = str(error.value)
    assert "holds tests.toy.Toy, which is not the network built here" in text and "\n" not in text
    assert "net.0.bias is (4,), expected (6,)" in text
    other = toy.Toy()
    other.extra = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"2 missing \(extra.bias, extra.weight\)"):
        load_weights(run / "checkpoints/last", other)
    del other.extra, other.labels
    with pytest.raises(CheckpointError, match=r"1 unexpected \(labels.weight\)"):
        load_weights(run / "checkpoints/last", other)


def test_a_newly_trained_part_or_average_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="averaged weights differ"):
        thawed = toy.Toy()
        thawed.codec.requires_grad_(True)
        toy.train(run, toy=thawed)
    toy.train(tmp_path / "plain", ema=False, steps=3)
    with pytest.raises(CheckpointError, match="ema=none"):
        toy.train(tmp_path / "plain", steps=6)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(name, run, trained, capsys):
    path = run / "checkpoints/last" / name
    path.write_bytes(path.read_bytes()[:-20])
    toy.train(run)
    err = capsys.readouterr().err
    assert "warning: passed over a checkpoint" in err and name in err and "step_00000009" in err
    assert toy.digest(run) == toy.digest(trained)


def test_a_run_whose_every_checkpoint_is_damaged_does_not_start_again(run):
    for _, directory in checkpoints.steps(run / "checkpoints"):
        (directory / "model.safetensors").write_bytes(b"")
    before = files(run)
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"):
        toy.train(run)
    with pytest.raises(CheckpointError, match="holds no checkpoint that can be used"):
        find(run)
    assert files(run) == before


def test_weights_that_are_not_finite_are_never_stored(tmp_path):
    broken = toy.Toy()

    def source(step):
        for batch in toy.batches(step):
            if batch["step"] == 5:  # after the forward pass nothing shows: the row of a label that is never drawn
                broken.labels.weight.data[3] = float("inf")
                batch["label"] = batch["label"] % 3
            yield batch

    with pytest.raises(NonFiniteError, match="labels.weight is not finite at step 6; .*step_00000003"):
        toy.train(tmp_path, toy=broken, source=source)
    assert latest(tmp_path / "checkpoints")[0].name == "step_00000003"


# --- continuing -----------------------------------------------------------------------------------------------------


def test_a_finished_run_stays_as_it_is(run):
    before = {name: (run / name).read_bytes() for name in ("summary.json", "metrics.jsonl")}
    assert toy.train(run)["step"] == 12
    assert {name: (run / name).read_bytes() for name in before} == before
    with pytest.raises(ConfigError, match="past trainer.steps=6"):
        toy.train(run, steps=6)


def test_continuing_elsewhere_leaves_the_first_run_alone(trained, tmp_path, capsys):
    before = files(trained)
    toy.train(tmp_path / "next", resume=trained, steps=15)
    assert files(trained) == before
    assert f"continuing from {trained}" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in (tmp_path / "next/metrics.jsonl").read_text().splitlines()]
    assert steps == [14, 15]
    toy.train(tmp_path / "next", resume=trained, steps=15)  # now from its own checkpoint
    with pytest.raises(CheckpointError, match="it has no checkpoints"):
        toy.train(tmp_path / "other", resume=tmp_path)


def test_changed_settings_are_named(run, capsys):
    (directory,) = [d for _, d in checkpoints.steps(run / "checkpoints")][:1]
    there = RunDirectory(run, config={"network": {"_target_": "ldm.Other"}, "seed": 3})
    assert there.newest() == (
        directory,
        [f"continuing with other settings than {directory}: network._target_=ldm.Other, seed=3"],
    )


def test_two_writers_are_kept_apart(tmp_path):
    holder = RunDirectory(tmp_path)
    with holder.lock():

        def second():
            try:
                toy.train(tmp_path)
            except ConfigError as error:
                os._exit(42 if f"is being written by process {os.getppid()} on " in str(error) else 43)

        assert toy.wait(toy.forked(second)) == 42
    with holder.lock():  # free again
        pass
