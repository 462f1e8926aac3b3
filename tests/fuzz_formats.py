"""The formats that `fuzz.py` damages: a good sample of each, ways to damage it, and what reads it."""

import base64
import json
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from fuzz_damage import (
    Damage,
    only,
    spoilt,
    spoilt_archive,
    spoilt_pickle,
    spoilt_safetensors,
    spoilt_text,
    spoilt_yaml,
    texts,
)
from PIL import Image

from ldm.adapters.lora_formats import read_lora
from ldm.adapters.lora_names import NETWORK
from ldm.build import build_objective
from ldm.conditioning.clip_tokenizer import read_clip_tokenizer
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.t5_tokenizer import read_t5_tokenizer
from ldm.conditioning.tokenizers import Tokenizer, train_words
from ldm.data.cache import Table
from ldm.data.images import ImageFolder
from ldm.generate import load_run
from ldm.io.checkpoints import commit
from ldm.io.images import read_image
from ldm.io.stored import index_tensors
from ldm.io.tensors import read_tensors, write_tensors
from ldm.io.text import read_yaml, write_json
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.codec import PixelCodec
from ldm.models.unet import UNet
from ldm.tools.claims import claims
from ldm.tools.report import report
from ldm.tools.runs import find_runs
from ldm.tools.table import as_csv, group, notes, sampling_table, settings_table
from ldm.training.checkpoint import tensors
from ldm.weights import load_model, save_model
from ldm.weights.pipeline import read_settings

SIDE = 16


class Format(NamedTuple):
    """make(folder) writes a good sample; damage(folder, random) damages it; read(folder) gives the bytes decoded."""

    make: Callable[[Path], None]
    damage: Damage
    read: Callable[[Path], int | None]


# --- tensors --------------------------------------------------------------------------------------------------------


@cache
def networks() -> tuple[AutoencoderKL, UNet]:
    """Small ones, made once."""
    torch.manual_seed(0)
    vae = AutoencoderKL(channels=32, channel_mult=[1], num_res_blocks=1)
    sizes = dict(channels=32, channel_mult=[1, 2], num_res_blocks=1, depth=[1, 1, 1], head_dim=[4, 8], context_dim=16)
    unet = UNet(4, **sizes, linear_projection=False)
    return vae.eval(), unet.eval()


def make_pickles(folder: Path, legacy: bool = False) -> None:
    state = {
        "state_dict": {"a.weight": torch.ones(4, 6), "b": torch.ones(6, 4).t(), "c": torch.ones(3).half()},
        "step": 1,
    }
    torch.save(state, folder / "a.ckpt", _use_new_zipfile_serialization=not legacy)


def read_file(folder: Path) -> None:
    for stored in index_tensors(next(folder.iterdir())).values():
        stored.read()


def read_whole(folder: Path) -> None:
    path = next(folder.iterdir())
    read_tensors(path)
    load_model(path)


# --- runs and folders -----------------------------------------------------------------------------------------------

DIT = {"_target_": "ldm.models.dit.DiT", "in_channels": 3, "width": 32, "depth": 1, "num_heads": 2, "patch_size": 4}
CONFIG = {
    "conditioner": {},
    "codec": {"_target_": "ldm.models.codec.PixelCodec"},
    "network": {**DIT, "sample_size": 16, "learned_variance": False},
    "process": {"_target_": "ldm.diffusion.process.linear", "T": 10},
    "prediction": {"_target_": "ldm.diffusion.prediction.Eps"},
    "objective": {"_target_": "ldm.diffusion.objective.DiffusionObjective", "seed": 0},
    "discriminator": None,
    "adapters": {},
    "image_size": 16,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
    "id2label": {"0": "cat", "1": "dog"}, "force_zeros_for_empty_prompt": True,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "leading",
    "trained_betas": None, "rescale_betas_zero_snr": False, "use_karras_sigmas": True, "set_alpha_to_one": False,
}  # fmt: skip
SCALE = {"linear_start": 0.00085, "timesteps": 1000, "first_stage_key": "jpg", "channel_mult": [1, 2, 4, 4]}
YAML = {"model": {"base_learning_rate": 1e-4, "target": "x.Y", "params": SCALE}, "name": "x", "when": "today"}
PEFT = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"], "alpha_pattern": {}, "rank_pattern": {},
    "use_rslora": False,
}  # fmt: skip
CLAIM = {
    "paper": "x", "says": "y", "arms": ["optimizer.lr"], "metric": "fid", "better": "lower",
    "orders": ["0.1 > 0.2", {"order": "0.2 = 0.1", "metric": "fid"}],
}  # fmt: skip
SUMMARY = {
    "step": 3, "metrics": {"fid": 1.0}, "wall_seconds": 2.0, "images_per_second": 3.0, "parameters": {"network": 10},
    "peak_memory_bytes": 10, "versions": {"torch": "2"}, "git_revision": "x",
}  # fmt: skip


