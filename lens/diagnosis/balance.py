"""Work that is spread unevenly by design or by data: makes of cards, pipeline stages, sequence lengths.

None of these is a rank's fault: the slower make, the longer stage and the longest batch are compared as groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis import notices, policy
from lens.diagnosis.arrays import Array, Floats, Ints, cells, mean, median
from lens.diagnosis.examine import Examiner
from lens.diagnosis.notices import Cause, Evidence, Notice
from lens.diagnosis.pipeline import bubble

CAUSES = {
    "mixed_vendor_imbalance": Cause(
        "Give the faster cards more of the work (micro-batches, experts, layers in proportion to their speed), or expect "
        "them to wait.",
        severity="info",
    ),
    "pipeline_imbalance": Cause(
        "Move layers from {component} to the other stages until all take the same time per micro-batch.",
        absorbs=("compute",),
    ),
    "variable_sequence_length": Cause(
        "Balance batches by the sum of squared sequence lengths (bucketing or packing), so that no rank draws the longest "
        "alone.",
        absorbs=("compute",),
        brings=("jitter_amplification",),
    ),
}  # fmt: skip

QUARTERS = 4
STANDING_STEPS = 30
VENDOR_RATIO = 1.08
"""Makes whose typical ranks differ by less are alike."""
STAGE_RATIO = 1.15
"""First and last stages carry embedding and loss: so much more of one stage is usual."""
STAGE_OF_ALL = 0.6
"""Share of the stage's excess that each of its ranks must show: else it is single ranks that are slow."""
FOLLOWS, FOLLOWS_SINCE = 0.9, 0.6
"""Correlation of self time with squared sequence lengths, from rank to rank within the steps; less of it, for the noise of
a shared machine hides some, where lengths became uneven at a step."""
SEQUENCE_COST = 0.08
"""What lengths cost at least that always were uneven: some unevenness is in all data."""
LONGEST_STALL = 0.3
"""Of a rank's usual time: what strays further from its peers is no sequence, and counts for no more than this."""
SEQUENCE_STEPS = 64
OFTEN_SLOWEST = 0.5
"""A rank that draws the longest batch more often than this has other data: it is not chance."""


