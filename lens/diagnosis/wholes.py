"""Hosts and pipeline stages that become slow as a whole: most of those they would be compared with are slow too.

A host of two, or a stage, is compared with its own past and with the ranks outside of it; where nobody is outside, with
its past alone. So much is common to all ranks of a run anyway that only what the cards themselves report counts here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lens.diagnosis import changes, measures, peers
from lens.diagnosis.arrays import Array, Floats, Ints, median
from lens.diagnosis.changes import Change
from lens.diagnosis.scenes import MOST_PEERS, Scene
from lens.diagnosis.signatures import UNMOVED, confirmed
from lens.diagnosis.topology import Topology

if TYPE_CHECKING:
    from lens.diagnosis.findings import Verdict

SAYS = {"power_cap": "power_cap_bit", "thermal_throttle": "thermal_bit", "power_brake": "power_brake_bit"}
"""Causes that a card tells of itself, whatever its peers do, and the measure by which it does."""
TOLD_BY = 0.9
"""Share of a set's cards that must tell it: one hot card among ranks that wait for it is no hot host."""
LARGE = 0.25
"""Share of its like from which a set moves their median."""
EACH = 0.5
"""Share of the set's excess that each of its ranks must show."""


MOST = 0.6
"""Share of a set's ranks that must be seen to be slow one by one before the whole of it is asked."""


@dataclass(frozen=True)
class Whole:
    """A set of ranks that left its past. rows: its places, ascending."""

    rows: tuple[int, ...]
    change: Change


def watch(compute: Floats, usual: Floats, topology: Topology) -> list[Whole]:
    """Changes of the typical self time of hosts, of stages and of the whole run. compute: seconds [steps, ranks]."""
    found = []
    for sets in _partitions(topology):
        typical = np.stack([median(compute[:, rows], axis=1) for rows in sets], axis=1)
        tracked = changes.track(typical, usual, [np.arange(len(sets))], True)
        found += [Whole(tuple(int(row) for row in sets[change.row]), change) for change in tracked]
    return found


def excess(values: Floats, rows: tuple[int, ...], before: Ints, after: Ints) -> tuple[Floats, Floats]:
    """How much longer each rank of a set takes than in its past, less what the ranks outside gained [after, rows];
    and its past [rows]. values: seconds [steps, ranks]."""
    usual, inside = median(values[before]), np.array(rows, np.int64)
    own = usual[inside]
    outside: Ints = np.setdiff1d(np.arange(values.shape[1]), inside)
    shared = np.ones(len(after))
    if len(outside):
        past = np.where(usual[outside] > 0, usual[outside], np.nan)
        common = median(values[np.ix_(after, outside)] / past, axis=1)
        shared = np.where(np.isfinite(common), common, 1.0)
    return values[np.ix_(after, inside)] - own * shared[:, None], own


def alike(extra: Floats, base: Floats) -> bool:
    """Whether all ranks of a set gained: extra [after, rows] over their past [rows]."""
    gained = median(extra) / base
    return bool(np.min(gained) >= EACH * np.median(gained))


def told_by_all(scene: Scene, cause: str) -> bool:
    """Whether the cards of a set say so, each of itself; of a large set, some of them are asked."""
    if cause not in SAYS:
        return False
    asked = scene.rows[:: max(1, len(scene.rows) // MOST_PEERS)]
    tell = measures.MEASURES[SAYS[cause]]
    levels = [tell(replace(scene, rows=(row,))).level for row in asked]
    return sum(level is not None and level > UNMOVED for level in levels) >= TOLD_BY * len(levels)


def told_sets(
    judged: list[Verdict], fates: list[tuple[str, set[int]]]
) -> list[tuple[tuple[int, ...], int, int | None, float]]:
    """Hosts and stages of which most ranks are slow for one reason that their cards tell: rows, onset, end, noise.

    In noise the ranks of one host do not seem to begin together; that their cards say the same makes them one.
    """
    told = [v for v in judged if v.finding.last is None and _told_by_card(v)]
    found: list[tuple[tuple[int, ...], int, int | None, float]] = []
    for cause in sorted({v.explained[0].cause for v in told}):
        for kind, places in fates:
            mine = [v for v in told if v.explained[0].cause == cause and set(v.finding.rows) <= places]
            onsets = sorted(v.finding.onset for v in mine for _ in v.finding.rows)
            if kind != "expert" and len(mine) > 1 and len(onsets) >= MOST * len(places):
                noise = max(v.finding.noise for v in mine)
                found.append((tuple(sorted(places)), onsets[len(onsets) // 2], None, noise))
    return found


def _told_by_card(verdict: Verdict) -> bool:
    """Whether ranks are slow for a reason that their own cards tell."""
    best = verdict.explained[0]
    return verdict.finding.feature == "compute" and best.cause in SAYS and confirmed(best)


def _partitions(topology: Topology) -> list[list[Array]]:
    """The hosts, the stages, and all ranks as one set, as far as a set of them weighs among its like."""
    ranks = np.arange(len(topology))
    like = {int(row): len(members) for members in peers.comparable(topology) for row in members}
    hosts, stages = topology.host_index(), np.array([-1 if s is None else s for s in topology.stage])
    result: list[list[Array]] = []
    for number in (hosts, stages, np.zeros(len(ranks), np.int64)):
        sets = [np.flatnonzero(number == one) for one in np.unique(number)]
        large = any(len(rows) > 1 and len(rows) > LARGE * like[int(rows[0])] for rows in sets)
        if large and not any(_same(sets, other) for other in result):
            result.append(sets)
    return result


def _same(sets: list[Array], others: list[Array]) -> bool:
    return len(sets) == len(others) and all(map(np.array_equal, sets, others))
