"""What people type: it works, or one line shows the command to type."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from omegaconf import OmegaConf
from test_cli import refused

import sample
import train
from ldm.tools.words import quoted, readable


def meant(word: str):
    """The value that Hydra reads in a word of sample.py."""
    (word,) = readable([word], "sample")
    value = plain_text(OverridesParser.create().parse_override(word).value())
    return OmegaConf.to_container(OmegaConf.create([value]), resolve=True)[0]


def plain_text(value):
    if isinstance(value, list):
        return [plain_text(part) for part in value]
    if isinstance(value, dict):
        return {str(plain_text(key)): plain_text(part) for key, part in value.items()}
    return value.text if isinstance(value, QuotedString) else value


@pytest.mark.parametrize(
    ("typed", "prompts"),
    [
        ("[a red circle, a blue square]", ["a red circle", "a blue square"]),
        ("a cat, sitting", "a cat, sitting"),
        ("[a cat's hat]", ["a cat's hat"]),
        ("[a cat's hat, the dog's]", ["a cat's hat", "the dog's"]),
        ("[(cat:1.3)]", ["(cat:1.3)"]),
        ("[a (red, big:1.3) fox, b]", ["a (red, big:1.3) fox", "b"]),
        ("['a (red:1.3) fox']", ["a (red:1.3) fox"]),
        ("""['a cat, sitting', "b's"]""", ["a cat, sitting", "b's"]),
        ("un café à Zürich", "un café à Zürich"),
        ("[日本の猫, ☕]", ["日本の猫", "☕"]),
        ("cat #1 = best; 50% {off} <b> & \"x\"", 'cat #1 = best; 50% {off} <b> & "x"'),
        ("[cat] and [dog]", "[cat] and [dog]"),
        ("[[cat] on a mat, dog]", ["[cat] on a mat", "dog"]),
        ("[:( sad, glad]", [":( sad", "glad"]),
        ("a [cat", "a [cat"),
        ("costs ${money}", "costs ${money}"),
        ("back\\slash\\", "back\\slash\\"),
        ("[207, 1e3, true, null]", ["207", "1e3", "true", None]),
        ("both ' and \"", "both ' and \""),
        ("[]", []),
        ("~ 5 ~", "~ 5 ~"),
    ],
)  # fmt: skip
def test_prompts_are_text(typed, prompts):
    assert meant(f"prompts={typed}") == prompts
    if isinstance(prompts, str):
        assert meant(f"negative={typed}") == prompts


def test_no_negative_prompt_and_an_empty_one():
    assert meant("negative=null") is None and meant("negative=") == ""


def test_other_values_that_hydra_cannot_read_are_text(monkeypatch):
    monkeypatch.setenv("HOME", "/home/josé")
    assert meant("run=~/runs/a b's #1") == "/home/josé/runs/a b's #1"
    assert meant("run=runs/x (1)/é=2") == "runs/x (1)/é=2"
    assert meant("run=2024") == "2024" and meant("out=1e5") == "1e5" and meant("run=null") is None
    assert meant("run={x}") == "{x}" and meant("run=runs/[a]") == "runs/[a]" and meant("run=[a") == "[a"
    lora = meant("lora=[{path: ~/é (1).safetensors, scale: 0.8}, 'b, c.safetensors']")
    assert lora == [{"path": "/home/josé/é (1).safetensors", "scale": 0.8}, "b, c.safetensors"]
    assert quoted("hydra.run.dir=~/x", False) == "hydra.run.dir='/home/josé/x'"
    assert readable(["--config-dir=~/x", "seeds=0"], "sample") == ["seeds=0", "--config-dir", "/home/josé/x"]


@pytest.mark.parametrize("word", ["seeds=[0,1]", "guidance.scale=1,4", "sampler=glob(*)", "sampler=glob(*,exclude=lcm)",
                                  "stages=[{},{steps:20,aug_level:0.2}]", "x=${steps}", "x=choice(a,b)",
                                  "steps=range(1,4)", "metrics=[frechet,kid]", "out=a b"])  # fmt: skip
def test_what_hydra_reads_is_left_alone(word):
    assert quoted(word, True) == word


def test_commas_part_the_values_of_a_sweep():
    assert quoted("prompts=[a cat's, b],[c]", True) == """prompts=["a cat's",'b'],['c']"""
    assert quoted("negative=blurry,a cat's", True) == """negative='blurry',"a cat's\""""
    assert quoted("run=é/a,é/b", True) == "run='é/a','é/b'"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["batch_size=3"], "did you mean 'trainer.batch_size'?"),
        (["workers=3"], "did you mean 'trainer.workers'?"),
        (["objects=3"], "did you mean 'data.objects'?"),
        (["lr=3"], "did you mean 'optimizer.lr'?"),
        (["scale.stesp=3"], "did you mean 'scale.steps'?"),
        (["network=dit_small", "network.widht=3"], "did you mean 'network.width'?"),
        (["guidance=7.5"], "type guidance.scale=7.5"),
        (["trainer=100"], "type trainer.steps=100"),
        (["times=20"], "type steps=20"),
        (["optimizer=1e-4"], "type optimizer.lr=0.0001"),
        (["-m", "guidance=3,7.5"], "type guidance.scale=3"),
        (["logger=null"], "logger=none"),
        (["ema=false"], "ema=none"),
        (["ema=off"], "ema=none"),
        (["~ema"], "ema=none"),
        (["~network"], "network=OPTION, of "),
        (["~seed"], "seed=null"),
        (["--seed=3"], "type seed=3"),
        (["--image-size", "64"], "type image_size=64"),
        (["--name", "a b"], 'type name="a b"'),
        (["data=photos/cats"], "data=folder data.path=photos/cats"),
        (["data.path=photos"], "data=folder data.path="),
        (["seed=0,1"], "type -m seed=0,1"),
        (["seed=range(0,3)"], "type -m seed=range(0,3)"),
        (["name=a", "red", "circle"], "'red' is not a setting"),
        (["+foo=1"], "nothing reads 'foo'"),
        (["++trainre.steps=1"], "did you mean 'trainer.steps'?"),
        (["+seed=1"], "leave out the +: seed=1"),
        (["+experiment=emoji"], "leave out the +: experiment=emoji"),
        (["präfix=1"], "'präfix' is no name of a setting"),
        (["experiment=emojy"], "did you mean 'emoji'?"),
    ],
)  # fmt: skip
def test_the_answer_shows_what_to_type(words, says, capsys):
    code, line = refused(train, capsys, *words, "--cfg", "job")
    assert code == 2 and says in line and line.startswith("error: ") and "hydra.cc" not in line
    assert "scale.batch_size" not in line


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("+prediction=v", "nothing reads 'prediction'"),
        ("+clip_skip=2", "nothing reads"),
        ("+published.foo=1", "nothing reads"),
        ("++sampeler=ddim", "did you mean 'sampler'?"),
        ("scale=7.5", "did you mean 'guidance.scale'?"),
    ],
)
def test_settings_that_nothing_reads_are_refused(word, says, capsys):
    code, line = refused(sample, capsys, word, "--cfg", "job")
    assert code == 2 and says in line


def test_sweeps_over_all_options_pass():
    words = ["-m", "sampler=glob(*)", "times=glob(*,exclude=lcm)", "guidance=cfg,none", "threshold=choice(none,static)"]
    assert readable(words, "sample") == [*words[1:], "-m"]


def test_new_arguments_of_what_is_built_can_be_added():
    assert readable(["+lr_schedule.warmup_fraction=1", "++seed=3", "+hydra.job.x=1"], "train")


def test_experiments_of_ones_own_are_among_the_choices(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "minetta.yaml").write_text("# @package _global_\ntrainer:\n  steps: 1\n")
    code, line = refused(train, capsys, "--config-dir", str(tmp_path), "experiment=minetto", "--cfg", "job")
    assert code == 2 and "did you mean 'minetta'?" in line and "emoji" in line
    code, line = refused(train, capsys, f"--config-dir={tmp_path}", "experiment=minetta", "+foo=1", "--cfg", "job")
    assert code == 2 and "nothing reads 'foo'" in line
