"""Where a link fault sits: every port, card link, host, switch and the whole fabric, weighed by the streams it touches.

A fault shows in every stream that crosses its place and in no other. So each stream speaks for the places it
crosses when it became slower, and against them when it did not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lens.diagnosis.arrays import Floats, Ints
from lens.diagnosis.topology import Topology
from lens.diagnosis.transfers import Transfers

CARD, PORT, HOST, SWITCH, UPLINK, FABRIC = "card", "port", "host", "switch", "uplink", "fabric"
PRIOR = {PORT: 0.0, CARD: -0.3, HOST: -1.0, SWITCH: -1.0, UPLINK: -1.5, FABRIC: -0.7}
SEVERAL_PORTS = -2.0
"""A host whose ranks have ports of their own: that all of them became slow at once is unlikely."""
SHARED_PORT = -0.5
"""One rank of several behind a port: possible, but the port itself is likelier."""
INSIDE = 0.5
"""Weight of what became slower within a host when a port is suspected: some runs send all of it through the port."""


REACH, ALIKE, MOST_RIVALS = 4.0, 0.3, 5
"""Places this much less likely (in logarithms) than the best are not judged; places this near to each other are
alike, and more of them than can be listed are one place that nobody knows."""


@dataclass(frozen=True)
class Place:
    """rows: ranks (places) behind it; () for the whole fabric. component: its name, None when it has none. among:
    where it is one of many alike, and nobody can tell which: the ranks behind all of them."""

    scope: str
    rows: tuple[int, ...]
    component: str | None
    prior: float
    among: tuple[int, ...] = ()


@dataclass(frozen=True)
class Places:
    """All candidates of a run, and which streams must, and which may, be slower when one of them is.

    behind_place, behind_row: pairs of a place and a rank behind it; must_place, must_stream and may_place,
    may_stream likewise.
    """

    places: list[Place]
    behind_place: Ints
    behind_row: Ints
    must_place: Ints
    must_stream: Ints
    may_place: Ints
    may_stream: Ints

    @classmethod
    def of(cls, topology: Topology, transfers: Transfers) -> Places:
        """Enumerate them from the run's topology."""
        places = _enumerate(topology)
        size = len(transfers)
        crosses = np.array([stream.crosses for stream in transfers.streams], bool)
        far = np.array([_far(topology, stream.rows) for stream in transfers.streams], bool)
        behind = np.repeat(np.arange(len(places)), [len(place.rows) for place in places])
        behind_row = np.array([row for place in places for row in place.rows], np.int64)
        scopes = np.array([place.scope for place in places])
        order = np.argsort(transfers.member_row, kind="stable")
        rows, streams = transfers.member_row[order], transfers.member_stream[order]
        must, may = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for scope in (CARD, PORT, HOST, SWITCH, UPLINK):
            mine = scopes[behind] == scope
            touched = _touched(np.stack([behind[mine], behind_row[mine]], axis=1), rows, streams, size)
            at = touched % max(size, 1)
            if scope == CARD:
                must.append(touched[~crosses[at]])
            else:
                needed = far if scope == UPLINK else crosses
                must.append(touched[needed[at]])
                may.append(touched[~needed[at]] if scope != UPLINK else touched[:0])
        fabric = [number for number, place in enumerate(places) if place.scope == FABRIC]
        for number in fabric:
            must.append(number * size + np.flatnonzero(crosses))
            may.append(number * size + np.flatnonzero(~crosses))
        needed_pairs, possible = np.concatenate(must), np.concatenate(may)
        width = max(size, 1)
        return cls(
            places,
            behind,
            behind_row,
            needed_pairs // width,
            needed_pairs % width,
            possible // width,
            possible % width,
        )

    def weigh(self, speaks: Floats) -> Floats:
        """Log-likelihood of each place, from what each stream says (> 0: it became slower).

        A place that no slower stream crosses is none (minus infinity).
        """
        count = len(self.places)
        rose = np.maximum(speaks, 0.0)
        must = np.bincount(self.must_place, weights=speaks[self.must_stream], minlength=count)
        covered = np.bincount(self.must_place, weights=rose[self.must_stream], minlength=count)
        inside = np.bincount(self.may_place, weights=rose[self.may_stream], minlength=count)
        prior = np.array([place.prior for place in self.places])
        weights = prior + must + INSIDE * inside - (rose.sum() - covered - inside)
        return np.where(covered + inside > 0, weights, -np.inf)

    def must_of(self, number: int) -> Ints:
        """The streams that cross a place."""
        streams: Ints = self.must_stream[self.must_place == number]
        return streams

    def streams_of(self, number: int, speaks: Floats) -> Ints:
        """The streams that became slower because of a place."""
        streams = np.concatenate([
            self.must_stream[self.must_place == number], self.may_stream[self.may_place == number]
        ])  # fmt: skip
        return np.sort(streams[speaks[streams] > 0])


