"""What is said of the pictures of a folder, found the way people lay it out. In the first of these that applies:

- Hugging Face "imagefolder": metadata.jsonl, .csv or .parquet, whose rows name a picture beside them and its caption;
- sidecars: `cat.txt` or `cat.caption` beside `cat.png`;
- one folder per class: the folder's name is the label, and the caption too.

Folders train/, val/ and test/ are parts of the data, no classes. Folders `10_sks dog` are kohya's: each picture counts
ten times, and "sks dog" is the caption of those without one. Nothing is left out without being listed in `left_out`.
"""

import posixpath
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ldm.data.metadata import Folder, plain, read_lines, tables_in
from ldm.io.archives import readable
from ldm.io.images import SUFFIXES
from ldm.io.text import MAX_TEXT, decode_text
from ldm.utils.errors import DataError

CAPTION_SUFFIXES = (".txt", ".caption")  # the first that a picture has
TRAIN, HELD_OUT, TEST = ("train", "training"), ("val", "valid", "validation", "dev"), ("test", "testing")
MAX_LEVELS = 32  # of folders that are looked through for classes
ADVICE = {
    ".zip": "give the .zip as data.path", ".parquet": "save the pictures as files, with metadata.csv",
    ".tar": "unpack the .tar", ".gz": "unpack the .gz", ".heic": "save them as .jpg",
}  # fmt: skip


class Sample(NamedTuple):
    """One picture of a folder and what is said of it."""

    name: str  # in its folder
    caption: str | None
    aesthetic: float | None = None
    group: str = ""  # the class it belongs to


class Subject(NamedTuple):
    """What kohya's name of a folder says of its pictures."""

    repeats: int
    words: str


@dataclass
class Layout:
    """What a folder holds."""

    samples: list[Sample] = field(default_factory=list)
    source: str = "none"  # of the captions, in words
    subjects: dict[str, Subject] = field(default_factory=dict)  # by folder
    held_out: frozenset[str] | None = None  # names that lie in val/ or test/; None where no folder says it
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason -> names


def find_layout(folder: Folder, caption_field: str | None = None) -> Layout:
    """All pictures with their captions and classes. Raises DataError."""
    everything = [name for name in folder.names if _suffix(name) in SUFFIXES]
    if not everything:
        raise DataError(f"{folder.path}: no pictures ({' '.join(SUFFIXES)}) in it; {_instead(folder)}")
    layout = Layout()
    places = _places(everything, layout)  # of those that are used
    groups = _groups(places)
    subjects = _subjects(places, groups, layout)
    tables, files = tables_in(folder), _sidecars(folder, list(places))
    if tables:
        layout.samples = _from_tables(folder, tables, caption_field, list(places), layout)
        files = {}
    elif files:
        layout.samples = _from_sidecars(folder, list(places), files, subjects, layout)
    else:
        layout.samples = _from_classes(folder, groups, subjects, layout)
    named = (sample.name for sample in layout.samples)
    _list_others(folder, {*everything, *tables, *files.values(), *named}, layout)
    for index, sample in enumerate(layout.samples):
        subject = subjects.get(sample.name)
        group = subject.words if subject else readable(groups.get(sample.name, ""))
        layout.samples[index] = sample._replace(group=group)
    repeats = [subjects[s.name].repeats if s.name in subjects else 1 for s in layout.samples]
    layout.samples = [s for s, times in zip(layout.samples, repeats, strict=True) for _ in range(times)]
    return layout


# --- where a picture lies


def _places(images: Sequence[str], layout: Layout) -> dict[str, str]:
    """The pictures that are used, and where each lies: its name, without train/ or val/ where those are parts."""
    root = _root(images)
    folders = {name: _first(name, root).lower() for name in images}
    kinds = set(folders.values()) - {""}
    if len(kinds) < 2 or not kinds.intersection(TRAIN) or not kinds <= {*TRAIN, *HELD_OUT, *TEST}:
        return {name: name for name in images}
    held_out = HELD_OUT if kinds.intersection(HELD_OUT) else TEST
    used = [name for name in images if folders[name] in (*TRAIN, *held_out)]
    for name in sorted(set(images).difference(used)):
        part = _first(name, root)
        layout.left_out[f"in {part}/, which is kept for tests" if part else "beside train/"].append(name)
    layout.held_out = frozenset(name for name in used if folders[name] in held_out)
    return {name: name[len(root) :].partition("/")[2] for name in used}


