"""Runs that wait for what they are fed: batches that come too late, or copies to the card, on every rank alike.

No rank differs from another there, and often not from its past either: the share of the step is what counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis import notices, policy
from lens.diagnosis.arrays import Floats, Ints, finite_median, median
from lens.diagnosis.examine import Examiner
from lens.diagnosis.notices import Cause, Evidence, Notice

CAUSES = {
    "input_bound": Cause(
        "Give every rank more loader workers and prefetched batches, prepare samples ahead of the run, or move the data to "
        "faster storage.",
    ),
    "h2d_blocking": Cause(
        "Pin host memory and copy with non_blocking=True, a batch ahead of the step that needs it."
    ),
}  # fmt: skip

BOUND_SHARE = 0.15
"""Of the step: what always took so long must take so much of it on nearly every rank …"""
NEARLY_ALL = 0.1
"""… which leaves out this share of the ranks."""
RISEN = 2.0
"""It was so from the start, unless it rose by this factor; then what it rose by must be worth naming."""
FULL_QUEUE = 1.0
"""Batches that lie ready on a typical rank: with more than this the loaders are not what is waited for."""
STEPS = 20
"""So many at least: the first batches of a run come late."""


@dataclass(frozen=True)
class Kind:
    """Something that ranks are fed with. feature: the part of the step that waits for it."""

    cause: str
    feature: str
    said: str


KINDS = (
    Kind("input_bound", "data", "all ranks wait for their next batch for {share} % of the step"),
    Kind("h2d_blocking", "h2d", "all ranks wait for copies to their cards for {share} % of the step"),
)


@dataclass(frozen=True)
class Feeding:
    """What the ranks of a run are fed with."""

    run: Examiner

    @classmethod
    def of(cls, run: Examiner) -> Feeding:
        """The times are known."""
        return cls(run)

    def at(self, place: int) -> list[Notice]:
        """What nearly every rank waits for, up to a place."""
        steps = notices.judged_steps(place)
        if len(steps) < STEPS:
            return []
        found = [self._judge(kind, steps) for kind in KINDS if kind.feature in self.run.features]
        return [notice for notice in found if notice is not None]

    def _judge(self, kind: Kind, steps: Ints) -> Notice | None:
        seconds, usual = self.run.features[kind.feature][steps], self.run.usual[steps]
        known = np.isfinite(usual) & np.isfinite(seconds).any(axis=1)
        steps, seconds, usual = steps[known], seconds[known], usual[known]
        if len(steps) < STEPS:
            return None
        share = seconds / usual[:, None]
        onset, before, now = notices.begins(median(share, axis=1), policy.FIRST_JUDGED_STEPS)
        if not onset or now < RISEN * before or now - before < policy.SMALLEST_EFFECT:
            onset, before, now = 0, 0.0, float(np.nanmean(share))
        # The ranks that wait least: what single ranks wait for is their own.
        parts = share[onset:], share[onset:][-policy.CALM_STEPS :]
        bar = before + policy.SMALLEST_EFFECT if onset else BOUND_SHARE
        if min(float(np.nanquantile(median(part), NEARLY_ALL, method="lower")) for part in parts) < bar:
            return None
        after = steps[onset:]
        queued = self._queued(after) if kind.feature == "data" else None
        if queued is not None and queued > FULL_QUEUE:
            return None
        typical = median(seconds[onset:])
        part = 1 - before / now
        extra = np.nan_to_num(seconds[onset:] * part)
        ratio = self.run.cost_ratio(after, extra, at_begin=True)
        if ratio is None or ratio - 1 < policy.WORTH_KEEPING:
            return None
        past = float(np.nanmedian(seconds[:onset])) if onset else None
        evidence = [Evidence("phase.duration", past, float(np.nanmedian(typical)))]
        if queued is not None:
            evidence.append(Evidence("train.data.queue_depth", None, queued))
        sure = notices.sureness(now - before, policy.SMALLEST_EFFECT if onset else BOUND_SHARE, 0.95)
        since = "" if onset else ", since the first step"
        return Notice(
            kind.cause, (), int(after[0]) if onset else 0, None, sure if queued is None else max(sure, 0.9),
            kind.said.format(share=f"{100 * now:.0f}") + since, tuple(evidence), ratio,
            rivals=(("slow_dataloader", "every rank waits as long as the others"),),
        )  # fmt: skip

    def _queued(self, steps: Ints) -> float | None:
        """Batches that lay ready on a typical rank."""
        rows = range(self.run.frame.shape[1])
        values = [self.run.signals.gauge("train.data.queue_depth", r, int(steps[0]), int(steps[-1])) for r in rows]
        return finite_median(_joined(values))


def _joined(parts: list[Floats]) -> Floats:
    return np.concatenate(parts) if parts else np.zeros(0)
