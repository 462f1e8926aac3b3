"""Sweeps: every launcher runs them, a job that fails stops no other, and a sweep begun again repeats only that one.

The jobs here are stubs: what is tested is all that lies around them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml

from ldm.tools.jobs import outcome, reached, run_job
from ldm.tools.report import main as report
from ldm.utils.errors import ConfigError, NonFiniteError

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = """
hydra: {output_subdir: .hydra, searchpath: ["file://%s/configs"]}
lr: 0.001
optimizer: {lr: 0.001}
"""
STUB = """
import json, math
from pathlib import Path
import ldm.tools.cli
from ldm.utils.errors import NonFiniteError

ldm.tools.cli.config_dir = lambda: Path("settings").resolve()

@ldm.tools.cli.entry("small")
def main(cfg, path):
    path.mkdir(parents=True, exist_ok=True)
    with (path / "ran").open("a") as file:
        file.write("x")
    if {fails} and not Path("mended").exists():
        raise NonFiniteError("the loss is nan")
    value = {value}
    (path / "summary.json").write_text(json.dumps({{"metrics": {{"score": value}}}}))
    return value

main()
"""


@pytest.fixture
def launch(tmp_path):
    """launch(arguments) runs a stub as a program, in a directory of its own."""

    def run(*arguments: str, fails: str = "False", value: str = "1.0"):
        (tmp_path / "stub.py").write_text(STUB.format(fails=fails, value=value))
        (tmp_path / "settings").mkdir(exist_ok=True)
        (tmp_path / "settings" / "small.yaml").write_text(SETTINGS % ROOT)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "stub.py", "-m", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    return run


def test_sixty_jobs_of_which_one_fails(launch, tmp_path, capsys):
    sweep, fails = tmp_path / "sweep", 'cfg["lr"] == 18'
    arguments = ("lr=range(1,61)", "hydra.sweep.dir=sweep")
    done = launch(*arguments, fails=fails, value='float(cfg["lr"])')
    assert done.returncode == NonFiniteError.exit_code
    assert "job 17 (lr=18) failed: the loss is nan" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: job 17 (lr=18): the loss is nan"

    assert report([str(sweep)]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\| \d+ +\| 1 ", printed, re.MULTILINE)) == 59
    assert f"- incomplete: {sweep / '17'} (the loss is nan)" in printed

    (tmp_path / "mended").touch()
    again = launch(*arguments, fails=fails, value='float(cfg["lr"])')
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before") == 59
    ran = {int(path.parent.name): path.read_text() for path in sweep.glob("*/ran")}
    assert ran == {**dict.fromkeys(range(60), "x"), 17: "xx"}


def test_a_job_whose_settings_changed_is_run_again(tmp_path, capsys):
    calls = []

    def main(cfg: dict, path: Path) -> float:
        calls.append(cfg.pop("lr"))  # jobs may change what they are given
        return 2.0

    path = tmp_path / "0"
    path.mkdir()
    for lr in (0.1, 0.1, 0.2):
        assert run_job(main, {"lr": lr, "list": [1, None]}, path, 0, ["lr=0.1"]) == 2.0
    assert calls == [0.1, 0.2] and "job 0 (lr=0.1): finished before" in capsys.readouterr().out
    (path / "job.json").write_text("{")
    run_job(main, {"lr": 0.2, "list": [1, None]}, path, 0, [])
    assert calls == [0.1, 0.2, 0.2]


def test_errors_that_are_not_ours_keep_their_traceback(tmp_path):
    def main(cfg: dict, path: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_job(main, {}, tmp_path, 3, [])
    assert outcome(tmp_path)["error"] == "ZeroDivisionError"


def test_an_interrupted_job_is_neither_finished_nor_failed(tmp_path):
    def main(cfg: dict, path: Path) -> None:
        raise SystemExit(130)  # as after Ctrl-C: Hydra ends the sweep

    with pytest.raises(SystemExit):
        run_job(main, {}, tmp_path, 3, [])
    assert outcome(tmp_path) == {}


@pytest.mark.parametrize("launcher, plugin", [("cores", "joblib"), ("slurm_local", "submitit")])
def test_launchers(launch, tmp_path, launcher, plugin):
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher", reason="needs the extra: sweeps")
    arguments = ("lr=1,2,3", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep")
    done = launch(*arguments, fails='cfg["lr"] == 2')
    assert done.returncode != 0 and "job 1 (lr=2): the loss is nan" in done.stderr
    (tmp_path / "mended").touch()
    again = launch(*arguments, fails='cfg["lr"] == 2')
    assert again.returncode == 0, again.stderr
    assert [(tmp_path / "sweep" / job / "ran").read_text() for job in "012"] == ["x", "xx", "x"]


def test_slurm_asks_for_what_its_config_says():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra: sweeps")
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"]
        launcher = hydra.compose("train", overrides, return_hydra_config=True).hydra.launcher
    assert launcher["_target_"].endswith("SlurmLauncher") and launcher["partition"] == "gpu"
    assert launcher["gpus_per_node"] == 1 and launcher["signal_delay_s"] == 120


def test_a_search_finds_the_best_and_outlives_a_failure(launch, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra: sweeps")
    lr = 'math.log10(cfg["optimizer"]["lr"])'
    done = launch(
        "hydra/sweeper=search", "hydra.sweeper.n_trials=8", "hydra.sweep.dir=sweep",
        value=f"-abs({lr} + 3)", fails='path.name == "3"',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    values = [json.loads(path.read_text())["value"] for path in (tmp_path / "sweep").glob("*/job.json")]
    assert len(values) == 8 and values.count(None) == 1
    assert found["best_value"] == max(value for value in values if value is not None)


def test_a_goal_is_a_number_of_the_summary():
    summary = {"metrics": {"loss": 0.5, "note": "x"}}
    assert reached("loss", summary) == 0.5 and reached(None, summary) is None
    with pytest.raises(ConfigError, match="goal=note: the run has no such number; it has loss"):
        reached("note", summary)
