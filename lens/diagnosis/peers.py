"""Whom a rank may be compared with, and who was slower than its like since the first step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis import policy
from lens.diagnosis.arrays import Array, Floats, Ints, median, median_of_others, spread
from lens.diagnosis.topology import Topology

FEWEST_PEERS = 3
QUARTERS = 4


def comparable(topology: Topology) -> list[Array]:
    """Disjoint sets of rank places whose *changes* compare: the stages of the pipeline, or all where stages are small.

    Each rank is first compared with its own past, so cards of several makes may stand in one set.
    """
    stage = np.array([-1 if s is None else s for s in topology.stage], np.int64)
    sets = [np.flatnonzero(stage == number) for number in np.unique(stage)]
    if any(len(members) < FEWEST_PEERS for members in sets):
        return [np.arange(len(topology))] if len(topology) else []
    return sets


@dataclass(frozen=True)
class Standing:
    """A rank that takes longer than its like in every part of the run: there is no past to compare with.

    effect: least excess of any quarter, as a share of a usual step. noise: what the others differ by anyway.
    few: whether so few are like it that its card must say the same.
    """

    row: int
    effect: float
    noise: float
    few: bool = False


def standing(values: Floats, usual: float, topology: Topology, steps: Array) -> list[Standing]:
    """Ranks whose self time lies above the median of the others of their kind in each quarter of the steps.

    values: seconds [steps, ranks]. usual: a usual step in seconds. steps: places of the steps to judge.
    """
    found = []
    for number in np.unique(topology.kind):
        members: Ints = np.flatnonzero(topology.kind == number)
        if len(members) < 2:
            continue
        few = len(members) < FEWEST_PEERS
        parts = np.array_split(values[np.ix_(steps, members)], QUARTERS)
        levels = np.stack([median(part) for part in parts])
        others = median_of_others(levels)
        above = (levels - others) / usual
        whole = median(values[np.ix_(steps, members)])
        # Ranks of a kind that differ among themselves anyway set the bar for the one that differs most.
        typical = float(spread(whole)) / usual
        effect, noise = np.min(above, axis=0), 0.0 if few else 4 * typical
        for place in np.flatnonzero(effect > max(policy.STANDING_EFFECT_CONFIRMED, noise)).tolist():
            found.append(Standing(int(members[place]), float(effect[place]), noise, few))
    return found
