"""The promises to the outside: what the two commands write, resume, refuse and say."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ldm
import sample
import train
from ldm.build import compose
from ldm.io.images import read_image, read_png_text
from ldm.io.tensors import read_tensors
from ldm.tools import report
from ldm.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def command(module, *arguments: str) -> None:
    """`python train.py ...` in this process, where torch is already imported."""
    argv, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, arguments)]
    try:
        module.main()
    finally:
        sys.argv = argv


def refused(module, capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and what was printed as the error."""
    with pytest.raises(SystemExit) as stop:
        command(module, *arguments)
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("run") / "smoke"
    command(train, "debug=smoke", f"hydra.run.dir={path}")
    return path


def test_one_command_trains_both_stages_and_leaves_everything_promised(run):
    for stage in (run, run / "autoencoder"):
        for name in ("config.yaml", "metrics.jsonl", "summary.json", "checkpoints/last/manifest.json"):
            assert (stage / name).is_file(), name
        assert (stage / "samples" / "step_00000004.png").is_file()
        assert sorted(p.name for p in (stage / "checkpoints").glob("step_*")) == ["step_00000002", "step_00000004"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert {"step", "loss", "lr", "images_per_second", "grad_norm"} <= set(records[0])
    assert "prompt_accuracy" in records[-1]
    summary = json.loads((run / "summary.json").read_text())
    promised = {"metrics", "wall_seconds", "images_per_second", "peak_memory_bytes", "parameters", "versions"}
    assert promised | {"git_revision"} <= set(summary)
    assert json.loads((run / "autoencoder" / "summary.json").read_text())["metrics"]["psnr"] > 0


def test_a_checkpoint_needs_nothing_else(run, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(run / "checkpoints" / "step_00000004", alone)
    expected = ldm.load_run(run).generate(["a red circle"], seeds=[3], steps=2)[0]
    assert ldm.load_run(alone).generate(["a red circle"], seeds=[3], steps=2)[0].tobytes() == expected.tobytes()
    assert not list(alone.glob("*.p*"))


def test_the_same_directory_resumes_to_the_same_bits(run, tmp_path, capsys):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    shared = ["debug=smoke", f"codec.run={run / 'autoencoder'}", "metrics=none", "preview=none"]
    command(train, *shared, f"hydra.run.dir={whole}")
    command(train, *shared, "lr_schedule=constant", "trainer.steps=2", f"hydra.run.dir={tmp_path / 'other'}")
    shutil.copytree(whole / "checkpoints" / "step_00000002", resumed / "checkpoints" / "step_00000002")
    command(train, *shared, f"hydra.run.dir={resumed}")
    assert "continuing from" in capsys.readouterr().err
    for name in ("model", "ema", "optimizer"):
        a, b = (read_tensors(d / "checkpoints" / "last" / f"{name}.safetensors") for d in (whole, resumed))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_resume_continues_from_elsewhere(run, tmp_path, capsys):
    there = tmp_path / "there"
    command(train, "debug=smoke", f"resume={run}", "trainer.steps=5", "metrics=none", "preview=none",
            "data.objects=3", f"hydra.run.dir={there}")  # fmt: skip
    assert f"continuing from {run}" in capsys.readouterr().err
    assert not (there / "autoencoder").exists(), "the codec comes with the checkpoint"
    old, new = ((d / "checkpoints" / "last" / "tokenizer.json").read_text() for d in (run, there))
    assert old == new, "so does the vocabulary, whatever words the data has now"
    assert [p.name for p in (there / "checkpoints").glob("step_*")] == ["step_00000005"]


def test_sample_writes_pictures_that_say_how_they_were_made(run, tmp_path):
    out = tmp_path / "out"
    command(sample, f"run={run}", "prompts=[a red circle, a blue square]", "seeds=[0,1]", "steps=3",
            "guidance.scale=4", f"out={out}")  # fmt: skip
    records = json.loads((out / "samples.json").read_text())
    assert [(r["prompt"], r["seed"]) for r in records] == [
        ("a red circle", 0), ("a red circle", 1), ("a blue square", 0), ("a blue square", 1)
    ]  # fmt: skip
    text = read_png_text(out / records[3]["file"])
    settings = json.loads(text["settings"])
    assert (text["prompt"], text["seed"]) == ("a blue square", "1")
    assert settings["steps"] == 3 and settings["guidance"]["scale"] == 4
    assert read_image(out / "grid.png").shape[1] > read_image(out / records[0]["file"]).shape[1] == 32


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pictures_have_a_folder_of_their_own_and_replace_only_their_own(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\ufeffa red circle\n\n a blue, small square \n", encoding="utf-8")
    words = [f"run={run}", "steps=1"]
    for _ in range(2):
        command(sample, *words, "prompts=@prompts.txt")
    first, second = (tmp_path / "samples").iterdir()
    assert names(first) == names(second) == ["0000.png", "0001.png", "grid.png", "samples.json"]
    assert [r["prompt"] for r in json.loads((first / "samples.json").read_text())] == [
        "a red circle", "a blue, small square"
    ]  # fmt: skip
    (first / "notes.txt").write_text("mine")
    command(sample, *words, "prompts=a red circle", f"out={first}")
    assert names(first) == ["0000.png", "grid.png", "notes.txt", "samples.json"]
    shutil.copy(first / "0000.png", first / "0001.png")
    code, line = refused(sample, capsys, *words, "prompts=[a, b]", f"out={first}")
    assert code == 2 and "0001.png that was not drawn by sample.py" in line
    code, line = refused(sample, capsys, *words, "prompts=@nowhere.txt")
    assert code == 3 and "nowhere.txt: no such file" in line
    assert len(list((tmp_path / "samples").iterdir())) == 2, "a command that failed leaves no empty folder"


def test_a_sweep_over_all_options_leaves_out_what_does_not_fit(run, tmp_path, capsys):
    words = ["-m", f"run={run}", "prompts=[a red circle]", "steps=1"]
    command(sample, *words, "sampler=glob(ddpm*)", f"out={tmp_path / 'a'}")
    printed = capsys.readouterr()
    assert "sampler=ddpm_learned" in printed.err and "left out: a learned variance" in printed.err
    assert f"{tmp_path / 'a'}; if stopped, to continue: " in printed.out
    assert len(list((tmp_path / "a").glob("*/grid.png"))) == 2
    code, line = refused(sample, capsys, *words, "sampler=glob(ddpm_le*)", f"out={tmp_path / 'b'}")
    assert code == 2 and "left out" not in line, "nothing fitted"
    code, line = refused(sample, capsys, *words, "sampler=ddpm_learned,ddim", f"out={tmp_path / 'c'}")
    assert code == 2 and "a learned variance" in line, "what was named must be done"


def test_the_command_that_continues_is_printed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command(train, "debug=smoke", f"codec.run={run / 'autoencoder'}", "metrics=none", "preview=none", "trainer.steps=1")
    line = next(line for line in capsys.readouterr().out.splitlines() if "to continue: " in line)
    words = line.partition("to continue: ")[2].split()
    assert words[1:3] == ["train.py", "debug=smoke"] and words[-1].startswith("hydra.run.dir=runs/shapes/")
    command(train, *words[2:])
    assert len(list((tmp_path / "runs" / "shapes").iterdir())) == 1


def test_numbers_of_no_images_are_refused(run, tmp_path, capsys):
    words = [f"run={run}", "metrics=shapes", "steps=1", f"out={tmp_path / 'o'}"]
    for setting in ("num_images=0", "num_images=-1", "num_images=x", "metrics.shapes.num_prompts=0"):
        code, line = refused(sample, capsys, *words, setting)
        assert code == 2 and setting.rpartition(".")[2].partition("=")[0] in line and line.startswith("error: ")


def test_previews_and_sample_draw_alike_by_default():
    trained, drawn = compose("train"), compose("sample")
    for name in ("sampler", "times", "guidance", "threshold", "steps"):
        assert trained[name] == drawn[name], name


def test_python_takes_what_the_command_line_takes(run, tmp_path):
    loaded = ldm.load_run(run)
    assert "load_run" in dir(ldm) and "step 4" in repr(loaded) and "run.generate('a red circle'" in repr(loaded)
    (picture,) = loaded.generate("a red circle", seeds=0, steps=2)
    assert picture.tobytes() == loaded.generate(["a red circle"], seeds=[0], steps=2)[0].tobytes()

    def euler(denoise, process, x, times):
        for t, s in zip(times.tolist(), times.tolist()[1:], strict=False):
            (alpha, sigma), (alpha_s, sigma_s), x0 = process(t), process(s), denoise(x, t)
            x = alpha_s * x0 + sigma_s / sigma * (x - alpha * x0)
        return x

    own = loaded.generate("a red circle", steps=2, sampler=euler)[0]
    assert max(abs(a - b) for a, b in zip(own.tobytes(), picture.tobytes(), strict=True)) <= 1
    picture.save(tmp_path / "a.png")
    command(sample, f"run={run}", "prompts=a ring", "steps=4", f"image={tmp_path / 'a.png'}", f"out={tmp_path / 'o'}")
    for source in (picture, tmp_path / "a.png", str(tmp_path / "a.png"), read_image(tmp_path / "a.png")):
        (changed,) = loaded.generate("a ring", steps=4, image=source, progress=False)
        assert changed.tobytes() == read_image(tmp_path / "o" / "0000.png").permute(1, 2, 0).numpy().tobytes()
    mask = Image.new("L", (32, 32))
    kept = loaded.generate("a ring", steps=4, image=picture, mask=mask)[0]
    assert kept.tobytes() == loaded.generate("a ring", steps=4, image=picture, strength=0)[0].tobytes()
    for wrong, says in {"imagesize": "'image_size'", "hint": "objective=control", "sampler": "sampler=3"}.items():
        with pytest.raises(ConfigError, match=says):
            loaded.generate("a", **{wrong: 3})


def test_an_image_of_a_batch_is_the_image_drawn_alone(run):
    loaded = ldm.load_run(run)
    batch = loaded.generate(["a red circle", "a small blue ring"], seeds=[0, 7], steps=4, sampler="euler_ancestral")
    alone = loaded.generate(["a small blue ring"], seeds=[7], steps=4, sampler="euler_ancestral")[0]
    apart = [abs(a - b) for a, b in zip(batch[3].tobytes(), alone.tobytes(), strict=True)]
    assert max(apart) <= 1  # the last bit of a float32 may turn a rounding
    assert batch[2].tobytes() != alone.tobytes()


def test_a_picture_is_changed_or_repainted(run, tmp_path):
    source = tmp_path / "a"
    command(sample, f"run={run}", "prompts=[a red circle]", "steps=2", f"out={source}")
    picture, mask = source / "0000.png", tmp_path / "mask.png"
    from ldm.io.images import write_png

    half = torch.zeros(3, 32, 32, dtype=torch.uint8)
    half[:, :, 16:] = 255
    write_png(mask, half)
    for name, extra in {"kept": ["strength=0"], "changed": ["strength=1"], "half": [f"mask={mask}"]}.items():
        command(sample, f"run={run}", "prompts=[a blue ring]", "steps=3", f"image={picture}", *extra,
                f"out={tmp_path / name}")  # fmt: skip
    kept, changed, half = (read_image(tmp_path / n / "0000.png").int() for n in ("kept", "changed", "half"))
    assert (kept - changed).abs().float().mean() > 5
    left = (half - kept).abs().float().mean(0)
    assert left[:, :8].mean() < left[:, 24:].mean() / 2


def test_sweeps_and_their_report(run, tmp_path, capsys):
    command(train, "-m", "debug=smoke", f"codec.run={run / 'autoencoder'}", "preview=none", "metrics=none",
            "prediction=flow,v", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}")  # fmt: skip
    assert report.main([str(tmp_path / "sweep"), "--out", str(tmp_path / "report")]) == 0
    table = (tmp_path / "report" / "report.md").read_text()
    assert "flow" in table and "| v" in table
    assert {p.name for p in (tmp_path / "report").iterdir()} >= {"report.md", "report.csv"}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["trainer.stesp=3"], 2, "did you mean 'trainer.steps'?"),
        (["smapler=ddim"], 2, "did you mean 'sampler'?"),
        (["sampler=heunn"], 2, "did you mean 'heun'?"),
        (["trainer.steps=0"], 2, "trainer.steps=0: expected at least 1"),
        (["image_size=30"], 2, "30"),
        (["data=folder", "data.path=/nonexistent/place"], 3, "/nonexistent/place: no such folder"),
        (["process=zero_snr", "prediction=eps"], 2, "use prediction=v"),
        (["trainer.steps=abc"], 2, "steps='abc' is of the wrong type"),
        (["optimizer.betas=3"], 2, "betas=3 is of the wrong type"),
        (["steps=0"], 2, "steps=0: a sampler needs at least one step"),
        (["network.channels=48"], 2, "48 channels do not split into the 32 groups"),
        (["network.head_dim=48"], 2, "head_dim=48 does not divide"),
        (["conditioner=labels", "network=autoencoder_small"], 2, "num_classes"),
        (["codec.run=/nonexistent/place"], 2, "codec.run=/nonexistent/place"),
        (["device=cuda"] if not torch.cuda.is_available() else ["device=gpu"], 2, "device="),
    ],
)
def test_bad_training_settings_end_in_one_line(run, tmp_path, capsys, arguments, code, says):
    known = [f"codec.run={run / 'autoencoder'}"] * (not any("codec.run" in a for a in arguments))
    found, line = refused(train, capsys, "debug=smoke", *known, *arguments, f"hydra.run.dir={tmp_path / 'bad'}")
    assert found == code and says in line and line.startswith("error: ")
    assert not (tmp_path / "bad" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["prompts=[]"], 3, "the list of prompts is empty"),
        (["prompts=[a red circle]", "steps=0"], 2, "steps=0"),
        (["prompts=[a red circle]", "seeds=[x]"], 2, "is not a list of whole numbers"),
        (["prompts=[a red circle]", "threshold=static"], 2, "not of latents"),
        (["prompts=[a red circle]", "batch_size=0"], 2, "batch_size=0"),
        (["prompts=[a red circle]", "image_size=30"], 2, "not divisible by 4"),
        (["prompts=[a red circle]", "strength=2", "image=x.png"], 2, "strength=2"),
        (["prompts=[a red circle]", "mask=x.png"], 2, "image is not"),
        (["prompts=[a red circle]", "run=/nonexistent/place"], 4, "/nonexistent/place holds no checkpoint"),
    ],
)
def test_bad_sampling_settings_end_in_one_line(run, tmp_path, capsys, arguments, code, says):
    known = [f"run={run}"] * (not any("run=" in a for a in arguments))
    found, line = refused(sample, capsys, *known, *arguments, f"out={tmp_path / 'out'}")
    assert found == code and says in line and line.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_checkpoints(run, tmp_path, capsys):
    cut = tmp_path / "cut"
    shutil.copytree(run, cut, symlinks=True)
    for file in cut.glob("checkpoints/step_*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    code, line = refused(sample, capsys, f"run={cut}", "prompts=[a red circle]", f"out={tmp_path / 'o'}")
    assert code == 4 and "damaged" in line
    other = tmp_path / "other"
    shutil.copytree(run / "checkpoints", other / "checkpoints", symlinks=True)
    code, line = refused(train, capsys, "debug=smoke", "network.channels=32", f"codec.run={run / 'autoencoder'}",
                         f"hydra.run.dir={other}")  # fmt: skip
    assert code == 4 and "is not the network built here" in line


def test_what_only_training_needs_may_be_gone(run, tmp_path):
    from ldm.io.checkpoints import commit

    old = run / "checkpoints" / "step_00000004"
    config = json.loads((old / "config.json").read_text())
    config["density"] = config["weighting"] = {"_target_": "ldm.diffusion.times.forgotten"}
    config["objective"]["forgotten"] = 1

    def write(folder: Path) -> None:
        for file in old.iterdir():
            if file.name != "manifest.json":
                shutil.copy(file, folder / file.name)
        (folder / "config.json").write_text(json.dumps(config))

    commit(tmp_path / "step_00000004", write, 4)
    assert len(ldm.load_run(tmp_path / "step_00000004").generate(["a red circle"], steps=1)) == 1


def test_python_errors_are_ours_too(run):
    with pytest.raises(ConfigError, match="there is no sampler=nope"):
        ldm.load_run(run).generate(["a red circle"], sampler="nope")


def test_an_autoencoder_draws_nothing(run, tmp_path, capsys):
    code, line = refused(sample, capsys, f"run={run / 'autoencoder'}", "prompts=[a]", f"out={tmp_path / 'o'}")
    assert code == 2 and "draws no images" in line


def test_a_config_in_a_checkpoint_runs_nothing(run, tmp_path):
    from ldm.utils.errors import LdmError

    evil = tmp_path / "evil"
    shutil.copytree(run / "checkpoints" / "step_00000004", evil)
    config = json.loads((evil / "config.json").read_text())
    config["network"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'ran'}"}
    (evil / "config.json").write_text(json.dumps(config))
    with pytest.raises(LdmError):
        ldm.load_run(evil)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["trainer.stesp=1"]])
def test_answers_before_torch_is_imported(arguments):
    probe = (
        "import sys, runpy\n"
        f"sys.argv = ['train.py', *{arguments!r}]\n"
        "try:\n    runpy.run_path('train.py', run_name='__main__')\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_importing_the_package_is_free():
    probe = "import sys, ldm; assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True, timeout=60)


def test_a_sweep_under_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, line = refused(train, capsys, "-m", "seed=0,1")
    assert code == 2 and "torchrun" in line