def _groups(places: Mapping[str, str]) -> dict[str, str]:
    """The class folder of each picture: the topmost that tells them apart, "" of a picture above all of them."""
    root = _root(list(places.values()))
    return {name: _first(place, root) for name, place in places.items()}


def _root(names: Sequence[str], root: str = "") -> str:
    """The folder, with '/', below which pictures lie in several folders, or in none."""
    folders = {_first(name, root) for name in names} - {""}
    if len(folders) != 1 or root.count("/") > MAX_LEVELS:
        return root
    below = f"{root}{folders.pop()}/"
    inside = [name for name in names if name.startswith(below)]
    deeper = _root(inside, below)
    is_several = len({_first(name, deeper) for name in inside} - {""}) > 1
    return deeper if is_several or len(inside) == len(names) else root


def _first(name: str, root: str) -> str:
    """The first folder of a name below root, "" where there is none."""
    first, slash, _ = name[len(root) :].partition("/")
    return first if slash else ""


def _subjects(places: Mapping[str, str], groups: Mapping[str, str], layout: Layout) -> dict[str, Subject]:
    """What kohya's names, `10_sks dog`, say of each picture, where all folders have such names.

    Numbers that count the folders, as in 1_cat and 2_dog, are no repeats; neither is 001_cat or 0_cat.
    """
    if not any(groups.values()):
        groups = {name: posixpath.basename(posixpath.dirname(place)) for name, place in places.items()}
    folders = sorted(set(groups.values()) - {""})
    matches = {folder: re.fullmatch(r"([1-9]\d{0,2})_(.*\S.*)", folder) for folder in folders}
    if not folders or None in matches.values():
        return {}
    subjects = {folder: Subject(int(match[1]), _words(match[2])) for folder, match in matches.items() if match}
    if len(folders) > 1 and sorted(s.repeats for s in subjects.values()) == list(range(1, len(folders) + 1)):
        return {}
    layout.subjects = subjects
    return {name: subjects[folder] for name, folder in groups.items() if folder}


# --- captions


def _from_tables(
    folder: Folder, tables: Sequence[str], caption_field: str | None, images: Sequence[str], layout: Layout
) -> list[Sample]:
    """One sample for each caption of each line."""
    samples, silent, used = [], {}, set(images)
    kinds = " and ".join(sorted({posixpath.basename(table) for table in tables}))
    outside = {name for names in layout.left_out.values() for name in names}
    lines = [line for line in read_lines(folder, tables, caption_field) if line.name not in outside]
    for line in lines:
        samples += [Sample(line.name, caption, line.aesthetic) for caption in line.captions]
        silent |= {} if line.captions else {line.name: None}
    named = {line.name for line in lines}
    if missing := sorted(used - named):
        layout.left_out[f"without a line in {kinds}"] += missing
    if silent := sorted(silent.keys() - {sample.name for sample in samples}):
        layout.left_out[f"without a caption in {kinds}"] += silent
    if not samples:
        problem = f"has {len(lines)} lines for {len(used)} pictures, and none with a caption"
        raise DataError(f"{folder.path}: {kinds} {problem}; write file_name and text, or delete it")
    if 0 < sum(sample.aesthetic is None for sample in samples) < len(samples):
        first = next(sample.name for sample in samples if sample.aesthetic is None)
        raise DataError(f"{folder.path}: {first!r} has no 'aesthetic', other images do; give it to all or to none")
    layout.source = kinds
    return samples


