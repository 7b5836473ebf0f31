"""What changed between two runs, and where: step time, phases, waiting and transfer of groups, memory; rank by rank.

Steps are paired by their number, so that equal data meets equal data. Neighbouring steps resemble each other, so
intervals come from the scatter of `BLOCKS` blocks of steps that follow each other, never from single steps: a run that
drifts gets a wide interval and no verdict. Everything is a pure function of two runs' records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from lens.diagnosis.arrays import Array, Floats, Ints, median
from lens.diagnosis.decompose import APART_PHASES, Frame
from lens.diagnosis.select import Timeline
from lens.diagnosis.signals import Signals
from lens.diagnosis.topology import Topology
from lens.tables import Tables

BLOCKS = 10
FEWEST_STEPS = 3 * BLOCKS
WARM_UP = 5
"""First steps left out: they compile, allocate and fill caches."""
CONFIDENCE = 0.99
"""A verdict fails builds: of a hundred pairs of equal runs, one may be told apart."""
SMALLEST_SHARE = 0.03
"""Of A's step time: a smaller change of a part is not worth a line."""
SMALLEST_MEMORY_SHARE = 0.05
ALIKE = 0.5
"""A rank belongs to a change when its own is at least this share of the largest rank's."""
CPU_WAIT = "process.cpu.run_delay"
MEMORY = ("torch.memory.allocated", "hw.gpu.memory.usage", "process.memory.usage")
OWN, TRANSFER, WAIT = "phase", "transfer", "wait"
ORDER = (OWN, "memory", TRANSFER, WAIT)
"""Waiting last: it follows from what others do."""


class ComparisonError(ValueError):
    """The two runs cannot be compared; the message says why."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval, in the unit of what was averaged."""

    value: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    @classmethod
    def of(cls, blocks: Floats, looks: int = 1) -> Estimate:
        """Of the means of blocks; `looks` is how many such intervals must hold together (Bonferroni)."""
        centre, count = float(blocks.mean()), len(blocks)
        reach = _quantile(1 - (1 - CONFIDENCE) / (2 * looks), count - 1) * float(blocks.std(ddof=1)) / count**0.5
        return cls(centre, centre - reach, centre + reach)


@dataclass(frozen=True)
class Side:
    """One run, decomposed. parts: (kind, name) to seconds [steps, ranks]; a step without the part spent no time in it."""

    name: str | None
    topology: Topology
    frame: Frame
    signals: Signals
    step_time: Floats
    parts: dict[tuple[str, str], Floats]

    @classmethod
    def of(cls, run: Mapping[str, Any], tables: Tables) -> Side:
        """Align and decompose a run's records."""
        timeline = Timeline.of(tables)
        topology = Topology.of(run, tables)
        frame = Frame.of(tables, timeline, topology)
        tables_of = {OWN: frame.own, TRANSFER: frame.transfer, WAIT: frame.wait}
        parts = {
            (kind, name): np.nan_to_num(values)
            for kind, named in tables_of.items()
            for name, values in named.items()
            if name not in APART_PHASES
        }
        step_time = median(frame.duration, axis=1)
        return cls(run.get("run"), topology, frame, Signals(tables, timeline, topology), step_time, parts)

    def reporting(self, steps: Ints) -> Array:
        """Global ranks of which some of these steps are known."""
        return self.topology.ranks[np.isfinite(self.frame.duration[steps]).any(axis=0)]

    def cpu_wait(self, steps: Ints, ranks: Array) -> float | None:
        """Seconds a second for which these ranks' processes were ready and had no CPU; None where nobody measured."""
        low, high = int(steps[0]), int(steps[-1])
        rates = [self.signals.rate(CPU_WAIT, row, low, high) for row in self.topology.row(ranks).tolist()]
        known = [rate for rate in rates if rate is not None]
        return sum(known) / len(known) if known else None

    @property
    def whole(self) -> Ints:
        """Places of the steps whose duration is known."""
        return np.flatnonzero(np.isfinite(self.step_time))


def compare(a: tuple[Mapping[str, Any], Tables], b: tuple[Mapping[str, Any], Tables]) -> dict[str, Any]:
    """What run B does otherwise than run A; each is a run object ({} derives it) and its records.

    The reply: `step_time` (means, percentiles and change of B against A), `changes` (what and where, the largest first
    of each kind), `verdict` (slower, faster, changed or no difference), `paired` (by, steps, ranks), `not_compared` (parts that one run's
    records lack), `cpu_wait` (how crowded each host was: seconds a second, None where not measured). Times in seconds, memory
    in bytes, shares and percentages of A's mean step time.

    Raises:
        ComparisonError: fewer than `FEWEST_STEPS` steps to compare, or no rank in common.
    """
    first, second = Side.of(*a), Side.of(*b)
    by, at_a, at_b = _pairs(first, second)
    ranks = np.intersect1d(first.reporting(at_a), second.reporting(at_b))
    if not len(ranks):
        raise ComparisonError("the two runs have no rank in common")
    before, after = first.step_time[at_a], second.step_time[at_b]
    usual = float(before.mean())
    change = Estimate.of(np.log(_blocks(after) / _blocks(before)))
    changes = [*_times(first, second, at_a, at_b, ranks, usual), *_memory(first, second, ranks)]
    changes.sort(key=lambda each: (ORDER.index(each["kind"]), -abs(each["pct"])))
    return {
        "a": first.name,
        "b": second.name,
        "verdict": _verdict(change, changes),
        "paired": {"by": by, "steps": len(at_a), "ranks": len(ranks), "confidence": CONFIDENCE},
        "cpu_wait": {"a": first.cpu_wait(at_a, ranks), "b": second.cpu_wait(at_b, ranks)},
        "step_time": {"a": _spread(before), "b": _spread(after), **_percent(change)},
        "changes": changes,
        "not_compared": [" ".join(name) for name in sorted(set(first.parts) ^ set(second.parts))],
    }