@dataclass(frozen=True)
class Balance:
    """How evenly the work of a run is spread."""

    run: Examiner
    squares: Floats | None

    @classmethod
    def of(cls, run: Examiner) -> Balance:
        """Read the sequence lengths; the self times are known."""
        return cls(run, _squares(run))

    def at(self, place: int) -> list[Notice]:
        """Imbalances that the steps up to a place show."""
        steps = notices.judged_steps(place)
        compute = self.run.features.get("compute")
        if compute is None or len(steps) < policy.FIRST_JUDGED_STEPS:
            return []
        sequences = self._sequences(compute, steps)
        if len(steps) < STANDING_STEPS:
            return [] if sequences is None else [sequences]
        found = [sequences, self._makes(compute, steps), self._stages(compute, steps)]
        return [notice for notice in found if notice is not None]

    def _makes(self, compute: Floats, steps: Ints) -> Notice | None:
        """Cards of different makes that work at different, constant speeds."""
        topology = self.run.topology
        makes = [(v or "", m or "") for v, m in zip(topology.vendor, topology.model, strict=True)]
        names = sorted(set(makes))
        if len(names) < 2:
            return None
        stage = [-1 if s is None else s for s in topology.stage]
        levels: dict[tuple[str, str], Floats] = {}
        for name in names:
            # A make is judged where it does the same work as others: within a stage.
            rows = [r for r, make in enumerate(makes) if make == name and _mixed(stage, makes, stage[r])]
            if rows:
                levels[name] = _design_speed(compute, steps, np.array(rows))
        if len(levels) < 2:
            return None
        slow = max(levels, key=lambda name: float(levels[name].mean()))
        fast = min(levels, key=lambda name: float(levels[name].mean()))
        ratio = levels[slow] / levels[fast]
        if not ratio.min() >= VENDOR_RATIO or ratio.max() > 1.3 * ratio.min():
            return None
        slower = [r for r, make in enumerate(makes) if make == slow]
        extra = np.zeros((len(steps), compute.shape[1]))
        part = 1 - 1 / float(ratio.mean())
        extra[:, slower] = np.nan_to_num(cells(compute, steps, slower)) * part
        cost = self.run.cost_ratio(steps, extra)
        said = (
            f"{_make(slow)} cards take {float(ratio.mean()):.2f} times as long as {_make(fast)} cards for the same work, "
            "since the first step and by design: no rank is at fault"
        )
        return Notice(
            "mixed_vendor_imbalance", (), 0, None, notices.sureness(float(ratio.min()) - 1, VENDOR_RATIO - 1, 0.95),
            said, (Evidence("comm.self", float(levels[fast].mean()), float(levels[slow].mean())),), cost, None,
            (("slow_device", "all ranks of the make differ by the same factor, in every part of the run"),),
        )  # fmt: skip

    def _stages(self, compute: Floats, steps: Ints) -> Notice | None:
        """A pipeline stage whose ranks all take longer than those of the others, since the first step."""
        topology = self.run.topology
        stage = np.array([-1 if s is None else s for s in topology.stage])
        numbers = np.unique(stage[stage >= 0])
        if len(numbers) < 2:
            return None
        make = np.unique(
            [f"{v}/{m}" for v, m in zip(topology.vendor, topology.model, strict=True)], return_inverse=True
        )[1]
        levels = np.stack([_by_quarter(compute, steps, np.flatnonzero(stage == n)) for n in numbers])
        longest = int(np.argmax(levels.mean(axis=1)))
        rows = np.flatnonzero(stage == numbers[longest])
        alike = np.array([n for n in numbers if n != numbers[longest] and set(make[stage == n]) == set(make[rows])])
        if not len(alike):
            return None
        others = np.median(levels[np.searchsorted(numbers, alike)], axis=0)
        ratio = levels[longest] / others
        each = median(cells(compute, steps, rows)) / float(others.mean())
        if not ratio.min() >= STAGE_RATIO or not np.nanmin(each) - 1 >= STAGE_OF_ALL * (float(ratio.mean()) - 1):
            return None
        extra = np.zeros((len(steps), compute.shape[1]))
        extra[:, rows] = np.nan_to_num(cells(compute, steps, rows)) * (1 - 1 / float(ratio.mean()))
        cost = self.run.cost_ratio(steps, extra)
        if cost is None or cost - 1 < policy.WORTH_KEEPING:
            return None
        said = (
            f"every rank of pipeline stage {numbers[longest]} computes {100 * (float(ratio.mean()) - 1):.0f} % longer than "
            "those of the other stages, since the first step"
        )
        evidence: tuple[Evidence, ...] = (
            Evidence("comm.self", float(others.mean()), float(levels[longest].mean())),
        )
        idle = bubble(self.run.frame, self.run.tables, steps)
        if idle is not None and idle.measured is not None:
            evidence += (Evidence("pipeline.bubble", idle.theory, idle.measured),)
            said += f" ({idle.words()})"
        return Notice(
            "pipeline_imbalance", notices.listed(rows), 0, None,
            notices.sureness(float(ratio.min()) - 1, STAGE_RATIO - 1, 0.93), said, evidence, cost,
            f"stage{numbers[longest]}",
            (("slow_device", "all ranks of the stage take longer, none more than the others"),),
        )  # fmt: skip

    def _sequences(self, compute: Floats, steps: Ints) -> Notice | None:
        """Steps that wait for the rank with the longest sequences, another one each time."""
        if self.squares is None:
            return None
        since = self._since(steps)
        steps = steps[steps >= since][-SEQUENCE_STEPS:]
        work, took = self.squares[steps], compute[steps]
        rows = np.flatnonzero(np.isfinite(work).all(axis=0) & np.isfinite(took).all(axis=0))
        if len(rows) < 2 or len(steps) < policy.FIRST_JUDGED_STEPS:
            return None
        work, took = work[:, rows], took[:, rows]
        usual = median(took)
        took = took / np.where(usual > 0, usual, 1.0)
        work_off, took_off = (part - part.mean(axis=1, keepdims=True) for part in (work, took))
        spread = float((work_off**2).sum())
        if spread <= 0 or float(np.std(work_off)) < 0.03 * float(work.mean()):
            return None
        calm = np.clip(took_off, -LONGEST_STALL, LONGEST_STALL)
        follows = max(float((work_off * t).sum() / np.sqrt(spread * float((t**2).sum()))) for t in (took_off, calm))
        slowest = np.bincount(work.argmax(axis=1), minlength=len(rows)).max() / len(work)
        needed, least = (FOLLOWS_SINCE, policy.SMALLEST_EFFECT) if since else (FOLLOWS, SEQUENCE_COST)
        if follows < needed or slowest > max(OFTEN_SLOWEST, 2 / len(rows)):
            return None
        slope = float((work_off * np.clip(took_off, -1, 1)).sum()) / spread
        extra = np.zeros((len(steps), compute.shape[1]))
        extra[:, rows] = np.maximum(slope * work_off, 0) * usual
        cost = self.run.cost_ratio(steps, extra)
        if cost is None or cost - 1 < least:
            return None
        said = (
            f"self time follows the squared sequence lengths from rank to rank (r = {follows:.2f}), and each step waits for "
            "whichever rank drew the longest"
        )
        return Notice(
            "variable_sequence_length", (), since, None,
            notices.sureness(cost - 1, least / 2, 0.95) * float(np.clip(0.85 + (follows - needed), 0.85, 1.0)), said,
            (Evidence("train.sequence.squared", float(np.median(work)), float(work.max(axis=1).mean())),), cost, None,
            (("slow_device", "another rank is the slowest in each step"),),
        )  # fmt: skip

    def _since(self, steps: Ints) -> int:
        """The step from which lengths differ so much between ranks; the first one where they always did."""
        assert self.squares is not None
        part = self.squares[policy.WARM_UP_STEPS : int(steps[-1]) + 1]
        level = mean(part, axis=1)
        uneven = np.nan_to_num(mean(np.abs(part - level[:, None]), axis=1) / np.where(level > 0, level, np.nan))
        onset, before, now = notices.begins(uneven, 5)
        return policy.WARM_UP_STEPS + onset if onset and now > 2 * before else 0