def alternatives(places: list[Place], weights: Floats, topology: Topology) -> list[tuple[Place, float]]:
    """The places worth judging with their log-likelihoods, likeliest first; many ports alike are one."""
    best = float(weights.max())
    near = [number for number in np.argsort(-weights, kind="stable").tolist() if weights[number] > best - REACH]
    single = [n for n in near if places[n].scope in (PORT, CARD)]
    result: list[tuple[Place, float]] = []
    for scope in (PORT, CARD):
        mine = [n for n in single if places[n].scope == scope]
        alike = [n for n in mine if weights[n] > weights[mine[0]] - ALIKE]
        if len(alike) > MOST_RIVALS:
            total = float(weights[alike[0]]) + float(np.log(np.exp(weights[alike] - weights[alike[0]]).sum()))
            result.append((_one_of([places[n] for n in alike], topology), total))
        else:
            result += [(places[n], float(weights[n])) for n in mine[:MOST_RIVALS]]
    result += [(places[n], float(weights[n])) for n in near if places[n].scope not in (PORT, CARD)][:MOST_RIVALS]
    return sorted(result, key=lambda item: (-item[1], item[0].rows))


def _one_of(alike: list[Place], topology: Topology) -> Place:
    """What is known when many places explain the same: a card link within one host, or some port."""
    among = tuple(sorted({row for place in alike for row in place.rows}))
    hosts = {topology.host[row] for row in among}
    host = next(iter(hosts))
    if alike[0].scope == CARD and len(hosts) == 1 and host is not None:
        return Place(CARD, tuple(r for r, name in enumerate(topology.host) if name == host), host, 0.0)
    return Place(alike[0].scope, (), None, 0.0, among)


def _touched(pairs: Ints, rows: Ints, streams: Ints, size: int) -> Ints:
    """place × size + stream for every stream that a rank behind the place takes part in, each once."""
    low, high = np.searchsorted(rows, pairs[:, 1], "left"), np.searchsorted(rows, pairs[:, 1], "right")
    lengths = high - low
    first = np.repeat(low - np.r_[0, np.cumsum(lengths)[:-1]], lengths)
    at = first + np.arange(int(lengths.sum()))
    return np.unique(np.repeat(pairs[:, 0], lengths) * max(size, 1) + streams[at])


def _enumerate(topology: Topology) -> list[Place]:
    places: list[Place] = []
    by_nic, by_host, by_switch = (_by_name(names) for names in (topology.nic, topology.host, topology.switch))
    for name, rows in by_nic.items():
        places.append(Place(PORT, rows, name, PRIOR[PORT]))
    for row in range(len(topology)):
        nic = topology.nic[row]
        if nic is None or len(by_nic[nic]) > 1:
            places.append(
                Place(PORT, (row,), nic or topology.host[row], PRIOR[PORT] if nic is None else SHARED_PORT)
            )
        places.append(Place(CARD, (row,), topology.device[row] or topology.host[row], PRIOR[CARD]))
    for name, rows in by_host.items():
        if len(rows) > 1:
            several = len({topology.nic[row] for row in rows} - {None}) > 1
            places.append(Place(HOST, rows, name, SEVERAL_PORTS if several else PRIOR[HOST]))
            places.append(Place(CARD, rows, name, PRIOR[HOST]))
    if len(by_switch) > 1:
        for name, rows in by_switch.items():
            places.append(Place(SWITCH, rows, name, PRIOR[SWITCH]))
            places.append(Place(UPLINK, rows, name, PRIOR[UPLINK]))
    only = next(iter(by_switch)) if len(by_switch) == 1 else None
    places.append(Place(FABRIC, (), only, PRIOR[FABRIC]))
    return places


def _by_name(names: Sequence[str | None]) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            found.setdefault(name, []).append(row)
    return {name: tuple(rows) for name, rows in sorted(found.items())}


def _far(topology: Topology, rows: tuple[int, ...]) -> bool:
    """Whether a stream goes from switch to switch."""
    names = {topology.switch[row] for row in rows}
    return len(names) > 1 and None not in names
