"""Ours beside its peers in one process: interleaved, on one thread, in CPU time, as ratios of the same round.

A machine shared with others changes speed from minute to minute, and two cases that run one after the other feel the
same minute. So every round runs each case once, in an order that rotates, and only times of one round are divided.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Case = Callable[[], object]


@dataclass
class Times:
    """CPU seconds of every round per case, of each first call, and the share of the machine others used meanwhile."""

    seconds: dict[str, list[float]]
    first_call: dict[str, float]
    busy_elsewhere: float

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, peer: str, work: float = 1.0) -> list[float]:
        """Lower quartile, median, upper quartile of name / peer round by round; `work`: how much more name does."""
        ratios = [a / b / work for a, b in zip(self.seconds[name], self.seconds[peer], strict=True)]
        return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3

    def report(self, bench: str, ours: str, peers: Sequence[str], *, target: float | None = None, **facts) -> dict:
        """Print ours against the fastest of `peers` as one JSON line; `work=` in facts makes it a ratio per FLOP."""
        peer = min(peers, key=self.median)
        lower, median, upper = self.ratios(ours, peer, facts.get("work", 1.0))
        line = {
            "bench": bench,
            "case": ours,
            "peer": peer,
            "ratio": round(median, 4),
            "quartiles": [round(lower, 4), round(upper, 4)],
            "target": target,
            "seconds": _digits(self.median(ours)),
            "peer_seconds": {name: _digits(self.median(name)) for name in peers},
            "first_call": {name: _digits(self.first_call[name]) for name in (ours, *peers)},
            "rounds": len(self.seconds[ours]),
            "busy_elsewhere": round(self.busy_elsewhere, 3),
            **facts,
        }
        print(json.dumps(line), flush=True)
        return line


def interleave(cases: Mapping[str, Case], *, rounds: int = 7, warmup: int = 1) -> Times:
    """Time every case once a round; first calls and warm-up are kept out of `seconds`."""
    names = list(cases)
    first_call = {name: cpu_seconds(cases[name]) for name in names}
    for name in names * warmup:
        cases[name]()
    seconds = {name: [] for name in names}
    before = _clocks()
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(cpu_seconds(cases[name]))
    return Times(seconds, first_call, _busy_elsewhere(before, _clocks()))


def cpu_seconds(case: Case) -> float:
    """CPU seconds, user and system, of this process and of the children it waited for."""
    start = _own_cpu()
    case()
    return _own_cpu() - start


def assert_equal(ours, peer, tol: float) -> float:
    """Largest difference relative to the peer's largest value; AssertionError above `tol`. Called before any timing."""
    error = ((ours.double() - peer.double()).abs().max() / peer.double().abs().max()).item()
    assert error <= tol, f"ours and the peer differ by {error:.2e} relative, allowed {tol:.0e}: nothing is timed"
    return error


def arguments(description: str) -> argparse.Namespace:
    """The command line of every benchmark: --small for a smoke run, --rounds for tighter quartiles."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--small", action="store_true", help="tiny sizes: checks that all runs, times mean nothing")
    parser.add_argument("--rounds", type=int, default=None, help="rounds to time (default: the benchmark's own)")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    return parser.parse_args()


def _own_cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _clocks() -> tuple[float, float, float]:
    """Wall seconds, this process's CPU seconds, the whole machine's busy CPU seconds."""
    busy = 0.0
    if os.path.exists("/proc/stat"):  # Linux; elsewhere busy_elsewhere reads 0
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, *_ = map(int, file.readline().split()[1:])
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), _own_cpu(), busy


def _busy_elsewhere(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    wall, own, busy = (b - a for a, b in zip(before, after, strict=True))
    return min(max((busy - own) / (wall * (os.cpu_count() or 1)), 0.0), 1.0)


def _digits(seconds: float) -> float:
    return float(f"{seconds:.4g}")
