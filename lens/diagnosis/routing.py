"""What the routers send where: tokens by step, layer and expert, and what arrives at each rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis.arrays import Array, Floats, Ints, pack, starts_of
from lens.diagnosis.select import Timeline
from lens.diagnosis.topology import Topology
from lens.slots import NULL
from lens.tables import Tables


@dataclass(frozen=True)
class Sent:
    """Vectors of tokens by expert: their rows in the table, and each one's places of step and layer and its rank's place
    (-1 = all ranks). group: expert-parallel group of each rank and of nobody [ranks + 1]."""

    tables: Tables
    rows: Ints
    step: Ints
    layer: Ints
    sender: Ints
    group: Ints


@dataclass(frozen=True)
class ExpertLoad:
    """Tokens for experts, before dropping; NaN = unknown.

    tokens: that arrive at each rank's experts, summed over layers [steps, ranks]. routed: for each expert over all
    ranks [steps, layers, experts]. layers: their numbers. position: place in its expert-parallel group of each
    expert's owner [experts]; place: of each rank, -1 = in none [ranks]. sent: what was told, vector by vector.
    """

    tokens: Floats
    routed: Floats
    layers: tuple[int, ...]
    position: Ints
    place: Ints
    sent: Sent

    @classmethod
    def of(cls, tables: Tables, timeline: Timeline, topology: Topology) -> ExpertLoad | None:
        """Sum what the routers of each expert-parallel group send; None where no router tells."""
        table = tables.vectors
        rows = np.flatnonzero((table["metric"] == tables.code("moe.expert.tokens")) & (table["length"] > 0))
        if not len(rows) or not len(timeline):
            return None
        experts = int(np.bincount(table["length"][rows]).argmax())
        rows = rows[(table["length"][rows] == experts) & (table["step"][rows] != NULL)]
        step = np.minimum(np.searchsorted(timeline.steps, table["step"][rows]), len(timeline) - 1)
        rows = rows[timeline.steps[step] == table["step"][rows]]
        if not len(rows):
            return None
        # What was sent twice stands once; several micro-batches of a step add up.
        sent = pack(*(table[name][rows] for name in ("step", "rank", "layer", "t_ns")))
        rows = rows[np.unique(sent, return_index=True)[1]]
        step = np.searchsorted(timeline.steps, table["step"][rows])
        flat = tables.vector_values[table["offset"][rows][:, None] + np.arange(experts)]
        layers, layer = np.unique(table["layer"][rows], return_inverse=True)
        routed = _sums(step * len(layers) + layer, flat, len(timeline) * len(layers))
        groups = [members for name, members in topology.members.items() if name.split("/")[0] == "ep"]
        position = positions(topology, experts, max((len(members) for members in groups), default=1))
        group, place = np.full((2, len(topology) + 1), -1, np.int64)
        for number, members in enumerate(groups):
            at = topology.row(np.array(members, np.int64))
            group[at], place[at] = number, np.arange(len(members))
        sender = np.where(table["rank"][rows] < 0, -1, topology.row(table["rank"][rows]))
        arrived = _arrivals(flat, step, sender, position, group, place, len(timeline))
        return cls(
            arrived,
            routed.reshape(len(timeline), len(layers), experts),
            tuple(layers.tolist()),
            position,
            place[:-1],
            Sent(tables, rows, step, layer, sender, group),
        )

    def arrived(self, steps: Ints) -> Floats:
        """Tokens that arrive at each rank's experts of each layer in these steps [steps given, layers, ranks]."""
        sent, experts, layers = self.sent, len(self.position), len(self.layers)
        at = np.searchsorted(steps, sent.step)
        mine = np.flatnonzero(steps[np.minimum(at, len(steps) - 1)] == sent.step)
        flat = sent.tables.vector_values[
            sent.tables.vectors["offset"][sent.rows[mine]][:, None] + np.arange(experts)
        ]
        cell = at[mine] * layers + sent.layer[mine]
        place = np.append(self.place, -1)
        found = _arrivals(flat, cell, sent.sender[mine], self.position, sent.group, place, len(steps) * layers)
        return found.reshape(len(steps), layers, -1)

    def layers_of(self, ranks: int) -> Array:
        """Which layers the routers of each rank told of; all, where they told for all ranks together [ranks, layers]."""
        result = np.zeros((ranks, len(self.layers)), bool)
        own = self.sent.sender >= 0
        result[self.sent.sender[own], self.sent.layer[own]] = True
        result[~result.any(axis=1)] = True
        return result

    def owners(self, expert: int) -> tuple[int, ...]:
        """Rows of the ranks that hold an expert, one of each expert-parallel group."""
        return tuple(np.flatnonzero(self.place == self.position[expert]).tolist())


