"""Checkpoints that take too long: longer than before, longer than the peers', or too much of the run.

A checkpoint that all ranks write at their usual pace is healthy, whatever it costs below a tenth of the run. What
counts is a rank's own time in it: who waits for a slow writer in a barrier of the same phase is its victim, and how long
a save took in which the collector, or the quota of its container, may have had most of the time is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis import notices, pauses, policy
from lens.diagnosis.arrays import Floats, Ints, mean, median, median_of_others
from lens.diagnosis.decompose import SECONDS
from lens.diagnosis.examine import Examiner
from lens.diagnosis.notices import Cause, Evidence, Notice
from lens.slots import NULL

CAUSES = {
    "checkpoint_stall": Cause(
        "Look at the storage that {ranks} write{s} checkpoints to, save asynchronously, or save less often.",
        absorbs=("compute", "host"),
    ),
}
GROWN = 3.0
"""A save this many times as long as before, or as the peers', has stalled."""
GROWN_ONCE = 5.0
"""A single long save must be longer still: storage has its moments."""
TOO_MUCH = 0.10
"""Share of the run that saves may take."""
NOT_SAVING = 0.5
"""Share of a save that garbage collections of its step, or stops by a quota around it, must have taken for it to tell
nothing of storage."""
FEWEST_SAVES = 3
"""Saves before their share of the run, or of what peers take, is judged."""


