"""A finding with its surroundings, and the form of what is measured there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lens.diagnosis.arrays import Array, Floats, Ints
from lens.diagnosis.decompose import Frame
from lens.diagnosis.routing import ExpertLoad
from lens.diagnosis.signals import Signals

MOST_PEERS = 64
ONSET_MARGIN_STEPS = 8
"""An onset in noise is found this many steps late at worst; samples taken there belong to neither side."""


@dataclass(frozen=True)
class Measure:
    """One feature around a finding. metric names it in the evidence; title in sentences; unit in both."""

    metric: str
    title: str
    unit: str
    baseline: float | None
    observed: float | None
    level: float | None

    @property
    def effect(self) -> float | None:
        """Relative change, None where there is nothing to relate it to."""
        if self.baseline is None or self.observed is None or self.baseline == 0:
            return None
        return self.observed / self.baseline - 1


@dataclass(frozen=True)
class Scene:
    """A finding's surroundings. rows: its ranks. before, after: places of steps. extra_s: its excess in seconds per
    step; ratio: self time after over before; step_s: a step's duration after."""

    frame: Frame
    signals: Signals
    load: ExpertLoad | None
    features: dict[str, Floats]
    rows: tuple[int, ...]
    before: Ints
    after: Ints
    upto: int
    extra_s: float
    ratio: float
    step_s: float

    @cached_property
    def others(self) -> Array:
        """All ranks that the finding does not name."""
        return np.setdiff1d(np.arange(len(self.frame.topology)), self.rows)

    @cached_property
    def like(self) -> list[int]:
        """Places of some of the ranks of the same kind that the finding does not name."""
        kind = self.frame.topology.kind
        alike = np.flatnonzero(np.isin(kind, kind[list(self.rows)]))
        # A median of so many is as good as one of all.
        return [int(row) for row in alike[:: max(1, len(alike) // MOST_PEERS)] if row not in self.rows]

    @property
    def surely_before(self) -> tuple[int, int]:
        """First and last place before an onset that may be some steps late: no sample of the finding is among them."""
        low, high = bounds(self.before)
        return low, high - ONSET_MARGIN_STEPS


def bounds(steps: Ints) -> tuple[int, int]:
    """First and last place of a run of steps; an empty range where there are none."""
    return (int(steps[0]), int(steps[-1])) if len(steps) else (1, 0)
