"""Time that a rank loses in pauses: garbage collection, compilation, logging, a stopped process.

Pauses live in the mean and the maximum; a median does not see them. The hook counts most of them itself, so they need
no comparison with the noise of step times: what a rank spent is known, and asked is only whether it is worth a word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lens.diagnosis import notices, policy
from lens.diagnosis.arrays import Floats, Ints, median
from lens.diagnosis.decompose import SECONDS
from lens.diagnosis.examine import Examiner
from lens.diagnosis.notices import Cause, Evidence, Notice
from lens.diagnosis.signatures import ADVICE

CAUSES = {
    "python_gc": Cause(ADVICE["python_gc"], absorbs=("compute", "host", "data", "h2d")),
    "recompilation": Cause(ADVICE["recompilation"], absorbs=("compute", "host")),
    "logging_overhead": Cause(ADVICE["logging_overhead"], absorbs=("host",)),
}

FEWEST_PAUSES = 3
AS_LONG = 0.3
"""Of the longest: what takes less is no pause like it."""
GROWN = 3.0
"""Collections that all ranks make alike are planned; they count once they grew by this factor."""
QUIET_PAUSES = 2.5
"""So many pauses would have been due in a past that is to count as one without."""
BAR = 0.04
"""Share of a usual step that a rank must lose a step; what then costs the run less than 3 % is left out."""
WINDOWS = (10, 20, 40, 80, 160, 320, 640)
"""Lengths over which the loss of the newest steps is looked at, beside that of all steps."""
STANDING_SHARE = 0.10
"""What a rank spends since the first step, and always spent, is its way of working below this share."""


@dataclass(frozen=True)
class Kind:
    """One kind of pause. metric: in the evidence. said: what the ranks do. shared: whether ranks that all do the same
    are a cause too."""

    cause: str
    metric: str
    said: str
    seconds: Callable[[Examiner], Floats | None]
    shared: bool


def _counted(name: str, factor: float) -> Callable[[Examiner], Floats | None]:
    def read(run: Examiner) -> Floats | None:
        values = run.frame.count.get(name)
        return None if values is None else np.nan_to_num(values) * factor

    return read


def collected(run: Examiner) -> Floats | None:
    """Seconds of collection by step [steps, ranks]; from the counter where steps do not bear them."""
    counted = _counted("gc_ns", SECONDS)(run)
    return spread_over_steps(run, "process.gc.time") if counted is None else counted


def spread_over_steps(run: Examiner, metric: str) -> Floats | None:
    """What a counter grew by, laid evenly over the steps between its samples."""
    series = run.signals.series(metric)
    if series is None:
        return None
    same = np.flatnonzero((np.diff(series.row) == 0) & (np.diff(series.step) > 0))
    since, until, row = series.step[same], series.step[same + 1], series.row[same]
    pace = np.maximum(np.diff(series.value)[same], 0) / (until - since)
    rises = np.zeros((run.frame.shape[0] + 1, run.frame.shape[1]))
    np.add.at(rises, (since + 1, row), pace)
    np.add.at(rises, (until + 1, row), -pace)
    spent: Floats = np.cumsum(rises, axis=0)[:-1]
    # What is left of sums that cancel is nothing.
    return np.where(spent > 1e-9 * max(1e-30, float(spent.max(initial=0.0))), spent, 0.0)


def grown_around(run: Examiner, metric: str) -> Floats | None:
    """What a counter grew by from its last sample before each step to its first one after it [steps, ranks]."""
    series = run.signals.series(metric)
    if series is None:
        return None
    same = np.flatnonzero(np.diff(series.row) == 0)
    since, until, row = series.step[same], series.step[same + 1], series.row[same]
    grew = np.maximum(np.diff(series.value)[same], 0)
    rises = np.zeros((run.frame.shape[0] + 1, run.frame.shape[1]))
    np.add.at(rises, (since, row), grew)
    np.add.at(rises, (until + 1, row), -grew)
    grown: Floats = np.maximum(np.cumsum(rises, axis=0)[:-1], 0.0)
    return grown


def _compiled(run: Examiner) -> Floats | None:
    """Seconds that steps with a recompilation took longer than the rank's others."""
    count = run.frame.count.get("recompiles")
    if count is None:
        return None
    hit = np.nan_to_num(count) > 0
    own = run.frame.self_time
    # Judged by steps before it alone: a later step must not change what was said about an earlier one.
    spent = np.zeros(own.shape)
    for step in np.flatnonzero(hit.any(axis=1)).tolist():
        since = max(0, step - 64)
        usual = median(np.where(hit[since:step], np.nan, own[since:step])) if step else np.zeros(own.shape[1])
        spent[step] = np.where(hit[step], np.nan_to_num(np.maximum(own[step] - usual, 0)), 0.0)
    return spent