def make_run(folder: Path) -> None:
    objective, _, _ = build_objective(CONFIG, PixelCodec(), Conditioner({}), training=False)
    write_tensors(folder / "model.safetensors", tensors(objective)[0])
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "state.json", {"step": 1, "scaler": {}, "frozen": ""})
    seal(folder)


def seal(folder: Path) -> None:
    """What lies in a folder as the checkpoint `run` in it, of which the manifest is right."""

    def write(temporary: Path) -> None:
        for path in list(folder.iterdir()):
            if path.is_file() and path.name != "manifest.json":
                path.rename(temporary / path.name)

    commit(folder / "run", write, 1)


def spoil_run(folder: Path, rng: random.Random) -> None:
    for path in list((folder / "run").iterdir()):
        path.rename(folder / path.name)
    (folder / "run").rmdir()
    texts("config.json", "config.json", "config.json", "state.json")(folder, rng)
    seal(folder)


def read_manifest(folder: Path) -> None:
    load_run(folder / "run")


def make_model(folder: Path) -> None:
    save_model(networks()[0], folder / "vae", layout="diffusers")


def make_scheduler(folder: Path) -> None:
    (folder / "scheduler").mkdir()
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)


# --- vocabularies ---------------------------------------------------------------------------------------------------


def make_clip(folder: Path) -> None:
    letters = "abcdefgh"
    vocab = [*letters, *(letter + "</w>" for letter in letters), "ab", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(vocab)})
    (folder / "merges.txt").write_text("#version: 0.2\na b\na b</w>\n")
    write_json(folder / "added_tokens.json", {"<new>": len(vocab)})
    (folder / "json").mkdir()
    (folder / "json/tokenizer.json").write_text(read_clip_tokenizer(folder).to_json())


def spoil_clip(folder: Path, rng: random.Random) -> None:
    if rng.random() < 0.2:
        only("merges.txt", spoilt)(folder, rng)
    else:
        texts("vocab.json", "added_tokens.json", "json/tokenizer.json", "json/tokenizer.json")(folder, rng)


def read_clip(folder: Path) -> None:
    for path in (folder / "json", folder):
        read_clip_tokenizer(path).encode(["a cab <new> of", "é"])


def make_t5(folder: Path) -> None:
    def field(number: int, value: bytes) -> bytes:
        return bytes([number << 3 | 2]) + bytes([len(value)]) + value

    pieces = [("<pad>", 3), ("</s>", 3), ("<unk>", 2), ("▁", 1), ("a", 1), ("b", 1), ("▁ab", 1)]
    rows = [
        field(1, p.encode()) + b"\x15" + struct.pack("<f", -float(i)) + bytes([0x18, k])
        for i, (p, k) in enumerate(pieces)
    ]
    (folder / "spiece.model").write_bytes(
        b"".join(field(1, row) for row in rows) + field(2, b"\x18\x01") + field(3, b"")
    )
    (folder / "json").mkdir()
    (folder / "json/tokenizer.json").write_text(read_t5_tokenizer(folder / "spiece.model").to_json())


