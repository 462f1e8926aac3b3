"""Latents and text embeddings of a dataset, computed once.

    python -m ldm.tools.precompute experiment=finetune_sdxl weights=PATH data.path=FOLDER cache=DIR

It takes what `train.py` takes; training with the same cache=DIR calls `precompute` itself, and then has nothing to do.
What is stored belongs to these weights and these images: for others it is made beside the old.
"""

import hashlib
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from ldm.conditioning.conditioner import Conditioner, Encoder
from ldm.conditioning.stored import StoredEncoder
from ldm.data.cache import StoredLatents, Table, Texts, digest, exclusive, identity, image_digests, stamp, text_digest
from ldm.data.loader import facts, fetch, groups, read
from ldm.io.text import read_json, write_json
from ldm.models.codec import LatentCodec
from ldm.tools.cli import entry
from ldm.utils.errors import ConfigError, DataError

COMMIT_SECONDS = 10.0
STAMP = "stamp.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """How images and texts go through a network."""

    batch_size: int
    workers: int  # processes that decode
    device: torch.device
    dtype: torch.dtype  # of what is stored


def precompute(
    data: Dataset,
    codec: nn.Module,
    conditioner: Conditioner,
    directory: str | Path,
    *,
    key: Mapping[str, bytes] | None = None,  # the vocabularies: what decides conditions besides the encoders
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    workers: int = 0,
    dtype: torch.dtype = torch.float16,
) -> tuple[StoredLatents, Conditioner]:
    """The dataset with "moments" instead of "image", and the conditioner with its frozen text encoders looked up.

    Computes what `directory` does not hold yet. float16 moves a mean by 2 % of the posterior's own deviation (root mean
    square, on an autoencoder of emoji), 0.04 % of its variance, and takes half the room. Raises ConfigError for a codec
    of pixels, DataError where images have changed since they were stored.
    """
    if not isinstance(codec, LatentCodec):
        raise ConfigError(
            f"cache={directory}: {type(codec).__name__} has no latents that could be stored; leave it out"
        )
    directory, how = Path(directory), Pass(batch_size, workers, torch.device(device), dtype)
    latents = store_latents(data, codec.to(device), directory, how)
    known = _texts(data)
    for name, encoder in conditioner.encoders.items():
        if encoder.field in known and _is_frozen(encoder):
            texts = store_texts(encoder.to(device).eval(), name, known[encoder.field], directory, how, key or {})
            conditioner.encoders[name] = StoredEncoder(encoder, texts)
    return latents, conditioner


# --- images ---------------------------------------------------------------------------------------------------------


def store_latents(data: Dataset, codec: LatentCodec, directory: Path, how: Pass) -> StoredLatents:
    """Every image's moments, of which those that are not there yet are computed."""
    settings = digest(identity(data), fingerprint(codec.autoencoder), str(how.dtype))
    folder = directory / f"latents-{settings[:16]}"
    with exclusive(folder):
        tables = {int(path.name[-2:]): Table(path) for path in folder.glob("bucket-*")}
        _check_unchanged(data, folder, [table for table in tables.values() if len(table)], how)
        if sum(map(len, tables.values())) < len(data):
            _fill(tables, data, codec, folder, how)
    while isinstance(data, Subset):  # "index" counts what is below
        data = data.dataset
    return StoredLatents(data, [table for _, table in sorted(tables.items())])


def _fill(tables: dict[int, Table], data: Dataset, codec: LatentCodec, folder: Path, how: Pass) -> None:
    """Append the images that are missing, bucket by bucket."""
    buckets = groups(data)
    buckets = torch.zeros(len(data), dtype=torch.int64) if buckets is None else buckets
    with _progress("encoding images", len(data), sum(map(len, tables.values()))) as bar:
        for bucket in buckets.unique().tolist():
            table = tables.setdefault(bucket, Table(folder / f"bucket-{bucket:02d}"))
            items = (buckets == bucket).nonzero().flatten()[len(table) :]
            for part, batch in _batches(data, items, how):
                moments = codec.moments(batch["image"].to(how.device)).to(how.dtype)
                kept = {name: batch[name] for name in ("index", "size", "content") if name in batch}
                table.append({"item": part, "moments": moments, **kept})
                table.commit(every=COMMIT_SECONDS)
                bar.update(len(part))
            table.commit()