def _verdict(change: Estimate, changes: list[dict[str, Any]]) -> str:
    if change.is_real and abs(np.expm1(change.value)) >= SMALLEST_SHARE:
        return "slower" if change.value > 0 else "faster"
    return "changed" if changes else "no difference"


def _pairs(a: Side, b: Side) -> tuple[str, Ints, Ints]:
    """How steps are paired, and the places of the pairs in both runs."""
    at_a, at_b = a.whole[WARM_UP:], b.whole[WARM_UP:]
    steps_a, steps_b = a.frame.timeline.steps[at_a], b.frame.timeline.steps[at_b]
    _, in_a, in_b = np.intersect1d(steps_a, steps_b, return_indices=True)
    if len(in_a) >= FEWEST_STEPS:
        return "step", at_a[in_a], at_b[in_b]
    count = min(len(at_a), len(at_b))
    if count < FEWEST_STEPS:
        raise ComparisonError(
            f"only {count} steps can be compared after {WARM_UP} of warm-up; {FEWEST_STEPS} are needed"
        )
    return "order", at_a[:count], at_b[:count]


def _times(a: Side, b: Side, at_a: Ints, at_b: Ints, ranks: Array, usual: float) -> Iterator[dict[str, Any]]:
    """Parts of the step that changed, with the ranks in which they did."""
    names = sorted(set(a.parts) & set(b.parts))
    looks = max(1, len(names) * len(ranks))
    rows_a, rows_b = a.topology.row(ranks), b.topology.row(ranks)
    for name in names:
        before, after = a.parts[name][np.ix_(at_a, rows_a)], b.parts[name][np.ix_(at_b, rows_b)]
        blocks = _blocks(after - before)
        estimates = [Estimate.of(blocks[:, column], looks) for column in range(len(ranks))]
        places = _where(estimates, SMALLEST_SHARE * usual)
        if places:
            together = Estimate.of(blocks[:, places].mean(axis=1), looks)
            share = Estimate(*(value / usual for value in (together.value, together.low, together.high)))
            yield {
                "kind": name[0],
                "name": name[1],
                "ranks": ranks[places].tolist(),
                "all_ranks": len(places) == len(ranks),
                "a": float(before[:, places].mean()),
                "b": float(after[:, places].mean()),
                **_share(share),
            }


def _memory(a: Side, b: Side, ranks: Array) -> Iterator[dict[str, Any]]:
    """Memory whose level changed, rank by rank."""
    looks = len(MEMORY) * len(ranks)
    rows = list(zip(a.topology.row(ranks).tolist(), b.topology.row(ranks).tolist(), strict=True))
    for metric in MEMORY:
        levels = [(_levels(a, metric, row_a), _levels(b, metric, row_b)) for row_a, row_b in rows]
        known = [(rank, *pair) for rank, pair in zip(ranks.tolist(), levels, strict=True) if all(map(len, pair))]
        if not known:
            continue
        estimates = [Estimate.of(np.log(after / before), looks) for _, before, after in known]
        places = _where(estimates, SMALLEST_MEMORY_SHARE)
        if places:
            together = Estimate.of(np.mean([np.log(known[p][2] / known[p][1]) for p in places], axis=0), looks)
            yield {
                "kind": "memory",
                "name": metric,
                "ranks": [known[place][0] for place in places],
                "all_ranks": len(places) == len(ranks),
                "a": float(np.mean([known[place][1].mean() for place in places])),
                "b": float(np.mean([known[place][2].mean() for place in places])),
                **_percent(together),
            }


def _levels(side: Side, metric: str, row: int) -> Floats:
    """The level of a rank's memory in each block of its samples; empty where too few are known or one is zero."""
    values = side.signals.gauge(metric, row, WARM_UP, len(side.frame.timeline))
    if len(values) < BLOCKS:
        return np.zeros(0)
    blocks = _blocks(values)
    return blocks if (blocks > 0).all() else np.zeros(0)


def _where(estimates: list[Estimate], smallest: float) -> list[int]:
    """Places with a real change of at least `smallest` and not far below the largest in that direction."""
    real = [p for p, each in enumerate(estimates) if each.is_real and abs(each.value) >= smallest]
    if not real:
        return []
    largest = max((estimates[place].value for place in real), key=abs)
    return [place for place in real if estimates[place].value / largest >= ALIKE]


def _blocks(values: Floats) -> Floats:
    """Means of `BLOCKS` equal runs of neighbours along the first axis."""
    return np.array([part.mean(axis=0) for part in np.array_split(values, BLOCKS)])


def _spread(values: Floats) -> dict[str, float]:
    p5, p50, p95 = np.percentile(values, [5, 50, 95]).tolist()
    return {"mean": float(values.mean()), "p5": p5, "p50": p50, "p95": p95}


def _percent(change: Estimate) -> dict[str, float]:
    """A change of logarithms as percent."""
    return {key: float(100 * np.expm1(value)) for key, value in _named(change)}


def _share(change: Estimate) -> dict[str, float]:
    """A share as percent."""
    return {key: 100 * value for key, value in _named(change)}


def _named(change: Estimate) -> list[tuple[str, float]]:
    return [("pct", change.value), ("pct_low", change.low), ("pct_high", change.high)]


def _quantile(probability: float, freedom: int) -> float:
    """Student's t, by the Cornish-Fisher expansion: within 1 % from 9 degrees of freedom on, up to 0.9999."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))