def _sidecars(folder: Folder, images: Sequence[str]) -> dict[str, str]:
    """The text file beside each picture that has one: cat.txt or cat.png.txt, in any case and Unicode form."""
    files: dict[str, str] = {}  # by the stem that a picture has too
    for suffix in reversed(CAPTION_SUFFIXES):
        files |= {plain(posixpath.splitext(n)[0]): n for n in folder.names if _suffix(n) == suffix}
    if not files:
        return {}
    beside = {name: files.get(plain(posixpath.splitext(name)[0]), files.get(plain(name))) for name in images}
    return {name: file for name, file in beside.items() if file}


def _from_sidecars(
    folder: Folder,
    images: Sequence[str],
    files: Mapping[str, str],
    subjects: Mapping[str, Subject],
    layout: Layout,
) -> list[Sample]:
    """Every picture with the text beside it, or its kohya folder's words. Raises DataError where one has neither."""
    missing = [name for name in images if name not in files and name not in subjects]
    if missing:
        file = posixpath.splitext(missing[0])[0] + _suffix(next(iter(files.values())))
        problem = f"no caption file {readable(file)!r} for {readable(missing[0])!r}"
        count = f"{len(missing)} of {len(images)} images lack theirs"
        raise DataError(f"{folder.path}: {problem} ({count}); add it, or take the pictures away")
    texts = {file: _read_text(folder, file) for file in dict.fromkeys(files.values())}
    samples = [Sample(name, texts[files[name]] if name in files else subjects[name].words) for name in images]
    empty = [sample.name for sample in samples if not sample.caption]
    if empty:
        where = f"{folder.path}/{readable(files[empty[0]])}"
        count = f"{len(empty)} of {len(images)} are"
        raise DataError(f"{where}: the caption is empty ({count}); write one, or leave the image out")
    suffixes = " and ".join(sorted({_suffix(file) for file in files.values()}))
    others = len(images) - len(files)
    layout.source = f"{suffixes} files ({len(files):,})" + (f" and names of folders ({others:,})" if others else "")
    return samples


def _read_text(folder: Folder, file: str) -> str:
    text = decode_text(folder.read(file, max_bytes=MAX_TEXT), f"{folder.path}/{readable(file)}")
    return " ".join(text.split())


def _from_classes(
    folder: Folder, groups: Mapping[str, str], subjects: Mapping[str, Subject], layout: Layout
) -> list[Sample]:
    """Pictures captioned by the folder they lie in, without captions where all lie in one."""
    classes = sorted(set(groups.values()) - {""})
    if not subjects and len(classes) < 2:
        return [Sample(name, None) for name in groups]
    loose = [name for name in groups if name not in subjects and not groups[name]]
    if 2 * len(loose) > len(groups):
        problem = f"{len(loose)} of {len(groups)} pictures ({_some(loose)}) lie beside the folders {_some(classes)}"
        raise DataError(f"{folder.path}: {problem}; put them into folders too, or leave out the folders")
    if loose:
        layout.left_out["above the class folders"] += loose
    layout.source = "names of folders"
    words = {name: subjects[name].words if name in subjects else _words(group) for name, group in groups.items()}
    return [Sample(name, words[name]) for name in groups if words[name]]


# --- words


def _list_others(folder: Folder, used: set[str], layout: Layout) -> None:
    """Everything that is no picture and no caption."""
    for name in folder.names:
        if name not in used:
            layout.left_out[f"{_suffix(name)} files" if _suffix(name) else "files without a suffix"].append(name)
    for reason, names in (("links to nothing", folder.unreadable), ("hidden or of the system", folder.hidden)):
        if names:
            layout.left_out[reason] += names


def _instead(folder: Folder) -> str:
    """The commonest kinds of files that are there, and what to do with them."""
    counts: dict[str, int] = defaultdict(int)
    for name in folder.names:
        counts[_suffix(name) or "no suffix"] += 1
    commonest = sorted(counts, key=counts.__getitem__, reverse=True)[:5]
    advice = next((f"; {ADVICE[kind]}" for kind in commonest if kind in ADVICE), "")
    return "found " + (", ".join(f"{counts[kind]} {kind}" for kind in commonest) or "nothing") + advice


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(map(readable, names[:count])) + (", ..." if len(names) > count else "")


def _words(folder: str) -> str:
    return " ".join(readable(folder).replace("_", " ").split())


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()