def _squares(run: Examiner) -> Floats | None:
    """Squared sequence lengths by step and rank, from the steps or from samples that bear one."""
    known = run.frame.count.get("seq_sq")
    if known is not None:
        return known
    series = run.signals.series("train.sequence.squared")
    if series is None:
        return None
    values = np.full(run.frame.shape, np.nan)
    values[series.step, series.row] = series.value
    return values


def _by_quarter(values: Floats, steps: Ints, rows: Array) -> Floats:
    """Typical level of these ranks in each quarter of the steps."""
    parts = np.array_split(steps, QUARTERS)
    return np.array([float(median(median(cells(values, part, rows)))) for part in parts])


def _design_speed(values: Floats, steps: Ints, rows: Array) -> Floats:
    """Level of a make's faster ranks in each quarter of the steps: one of few that is slow is no design."""
    parts = [np.sort(median(cells(values, part, rows))) for part in np.array_split(steps, QUARTERS)]
    return np.array([part[(len(rows) - 1) // 4] for part in parts])


def _mixed(stage: list[int], makes: list[tuple[str, str]], number: int) -> bool:
    """Whether a stage has cards of several makes."""
    return len({make for s, make in zip(stage, makes, strict=True) if s == number}) > 1


def _make(name: tuple[str, str]) -> str:
    return name[1] or name[0] or "unnamed"
