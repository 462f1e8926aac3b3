"""Malformed files of LoRA and its kin: every one is read, or ends in one line."""

import random
import time

import torch

from ldm.adapters.lora_formats import read_lora
from ldm.io.tensors import write_tensors
from ldm.utils.errors import LdmError
from tests.test_lora_formats import CONV, NORM, Q, draw, unet
from tests.test_lora_kin import A, B, lora, of

TEMPLATES = [
    lora(alpha=torch.tensor(3.0), dora_scale=draw(64), scalar=torch.tensor(1.0), diff_b=draw(64)),
    of(Q, hada_w1_a=draw(64, 3), hada_w1_b=draw(3, 64), hada_w2_a=draw(64, 3), hada_w2_b=draw(3, 64)),
    of(Q, lokr_w1=draw(8, 8), lokr_w2_a=draw(8, 2), lokr_w2_b=draw(2, 8), alpha=torch.tensor(2)),
    of(CONV, lora_down__weight=draw(2, 64, 1, 1), lora_up__weight=draw(64, 2, 1, 1), lora_mid__weight=draw(2, 2, 3, 3)),
    of(Q, a1__weight=draw(64, 3), a2__weight=draw(3, 64), b1__weight=draw(64, 3), b2__weight=draw(3, 64)),
    of(Q, oft_blocks=draw(4, 16, 16), rescale=draw(64, 1), alpha=torch.tensor(0.1)),
    of(Q, weight=draw(64), on_input=torch.tensor(0)),
    lora(bias_indices=torch.tensor([[0], [1]]), bias_values=draw(1), bias_size=torch.tensor([64, 64])),
    {f"base_model.model.{Q}.lora_{end}.x.{what}": x for end, what, x in (("A", "weight", A), ("B", "weight", B),
                                                                        ("B", "bias", draw(64)))},
    of(NORM, w_norm=draw(64), b_norm=draw(64)),
]  # fmt: skip
DTYPES = [torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64]
SHAPES = [(), (0,), (1,), (64,), (3, 64), (64, 0), (0, 64), (1, 1, 1, 1), (2, 2, 2), (64, 64, 3), (1, 64), (7, 3)]


WRONGS = [  # of a tensor by its key
    lambda rng, key, tensor: {key: torch.zeros(rng.choice(SHAPES))},
    lambda rng, key, tensor: {key: tensor.to(rng.choice(DTYPES))},
    lambda rng, key, tensor: {key: tensor.float() * rng.choice([float("nan"), float("inf"), -1, 0, 1e38])},
    lambda rng, key, tensor: {key: tensor.reshape(-1)[: rng.randint(0, 5)]},
    lambda rng, key, tensor: {key.replace("lora", rng.choice(["lora_", "", "hada"])): tensor},
    lambda rng, key, tensor: {rng.choice(sorted(rng.choice(TEMPLATES))): torch.ones(rng.choice(SHAPES))},
    lambda rng, key, tensor: {rng.choice(["", "x", "a\u2028b", "." * 9, ".alpha", "é" * 99]) + key: tensor},
    lambda rng, key, tensor: {key: tensor.transpose(0, -1) if tensor.ndim else tensor},
]


def mangled(rng, tensors):
    """The tensors with one to three things about them wrong."""
    tensors = dict(tensors)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(sorted(tensors))
        tensors |= rng.choice(WRONGS)(rng, key, tensors[key])
        if rng.random() < 0.3 and len(tensors) > 1:
            tensors.pop(rng.choice(sorted(tensors)))
    return tensors


def test_malformed_files_end_in_one_line(tmp_path):
    rng, refused, path, networks = random.Random(0), 0, tmp_path / "x.safetensors", {"network": unet()}
    for i in range(400):
        tensors = {key[:400] or "x": x for key, x in mangled(rng, rng.choice(TEMPLATES)).items()}
        start = time.perf_counter()
        try:
            write_tensors(path, tensors)
            found = read_lora(path, networks)
            assert all(p.isfinite().all() for change in found.values() for p in change.parameters()), i
        except LdmError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, (i, str(error))
        assert time.perf_counter() - start < 20, i
    assert 100 < refused < 400
