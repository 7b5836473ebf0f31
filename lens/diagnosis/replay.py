"""What would the step take if the cause were gone? The step graph, run again with less self time.

Within a step each rank computes, enters a collective, leaves it when the last member has entered and the transfer
is done, and goes on. Replayed once as it was and once without the excess, the two differ by what the cause costs: a
slow rank that nobody waits for costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lens.diagnosis import policy
from lens.diagnosis.arrays import Array, Floats, Ints, starts_of
from lens.diagnosis.decompose import SECONDS, Frame
from lens.diagnosis.segments import Where
from lens.slots import NULL


def step_ratio(frame: Frame, extra: Floats, steps: Ints, less: Floats | None = None) -> float | None:
    """Mean step time as it was over mean step time without what was too long; None without a replay."""
    seconds = step_seconds(frame, extra, steps, less)
    return seconds[0] / seconds[1] if seconds is not None and seconds[1] > 0 else None


def step_seconds(
    frame: Frame,
    extra: Floats,
    steps: Ints,
    less: Floats | None = None,
    loading: Floats | None = None,
    ahead: Floats | None = None,
    behind: Floats | None = None,
) -> tuple[float, float] | None:
    """Mean step time as it was, and without the extra self time and transfer.

    extra: seconds that each rank took too long, spread over the step's self time [steps given, ranks]. steps: places
    of these steps. less: seconds that each transfer took too long [rows of Collectives]. loading: as extra, before the
    step's first collective. ahead: seconds that the self time right before each collective took too long, below 0 where
    it took too little [rows of Collectives]; behind: the same after the last collective [steps given, ranks].
    None where the records do not allow a replay (no collectives).
    """
    collectives, pieces = frame.collectives, frame.pieces
    if not len(collectives) or not len(steps):
        return None
    chosen = _sample(frame, len(steps))
    steps, extra = steps[chosen], extra[chosen]
    loading = np.zeros_like(extra) if loading is None else loading[chosen]
    place = np.full(frame.shape[0], -1)
    place[steps] = np.arange(len(steps))
    rows = np.flatnonzero(place[collectives.step] >= 0)
    if not len(rows):
        return None
    rows = rows[np.lexsort((pieces.start_ns[rows], collectives.row[rows], place[collectives.step[rows]]))]
    step, rank = place[collectives.step[rows]], collectives.row[rows]
    chain = step * frame.shape[1] + rank
    first = starts_of(chain)
    begun, ended = frame.start_ns[steps][step[first], rank[first]], frame.end_ns[steps][step[first], rank[first]]
    known = (begun != NULL) & (ended != NULL)
    start, end = pieces.start_ns[rows], pieces.end_ns[rows]
    previous = np.r_[0, end[:-1]]
    previous[first] = np.where(known, begun, start[first])
    own = np.maximum(start - previous, 0) * SECONDS
    last = np.r_[first[1:], len(rows)] - 1
    tail = np.where(known, np.maximum(ended - end[last], 0), 0) * SECONDS
    wait = pieces.wait[rows]
    transfer = (end - start) * SECONDS - wait
    instance = np.unique(collectives.instance[rows], return_inverse=True)[1]
    # A send that is buffered, or not waited for, is over before its receiver came: it waits for nobody.
    free = (end < collectives.last_entry_ns[rows]) | (collectives.is_async[rows] & (end == start))
    transfer = np.where(free, (end - start) * SECONDS, transfer)
    graph = _Graph(chain, first, last, step, instance, free, len(steps))
    lessened, tail_lessened = _without(
        own, tail, first, last, *(late.reshape(-1)[chain[first]] for late in (extra, loading))
    )
    if ahead is not None:
        lessened = np.maximum(lessened - ahead[rows], 0)
    if behind is not None:
        tail_lessened = np.maximum(tail_lessened - behind[chosen].reshape(-1)[chain[first]], 0)
    shorter = transfer if less is None else np.maximum(transfer - less[rows], 0)
    now, fixed = graph.step_times(own, tail, transfer), graph.step_times(lessened, tail_lessened, shorter)
    return float(now.mean()), float(fixed.mean())


@dataclass(frozen=True, eq=False)
class Excess:
    """Self time too long in some steps. extra: seconds [steps given, ranks]. at_begin: it lies before each step's first
    collective; where: else in which stretches, None where it is spread over the step."""

    extra: Floats
    at_begin: bool = False
    where: Where | None = None


def without(frame: Frame, steps: Ints, excesses: Sequence[Excess]) -> tuple[float, float] | None:
    """Mean step time as it was, and without all of these; None where the records do not allow a replay."""
    if not len(frame.collectives) or not len(steps):
        return None
    spread, loading, behind = np.zeros((3, len(steps), frame.shape[1]))
    ahead: Floats | None = None
    for excess in excesses:
        if excess.at_begin:
            loading += excess.extra
        elif excess.where is None:
            spread += excess.extra
        else:
            early, late, rest = excess.where.seconds(frame, steps, excess.extra)
            ahead = early if ahead is None else ahead + early
            behind += late
            spread += rest
    return step_seconds(frame, spread, steps, None, loading, ahead, behind)


def _sample(frame: Frame, steps: int) -> Ints:
    """Which of so many steps are replayed: at most as many as the answer needs, evenly chosen."""
    per_step = max(1, len(frame.collectives) // max(1, frame.shape[0]))
    count = int(np.clip(policy.REPLAY_PIECES // per_step, 4, policy.REPLAY_STEPS))
    return np.unique(np.linspace(0, steps - 1, min(count, steps)).astype(np.int64))


def _without(
    own: Floats, tail: Floats, first: Ints, last: Ints, extra: Floats, loading: Floats
) -> tuple[Floats, Floats]:
    """Self times with the excess of each chain taken out, first of all where it arose."""
    rest, early = (np.maximum(np.nan_to_num(late), 0) for late in (extra, loading))
    lessened = own.copy()
    lessened[first] -= np.minimum(early, lessened[first])
    total = np.add.reduceat(lessened, first) + tail
    kept = 1 - np.minimum(rest / np.maximum(total, 1e-12), 1)
    lengths = last - first + 1
    return lessened * np.repeat(kept, lengths), tail * kept


class _Graph:
    """Chains of collectives by (step, rank), tied to each other where ranks meet."""

    def __init__(
        self,
        chain: Ints,
        first: Ints,
        last: Ints,
        step: Ints,
        instance: Ints,
        free: Array,
        steps: int,
    ) -> None:
        self._first, self._last, self._steps = first, last, steps
        self._step_of_chain = step[first]
        self._instance, self._free = instance, free
        self._count = int(instance.max()) + 1
        self._depth = int(np.bincount(np.unique(chain, return_inverse=True)[1]).max())
        self._is_first = np.zeros(len(chain), bool)
        self._is_first[first] = True

    def step_times(self, own: Floats, tail: Floats, transfer: Floats) -> Floats:
        """Seconds from the common start of each step until its last rank ends."""
        left = np.zeros(len(own))
        for _ in range(4 * self._depth + 4):
            entered = own + np.where(self._is_first, 0.0, np.r_[0.0, left[:-1]])
            latest = np.zeros(self._count)
            np.maximum.at(latest, self._instance, entered)
            moved = np.where(self._free, entered, latest[self._instance]) + transfer
            if np.array_equal(moved, left):
                break
            left = moved
        done = left[self._last] + tail
        result = np.zeros(self._steps)
        np.maximum.at(result, self._step_of_chain, done)
        return result


def without_graph(durations: Floats, extra: Array) -> float | None:
    """The same ratio where no collectives were recorded: the step shrinks by what its slowest rank loses."""
    lost = np.nanmax(np.where(np.isfinite(extra), np.maximum(extra, 0), 0.0), axis=1)
    known = np.isfinite(durations)
    if not known.any():
        return None
    fixed = float(np.mean(np.maximum(durations[known] - lost[known], 0.0)))
    return float(durations[known].mean()) / fixed if fixed > 0 else None
