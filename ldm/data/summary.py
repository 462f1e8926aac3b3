"""A summary of a folder of pictures, for the screen and the run's log: nothing is left out in silence."""

import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence

from ldm.data.buckets import Shape
from ldm.data.layouts import Layout, Sample
from ldm.io.archives import readable

NAMES, CLASSES, REASONS = 3, 12, 12  # at most, so that it stays one screen
FIRST_FRAMES = (".gif", ".tif", ".tiff")


def describe_folder(
    path: str,
    layout: Layout,
    samples: Sequence[Sample],
    held_out: Sequence[str],
    sizes: Sequence[Shape],
    broken: Mapping[str, str],
) -> str:
    """What is used of a folder and what is not. `sizes` are those of some pictures, `broken` has reasons by name."""
    names = {sample.name for sample in samples}
    lines = [f"{readable(path)}: {len(names) - len(broken.keys() & names):,} pictures are used{_range(sizes)}"]
    lines.append(f"captions: {_captions(layout, samples)}")
    if len(classes := Counter(sample.group for sample in samples if sample.group)) > 1:
        shown = [f"{name} ({count:,})" for name, count in sorted(classes.items())]
        lines.append(f"classes: {len(classes):,}: {_listed(shown, CLASSES)}")
    if layout.subjects:
        times = [f"{readable(folder)} {subject.repeats} times" for folder, subject in layout.subjects.items()]
        lines.append(f"repeats: {_listed(times, CLASSES)}; {len(samples):,} in an epoch")
    lines.append(f"held out: {_held_out(layout, held_out)}")
    for suffix, count in Counter(posixpath.splitext(name)[1].lower() for name in names).items():
        if suffix in FIRST_FRAMES:
            lines.append(f"first frame only: of {count:,} {suffix} files that may have several")
    left_out = {reason: list(map(readable, some)) for reason, some in layout.left_out.items() if some}
    if broken:
        reason = next(iter(broken.values())).rpartition(": ")[2]
        left_out[f"that cannot be read ({reason})"] = list(map(readable, broken))
    lines += [f"left out: {len(some):,} {why}: {_listed(some, NAMES)}" for why, some in left_out.items()][:REASONS]
    if len(left_out) > REASONS:
        rest = list(left_out.values())[REASONS:]
        lines.append(f"left out: {sum(map(len, rest)):,} of {len(rest)} other kinds")
    return "\n  ".join(lines)


def _range(sizes: Sequence[Shape]) -> str:
    if not sizes:
        return ""
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    (low_h, low_w), (high_h, high_w) = ordered[0], ordered[-1]
    span = f"{low_w} x {low_h}" + (f" to {high_w} x {high_h}" if ordered[0] != ordered[-1] else "")
    return f", {span} pixels (width x height, of {len(sizes):,} of them)"


def _captions(layout: Layout, samples: Sequence[Sample]) -> str:
    texts = [sample.caption for sample in samples if sample.caption is not None]
    if not texts:
        return "none (no metadata.csv or .jsonl, no .txt or .caption beside a picture, no class folders)"
    return f"{len(texts):,} from {layout.source}, {len(set(texts)):,} of them different, such as {texts[0][:60]!r}"


def _held_out(layout: Layout, names: Sequence[str]) -> str:
    if not names:
        return "none; previews and metrics use pictures that are trained on (data.held_out=0.1 keeps a tenth)"
    how = "in folders for that" if layout.held_out is not None else "chosen by name, data.held_out"
    return f"{len(names):,} ({how}), for previews and metrics: {_listed(list(map(readable, names)), NAMES)}"


def _listed(names: Sequence[str], count: int) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
