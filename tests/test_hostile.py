"""Checkpoints made to harm: sealed like any other, so that only what reads them stands in their way."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

import ldm
from ldm.build import build_objective
from ldm.cascade import Stage
from ldm.conditioning.conditioner import Conditioner
from ldm.generate import load_run
from ldm.io.checkpoints import commit
from ldm.io.tensors import write_tensors
from ldm.models.codec import PixelCodec
from ldm.training.checkpoint import tensors
from ldm.utils.errors import CheckpointError, LdmError

AUTOENCODER = {"_target_": "ldm.models.autoencoder.AutoencoderKL", "channels": 32, "channel_mult": [1]}
DIT = {"_target_": "ldm.models.dit.DiT", "in_channels": 3, "width": 32, "depth": 1, "num_heads": 2, "patch_size": 4,
       "sample_size": 16, "learned_variance": False}  # fmt: skip
CONFIG = {
    "conditioner": {},
    "codec": {"_target_": "ldm.models.codec.PixelCodec"},
    "network": DIT,
    "process": {"_target_": "ldm.diffusion.process.RectifiedFlow"},
    "prediction": {"_target_": "ldm.diffusion.prediction.Flow"},
    "objective": {"_target_": "ldm.diffusion.objective.DiffusionObjective", "seed": 2**40},
    "discriminator": None,
    "adapters": {},
    "image_size": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    torch.set_num_threads(1)
    objective, _, _ = build_objective(CONFIG, PixelCodec(), Conditioner({}), training=False)
    return tensors(objective)[0]


@pytest.fixture
def sealed(tmp_path, weights):
    """A whole checkpoint with this config and this state, whose manifest agrees with them."""

    def make(config, state=None, files=()):
        def write(folder: Path) -> None:
            (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
            (folder / "state.json").write_text(json.dumps({"step": 1} if state is None else state))
            write_tensors(folder / "model.safetensors", weights)
            for name, text in files:
                (folder / name).write_text(text)

        return commit(tmp_path / f"run{len(list(tmp_path.iterdir()))}" / "step_00000001", write, 1)

    return make


def refusal(directory: Path) -> str:
    """What load_run says, in little time; of one line, of weights (exit code 4)."""
    start = time.monotonic()
    with pytest.raises(LdmError) as refused:
        load_run(directory)
    assert time.monotonic() - start < 5
    assert "\n" not in str(refused.value) and isinstance(refused.value, CheckpointError)
    return str(refused.value)


def changed(config, where: str, value):
    """A copy with one entry, of nested tables, replaced."""
    config, (*path, last) = json.loads(json.dumps(config)), where.split(".")
    node = config
    for name in path:
        node = node.setdefault(name, {})
    node[last] = value
    return config


def test_the_checkpoint_that_the_others_damage_is_whole(sealed):
    assert load_run(sealed(CONFIG)).step == 1


SLOTS = ["codec", "codec.autoencoder", "network", "process", "prediction", "objective",
         "conditioner.tokenizer", "conditioner.encoders.x", "conditioner.encoders.x.network", "adapters.x"]  # fmt: skip


@pytest.mark.parametrize("slot", SLOTS)
def test_no_slot_of_a_sealed_checkpoint_runs_what_its_files_do_not_name(sealed, slot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    config = changed(CONFIG, "codec", {"_target_": "ldm.models.codec.LatentCodec", "autoencoder": AUTOENCODER})
    encoder = {"_target_": "ldm.conditioning.clip.CLIPTextEncoder"}
    config = changed(config, "conditioner.encoders", {"x": encoder} if slot.startswith("conditioner.encoders") else {})
    text = {"path": "victim", "value": "$(touch ran)"}
    for target in ("ldm.io.text.write_json", "ldm.tools.extractors.classifier", "os.system", "ldm.build.write_config"):
        said = refusal(sealed(changed(config, slot, {"_target_": target, **text}), files=[("tokenizer.json", "{}")]))
        assert f"cannot be _target_ '{target}'" in said
    assert victim.read_text() == "mine" and not (tmp_path / "ran").exists()


def test_a_vocabulary_is_read_from_the_checkpoint_or_not_at_all(sealed, tmp_path):
    node = {"_target_": "ldm.conditioning.clip_tokenizer.read_clip_tokenizer", "path": str(tmp_path / "private")}
    opened = []
    sys.addaudithook(lambda event, arguments: event == "open" and opened.append(str(arguments[0])))
    said = refusal(sealed(changed(CONFIG, "conditioner", {"tokenizer": node, "encoders": {}})))
    assert "has no tokenizer.json" in said and not any("private" in path for path in opened)


@pytest.mark.parametrize("where", ["conditioner", "codec", "network", "process", "prediction", "objective", "adapters",
                                   "conditioner.encoders", "conditioner.encoders.x", "conditioner.tokenizer",
                                   "codec.autoencoder", "adapters.x", "network.channel_mult", "network.channels",
                                   "image_size", "network._target_", "network.width", "objective.seed"])  # fmt: skip
def test_entries_of_any_type_are_refused_or_do(sealed, where):
    for value in (3, "x", ["x"], [1], None, {"a": 1}, True, -1, 1.5, 10**12, "???", {"_target_": "x"}, [[]]):
        try:
            load_run(sealed(changed(CONFIG, where, value)))
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 700


@pytest.mark.parametrize("name", CONFIG)
def test_entries_that_are_missing_are_refused_or_do(sealed, name):
    try:
        load_run(sealed({key: value for key, value in CONFIG.items() if key != name}))
    except CheckpointError as error:
        assert "\n" not in str(error) and name in str(error)


SIZES = [
    ("network.width", 65536), ("network.depth", 10**6), ("network.width", 2**62),
    ("network", {**AUTOENCODER, "channels": 65536}), ("network", {**AUTOENCODER, "channel_mult": [1] * 5000}),
    ("network", {**AUTOENCODER, "num_res_blocks": 10**6}), ("network", {**AUTOENCODER, "latent_channels": 10**6}),
    ("conditioner.encoders", {"x": {"_target_": "ldm.conditioning.labels.ClassLabels", "num_classes": 10**18}}),
    ("process", {"_target_": "ldm.diffusion.process.linear", "T": 10**12}),
    ("process", {"_target_": "ldm.diffusion.process.RectifiedFlow", "shift": 1e308}),
]  # fmt: skip


@pytest.mark.parametrize("where, value", SIZES, ids=lambda v: str(v)[:40])
def test_sizes_beyond_the_tensors_that_are_there_take_no_memory(sealed, where, value):
    from resource import RUSAGE_SELF, getrusage

    before = getrusage(RUSAGE_SELF).ru_maxrss
    directory = sealed(changed(CONFIG, where, value))
    if value != SIZES[-1][1]:
        refusal(directory)
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


@pytest.mark.parametrize("state", [{}, [], 3, *({"step": step} for step in ("x", None, -1, 10**30, 1.5, [1]))])
def test_states_of_any_form(sealed, state):
    refusal(sealed(CONFIG, state))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 10**5, '{"a": 1e999}', '{"a": NaN}', "\0", "1" * 10**5])
def test_configs_that_are_no_table(sealed, text):
    refusal(sealed(text))


@pytest.mark.parametrize("manifest", ["", "{}", "[]", '{"schema": 1}', '{"schema": 1, "step": 1, "files": []}',
                                      '{"schema": 1, "step": 1, "files": {"model.safetensors": 3}}',
                                      '{"schema": 1, "step": 1, "files": {"../x": {"size": 1}}}',
                                      '{"schema": 1, "step": 1, "files": {"a\\u0000b": {"size": 1}}}',
                                      '{"schema": 1, "step": [], "files": {}}'])  # fmt: skip
def test_manifests_of_any_form(sealed, manifest):
    directory = sealed(CONFIG)
    (directory / "manifest.json").write_text(manifest)
    refusal(directory)


def test_patterns_that_search_for_ever_are_refused(sealed):
    for pattern in ("(a+)+$", "(.*)*x", "(?:a|a){1,}b", ".*.*.*.*.*x", "("):
        node = {"_target_": "ldm.adapters.lora.LoRA", "targets": pattern}
        said = refusal(sealed(changed(CONFIG, "adapters", {"lora": node})))
        assert "search for ever" in said or "no regular expression" in said


def test_a_stage_of_a_cascade_has_a_config_that_makes_sense(sealed):
    for where, value in {"objective": 3, "image_size": "x", "objective._target_": "os.system"}.items():
        with pytest.raises(LdmError) as refused:
            print(Stage.of_run(sealed(changed(CONFIG, where, value))).factor)
        assert "\n" not in str(refused.value)


def test_the_package_loads_runs_through_the_same_door():
    assert ldm.load_run is load_run
