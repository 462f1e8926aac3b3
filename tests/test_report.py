"""The report: what becomes a column, what becomes a row, and what happens to runs that did not end."""

import csv
import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from ldm.io.images import read_image, write_png
from ldm.tools.claims import claims, compare
from ldm.tools.figures import colours_of, panels_of
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


CLAIM = {
    "paper": "arXiv:0000.00000, Table 1",
    "says": "a is best",
    "arms": ["network"],
    "metric": "fd",
    "better": "lower",
    "orders": [
        "a > b",
        "b > a",
        "b > c",
        "a > b > c",
        "b = c",
        "a = b",
        "a > d",
        {"order": "a/few > a/many", "metric": "fd"},
        {"order": "a > b", "metric": "few/fd", "better": "higher"},
        {"order": "a > b", "metric": "absent"},
    ],
}


@pytest.fixture
def ablation(tmp_path):
    """Arms a, b, c with three seeds: a is about 1 better than b with every seed, c is on both sides of b."""
    for arm, values in {"a": (1.0, 3.0, 5.0), "b": (2.0, 4.1, 6.0), "c": (2.5, 3.5, 6.2)}.items():
        for seed, value in enumerate(values):
            path = tmp_path / "sweep" / f"{arm}{seed}"
            config = {"seed": seed, "image_size": 16, "data": {"seed": 0}, "claim": CLAIM}
            make_run(path, config, [f"network={arm}", f"seed={seed}"], accuracy=0.5)
            metrics = {"fd": value, "few/fd": value + 1, "many/fd": value + 2, "part": 1.0, "part_1": 2.0}
            (path / "summary.json").write_text(json.dumps({"metrics": metrics, "parameters": 10}))
    return tmp_path / "sweep"


def test_verdicts_weigh_the_gap_against_the_spread_over_seeds(ablation):
    (claim,) = claims(find_runs([ablation]))
    words = [verdict.text for verdict in claim.verdicts()]
    assert words[:6] == ["agrees", "disagrees", "undecided", "undecided", "agrees", "disagrees"]
    assert words[6:] == ["not judged", "agrees", "disagrees", "not judged"]
    reasons = [verdict.reason for verdict in claim.verdicts()]
    assert reasons[0] == "a 3, b 4.033; gap +1, seeds' spread 0.1"
    assert reasons[6] == "no run is of arm d; there are a, b, c"
    assert reasons[9] == "no finished run of arm a has the metric absent"


def test_without_common_seeds_the_spread_is_that_of_the_values(ablation):
    config = ablation / "b2" / "config.yaml"
    config.write_text(config.read_text().replace('"seed": 2', '"seed": 9'))
    (claim,) = claims(find_runs([ablation]))
    assert claim.verdicts()[0].reason == "a 3, b 4.033; gap +1, seeds' spread 4"
    for seed in "12":
        (ablation / f"a{seed}" / "summary.json").unlink()
    assert claims(find_runs([ablation]))[0].verdicts()[0].reason.endswith("of one seed")


def test_mixed_image_sizes_are_not_judged(ablation):
    config = ablation / "a0" / "config.yaml"
    config.write_text(config.read_text().replace('"image_size": 16', '"image_size": 32'))
    (claim,) = claims(find_runs([ablation]))
    assert {verdict.text for verdict in claim.verdicts()} == {"not judged"}
    assert claim.verdicts()[0].reason == "runs of image_size 16 and 32 are mixed; report one size at a time"


def judged(first: tuple, second: tuple, sign: str = ">", **knobs) -> str:
    first, second = ({str(seed): value for seed, value in enumerate(values)} for values in (first, second))
    return compare(first, sign, second, "higher", **knobs)[0]


def test_a_gap_that_means_nothing_is_no_verdict():
    """However well seeds agree: 0.6101 is not more than 0.61."""
    assert judged((0.6101, 0.6101, 0.6102), (0.61, 0.61, 0.61)) == "undecided"
    assert judged((0.6101, 0.6101), (0.61, 0.61), "=") == "agrees"
    assert judged((0.62, 0.62), (0.61, 0.61)) == "agrees"
    assert judged((0.62, 0.62), (0.61, 0.61), least=0.05) == "undecided"
    assert judged((0.61, 0.61), (0.62, 0.62)) == "disagrees"


