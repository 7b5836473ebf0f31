"""Transfers that were slow since the first step: there is no past, so the class, the link's rate and the ports speak."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lens.diagnosis import hints, policy
from lens.diagnosis.arrays import Array, Floats, Ints, median, spread
from lens.diagnosis.counters import Ports
from lens.diagnosis.link_measures import LIMIT_REACHED, bus_bandwidth
from lens.diagnosis.locate import Effects
from lens.diagnosis.places import FABRIC, PORT, Place, Places
from lens.diagnosis.topology import Topology
from lens.diagnosis.transfers import Transfers

QUARTERS = 4
ALL_RANKS_SHARE = 0.15
"""Share of the step that the transfers of every rank must take before a slow transport is suspected."""
GOOD_SHARE = 0.7
"""What a collective may be expected to reach of the link's rate."""
LOWER_RATE = 0.6
"""A port whose rate is below this share of its peers' is trained down."""
RARE = 0.25


def suspects(
    transfers: Transfers, places: Places, ports: Ports, topology: Topology, unit: float, steps: Ints
) -> Iterator[tuple[Effects, Place | None, Array, float]]:
    """What may have been slow all along: its effects, its place (None: to be located), its streams, its noise."""
    yield from _beside_its_class(transfers, unit, steps)
    yield from _trained_down(transfers, ports, topology, steps)
    yield from _everywhere(transfers, places, ports, topology, unit, steps)


def _beside_its_class(
    transfers: Transfers, unit: float, steps: Ints
) -> Iterator[tuple[Effects, Place | None, Array, float]]:
    """Streams above their class in each quarter of the steps."""
    seconds = transfers.seconds[steps]
    now = median(seconds)
    quarters = np.stack([median(part) for part in np.array_split(seconds, QUARTERS)])
    usual, noise = np.full(len(now), np.nan), np.full(len(now), np.inf)
    gain = np.full(len(now), np.nan)
    for number in np.unique(transfers.alike):
        members = np.flatnonzero(transfers.alike == number)
        if len(members) < 3:
            continue
        usual[members] = float(median(now[members]))
        gain[members] = np.min(quarters[:, members] - median(quarters[:, members], axis=1)[:, None], axis=0)
        # Streams that differ among themselves anyway set the bar for the one that differs most.
        noise[members] = np.fmax(float(spread(now[members])), 0.03 * usual[members])
    with np.errstate(invalid="ignore"):
        apart = gain > np.fmax(4 * noise, policy.STANDING_EFFECT_CONFIRMED * unit)
    if apart.any():
        count = np.fmax(np.nan_to_num(median(transfers.count[steps]), nan=1.0), 1e-9)
        least = float(np.min(4 * noise[apart])) / unit
        yield Effects(usual, now, np.where(np.isfinite(usual), now - usual, 0.0), noise, count), None, apart, least


def _trained_down(
    transfers: Transfers, ports: Ports, topology: Topology, steps: Ints
) -> Iterator[tuple[Effects, Place | None, Array, float]]:
    """Ports that run at a lower rate than those of like ranks."""
    rate = ports.counters.level(hints.LIMIT, 0, int(steps[-1]))
    if not np.isfinite(rate).any():
        return
    of_row = np.where(ports.of_row >= 0, rate[ports.of_row], np.nan)
    for number in np.unique(topology.kind):
        like = np.flatnonzero((topology.kind == number) & np.isfinite(of_row))
        usual = float(np.median(of_row[like])) if len(like) else np.nan
        low = like[of_row[like] < LOWER_RATE * usual]
        if not len(low) or len(low) > RARE * len(like):
            continue
        for port in np.unique(ports.of_row[low]).tolist():
            rows = tuple(np.flatnonzero(ports.of_row == port).tolist())
            touched = np.array([s.crosses and not set(rows).isdisjoint(s.rows) for s in transfers.streams], bool)
            now = median(transfers.seconds[steps])
            kept = np.where(touched, rate[port] / usual, 1.0)
            place = Place(PORT, rows, ports.counters.devices[port], 0.0)
            yield _lessened(transfers, now, kept, steps), place, touched, 0.0


def _everywhere(
    transfers: Transfers, places: Places, ports: Ports, topology: Topology, unit: float, steps: Ints
) -> Iterator[tuple[Effects, Place | None, Array, float]]:
    """All that leaves the hosts, when it takes a good part of every rank's step."""
    crosses = np.array([stream.crosses and not stream.small for stream in transfers.streams], bool)
    now = median(transfers.seconds[steps])
    pairs = crosses[transfers.member_stream]
    spent = np.bincount(
        transfers.member_row[pairs],
        weights=np.nan_to_num(now[transfers.member_stream[pairs]]),
        minlength=len(topology),
    )
    if not crosses.any() or spent.min() < ALL_RANKS_SHARE * unit or not ports.counters.devices:
        return
    limit = float(np.nan_to_num(median(ports.counters.level(hints.LIMIT, 0, int(steps[-1])))))
    reached = (
        bus_bandwidth(transfers, transfers.seconds, steps) / (GOOD_SHARE * limit)
        if limit
        else np.full(len(now), np.nan)
    )
    kept = np.where(np.isfinite(reached), np.clip(reached, 0.01, 1.0), LIMIT_REACHED)
    place = next(place for place in places.places if place.scope == FABRIC)
    yield _lessened(transfers, now, np.where(crosses, kept, 1.0), steps), place, crosses, 0.0


def _lessened(transfers: Transfers, now: Floats, kept: Floats, steps: Ints) -> Effects:
    """Effects of streams that should take a share of what they do."""
    count = np.fmax(np.nan_to_num(median(transfers.count[steps]), nan=1.0), 1e-9)
    return Effects(now * kept, now, now * (1 - kept), 0.1 * now, count)
