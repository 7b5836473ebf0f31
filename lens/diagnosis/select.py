"""Which records a diagnosis up to step N may see, and at which step each record becomes visible.

A record with a step is visible from its step on. A record without one (samples of devices, events, heartbeats) is
visible once a step span ended no earlier than it. When N is the run's last or an unfinished step, all is visible.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lens.diagnosis.arrays import Array, Ints
from lens.slots import NULL
from lens.tables import SCHEMA, STEP_BEARING, TIME_COLUMN, Tables


@dataclass(frozen=True)
class Timeline:
    """The steps of a run in order, and when each was over.

    steps: the numbers of all steps the records name, ascending [T].
    ended_ns: latest end of a step span with that number or a smaller one [T]; the smallest int64 where none ended.
    complete_from: index of the first step at which every record of the run is visible.
    """

    steps: Ints
    ended_ns: Ints
    complete_from: int

    @classmethod
    def of(cls, tables: Tables) -> Timeline:
        """Read the timeline from all records of a run."""
        steps = _named_steps(tables, STEP_BEARING)
        if not len(steps):
            steps = _named_steps(tables, tuple(SCHEMA))
        spans = tables.steps
        closed = spans["t1_ns"] != NULL
        ended = np.full(len(steps), NULL, np.int64)
        at = np.searchsorted(steps, spans["step"][closed])
        np.maximum.at(ended, at, spans["t1_ns"][closed])
        if not closed.any():
            # Large runs send a step's duration over all ranks instead of its spans.
            reduced = tables.vectors["metric"] == tables.code("step.duration")
            reduced &= tables.vectors["step"] != NULL
            at = np.searchsorted(steps, tables.vectors["step"][reduced])
            np.maximum.at(ended, at, tables.vectors["t_ns"][reduced])
        finished = np.flatnonzero(ended != NULL)
        return cls(steps, np.maximum.accumulate(ended), _complete_from(tables, steps, finished))

    def __len__(self) -> int:
        return len(self.steps)

    def index(self, upto_step: int | None) -> int:
        """Index of the last visible step; len(self) - 1 when all is visible, -1 when nothing is."""
        last = len(self.steps) - 1
        if upto_step is None or last < 0:
            return last
        index = int(np.searchsorted(self.steps, upto_step, "right")) - 1
        return last if index >= self.complete_from or upto_step > int(self.steps[-1]) else index

    def visible_from(self, step: Array, t_ns: Array) -> Ints:
        """For records with this step (or NULL) and time: the index of the step from which they are visible."""
        last = max(len(self.steps) - 1, 0)
        by_time = np.searchsorted(self.ended_ns, t_ns, "left")
        by_step = np.searchsorted(self.steps, step, "left")
        chosen: Ints = np.where(step == NULL, by_time, by_step)
        return np.minimum(chosen, last)


def through(tables: Tables, timeline: Timeline, upto_step: int | None) -> Tables:
    """The tables as a diagnosis up to this step sees them."""
    index = timeline.index(upto_step)
    if index == len(timeline) - 1:
        return tables
    result = Tables(strings=tables.strings, vector_values=tables.vector_values)
    for name, table in _tables_with_rows(tables):
        visible = timeline.visible_from(table["step"], table[TIME_COLUMN[name]]) <= index
        setattr(result, name, tables.select(name, visible))
    return result


def _tables_with_rows(tables: Tables) -> Iterator[tuple[str, dict[str, Array]]]:
    for name in SCHEMA:
        if tables.count(name):
            yield name, tables.table(name)


def _named_steps(tables: Tables, names: tuple[str, ...]) -> Ints:
    found = np.unique(np.concatenate([np.unique(tables.table(name)["step"]) for name in names]))
    steps: Ints = found[found != NULL].astype(np.int64)
    return steps


def _complete_from(tables: Tables, steps: Ints, finished: Ints) -> int:
    """Index of the first step that counts as last or unfinished.

    A step after which no step was finished by anyone is unfinished while a rank that began it has not ended it.
    """
    last = len(steps) - 1
    if not len(finished):
        return max(last, 0)
    newest = int(finished[-1])
    spans = tables.steps
    here = spans["step"] == steps[newest]
    is_open = here & (spans["t1_ns"] == NULL)
    begun, ended = spans["rank"][is_open], spans["rank"][here & ~is_open]
    return newest if np.setdiff1d(begun, ended).size else min(newest + 1, last)