def test_runs_of_a_few_steps_are_not_judged(ablation):
    for path in ablation.glob("*/summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 4}))
    (claim,) = claims(find_runs([ablation]))
    assert {verdict.text for verdict in claim.verdicts()} == {"not judged"}
    assert "4 steps" in claim.verdicts()[0].reason


def test_an_arm_has_one_colour_in_all_panels(ablation):
    runs = find_runs([ablation])
    rows, made_for = group(runs), claims(runs)
    panels = panels_of(rows, made_for)
    colours = colours_of(rows, made_for, panels)
    arms = {arm for _, dots in panels for arm in dots}
    assert {"a", "b", "c", "a/few", "a/many"} >= arms and arms <= colours.keys()
    assert [colours[arm] for arm in "abc"] == [colours[f"network={arm}"] for arm in "abc"]
    assert len({colours[arm] for arm in ("a", "b", "c")}) == 3


def test_the_report_of_an_ablation(ablation):
    assert main([str(ablation)]) == 0
    text, html = ((ablation / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "## arXiv:0000.00000, Table 1" in text and "a is best." in text
    assert "| network | runs | fd" in text and "data.seed" not in text and "part_1" not in text
    assert re.search(r"\| b +\| few +\| 5.033 \[3, 7\] ", text)
    assert re.search(r"\| b > a +\| fd +\| disagrees ", text)
    assert '<td class="disagrees">disagrees</td>' in html and "http" not in html
    assert html.count('src="data:image/png;base64,') == text.count("![") > 0
    assert "part_1_max" in (ablation / "report.csv").read_text()


def make_images(path: Path, settings: dict, size: int = 8, numbers: dict | None = None):
    """A folder as sample.py leaves it, of two prompts with one seed."""
    path.mkdir(parents=True)
    records = []
    for number, prompt in enumerate(("a red circle", "a blue square")):
        write_png(path / f"{number:04d}.png", torch.full((3, size, size), 40 * number, dtype=torch.uint8))
        records.append({"file": f"{number:04d}.png", "prompt": prompt, "seed": 3, "run": "r", **settings})
    (path / "samples.json").write_text(json.dumps(records))
    if numbers:
        (path / "metrics.json").write_text(json.dumps({"numbers": numbers}))


def sampler(name: str, **knobs) -> dict:
    return {"_target_": f"ldm.samplers.{name}.sample", "_partial_": True, **knobs}


def test_a_sweep_of_samples_is_a_table_and_a_grid(tmp_path):
    for number, (how, scale) in enumerate(product((sampler("ddim", eta=0.0), sampler("euler")), (1, 2, 4))):
        settings = {"sampler": how, "guidance": {"_target_": "ldm.diffusion.guidance.cfg", "scale": scale}}
        make_images(tmp_path / str(number), settings, numbers={"frechet_distance": scale / 3})
    (tmp_path / "6").mkdir()
    (tmp_path / "6" / "job.json").write_text(json.dumps({"config": {}, "error": "job 6: needs a variance"}))
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"\| sampler \| guidance.scale \| frechet_distance \| folder", text)
    assert re.search(r"\| euler +\| 4 +\| 1.333 ", text) and f"- failed: {tmp_path / '6'} (job 6: needs a va" in text
    grid, side = read_image(tmp_path / "drawn.png"), 2 * 10 + 2  # two images of a cell side by side, with margins
    factor = -(-96 // side)
    assert grid.shape[2] == 3 * (side * factor + 4) + 4  # two samplers across
    assert grid.shape[1] > 3 * 12 * factor
    for number, option in enumerate(("ddim", "ddim", "ddim", "euler_x", "euler_x", "euler_x")):
        record = {"overrides": [f"sampler={option}", f"guidance.scale={(1, 2, 4)[number % 3]}"], "error": None}
        (tmp_path / str(number) / "job.json").write_text(json.dumps(record))
    assert main([str(tmp_path)]) == 0
    assert re.search(r"\| euler_x \| 4 +\| 1.333 ", (tmp_path / "report.md").read_text()), "options as they were typed"


def test_images_of_other_sizes_or_prompts_are_no_grid(tmp_path, capsys):
    make_images(tmp_path / "0", {"steps": 1})
    make_images(tmp_path / "1", {"steps": 2}, size=16)
    assert main([str(tmp_path)]) == 0
    assert "drawn.png skipped: images of 8x8 and 16x16 are mixed" in capsys.readouterr().out
    (tmp_path / "1" / "samples.json").write_text(json.dumps([{"file": "x", "prompt": "y", "seed": 0, "steps": 2}]))
    assert main([str(tmp_path)]) == 0
    assert "no prompt was drawn with the same seed in every folder" in capsys.readouterr().out


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