def _check_unchanged(data: Dataset, folder: Path, tables: Sequence[Table], how: Pass) -> None:
    """Where files were touched since the last time, or nobody can tell, the images stored are looked at again."""
    now = stamp(data)
    before = read_json(folder / STAMP)["stamp"] if (folder / STAMP).exists() else None
    if tables and (now is None or now != before):
        with _progress("comparing images", sum(map(len, tables))) as bar:
            for table in tables:
                _compare(data, table, how, bar)
    if now != before:
        write_json(folder / STAMP, {"stamp": now})


def _compare(data: Dataset, table: Table, how: Pass, bar: tqdm) -> None:
    """Raise DataError if an image is not the one that was stored."""
    stored = table.column("content").split(how.batch_size)
    for (part, batch), content in zip(_batches(data, table.column("item"), how), stored, strict=True):
        changed = (batch["content"] != content).any(1)
        if changed.any():
            name = f"image {int(part[changed][0])} and perhaps more"
            folder = table.directory.parent
            raise DataError(f"{folder}: {name} changed since they were stored; delete that folder, and it is made anew")
        bar.update(len(part))


class _Hashed:
    """Batches of some items, each image with its digest."""

    def __init__(self, data: Dataset, parts: Sequence[Tensor]):
        self.data, self.parts = data, parts

    def batch(self, number: int) -> dict[str, Any]:
        batch = fetch(self.data, self.parts[number])
        return {**batch, "content": image_digests(batch["image"])}


def _batches(data: Dataset, items: Tensor, how: Pass) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """These items part by part, and their batches."""
    parts = items.split(how.batch_size) if len(items) else ()
    return zip(parts, read(_Hashed(data, parts), range(len(parts)), how.workers), strict=True)


# --- texts ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def store_texts(
    encoder: Encoder, name: str, texts: Iterable[str], directory: Path, how: Pass, key: Mapping[str, bytes]
) -> Texts:
    """What the encoder makes of each text and of none, of which those that are not there yet are computed.

    All have the shape of "none". A text of another, longer than the 77 tokens that CLIP sees at once, is noted and
    stays out: a batch with such a text is encoded when it comes.
    """
    vocabularies = [part for item in sorted(key.items()) for part in item]
    folder = directory / f"texts-{digest(fingerprint(encoder), str(how.dtype), *vocabularies)[:16]}"
    with exclusive(folder):
        table, longer = Table(folder), Table(folder / "longer")
        if not len(table):
            _append(table, [encoder.null], encoder([encoder.null], how.device), how)
            table.commit()
        missing = _missing(longer, _missing(table, list(dict.fromkeys([encoder.null, *texts]))))
        with _progress(f"encoding texts for {name}", len(missing)) as bar:
            for start in range(0, len(missing), how.batch_size):
                _read(encoder, missing[start : start + how.batch_size], table, longer, how)
                bar.update(min(how.batch_size, len(missing) - start))
                table.commit(every=COMMIT_SECONDS)
        table.commit()
        if longer.columns:
            longer.commit()
            logger.warning("%s: %d captions are too long to be stored; they are encoded in training", name, len(longer))
    return Texts(table)


def _read(encoder: Encoder, texts: Sequence[str], table: Table, longer: Table, how: Pass) -> None:
    """Store what fits into the table. Together with a longer text every other one looks longer too."""
    cond = encoder(texts, how.device)
    if all(value.shape[1:] == table.columns[name][1] for name, value in cond.items()):
        _append(table, texts, cond, how)
    elif len(texts) > 1:
        for text in texts:
            _read(encoder, [text], table, longer, how)
    else:
        longer.append({"digest": torch.tensor([text_digest(texts[0])])})