KINDS = (
    Kind("python_gc", "process.gc.time", "spend {now} a step in Python's garbage collector, in pauses of {each}", collected, False),
    Kind("recompilation", "train.recompiles", "compile again and again, which takes {now} a step, {each} at a time", _compiled, True),
    Kind("logging_overhead", "train.log.time", "spend {now} a step on logging", _counted("log_ns", SECONDS), True),
)  # fmt: skip


@dataclass(frozen=True)
class Pauses:
    """Seconds that each rank lost in each step to each kind of pause."""

    run: Examiner
    spent: dict[str, Floats]

    @classmethod
    def of(cls, run: Examiner) -> Pauses:
        """Read what was counted."""
        read = {kind.cause: kind.seconds(run) for kind in KINDS}
        return cls(run, {cause: values for cause, values in read.items() if values is not None})

    def at(self, place: int) -> list[Notice]:
        """Ranks whose pauses cost too much."""
        steps = notices.judged_steps(place)
        unit = self.run.usual_seconds(steps)
        if len(steps) < policy.FIRST_JUDGED_STEPS or not unit > 0:
            return []
        found = []
        for kind in KINDS:
            if kind.cause in self.spent:
                notice = self._judge(kind, self.spent[kind.cause][steps], steps, unit)
                if notice is not None:
                    found.append(notice)
        return found

    def _judge(self, kind: Kind, spent: Floats, steps: Ints, unit: float) -> Notice | None:
        episodes = [
            episode for row in np.flatnonzero(_worst(spent) > BAR * unit).tolist()
            if (episode := self._episode(kind, spent, row, unit)) is not None
        ]  # fmt: skip
        if not episodes:
            return None
        lead = max(episodes, key=lambda e: (e.share, -e.row))
        together = [e for e in episodes if e.share >= 0.4 * lead.share and e.standing == lead.standing]
        rows = notices.listed([e.row for e in together])
        onset = min(e.onset for e in together)
        after = steps[onset:]
        extra = np.zeros((len(after), spent.shape[1]))
        extra[:, rows] = np.maximum(spent[onset:, rows] - [e.before for e in together], 0)
        ratio = self.run.cost_ratio(after, extra, before=steps[:onset])
        if ratio is None or ratio - 1 < policy.WORTH_KEEPING:
            return None
        pauses = spent[onset:, rows][spent[onset:, rows] >= AS_LONG * lead.pause]
        now = float(spent[onset:, rows].mean())
        before = float(np.mean([e.before for e in together]))
        said = kind.said.format(now=notices.short(now), each=notices.short(float(pauses.mean())))
        return Notice(
            kind.cause, rows, 0 if lead.standing else int(after[0]), None,
            notices.sureness(lead.share, BAR, 0.97 if not lead.standing else 0.9), said,
            (Evidence(kind.metric, before, now),), ratio,
        )  # fmt: skip

    def _episode(self, kind: Kind, spent: Floats, row: int, unit: float) -> _Episode | None:
        """Since when a rank loses more, and whether that is its own; None when not."""
        paused = np.flatnonzero(spent[:, row] >= AS_LONG * spent[:, row].max())
        if len(paused) < FEWEST_PAUSES:
            return None
        # Pauses come one by one: the newest of them alone is always far above all steps before it.
        onset, before, now = notices.begins(spent[:, row], latest=int(paused[-FEWEST_PAUSES]))
        often = (spent[onset:, row] >= AS_LONG * spent[onset:, row].max()).mean()
        # Before a pause that was due anyway there is none either: the time without must be too long for chance.
        standing = onset * often < QUIET_PAUSES or before > now / GROWN
        if standing:
            onset, before, now = 0, 0.0, float(spent[:, row].mean())
        part = spent[onset:, row]
        if (part >= AS_LONG * part.max()).sum() < FEWEST_PAUSES:
            return None
        others = np.delete(spent[onset:], row, axis=1).mean(axis=0)
        shared = float(np.median(others)) if len(others) else 0.0
        if kind.shared or (not standing and shared > now / GROWN):
            # What all ranks do is a cause when it is new, or when nobody plans it.
            shared = 0.0
        share = (now - max(before, shared)) / unit
        if share < (STANDING_SHARE if standing and kind.shared else BAR):
            return None
        return _Episode(row, onset, before, share, float(part.max()), standing)


@dataclass(frozen=True)
class _Episode:
    row: int
    onset: int
    before: float
    share: float
    pause: float
    standing: bool


def _worst(spent: Floats) -> Floats:
    """The highest mean loss of each rank over the newest steps, for several numbers of them [ranks]."""
    total = np.cumsum(spent, axis=0)
    worst: Floats = total[-1] / len(spent)
    for length in WINDOWS:
        if length < len(spent):
            worst = np.maximum(worst, (total[-1] - total[-1 - length]) / length)
    return worst
