"""Checkpoint directories: complete or absent, verified before they are believed, of the network that reads them."""

import errno
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
import toy

from ldm.io import checkpoints
from ldm.io.checkpoints import commit, latest, point_last, prune, step_directory, verify
from ldm.io.files import replacing, say_once
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


def flip(path: Path) -> None:
    """One bit, in place, as a failing disk does it."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with open(path, "r+b") as file:
        file.write(data)


@pytest.mark.parametrize("settled", [False, True])
def test_prune_counts_flipped_bits_and_spares_the_last_whole_ones(settled, tmp_path, monkeypatch):
    if settled:  # as after seconds, when sums are remembered
        monkeypatch.setattr(checkpoints, "SETTLED", -1.0)
    for step in (1, 2, 3, 4, 5):
        make(tmp_path, step)
        prune(tmp_path, 5)
    for step in (5, 4, 2):
        time.sleep(0.01)
        flip(tmp_path / f"step_{step:08d}/data")
    prune(tmp_path, 2)
    assert [step for step, _ in checkpoints.steps(tmp_path)] == [5, 4, 3, 2, 1]
    spare = make(tmp_path, 6)
    flip(spare / "data")
    prune(tmp_path, 2, spare=spare)
    make(tmp_path, 7)
    prune(tmp_path, 2, spare=tmp_path / "step_00000002")
    assert [step for step, _ in checkpoints.steps(tmp_path)] == [7, 6, 5, 4, 3, 2]


def test_prune_reads_large_files_once(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SETTLED", -1.0)
    read, sha256 = [], checkpoints.sha256
    monkeypatch.setattr(checkpoints, "sha256", lambda path: read.append(path.parent.name) or sha256(path))
    for step in range(1, 8):
        make(tmp_path, step)
        prune(tmp_path, 2)
    assert len(read) == 7 and all(name.startswith(".tmp-") for name in read)  # each when it was written
    latest(tmp_path)
    assert read[7:] == ["step_00000007"]  # but what training continues from is always read


def test_a_disk_that_cannot_read_a_file_has_a_damaged_checkpoint(tmp_path, monkeypatch):
    older, newest = make(tmp_path, 1), make(tmp_path, 2)
    sha256 = checkpoints.sha256

    def failing(path):
        if path.parent == newest:
            raise OSError(errno.EIO, "Input/output error")
        return sha256(path)

    monkeypatch.setattr(checkpoints, "sha256", failing)
    assert latest(tmp_path) == (older, [f"{newest} is damaged: data cannot be read (Input/output error)"])


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


def test_a_checkpoint_of_another_step_is_not_taken_for_this_one(tmp_path):
    make(tmp_path, 1).rename(step_directory(tmp_path, 2))
    with pytest.raises(CheckpointError, match="its manifest is of step 1"):
        verify(step_directory(tmp_path, 2))
    assert latest(tmp_path)[0] is None


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


# --- power cuts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch) -> list[tuple]:
    """What reaches the disk, in order: ("flushed", inode, size) and ("renamed", inode, size, inode of the folder)."""
    calls = []

    def fsync(descriptor, original=os.fsync):
        status = os.fstat(descriptor)
        calls.append(("flushed", status.st_ino, None if stat.S_ISDIR(status.st_mode) else status.st_size))
        original(descriptor)

    def rename(source, target, original=os.rename):
        status = os.stat(source)
        calls.append(("renamed", status.st_ino, status.st_size, os.stat(Path(target).parent).st_ino))
        original(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    return calls


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, disk):
    with replacing(tmp_path / "file") as file:
        file.write(bytes(1000))
    inode, folder = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    assert disk == [("flushed", inode, 1000), ("renamed", inode, 1000, folder), ("flushed", folder, None)]


def test_a_checkpoint_is_on_disk_before_it_has_its_name_and_its_name_is_too(tmp_path, disk):
    directory = make(tmp_path / "checkpoints", 1)
    inode, parent = directory.stat().st_ino, directory.parent.stat().st_ino
    named = next(i for i, call in enumerate(disk) if call[:2] == ("renamed", inode))
    for path in directory.iterdir():
        assert ("flushed", path.stat().st_ino, path.stat().st_size) in disk[:named], path.name
    assert ("flushed", inode, None) in disk[:named]
    assert ("flushed", parent, None) in disk[named:]


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


# --- what killed programs leave -------------------------------------------------------------------------------------


def test_temporaries_of_killed_programs_go_at_the_next_start(tmp_path, monkeypatch):
    def killed(path):
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            os._exit(9)

    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    for name in ("config.yaml", "summary.json", "samples/step_00000003.png"):
        assert toy.wait(toy.forked(killed, run / name)) == 9
    mine, living = (run / f".tmp-{process}-config.yaml" for process in (os.getpid(), os.getppid()))
    old, foreign = run / f".tmp-{os.getppid()}-summary.json", run / ".tmp-notes.txt"
    for path in (mine, living, old, foreign):
        path.touch()
    os.utime(old, (0, 0))
    (run / f".tmp-{2**40}-adapter").mkdir()  # no process has such a number
    assert len(list(run.rglob(".tmp-*"))) == 8
    toy.train(run)
    assert set(run.rglob(".tmp-*")) == {living, foreign}


def test_a_run_in_use_is_not_swept(tmp_path):
    with RunDirectory(tmp_path).lock():
        (tmp_path / f".tmp-{2**40}-config.yaml").touch()

        def second():
            with pytest.raises(ConfigError, match="is being written by"):
                toy.train(tmp_path)

        assert toy.wait(toy.forked(second)) == 0
    assert len(list(tmp_path.glob(".tmp-*"))) == 1


# --- file systems that lack something -------------------------------------------------------------------------------


def without_links(patch):
    def refuse(*arguments):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    patch.setattr(os, "symlink", refuse)
    patch.setattr(os, "link", refuse)


def without_locks(patch, number=errno.ENOLCK):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    patch.setattr(fcntl, "lockf", refuse)


def without_flushed_directories(patch, number=errno.EINVAL):
    def fsync(descriptor, original=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        original(descriptor)

    patch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("lack", [without_links, without_locks, without_flushed_directories])
def test_what_a_file_system_lacks_is_said_once(lack, tmp_path, trained, monkeypatch, capsys):
    say_once.cache_clear()
    lack(monkeypatch)
    toy.train(tmp_path / "run")
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert " on this disk" in said or " to this disk" in said or "no locks here" in said
    toy.train(tmp_path / "run", steps=15)
    monkeypatch.undo()
    assert [step for step, _ in checkpoints.steps(tmp_path / "run/checkpoints")] == [15, 12]
    for name in ("model", "frozen", "ema", "optimizer"):
        both = [path / f"checkpoints/step_00000012/{name}.safetensors" for path in (tmp_path / "run", trained)]
        assert both[0].read_bytes() == both[1].read_bytes()


def test_a_file_stands_for_the_link(run, monkeypatch):
    without_links(monkeypatch)
    last = run / "checkpoints/last"
    last.unlink()
    point_last(run / "checkpoints/step_00000009")
    assert last.read_text() == "step_00000009\n"
    assert find(last) == run / "checkpoints/step_00000009" and find(run).name == "step_00000012"
    monkeypatch.undo()
    point_last(run / "checkpoints/step_00000012")
    assert os.readlink(last) == "step_00000012"
    last.unlink()
    shutil.copytree(run / "checkpoints/step_00000009", last)  # as `cp -rL` leaves it
    toy.train(run, steps=15)
    assert find(run).name == "step_00000015"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_not_one_that_lacks_something(number, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        without_flushed_directories(patch, number)
        with pytest.raises(CheckpointError, match=re.escape(os.strerror(number))):
            toy.train(tmp_path / "a")
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(ConfigError, match="Input/output error"):
        toy.train(tmp_path / "b")


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


def frozen_files(run: Path) -> dict[int, int]:
    """The file of frozen tensors of every checkpoint, as its number on disk."""
    return {step: (path / "frozen.safetensors").stat().st_ino for step, path in checkpoints.steps(run / "checkpoints")}


def test_unchanged_frozen_tensors_are_in_two_files_that_take_turns(tmp_path):
    toy.train(tmp_path / "a", keep=4)
    shared = frozen_files(tmp_path / "a")
    assert shared[12] == shared[6] != shared[9] == shared[3]
    toy.train(tmp_path / "a", keep=4, steps=15)  # and so they do where training continues
    assert frozen_files(tmp_path / "a") == {15: shared[9], 12: shared[6], 9: shared[9], 6: shared[6]}
    changed = toy.Toy()

    def source(step):  # as a teacher that follows its student is: frozen, but not constant
        for batch in toy.batches(step):
            changed.codec.bias.data.add_(1)
            yield batch

    toy.train(tmp_path / "b", toy=changed, source=source, keep=4)
    assert len(set(frozen_files(tmp_path / "b").values())) == 4


def test_one_flipped_bit_in_frozen_tensors_costs_one_checkpoint_of_two(run, trained):
    flip(run / "checkpoints/step_00000012/frozen.safetensors")
    assert latest(run / "checkpoints")[0].name == "step_00000009"
    toy.train(run)
    assert toy.digest(run) == toy.digest(trained)


def test_the_newest_whole_checkpoint_is_not_shared_with_whatever_else_is_damaged(run):
    flip(run / "checkpoints/step_00000012/model.safetensors")
    toy.train(run, steps=10, save_every=1)
    files = frozen_files(run)
    assert files[10] != files[9]


def test_damaged_frozen_tensors_are_not_shared(run):
    frozen = {d: d / "frozen.safetensors" for _, d in checkpoints.steps(run / "checkpoints")}
    good = (run / "checkpoints/last/frozen.safetensors").read_bytes()

    def source(step):
        for path in frozen.values():  # in place, while the run goes on
            flip(path)
        return toy.batches(step)

    toy.train(run, source=source, steps=15)
    newest = run / "checkpoints/last/frozen.safetensors"
    assert verify(newest.parent)["step"] == 15
    assert newest.stat().st_ino not in {path.stat().st_ino for path in frozen.values() if path.exists()}
    assert newest.read_bytes() == good


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
