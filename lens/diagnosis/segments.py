"""Where within its steps a rank loses time: before which collective, or after the last one.

Ranks wait at the next collective for whoever is late there, so the same excess costs more where it lies in one stretch
of self time than where it is spread over all. A stretch is known by its number in the step; how long it usually takes
is seen in the steps before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis.arrays import Array, Floats, Ints, median
from lens.diagnosis.decompose import SECONDS, Frame
from lens.slots import NULL

MOST_RANKS = 64
"""Of more ranks the excess is taken to be spread over the step."""
LEAST_SEEN = 0.3
"""Share of the excess that the stretches together must show, else it is not known where it lies."""
FEWEST = 4
"""So many steps before tell what a stretch usually takes."""
NOW_AND_THEN = 0.5
"""An excess in fewer of the steps is looked for in each of them, else in their mean."""


@dataclass(frozen=True, eq=False)
class Where:
    """Shares of a rank's excess in a step. ahead: in the self time right before each collective [rows of Collectives].
    behind: after the last one [steps, ranks]. known: where the shares are known and add to 1; elsewhere they are 0."""

    ahead: Floats
    behind: Floats
    known: Array

    @classmethod
    def of(cls, frame: Frame, before: Ints, after: Ints, extra: Floats) -> Where | None:
        """Lay the stretches of the ranks with an excess beside what they took before.

        extra: seconds too long [after, ranks]. None where nothing can be laid side by side.
        """
        rows = np.flatnonzero((extra > 0).any(axis=0))
        if not len(frame.collectives) or not 0 < len(rows) <= MOST_RANKS:
            return None
        where = cls(np.zeros(len(frame.collectives)), np.zeros(frame.shape), np.zeros(frame.shape, bool))
        begins = np.searchsorted(frame.collectives.row, np.append(rows, rows + 1)).reshape(2, -1)
        for row, first, last in zip(rows.tolist(), *begins.tolist(), strict=True):
            if last > first:
                where._place(frame, _Stretches.of(frame, row, first, last), before, after, extra[:, row])
        return where if where.known.any() else None

    def _place(self, frame: Frame, stretches: _Stretches, before: Ints, after: Ints, extra: Floats) -> None:
        """Share out the excess of one rank [after]."""
        touched = extra > 0
        if touched.mean() < NOW_AND_THEN:
            before, after, extra = np.concatenate([before, after[~touched]]), after[touched], extra[touched]
        past, present = stretches.at(before), stretches.at(after)
        same = stretches.counted[after]
        if len(past) < FEWEST or not same.any():
            return
        usual, total = median(past), float(extra[same].mean())
        if touched.mean() < NOW_AND_THEN:
            gained = np.maximum(present - usual, 0)
        else:
            usual = past.mean(axis=0)
            # What all stretches gained alike, with those of other ranks, is no excess.
            common = max(0.0, (float(present.sum(axis=1).mean()) - total) / max(float(usual.sum()), 1e-12))
            error = np.sqrt(past.var(axis=0) / len(past) + present.var(axis=0) / len(present))
            gained = np.maximum(present.mean(axis=0) - common * usual - error, 0)[None, :]
        whole = gained.sum(axis=1, keepdims=True)
        shares = np.broadcast_to(gained / np.where(whole > 0, whole, np.inf), present.shape)
        sure = np.broadcast_to(whole[:, 0] >= LEAST_SEEN * total, len(present))
        steps = after[same][sure]
        at = stretches.first[steps][:, None] + np.arange(shares.shape[1] - 1)
        self.ahead[at] = shares[sure][:, :-1]
        self.behind[steps, stretches.row] = shares[sure][:, -1]
        self.known[steps, stretches.row] = True

    def seconds(self, frame: Frame, steps: Ints, extra: Floats) -> tuple[Floats, Floats, Floats]:
        """The excess of these steps [steps given, ranks] as seconds before each collective [rows of Collectives], after the
        last one [steps given, ranks], and spread over the step [steps given, ranks]."""
        whole = np.zeros(frame.shape)
        whole[steps] = np.nan_to_num(extra)
        ahead = self.ahead * whole[frame.collectives.step, frame.collectives.row]
        return ahead, (self.behind * whole)[steps], np.where(self.known[steps], 0.0, extra)


@dataclass(frozen=True)
class _Stretches:
    """Self times of one rank. first: of each step, its first row of Collectives. counted: steps with the usual number of
    collectives. own: before each collective of those steps and after the last, by step [steps, collectives + 1]."""

    row: int
    first: Ints
    counted: Array
    own: Floats

    @classmethod
    def of(cls, frame: Frame, row: int, first: int, last: int) -> _Stretches:
        """Read the rows first … last - 1 of Collectives, all of this rank."""
        steps, mine = frame.shape[0], slice(first, last)
        step = frame.collectives.step[mine]
        count = np.bincount(step, minlength=steps)
        usual = int(np.bincount(count[count > 0]).argmax())
        begin, end = frame.start_ns[:, row], frame.end_ns[:, row]
        counted = (count == usual) & (begin != NULL) & (end != NULL)
        # Steps follow each other: rows of a step lie side by side, in the order of their starts.
        counted &= bool((np.diff(step) >= 0).all())
        place = first + np.concatenate([[0], np.cumsum(count)[:-1]])
        at = place[counted][:, None] + np.arange(usual)
        left = np.concatenate([begin[counted][:, None], frame.pieces.end_ns[at]], axis=1)
        until = np.concatenate([frame.pieces.start_ns[at], end[counted][:, None]], axis=1)
        own = np.zeros((steps, usual + 1))
        own[counted] = np.maximum(until - left, 0) * SECONDS
        return cls(row, place, counted, own)

    def at(self, steps: Ints) -> Floats:
        """Self times of those of these steps that have the usual number of collectives."""
        result: Floats = self.own[steps[self.counted[steps]]]
        return result