def spoil_t5(folder: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        return only("spiece.model", spoilt)(folder, rng)
    path = folder / "json/tokenizer.json"
    table = json.loads(path.read_text())
    if rng.random() < 0.3:
        charsmap = base64.b64encode(struct.pack("<I", rng.choice([1024, 0, 1 << 31])) + rng.randbytes(1030)).decode()
        table["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    path.write_bytes(spoilt_text(json.dumps(table), rng))


def read_t5(folder: Path) -> None:
    for path in (folder / "json", folder / "spiece.model"):
        read_t5_tokenizer(path).encode(["a ab b", "é"], 8)


def make_words(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(train_words(["a red circle", "a blue square"]).to_json())


def read_words(folder: Path) -> None:
    Tokenizer.from_json((folder / "tokenizer.json").read_text(errors="replace")).encode(["a red moon"], 8)


# --- data, caches, reports ------------------------------------------------------------------------------------------


def picture(rng: random.Random) -> Image.Image:
    return Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(SIDE * SIDE * 3))


def make_pictures(folder: Path) -> None:
    image = picture(random.Random(0))
    for suffix, options in {
        "png": {},
        "jpg": {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0"},
        "webp": {"lossless": True},
    }.items():
        image.save(folder / f"a.{suffix}", **options)
    image.quantize(16).save(folder / "p.png", transparency=3)


def spoil_pictures(folder: Path, rng: random.Random) -> None:
    chosen = rng.choice(sorted(folder.iterdir()))
    for path in set(folder.iterdir()) - {chosen}:
        path.unlink()
    chosen.write_bytes(spoilt(chosen.read_bytes(), rng))


def read_picture(folder: Path) -> int:
    pixels = [read_image(path) for path in folder.iterdir()]
    return sum(each.numel() for each in pixels)


def make_zip(folder: Path) -> None:
    make_pictures(folder)
    files = sorted(folder.iterdir())
    with zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.name)
            archive.writestr(path.name + ".txt", "a picture")
            path.unlink()


def read_zip(folder: Path) -> int:
    return read_data(folder / "data.zip")


def read_data(path: Path) -> int:
    data = ImageFolder(str(path), image_size=SIDE, held_out=0.0)
    list(data.captions())
    return sum(data[index]["image"].numel() for index in range(min(len(data), 4)))


def make_metadata(folder: Path) -> None:
    make_pictures(folder)
    rows = [{"file_name": path.name, "text": "a picture", "aesthetic": 5.5} for path in sorted(folder.iterdir())]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def spoilt_lines(text: str, rng: random.Random) -> bytes:
    """One line of JSON changed."""
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = spoilt_text(lines[at], rng).decode(errors="surrogateescape")
    return "\n".join(lines).encode(errors="surrogateescape")


def make_lora(folder: Path) -> None:
    write_tensors(folder / "lora.safetensors", {
        f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{part}.{kind}": value
        for part in "qk" for kind, value in {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(32, 2),
                                             "alpha": torch.tensor(2.0)}.items()
    })  # fmt: skip


def read_lora_file(folder: Path) -> None:
    read_lora(folder / "lora.safetensors", {NETWORK: networks()[1]})


def make_peft(folder: Path) -> None:
    stem = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    write_tensors(folder / "adapter_model.safetensors", {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up})
    write_json(folder / "adapter_config.json", PEFT)


def read_peft(folder: Path) -> None:
    read_lora(folder, {NETWORK: networks()[1]})


def make_cache(folder: Path) -> None:
    rows = Table(folder / "rows")
    rows.append({"x": torch.ones(5, 2, 3), "y": torch.ones(5, dtype=torch.int64)})
    rows.commit()


def read_cache(folder: Path) -> None:
    rows = Table(folder / "rows")
    for name in rows.columns:
        rows.read(name, torch.arange(min(len(rows), 5)))


def make_report(folder: Path) -> None:
    for name, lr in {"a": 0.1, "b": 0.2}.items():
        (folder / name).mkdir()
        lines = [{"step": step, "loss": 1 / step, "lr": lr, "images_per_second": 3.0} for step in (1, 2, 3)]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_json(folder / name / "summary.json", SUMMARY)
        config = {"seed": 0, "optimizer": {"lr": lr}, "claim": CLAIM, "sampler": {}}
        (folder / name / "config.yaml").write_text(json.dumps(config))
    report([folder], folder / "out")  # what draws is imported once, before workers are forked
    shutil.rmtree(folder / "out")


def spoil_report(folder: Path, rng: random.Random) -> None:
    run = rng.choice("ab")
    kind = rng.randrange(3)
    if kind == 0:
        texts(f"{run}/metrics.jsonl", change=spoilt_lines)(folder, rng)
    elif kind == 1:
        texts(f"{run}/summary.json")(folder, rng)
    else:
        texts(f"{run}/config.yaml", change=spoilt_yaml)(folder, rng)


def read_report(folder: Path) -> None:
    runs = find_runs([folder])
    rows, made_for = group(runs), claims(runs)
    settings_table(rows), sampling_table(rows), notes(rows), as_csv(rows)
    for claim in made_for:
        claim.verdicts()
    if (
        not zlib.crc32((folder / "a/metrics.jsonl").read_bytes() + (folder / "b/summary.json").read_bytes()) % 16
    ):  # pictures take most of the time
        report([folder], folder / "out")


FORMATS = {
    "safetensors": Format(lambda f: save_model(networks()[0], f / "a.safetensors", layout="original"),
                          only("*.safetensors", spoilt_safetensors), read_whole),
    "ckpt": Format(make_pickles, only("*.ckpt", spoilt_archive), read_file),
    "legacy": Format(lambda f: make_pickles(f, legacy=True), only("*.ckpt", spoilt_pickle), read_file),
    "run": Format(make_run, spoil_run, read_manifest),
    "manifest": Format(make_run, texts("run/manifest.json"), read_manifest),
    "folder": Format(make_model, texts("vae/config.json"), lambda f: load_model(f / "vae") and None),
    "scheduler": Format(make_scheduler, texts("model_index.json", *["scheduler/scheduler_config.json"] * 4),
                        lambda f: read_settings(f) and None),
    "yaml": Format(lambda f: (f / "a.yaml").write_text(json.dumps(YAML)), texts("a.yaml", change=spoilt_yaml),
                   lambda f: read_yaml(f / "a.yaml") and None),
    "clip": Format(make_clip, spoil_clip, read_clip),
    "t5": Format(make_t5, spoil_t5, read_t5),
    "words": Format(make_words, texts("tokenizer.json"), read_words),
    "lora": Format(make_lora, only("*.safetensors", spoilt_safetensors), read_lora_file),
    "peft": Format(make_peft, texts("adapter_config.json"), read_peft),
    "pictures": Format(make_pictures, spoil_pictures, read_picture),
    "zip": Format(make_zip, only("*.zip", spoilt), read_zip),
    "metadata": Format(make_metadata, texts("metadata.jsonl", change=spoilt_lines), read_data),
    "cache": Format(make_cache, texts("rows/header.json"), read_cache),
    "report": Format(make_report, spoil_report, read_report),
}  # fmt: skip
