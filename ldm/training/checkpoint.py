"""What a checkpoint of a run holds, and how it comes back: tensors as safetensors, everything else as JSON, no pickle.

model.safetensors      trained parameters and buffers      optimizer.safetensors   "parameter.state"
frozen.safetensors     frozen parameters (codec, ...)      state.json              step, loss scale, seconds
ema.safetensors        averaged parameters                 config.json, tokenizer.json, ..., manifest.json
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.io.checkpoints import (
    commit,
    followed,
    latest,
    point_last,
    prune,
    read_object,
    sha256,
    step_directory,
    steps,
    verify,
    whole,
)
from ldm.io.files import read_bytes
from ldm.io.tensors import read_header, read_tensors, write_tensors
from ldm.io.text import decode_text, read_config, write_json
from ldm.training.ema import EMA, canonical, trainable
from ldm.utils.errors import CheckpointError, DataError, NonFiniteError, WeightsError

if TYPE_CHECKING:
    from ldm.training.run import RunDirectory

OWN_FILES = {"model.safetensors", "frozen.safetensors", "ema.safetensors", "optimizer.safetensors"}
MAX_FILE = 1 << 30  # bytes of one extra file, such as a tokenizer


# --- writing --------------------------------------------------------------------------------------------------------


def save(
    run: "RunDirectory",
    step: int,
    objective: nn.Module,
    ema: EMA | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    state: dict,
    keep: int = 2,
) -> Path:
    """Commit checkpoints/step_NNNNNNNN, point `last` at it, then forget all but `keep`.

    Raises NonFiniteError rather than store broken weights, CheckpointError when it cannot be written; older ones stay.
    """
    trained, frozen = tensors(objective)
    for name, p in trainable(objective).items():
        if not p.isfinite().all():
            raise NonFiniteError(f"{name} is not finite at step {step}; {run.last_good()}; lower optimizer.lr")
    digest = _digest(frozen)
    state = {**state, "step": step, "scaler": scaler.state_dict(), "frozen": digest}
    metadata = {"step": step, "objective": type(objective).__name__}

    def write(temporary: Path) -> None:
        write_tensors(temporary / "model.safetensors", trained, metadata)
        if frozen and not any(_link_frozen(older, temporary, digest) for older in _not_newest(run.checkpoints)):
            write_tensors(temporary / "frozen.safetensors", frozen)
        if ema:
            write_tensors(temporary / "ema.safetensors", ema.state_dict(), metadata)
        write_tensors(temporary / "optimizer.safetensors", _optimizer_tensors(objective, optimizer), metadata)
        write_json(temporary / "state.json", state)
        write_json(temporary / "config.json", run.config)
        for name, data in run.files.items():
            (temporary / name).write_bytes(data)

    directory = commit(step_directory(run.checkpoints, step), write, step)
    point_last(directory)
    verify(directory, content=False)
    prune(run.checkpoints, keep, spare=directory)
    return directory


def tensors(objective: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(trained, frozen) by canonical name: parameters once each even where tied; stored buffers as their module is."""
    stored = {canonical(name) for name in objective.state_dict()}
    trained, frozen = {}, {}
    for name, p in objective.named_parameters():
        (trained if p.requires_grad else frozen)[canonical(name)] = p.detach()
    for prefix, module in objective.named_modules():
        rests = any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
        for key, b in module.named_buffers(prefix, recurse=False):
            if canonical(key) in stored:
                (frozen if rests else trained)[canonical(key)] = b
    return trained, frozen


