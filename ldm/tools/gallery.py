"""What `sample.py` leaves behind: a PNG per image that says how it was made, a contact sheet, and samples.json."""

from pathlib import Path

from torch import Tensor

from ldm.io.images import write_png
from ldm.io.text import write_json
from ldm.utils.images import labelled_grid


def write_gallery(out: Path, images: Tensor, pairs: list[tuple[str, int]], settings: dict, columns: int) -> list[dict]:
    """Write images (B 3 H W uint8) of (prompt, seed) pairs and their settings below `out`; returns samples.json."""
    records = []
    for number, (image, (prompt, seed)) in enumerate(zip(images, pairs, strict=True)):
        record = {"file": f"{number:04d}.png", "prompt": prompt, "seed": seed, **settings}
        write_png(out / record["file"], image, text={k: str(v) for k, v in record.items()})
        records.append(record)
    write_png(out / "grid.png", labelled_grid(images, [prompt for prompt, _ in pairs], columns=columns))
    write_json(out / "samples.json", records)
    return records
