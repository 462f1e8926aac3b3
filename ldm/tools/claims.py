"""What papers say of the arms of an ablation, and what runs say: *agrees*, *disagrees* or *undecided*.

The `claim` node of a config, which every run of an ablation stores:

    paper: arXiv:2212.09748, Fig. 5
    says: adaLN-Zero is best, then adaLN       # in words
    arms: [network.conditioning]               # settings whose values name an arm; none: only its ways of sampling do
    metric: held_out_eps_mse                   # of summary.json
    better: lower                              # or higher
    gap: 0.01                                  # the least that counts, of the larger mean; 0.01 unless given
    orders:                                    # best first; = is a tie
      - adaln_zero > adaln = cross_attention
      - {order: adaln_zero > adaln, metric: frechet_distance, better: lower}

An arm is written value/value/way: one value for each of `arms`, and for metrics=sampling_arms the way of sampling,
which may stand in front of `metric` instead. Runs of fewer than TRIAL steps try a sweep out, and are not judged.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ldm.tools.runs import Run
from ldm.utils.errors import DataError

TRIAL = 50  # steps
GAP = 0.01
AGREES, DISAGREES, UNDECIDED, OPEN = "agrees", "disagrees", "undecided", "not judged"


@dataclass
class Order:
    """One line of a claim: arms, best first, and between them > or =."""

    text: str
    metric: str
    better: str  # lower | higher
    settings: Sequence[str]  # that name an arm
    gap: float = GAP  # the least difference that counts, as a share of the larger mean

    @property
    def parts(self) -> list[str]:
        return re.split(r"\s*([>=])\s*", self.text.strip())

    @property
    def arms(self) -> list[str]:
        return self.parts[::2]

    def key(self, arm: str) -> str:
        """Where summary.json has the metric of an arm."""
        return "/".join([*arm.split("/")[len(self.settings) :], self.metric])

    def runs(self, arm: str, runs: Iterable[Run]) -> list[Run]:
        """Those of an arm."""
        values = arm.split("/")
        wanted = dict(zip(self.settings, values, strict=False))
        return [run for run in runs if all(run.setting(name) == value for name, value in wanted.items())]

    def values(self, arm: str, runs: Sequence[Run]) -> dict[str, float]:
        """seed -> the metric, of every finished run of an arm. Raises DataError where there is none."""
        chosen = self.runs(arm, runs)
        if not chosen:
            known = dict.fromkeys("/".join(run.setting(name) for name in self.settings) for run in runs)
            raise DataError(f"no run is of arm {arm}; there are {', '.join(known)}")
        found = {run.seed: run.number(self.key(arm)) for run in chosen}
        if values := {seed: value for seed, value in found.items() if value is not None}:
            return values
        raise DataError(f"no finished run of arm {arm} has the metric {self.key(arm)}")


@dataclass
class Verdict:
    """What the runs say of an order: `text` is one of the four words above; `reason` has the numbers."""

    order: Order
    text: str
    reason: str


@dataclass
class Claim:
    """A claim and the runs that were made to test it."""

    node: dict
    runs: list[Run]

    @property
    def orders(self) -> list[Order]:
        given = [{"order": line} if isinstance(line, str) else line for line in self.node["orders"]]
        return [
            Order(
                line["order"],
                line.get("metric", self.node["metric"]),
                line.get("better", self.node["better"]),
                self.node["arms"],
                line.get("gap", self.node.get("gap", GAP)),
            )
            for line in given
        ]

    def verdicts(self) -> list[Verdict]:
        sizes = sorted({run.setting("image_size") for run in self.runs if run.summary})
        if len(sizes) > 1:
            reason = f"runs of image_size {' and '.join(sizes)} are mixed; report one size at a time"
            return [Verdict(order, OPEN, reason) for order in self.orders]
        steps = [step for run in self.runs if (step := run.number("step")) is not None]
        if steps and min(steps) < TRIAL:
            reason = f"runs of {min(steps):g} steps show that the sweep runs, and no more"
            return [Verdict(order, OPEN, reason) for order in self.orders]
        return [judge(order, self.runs) for order in self.orders]


def claims(runs: Iterable[Run]) -> list[Claim]:
    """The claims that runs store, each with its runs."""
    found: dict[str, Claim] = {}
    for run in runs:
        if run.claim and _is_whole(run.claim):
            found.setdefault(json.dumps(run.claim, sort_keys=True), Claim(run.claim, [])).runs.append(run)
    return list(found.values())


def _is_whole(node: dict) -> bool:
    """Whether a claim has what it is judged by; a damaged config may have left anything of it."""
    arms, lines = node.get("arms"), node.get("orders")
    if not isinstance(arms, list) or not isinstance(lines, list):
        return False
    orders = [line if isinstance(line, dict) else {"order": line} for line in lines]
    told = [node.get(name) for name in ("paper", "says", "metric", "better")]
    told += [order.get(name, "") for order in orders for name in ("metric", "better")]
    return all(isinstance(text, str) for text in [*told, *arms, *(order.get("order") for order in orders)])


def judge(order: Order, runs: Sequence[Run]) -> Verdict:
    """An order agrees when each of its neighbours does, and disagrees when one of them does."""
    try:
        values = {arm: order.values(arm, runs) for arm in order.arms}
    except DataError as error:
        return Verdict(order, OPEN, str(error))
    signs = order.parts[1::2]
    found = [
        compare(values[better], sign, values[worse], order.better, order.gap)
        for (better, worse), sign in zip(pairwise(order.arms), signs, strict=True)
    ]
    words = [word for word, _ in found]
    word = DISAGREES if DISAGREES in words else UNDECIDED if UNDECIDED in words else AGREES
    means = [f"{arm} {_mean(values[arm].values()):.4g}" for arm in order.arms]
    return Verdict(order, word, f"{', '.join(means)}; " + "; ".join(reason for _, reason in found))


def compare(
    first: dict[str, float], sign: str, second: dict[str, float], better: str, least: float = GAP
) -> tuple[str, str]:
    """The verdict on two neighbours, seed -> value: their mean gap counts where it exceeds the seeds' spread, and the
    `least` share of the larger mean.

    Runs of the same seed share weights, data and noise at their start, so the spread is the range of their gaps; arms
    without common seeds are compared by the larger range of their values.
    """
    towards, means = -1 if better == "lower" else 1, [_mean(first.values()), _mean(second.values())]
    gap = towards * (means[0] - means[1])
    if first.keys() == second.keys():
        gaps = [first[seed] - second[seed] for seed in first]
        spread = max(gaps) - min(gaps)
    else:
        spread = max(max(values.values()) - min(values.values()) for values in (first, second))
    needed = least * max(map(abs, means))
    reason = f"gap {gap:+.2g}, seeds' spread {spread:.2g}" + (f", least {needed:.2g}" if needed > spread else "")
    if min(len(first), len(second)) < 2:
        return UNDECIDED, reason + " of one seed"
    needed = max(spread, needed)
    if sign == "=":
        return (AGREES if abs(gap) <= needed else DISAGREES), reason
    return (AGREES if gap > needed else DISAGREES if -gap > needed else UNDECIDED), reason


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)