@dataclass(frozen=True)
class Saves:
    """Checkpoints of the run.

    steps: places of steps in which any rank saved, ascending [K]. own: seconds of its own that each rank spent in
    it, NaN = did not save [K, ranks]. blocking: whether the step waits for it; background saves cost nothing by
    themselves.
    """

    run: Examiner
    steps: Ints
    own: Floats
    blocking: bool

    @classmethod
    def of(cls, run: Examiner) -> Saves:
        """Read the phases; where there are none, the background saves."""
        own = run.frame.own.get("checkpoint")
        blocking = own is not None
        if own is None:
            own = _in_background(run)
        for elsewhere in (pauses.collected(run), pauses.grown_around(run, "container.cpu.throttled.time")):
            if elsewhere is not None:
                own = np.where(elsewhere > NOT_SAVING * np.nan_to_num(own), np.nan, own)
        steps = np.flatnonzero((np.nan_to_num(own) > 0).any(axis=1))
        return cls(run, steps, np.where(own[steps] > 0, own[steps], np.nan), blocking)

    def at(self, place: int) -> list[Notice]:
        """The stall that the saves up to a place show."""
        known = int(np.searchsorted(self.steps, place, "right"))
        if not known:
            return []
        stall = self._grown(known) or self._slower(known) or self._too_much(known)
        return [] if stall is None else self._told(stall, known, place)

    def _grown(self, known: int) -> _Stall | None:
        """Saves of some ranks (most often all) that take several times as long as before."""
        own = self.own[:known]
        best: _Stall | None = None
        for first in range(1, known):
            single = known - first == 1
            if single and first == 1:
                continue
            before, after = median(own[:first]), mean(own[first:])
            shortest = np.fmin.reduce(own[first:], axis=0)
            # Comparisons with NaN, of ranks that did not save on either side, are false.
            stalled = (after >= (GROWN_ONCE if single else GROWN) * before) & (shortest >= 2 * before)
            excess = np.where(stalled, after - before, 0.0)
            weight = float(excess.max()) * (known - first)
            if weight > 0 and (best is None or weight > best.weight):
                rows = notices.listed(np.flatnonzero(excess >= 0.3 * excess.max()))
                times = float((after / np.where(before > 0, before, np.nan))[list(rows)].min())
                best = _Stall(rows, first, before, weight, times, "before")
        return best

    def _slower(self, known: int) -> _Stall | None:
        """Ranks whose saves take several times as long as those of their peers."""
        own = self.own[:known]
        saved = np.isfinite(own).sum(axis=0)
        if (saved >= 2).sum() < 3 or known < 2:
            return None
        usual = median(median_of_others(own))
        ratio = np.where((saved >= 2) & (usual > 0), median(own) / np.where(usual > 0, usual, 1.0), 0.0)
        rows = notices.listed(np.flatnonzero(ratio >= GROWN))
        if not rows or len(rows) > len(ratio) / 2:
            return None
        weight = float(np.nansum(own[:, rows] - usual[list(rows)], axis=0).max())
        return _Stall(rows, 0, usual, weight, float(ratio[list(rows)].min()), "those of their peers")

    def _too_much(self, known: int) -> _Stall | None:
        """Saves that take too much of the run, for those who write them."""
        if known < FEWEST_SAVES or not self.blocking:
            return None
        usual = np.nan_to_num(mean(self.own[:known]))
        rows = notices.listed(np.flatnonzero(usual >= 0.5 * usual.max()))
        # From the first save to the last: as many intervals as saves less one.
        spent = float(usual[list(rows)].mean()) * (known - 1)
        between = float(np.nansum(self.run.usual[int(self.steps[0]) + 1 : int(self.steps[known - 1]) + 1]))
        if not between > 0 or spent / between < TOO_MUCH:
            return None
        return _Stall(rows, 0, np.zeros(len(usual)), spent, spent / between, None)

    def _told(self, stall: _Stall, known: int, place: int) -> list[Notice]:
        onset = int(self.steps[stall.first]) if stall.first else 0
        after = np.arange(max(onset, policy.WARM_UP_STEPS), place + 1)
        places = self.steps[stall.first : known]
        inside = places >= after[0]
        extra = np.zeros((len(after), self.run.frame.shape[1]))
        rows = list(stall.rows)
        longer = np.nan_to_num(self.own[stall.first : known][:, rows] - stall.before[rows])
        extra[np.ix_(places[inside] - after[0], rows)] = np.maximum(longer[inside], 0)
        ratio = self._cost(after, extra)
        if ratio is None or ratio - 1 < policy.WORTH_KEEPING:
            return []
        now = float(np.nanmean(self.own[stall.first : known][:, rows]))
        if stall.than is None:
            said = f"checkpoints take {100 * stall.times:.0f} % of the run, {notices.short(now)} each"
            before, bar = None, TOO_MUCH
        else:
            said = f"checkpoints take {notices.short(now)}, {stall.times:.1f} times as long as {stall.than}"
            before, bar = float(np.nanmean(stall.before[rows])), GROWN
        confidence = notices.sureness(stall.times, bar) * (1.0 if known - stall.first > 1 else 0.85)
        return [
            Notice(
                "checkpoint_stall", stall.rows, onset, None, confidence, said,
                (Evidence("train.checkpoint.duration", before, now),), ratio,
            )
        ]  # fmt: skip

    def _cost(self, after: Ints, extra: Floats) -> float | None:
        """What the stall costs; a background save only as far as its steps became longer."""
        if self.blocking:
            return self.run.cost_ratio(after, extra)
        inside = (extra > 0).any(axis=1)
        durations = self.run.usual[after]
        usual = float(np.nanmedian(durations[~inside])) if (~inside).any() else np.nan
        total = float(np.nansum(durations))
        lost = float(np.nansum(np.maximum(durations[inside] - usual, 0)))
        return total / (total - lost) if total > lost else None


@dataclass(frozen=True)
class _Stall:
    """rows: who stalls. first: number of the first long save. before: what a save should take [ranks]. weight: seconds
    lost so far. times: saves over what they should take; the share of the run where than is None."""

    rows: tuple[int, ...]
    first: int
    before: Floats
    weight: float
    times: float
    than: str | None


def _in_background(run: Examiner) -> Floats:
    """Seconds of saves that run beside the steps, at the step in which they began [steps, ranks]."""
    own = np.zeros(run.frame.shape)
    table, tables = run.tables.spans, run.tables
    rows = np.flatnonzero((table["kind"] == tables.code("checkpoint")) & (table["t1_ns"] != NULL))
    rows = rows[table["rank"][rows] >= 0]
    if len(rows) and len(run.timeline):
        step = run.timeline.visible_from(table["step"][rows], table["t0_ns"][rows])
        seconds = (table["t1_ns"][rows] - table["t0_ns"][rows]) * SECONDS
        np.maximum.at(own, (step, run.topology.row(table["rank"][rows])), seconds)
    return own