def positions(topology: Topology, experts: int, group_size: int) -> Ints:
    """Owner of each expert as declared, else in equal blocks."""
    owner = topology.experts.get("owner")
    if isinstance(owner, list) and len(owner) == experts:
        return np.array(owner, np.int64)
    return np.arange(experts) // max(1, experts // group_size)


def _arrivals(
    flat: Floats, step: Ints, sender: Ints, position: Ints, group: Ints, place: Ints, steps: int
) -> Floats:
    """Tokens for each rank's experts [steps, ranks]."""
    ranks = len(place) - 1
    arrived = np.full((steps, ranks), np.nan)
    groups = int(group.max()) + 1
    if not groups:
        return arrived
    owned = np.stack([flat[:, position == owner].sum(axis=1) for owner in range(int(position.max()) + 1)], axis=1)
    within = np.where(sender >= 0, group[sender], -1)
    by_group = _sums(np.where(within >= 0, within * steps + step, -1), owned, groups * steps)
    # A vector without rank is summed over all ranks: it reaches every group's owner.
    everywhere = _sums(np.where(sender < 0, step, -1), owned, steps)
    by_group = by_group.reshape(groups, steps, -1)
    rows = np.flatnonzero((place[:-1] >= 0) & (place[:-1] < owned.shape[1]))
    near, far = by_group[group[rows], :, place[rows]].T, everywhere[:, place[rows]]
    known = np.isfinite(near) | np.isfinite(far)
    arrived[:, rows] = np.where(known, np.nan_to_num(near) + np.nan_to_num(far), np.nan)
    return arrived


def _sums(cell: Ints, values: Floats, cells: int) -> Floats:
    """Sums of rows of values by cell, NaN where a cell has none; cell -1 counts nowhere [cells, columns]."""
    total = np.full((cells, values.shape[1]), np.nan)
    counted = np.flatnonzero(cell >= 0)
    if len(counted):
        order = counted[np.argsort(cell[counted], kind="stable")]
        first = starts_of(cell[order])
        total[cell[order[first]]] = np.add.reduceat(values[order], first, axis=0)
    return total


def drops(tables: Tables, timeline: Timeline) -> tuple[Floats, Floats] | None:
    """Tokens dropped and tokens routed in each step over all ranks and layers that tell both; None where none does.

    From counters that only grow: a step after one that is not known, or after a restart, is NaN [steps].
    """
    grown: list[Floats] = []
    for metric in ("moe.tokens.dropped", "moe.tokens.routed"):
        rows = np.flatnonzero((tables.samples["metric"] == tables.code(metric)) & (tables.samples["step"] != NULL))
        rank, labels, step = (tables.samples[name][rows] for name in ("rank", "labels", "step"))
        rows = rows[np.lexsort((tables.samples["t_ns"][rows], step, labels, rank))]
        rank, labels, step = (tables.samples[name][rows] for name in ("rank", "labels", "step"))
        growth = np.diff(tables.samples["value"][rows])
        follows = (np.diff(rank) == 0) & (np.diff(labels) == 0) & (np.diff(step) == 1) & (growth >= 0)
        at = np.searchsorted(timeline.steps, step[1:][follows])
        inside = at < len(timeline)
        if not inside.any():
            return None
        total = np.bincount(at[inside], growth[follows][inside], len(timeline)).astype(np.float64)
        total[np.bincount(at[inside], minlength=len(timeline)) == 0] = np.nan
        grown.append(total)
    return grown[0], grown[1]