def _append(table: Table, texts: Sequence[str | None], cond: Mapping[str, Tensor], how: Pass) -> None:
    rows = {name: value.to(how.dtype) if value.is_floating_point() else value for name, value in cond.items()}
    table.append({"digest": torch.tensor([text_digest(text) for text in texts]), **rows})


def _missing(table: Table, texts: list) -> list:
    """The texts that are not in a table."""
    if not len(table) or not texts:
        return texts
    return [text for text, row in zip(texts, Texts(table).find(texts).tolist(), strict=True) if row < 0]


def _texts(data: Dataset) -> dict[str, dict[str, None]]:
    """The distinct texts of every field that has texts, in order."""
    found: dict[str, dict[str, None]] = {}
    for items in torch.arange(len(data)).split(4096):
        for field, values in facts(data, items).items():
            if isinstance(values, list):
                found.setdefault(field, {}).update(dict.fromkeys(values))
    return found


# --- both -----------------------------------------------------------------------------------------------------------


def fingerprint(module: nn.Module) -> str:
    """Of all that decides what a network computes: the classes of its parts, their settings, its weights."""
    common, whole = vars(nn.Module()), hashlib.sha256()
    for name, part in module.named_modules():
        settings = {key: _setting(value) for key, value in sorted(vars(part).items()) if key not in common}
        whole.update(f"{name} {type(part).__qualname__} {settings}".encode())
    for name, tensor in module.state_dict().items():
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _setting(value: Any) -> Any:
    """A number, a text or several of them; a function by its name; nothing of what has no value of its own."""
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return value.__name__
    if type(value) in (tuple, list):
        return [_setting(part) for part in value]
    return value if isinstance(value, int | float | str) else None


def _is_frozen(encoder: Encoder) -> bool:
    wanted = [parameter.requires_grad for parameter in encoder.parameters()]
    return bool(wanted) and not any(wanted)


def _progress(what: str, total: int, done: int = 0) -> tqdm:
    return tqdm(total=total, initial=done, desc=what, delay=2, leave=False)


# --- the command ----------------------------------------------------------------------------------------------------


def prepare_cached(cfg: dict) -> StoredLatents:
    """Fill cfg["cache"] with what a run of this config will read."""
    from ldm.build import build_codec, build_conditioner, make
    from ldm.generate import codec_of_run
    from ldm.published import begin, parts_of
    from ldm.utils.devices import pick_device

    if not cfg["cache"]:
        raise ConfigError("nothing says where to: give cache=DIR")
    data = make(cfg["data"], "data")
    published = cfg["weights"] or parts_of(cfg)
    cfg, networks, vocabulary = begin(cfg, {}) if published else (cfg, {}, None)
    node = cfg["codec"]
    if node.get("experiment") and not node["run"]:
        raise ConfigError("the autoencoder is not trained yet; give its run, codec.run=DIR, or weights=PATH")
    codec = codec_of_run(node, Path(node["run"]), data)[0] if "experiment" in node else build_codec(node, networks)
    conditioner, _, files = build_conditioner(cfg["conditioner"], data, vocabulary, networks)
    images = Subset(data, range(min(cfg["limit"], len(data)))) if cfg["limit"] else data
    device, workers = pick_device(cfg["device"]), cfg["trainer"]["workers"]
    return precompute(images, codec, conditioner, cfg["cache"], key=files, device=device, workers=workers)[0]


@entry("train")
def main(cfg: dict, path: Path) -> None:
    stored = prepare_cached(cfg)
    print(f"{cfg['cache']}: {len(stored):,} images in {len(stored.tables)} buckets")


if __name__ == "__main__":
    # No run directory is made: this is not a run.
    sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]
    main()
