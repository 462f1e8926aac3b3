"""The model that a checkpoint describes, without its weights. The description may be a stranger's: it is built twice.

First on the `meta` device, which takes no memory: names and shapes must be those of the checkpoint's own tensors. So a
config can ask for no more than the size of the files that come with it.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.build import (
    NONE,
    Networks,
    build_adapters,
    build_codec,
    build_conditioner,
    build_objective,
    hollow_encoders,
)
from ldm.training.checkpoint import check_weights, load_config, load_files, stored_shapes
from ldm.utils.budget import Budget
from ldm.utils.errors import CheckpointError, ConfigError, reading

NODES = ("codec", "conditioner", "network", "process", "prediction", "objective")
MAX_NUMBER = 1 << 20  # of a node: steps of a table, words of a vocabulary, tokens
MAX_IMAGE = 1 << 16  # pixels, a side
ROOM = 256 << 20  # bytes, beside eight times the tensors


def rebuild(directory: Path, *, ema: bool = True) -> tuple[nn.Module, dict]:
    """The objective of a checkpoint with adapters around it, to be filled, and its config. Raises CheckpointError."""
    config, files = described(directory), load_files(directory)
    with reading(directory, "its config.json describes no model that can be built here", CheckpointError):
        tokenizer = files.get("tokenizer.json")
        if tokenizer is None and "tokenizer" in config["conditioner"]:
            raise CheckpointError(f"{directory} has no tokenizer.json, which its conditioner reads with; copy it again")
        there = stored_shapes(directory, ema=ema)
        size = sum(tensor.numel() * tensor.element_size() for tensor in there.values())
        with torch.device("meta"), Budget(max_bytes=8 * size + ROOM, max_calls=4000 + 40 * len(there)):
            hollow = _objective(config, tokenizer)
        check_weights(directory, hollow, ema=ema)
        texts = hollow_encoders(config["conditioner"])  # T5-XXL's 19 GB are not drawn at random first
        return _objective(config, tokenizer, texts), config


def described(directory: Path) -> dict:
    """The config of a checkpoint, which has the nodes of a model. Raises CheckpointError."""
    config = load_config(directory)
    with reading(directory, "its config.json describes no model", CheckpointError):
        check(config)
    return config


def check(config: dict) -> None:
    """ConfigError unless the config of a checkpoint has the nodes of a model, with sizes that can be."""
    for name in NODES:
        if not isinstance(config.get(name), dict):
            raise ConfigError(f"config.json: {name} is {_short(config.get(name))}; expected a table of settings")
    tables = {"adapters": config.get("adapters", {}), "conditioner.encoders": config["conditioner"].get("encoders", {})}
    for name, nodes in tables.items():
        if not isinstance(nodes, dict) or not all(isinstance(node, dict) for node in nodes.values()):
            raise ConfigError(f"config.json: {name} is {_short(nodes)}; expected tables of settings by name")
    for name in (*NODES, "adapters", "discriminator"):
        check_numbers(config.get(name), name)
    size = config.get("image_size", 1)
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if not all(type(side) is int and 0 < side <= MAX_IMAGE for side in sides):
        raise ConfigError(f"config.json: image_size is {_short(size)}; expected pixels, or [height, width]")


def check_numbers(value: Any, name: str) -> None:
    """ConfigError for a number in a node that only an attack or a damaged file would have."""
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            if key != "seed":
                check_numbers(child, f"{name}.{key}")
    elif isinstance(value, int) and abs(value) > MAX_NUMBER or isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"config.json: {name} is {_short(value)}; expected at most {MAX_NUMBER:,}")


def _objective(config: dict, tokenizer: str | None, networks: Networks = NONE) -> nn.Module:
    conditioner, _, _ = build_conditioner(config["conditioner"], tokenizer=tokenizer, networks=networks)
    objective, _, _ = build_objective(config, build_codec(config["codec"]), conditioner, training=False)
    build_adapters(config.get("adapters", {}), objective)
    return objective


def _short(value: Any) -> str:
    return "missing" if value is None else str(value)[:60]
