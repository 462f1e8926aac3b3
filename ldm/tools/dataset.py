"""Questions of a run to its data before anything is trained: what is there, and is it what the model reads."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ldm.build import locate
from ldm.data.images import ImageFolder
from ldm.data.loader import facts, summary
from ldm.utils.errors import DataError

SUMMARY = "data.txt"
ASKED = {  # field that a dataset may have -> what to do where it has none
    "caption": "add metadata.csv (file_name,text) or cat.txt beside cat.png, or choose conditioner=none",
    "label": "put the pictures into one folder per class, or choose conditioner=none",
}

logger = logging.getLogger(__name__)


def show_data(data: Any) -> None:
    """Show once what was found and is used, where the data are somebody's own pictures."""
    if "\n" in (text := summary(data)):
        _say(text)


def write_data(data: Any, path: Path) -> None:
    """Write data.txt into a run directory: what was found and is used."""
    (path / SUMMARY).write_text(summary(data) + "\n", encoding="utf-8")


@cache
def _say(text: str) -> None:
    logger.info("%s", text)


def check_conditions(data: Any, conditioner: Mapping[str, Any], stored: Mapping[str, Any], loose: bool) -> None:
    """Raises DataError where a conditioner reads what the data do not have, or `stored`, the one that training goes on
    with, numbers classes otherwise than the data do.

    loose: published weights name classes in their own words; as many folders, in order, are taken for them.
    """
    readers = conditioner.get("encoders", {}).values()
    fields = {locate(node.get("_target_"), "conditioner.encoders").field for node in readers}
    known = facts(data, torch.tensor([0])) if fields & ASKED.keys() else {}
    for field in sorted(fields & ASKED.keys() - known.keys()):
        where = f"{data.folder.path}: {len(data):,} pictures" if isinstance(data, ImageFolder) else "the data"
        raise DataError(f"{where} have no {field}, which the conditioner reads; {ASKED[field]}")
    if "label" in fields:
        if bad := [name for name in data.class_names if "${" in name]:
            raise DataError(f"the class folder {bad[0]!r} is named as Hydra names variables; rename it, without '${{'")
        for node in (stored or conditioner).get("encoders", {}).values():
            _check_classes(data.class_names, node.get("class_names"), loose)


def _check_classes(names: list[str], before: Any, loose: bool) -> None:
    """Numbers of classes stay as they are in a checkpoint: 0 is the same class as before, or nothing is trained."""
    if not isinstance(before, list) or before == names or loose and len(before) == len(names):
        return
    new, gone = (sorted(set(a) - set(b)) for a, b in ((names, before), (before, names)))
    changes = [f"{word} {', '.join(some[:5])}" for word, some in (("new:", new), ("gone:", gone)) if some]
    advice = "give the folders their names of before, or begin another run"
    numbers = f"the model numbers {len(before)} classes, and these are others"
    raise DataError(f"{numbers} ({'; '.join(changes) or 'in another order'}); {advice}")