def _digest(frozen: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(frozen.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _not_newest(parent: Path) -> list[Path]:
    """Checkpoints whose file of frozen tensors a new one may share: two files take turns.

    Never the newest whole one's, so that one flipped bit cannot damage the two newest.
    """
    newest = whole(parent)[:1]
    return [directory for _, directory in steps(parent) if directory not in newest]


def _link_frozen(previous: Path, temporary: Path, digest: str) -> bool:
    """Share a previous checkpoint's file of frozen tensors if it is intact and they have not changed since."""
    name = "frozen.safetensors"
    try:
        entry = verify(previous, content=False)["files"].get(name)
        if not entry or read_object(previous / "state.json").get("frozen") != digest:
            return False
        if sha256(previous / name) != entry["sha256"]:
            return False
        os.link(previous / name, temporary / name)
        return True
    except (CheckpointError, OSError):  # no previous one, or a file system without links
        return False


def _optimizer_tensors(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, p in _parameters(objective).items()
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }


def _parameters(objective: nn.Module) -> dict[str, nn.Parameter]:
    return {canonical(name): p for name, p in objective.named_parameters()}


# --- reading --------------------------------------------------------------------------------------------------------


def find(path: Path) -> Path:
    """The checkpoint directory that a run directory (its newest whole one) or a checkpoint directory stands for."""
    path = followed(Path(path))
    if (path / "manifest.json").is_file():
        verify(path)
        return path
    directory, skipped = latest(path / "checkpoints")
    if directory is None:
        reason = f"all are damaged: {skipped[0]}" if skipped else "it has no checkpoints/step_*"
        raise CheckpointError(f"{path} holds no checkpoint that can be used ({reason})")
    return directory


def load(
    directory: Path,
    objective: nn.Module,
    ema: EMA | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> dict:
    """Continue exactly from a verified checkpoint; returns its state.json.  Raises CheckpointError."""
    state = read_object(directory / "state.json")
    load_weights(directory, objective, ema=False)
    with _reading(directory):
        if ema:
            if not (directory / "ema.safetensors").is_file():
                raise CheckpointError(f"{directory} has no averaged weights; continue it with ema=none")
            ema.load_state_dict(read_tensors(directory / "ema.safetensors"))
        _load_optimizer(directory, objective, optimizer)
    if scaler.is_enabled():
        if not state.get("scaler"):
            raise CheckpointError(f"{directory} has no loss scale; continue it with the precision it was trained in")
        scaler.load_state_dict(state["scaler"])
    return state


def load_weights(directory: Path, objective: nn.Module, *, ema: bool = True) -> int:
    """Fill an objective from a checkpoint, with averaged weights where asked and there are any; returns the step.

    Raises CheckpointError unless every name and shape is the same on both sides.
    """
    names = ["model.safetensors", "frozen.safetensors"] + ["ema.safetensors"] * ema
    found: dict[str, Tensor] = {}
    with _reading(directory):
        for name in names:
            if (directory / name).is_file():
                found |= read_tensors(directory / name)
    trained, frozen = tensors(objective)
    expected = trained | frozen
    _refuse_other(directory, found, expected)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])
    step = read_object(directory / "state.json").get("step")
    if type(step) is not int or not 0 <= step < 1 << 53:
        raise CheckpointError(f"{directory} is damaged: its state.json has step={str(step)[:40]}, expected a number")
    return step


def check_weights(directory: Path, objective: nn.Module, *, ema: bool = True) -> None:
    """Compare names and shapes as `load_weights` does, before an objective on `meta` takes memory. CheckpointError."""
    trained, frozen = tensors(objective)
    _refuse_other(directory, stored_shapes(directory, ema=ema), trained | frozen)


def stored_shapes(directory: Path, *, ema: bool = True) -> dict[str, Tensor]:
    """Tensors on `meta` like those of a checkpoint, by name.  Raises CheckpointError."""
    found: dict[str, Tensor] = {}
    with _reading(directory):
        for name in ["model.safetensors", "frozen.safetensors"] + ["ema.safetensors"] * ema:
            if (directory / name).is_file():
                header = read_header(directory / name)
                sizes = {key: (shape, header.dtypes[key]) for key, shape in header.shapes.items()}
                found |= {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in sizes.items()}
    return found


def load_config(directory: Path) -> dict:
    """The resolved config a checkpoint was trained with.  Raises CheckpointError."""
    with _reading(directory):
        return read_config(directory / "config.json")


def load_files(directory: Path) -> dict[str, str]:
    """The text of the extra files a checkpoint carries, by name.  Raises CheckpointError."""
    own = OWN_FILES | {"state.json", "config.json"}
    names = [name for name in verify(directory, content=False)["files"] if name not in own]
    with _reading(directory):
        return {name: decode_text(read_bytes(directory / name, max_bytes=MAX_FILE), name) for name in names}


def _load_optimizer(directory: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = _parameters(objective)
    layout = optimizer.state_dict()  # which index stands for which parameter
    indices = [i for group in layout["param_groups"] for i in group["params"]]
    index = {id(p): i for i, p in zip(indices, (p for g in optimizer.param_groups for p in g["params"]), strict=True)}
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in read_tensors(directory / "optimizer.safetensors").items():
        name, _, kind = key.rpartition(".")
        p = parameters.get(name)
        if p is None or id(p) not in index:
            raise CheckpointError(f"{directory}: the optimizer moved {name}, which is not trained in this run")
        if value.shape == p.shape:  # in the memory layout of its parameter, which fused kernels rely on
            value = torch.empty_like(p, dtype=value.dtype).copy_(value)
        states.setdefault(index[id(p)], {})[kind] = value
    optimizer.load_state_dict({"state": states, "param_groups": layout["param_groups"]})


def _refuse_other(directory: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    shapes = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": shapes,
    }
    faults = [f"{len(v)} {kind} ({', '.join(v[:2])}{', ...' * (len(v) > 2)})" for kind, v in kinds.items() if v]
    if faults:
        node = read_object(directory / "config.json").get("network")
        network = node.get("_target_", "another network") if isinstance(node, dict) else "no network"
        raise CheckpointError(f"{directory} holds {network}, which is not the network built here: {'; '.join(faults)}")


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (DataError, WeightsError) as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error
