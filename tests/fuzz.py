"""Hostile input by the thousand: `python tests/fuzz.py FORMAT... [--count 20000] [--seed 0] [--only N --keep FOLDER]`.

A case is a good file, damaged as (format, seed, number) say. Reading it must end well, or in one LdmError of one line,
within 2 seconds of the processor and 4 x the file + 4 x what it decodes to + 200 MB. Batches run in forked workers,
so that a reader that never comes back, or dies, is one finding; the formats are in `fuzz_formats.py`.
"""

import argparse
import contextlib
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

from ldm.utils.errors import LdmError, in_a_line  # noqa: E402

SECONDS = 2.0  # of the processor
DEADLY = 10  # seconds of the processor after which a worker that hears no signal is ended
SPARE = 200 << 20  # bytes
BATCH = 250
KINDS = ("traceback", "lines", "hang", "memory", "death")


class Finding(NamedTuple):
    """What should not have happened."""

    format: str
    number: int
    kind: str
    text: str


class Late(BaseException):
    """The time of a case is over."""


def fuzz(name: str, count: int, seed: int = 0, numbers: Iterable[int] | None = None) -> list[Finding]:
    """Read `count` damaged files of a format; the findings."""
    from fuzz_formats import FORMATS

    findings, todo = [], list(range(count) if numbers is None else numbers)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        good = Path(folder) / "good"
        good.mkdir()
        FORMATS[name].make(good)
        while todo:
            done, found = _batch(name, good, Path(folder), seed, todo[:BATCH])
            findings += found
            todo = todo[done:]
    return findings


def damaged(name: str, good: Path, work: Path, seed: int, number: int) -> Path:
    """The case of this number, made in `work`."""
    from fuzz_formats import FORMATS

    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(good, work)
    FORMATS[name].damage(work, random.Random(f"{name}/{seed}/{number}"))
    return work


def _batch(name: str, good: Path, folder: Path, seed: int, numbers: list[int]) -> tuple[int, list[Finding]]:
    """Some cases in a worker: how many came to an end, one way or the other, and the findings."""
    place, log = mmap.mmap(-1, 8), folder / "findings"
    log.write_text("")
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            _work(name, good, folder / "case", seed, numbers, place, log)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    lines = [line.split("\t", 2) for line in log.read_text().splitlines()]
    findings = [Finding(name, int(number), kind, text) for number, kind, text in lines]
    at = struct.unpack("<q", place[:8])[0]
    if at < len(numbers):  # it died on this one
        kind = "hang" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU else "death"
        findings.append(Finding(name, numbers[at], kind, f"the worker ended with status {status}"))
    return min(at + 1, len(numbers)), findings


def _work(name: str, good: Path, work: Path, seed: int, numbers: list[int], place: mmap.mmap, log: Path) -> None:
    from fuzz_formats import FORMATS

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    signal.signal(signal.SIGPROF, _late)
    with contextlib.suppress(LdmError):
        FORMATS[name].read(good)  # what is imported and cached on the way is no memory of a file's
    with open(log, "a", buffering=1) as findings:
        for index, number in enumerate(numbers):
            place[:8] = struct.pack("<q", index)
            try:
                damaged(name, good, work, seed, number)
            except Exception as error:
                findings.write(f"{number}\ttraceback\tof this harness: {in_a_line(error)}\n")
                continue
            for kind, text in _read(FORMATS[name].read, work):
                findings.write(f"{number}\t{kind}\t{' '.join(text.split())[:400]}\n")
    place[:8] = struct.pack("<q", len(numbers))


def _read(read, work: Path) -> list[tuple[str, str]]:
    """What is wrong with how one case is read."""
    used = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + DEADLY, resource.RLIM_INFINITY))
    before, found = _peak(), []
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    decoded = 0
    try:
        decoded = read(work) or 0
    except LdmError as error:
        found += [("lines", repr(str(error)))] if "\n" in str(error) else []
    except Late:
        found.append(("hang", f"over {SECONDS} s of the processor"))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        found.append(("traceback", f"{Path(where.filename).name}:{where.lineno} {type(error).__name__}: {error}"))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    size = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    if (grown := _peak() - before) > 4 * size + 4 * decoded + SPARE:
        found.append(("memory", f"{grown >> 20} MB for {size:,} bytes"))
    return found


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _late(*_) -> None:
    raise Late


def table(counts: dict[str, int], findings: list[Finding]) -> str:
    """A line for each format."""
    lines = [f"{'format':14}{'inputs':>8}" + "".join(f"{kind:>11}" for kind in KINDS)]
    for name, count in counts.items():
        kinds = Counter(found.kind for found in findings if found.format == name)
        lines.append(f"{name:14}{count:8}" + "".join(f"{kinds[kind]:11}" for kind in KINDS))
    return "\n".join(lines)


def main() -> int:
    from fuzz_formats import FORMATS

    parser = argparse.ArgumentParser(description="Read damaged files; count what does not end in one clear line.")
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(FORMATS)}; all unless given")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case by its number")
    parser.add_argument("--keep", type=Path, help="with --only: write that case into this folder and read it here")
    chosen = parser.parse_args()
    names, findings, counts = chosen.formats or list(FORMATS), [], {}
    if chosen.keep:
        with tempfile.TemporaryDirectory() as good:
            FORMATS[names[0]].make(Path(good))
            print(FORMATS[names[0]].read(damaged(names[0], Path(good), chosen.keep, chosen.seed, chosen.only)))
        return 0
    for name in names:
        start = time.monotonic()
        found = fuzz(name, chosen.count, chosen.seed, None if chosen.only is None else [chosen.only])
        findings += found
        counts[name] = chosen.count if chosen.only is None else 1
        print(f"{name}: {len(found)} findings in {counts[name]} inputs, {time.monotonic() - start:.0f} s", flush=True)
        seen = Counter((each.kind, each.text) for each in found)
        first = {(each.kind, each.text): each.number for each in reversed(found)}
        for (kind, text), times in seen.most_common(30):
            print(f"  {times:5} x {kind}, first --only {first[kind, text]}: {text}", flush=True)
    print(table(counts, findings))
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
