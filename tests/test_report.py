"""The report: what becomes a column, what becomes a row, and what happens to runs that did not end."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.io.images import read_image, write_png
from ldm.tools.report import main
from ldm.tools.runs import find_runs
from ldm.tools.table import differing, group

ROOT = Path(__file__).resolve().parents[1]


def make_run(path: Path, config: dict, overrides: list[str] = (), *, accuracy: float | None = None, steps: int = 60):
    """A run directory as train.py leaves it; without an accuracy, as a killed one does."""
    (path / ".hydra").mkdir(parents=True)
    (path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (path / ".hydra" / "overrides.yaml").write_text("".join(f"- {line}\n" for line in overrides) or "[]\n")
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + ("\n" if accuracy else '\n{"step": 61, "lo'))
    for step in (10, steps):
        image = torch.full((3, 40, 40 + steps), step, dtype=torch.uint8)
        (path / "samples").mkdir(exist_ok=True)
        write_png(path / "samples" / f"step_{step:08d}.png", image)
    if accuracy is not None:
        summary = {"metrics": {"accuracy": accuracy, "note": "x"}, "wall_seconds": 90.0, "images_per_second": 250,
                   "peak_memory_bytes": 2e9, "parameters": 3_000_000, "git_revision": "abc"}  # fmt: skip
        (path / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep(tmp_path):
    """Two predictions times two seeds, one of them killed; `v` also sets a number below it."""
    number = 0
    for prediction, clip in (("eps", 1), ("v", 2)):
        for seed in (0, 1):
            config = {"seed": seed, "data": {"seed": seed, "size": 32}, "prediction": {"clip": clip}}
            killed = (prediction, seed) == ("v", 1)
            overrides = [f"prediction={prediction}", f"seed={seed}"]
            accuracy = None if killed else 0.5 + 0.1 * number
            make_run(tmp_path / "sweep" / str(number), config, overrides, accuracy=accuracy)
            number += 1
    return tmp_path / "sweep"


def test_seeds_share_a_row_and_typed_settings_are_the_columns(sweep):
    rows = group(find_runs([sweep]))
    assert [row.cells for row in rows] == [{"prediction": "eps"}, {"prediction": "v"}]
    assert rows[0].values("accuracy") == pytest.approx([0.5, 0.6])
    assert len(rows[1].runs) == 2 and rows[1].values("accuracy") == pytest.approx([0.7])


def test_the_table_on_the_terminal_and_in_the_files(sweep, capsys):
    assert main([str(sweep)]) == 0
    printed = capsys.readouterr().out
    assert (sweep / "report.md").read_text() in printed
    assert "| eps        | 2      | 0.55 [0.5, 0.6] | 1.5     | 250      | 2  | 3        |" in printed
    assert "| v          | 1 of 2 | 0.7 " in printed
    assert f"- incomplete: {sweep / '3'} (step 60, loss 0.01667)" in printed
    assert "Mean over seeds [least, greatest]." in printed
    table = list(csv.DictReader((sweep / "report.csv").open()))
    assert [row["incomplete"] for row in table] == ["0", "1"]
    assert float(table[0]["accuracy_max"]) == pytest.approx(0.6) and table[0]["wall_seconds"] == "90.0"


def test_a_report_beside_the_runs_does_not_change_the_next_one(sweep, capsys):
    main([str(sweep)])
    first = capsys.readouterr().out
    main([str(sweep), str(sweep / "0")])
    assert capsys.readouterr().out == first


def test_config_edited_between_runs_is_a_column_although_nothing_was_typed(tmp_path):
    for name, width in (("a", 64), ("b", 128)):
        make_run(tmp_path / name, {"seed": 0, "network": {"width": width}, "same": 1}, accuracy=0.5)
    assert differing(find_runs([tmp_path])) == ["network.width"]


def test_a_setting_typed_once_is_compared_with_the_others_config(tmp_path):
    make_run(tmp_path / "a", {"lr": 0.1}, accuracy=0.5)
    make_run(tmp_path / "b", {"lr": 0.2}, ["lr=0.2", "+extra=1"], accuracy=0.5)
    make_run(tmp_path / "c", {"lr": 0.1}, ["lr=0.1"], accuracy=0.7)
    rows = group(find_runs([tmp_path]))
    assert [row.cells for row in rows] == [{"lr": "0.1", "extra": ""}, {"lr": "0.2", "extra": "1"}]
    assert [len(row.runs) for row in rows] == [2, 1]


def test_runs_in_natural_order(tmp_path):
    for number in (10, 9, 1):
        make_run(tmp_path / str(number), {"n": number}, [f"n={number}"], accuracy=0.5)
    assert [row.cells["n"] for row in group(find_runs([tmp_path]))] == ["1", "9", "10"]


def test_contact_sheet_shows_the_last_preview_of_each_run(sweep, tmp_path):
    assert main([str(sweep), "--out", str(tmp_path / "new" / "out")]) == 0
    sheet = read_image(tmp_path / "new" / "out" / "contact.png")
    assert sheet.shape[2] == 3 * (384 + 4) + 4 and sheet[:, 90, 388 + 60].tolist() == [60] * 3


def test_plot_is_written_or_its_absence_explained(sweep, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(sweep)]) == 0
    assert "report.png skipped: matplotlib is not installed" in capsys.readouterr().out
    assert not (sweep / "report.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert main([str(sweep)]) == 0 and read_image(sweep / "report.png").shape[0] == 3


def test_damaged_files_make_an_incomplete_run_not_a_crash(tmp_path, capsys):
    make_run(tmp_path / "a", {"seed": 0}, accuracy=0.5)
    make_run(tmp_path / "b", {"seed": 1}, accuracy=0.5)
    (tmp_path / "b" / "summary.json").write_text("[1, 2")
    (tmp_path / "b" / "config.yaml").write_text("a: [")
    (tmp_path / "b" / "metrics.jsonl").write_text("nonsense\n[1]\n{}\n")
    (tmp_path / "b" / ".hydra" / "overrides.yaml").write_text("- lr=1\n- seed=3\n- ~ema\n")
    for path in (tmp_path / "b" / "samples").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert main([str(tmp_path)]) == 0
    assert f"- incomplete: {tmp_path / 'b'} (nothing logged)" in capsys.readouterr().out


def test_a_job_that_failed_before_its_first_step_is_listed(tmp_path, capsys):
    (tmp_path / "0" / ".hydra").mkdir(parents=True)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"incomplete: {tmp_path / '0'}" in out and "contact.png skipped: no run has samples" in out


@pytest.mark.parametrize("name, message", [("absent", "no such directory"), ("empty", "no run in")])
def test_nothing_to_report_is_one_line_and_an_exit_code(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / name)]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list((tmp_path / "empty").iterdir()) == []


def test_help_does_not_import_torch():
    code = """if True:
        import sys
        from ldm.tools.report import main
        try:
            main(["--help"])
        finally:
            print({"torch", "omegaconf", "PIL", "matplotlib"} & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n") and "DIR" in done.stdout
