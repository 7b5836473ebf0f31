"""What counters of ports and cards, and the ranks' own exits, say about where a link fault sits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lens.diagnosis.arrays import Array, Floats, Ints, median
from lens.diagnosis.counters import Counters, Ports, risen
from lens.diagnosis.decompose import Frame
from lens.diagnosis.places import CARD, FABRIC, HOST, Places
from lens.diagnosis.signals import Signals
from lens.diagnosis.transfers import Transfers

ERRORS: Mapping[str, float] = {
    "hw.errors": 0.5, "net.rdma.retransmits": 1.0, "net.rdma.out_of_sequence": 1.0, "net.ib.xmit_discards": 1.0,
    "net.ib.link_downed": 0.02,
}  # fmt: skip
"""Counters of what was lost or sent again, and rates per second below which they say nothing."""
PRESSURE: Mapping[str, float] = {
    "net.ib.xmit_wait.time": 0.02, "net.roce.cnp_sent": 5.0, "net.roce.cnp_handled": 5.0, "net.roce.ecn_marked": 5.0,
    "net.eth.pause": 5.0,
}  # fmt: skip
"""Counters of waiting for room ahead."""
CARD_ERRORS: Mapping[str, float] = {"gpu.link.errors": 0.5, "gpu.pcie.replays": 0.5}
LIMIT = "hw.network.bandwidth.limit"
STOLEN = ("container.cpu.throttled.time", "process.cpu.run_delay")
RATE_WEIGHT, ERROR_WEIGHT, PRESSURE_WEIGHT, EXIT_WEIGHT, STOLEN_WEIGHT = 5.0, 4.0, 2.5, 2.5, 3.0


@dataclass(frozen=True)
class Window:
    """Step places before an onset and after it; before is empty when there is no past."""

    before: tuple[int, int]
    after: tuple[int, int]


def moved(counters: Counters, metrics: Mapping[str, float], window: Window) -> Floats:
    """How surely any of these counters grows faster than before [devices], 0 … 1, NaN = none is known."""
    levels = [
        risen(counters.rate(metric, *window.before), counters.rate(metric, *window.after), least)
        for metric, least in metrics.items()
        if counters.known(metric)
    ]
    if not levels or not counters.devices:
        return np.full(len(counters.devices), np.nan)
    table = np.stack(levels)
    known = np.isfinite(table).any(axis=0)
    return np.where(known, np.max(np.nan_to_num(table), axis=0), np.nan)


def rates(counters: Counters, window: Window) -> tuple[Floats, Floats]:
    """Link rate of each port before (where unknown: the median of all ports) and after, in bytes per second."""
    before, after = counters.level(LIMIT, *window.before), counters.level(LIMIT, *window.after)
    return np.where(np.isfinite(before), before, median(after)), after


def of_places(places: Places, ports: Ports, cards: Counters, card_of_row: Ints, window: Window) -> Floats:
    """Log-likelihood of each place from counters: what moved behind it and nowhere else."""
    hints = np.zeros(len(places.places))
    if ports.counters.devices:
        usual, now = rates(ports.counters, window)
        lower = np.clip((1 - now / np.where(usual > 0, usual, np.nan)) / 0.2, 0, 1)
        says = (
            RATE_WEIGHT * np.nan_to_num(lower)
            + ERROR_WEIGHT * np.nan_to_num(moved(ports.counters, ERRORS, window))
            + PRESSURE_WEIGHT * np.nan_to_num(moved(ports.counters, PRESSURE, window))
        )
        hints += _inside_less_outside(places, says, ports.of_row, card=False)
    if cards.devices:
        says = ERROR_WEIGHT * np.nan_to_num(moved(cards, CARD_ERRORS, window))
        hints += _inside_less_outside(places, says, card_of_row, card=True)
    return hints


def _inside_less_outside(places: Places, says: Floats, device_of_row: Ints, card: bool) -> Floats:
    """Mean of the devices behind a place less the mean of all others; the fabric has nothing outside."""
    count, total = len(says), float(says.sum())
    result = np.zeros(len(places.places))
    if not total:
        return result
    device = device_of_row[places.behind_row]
    pairs = np.unique(places.behind_place[device >= 0] * count + device[device >= 0])
    place, device = pairs // count, pairs % count
    number = np.bincount(place, minlength=len(result))
    inside = np.bincount(place, weights=says[device], minlength=len(result))
    mean = inside / np.maximum(number, 1) - (total - inside) / np.maximum(count - number, 1)
    scopes = np.array([p.scope for p in places.places])
    fits = (scopes == HOST) | ((scopes == CARD) == card)
    result = np.where(fits & (number > 0), mean, 0.0)
    if not card:
        result[scopes == FABRIC] = total / count
    return result


def of_exits(
    places: Places, frame: Frame, transfers: Transfers, streams: Ints, gain_s: Floats, before: Ints, after: Ints
) -> Floats:
    """Log-likelihood of each place from ranks that leave their collectives at another time than their group.

    gain_s: seconds a step that each stream gained [streams of the run].

    A slow way out of a rank lets everybody else leave late, a slow way in that rank alone: either way it is the odd
    one out. Of two ranks, the one that waits less for data is the one whose way out is slow.
    """
    hints = np.zeros(len(places.places))
    if not (np.isin(transfers.stream_of, streams) & frame.collectives.complete).any():
        # Large runs send their transfers already reduced: who left when is not known.
        return hints
    shift = _shift(frame, transfers, before, after)
    odd = np.zeros(frame.shape[1])
    for stream in streams.tolist():
        # Each by itself: ranks take part in different ones, and their sums do not compare.
        here = slice(*np.searchsorted(transfers.member_stream, [stream, stream + 1]))
        own, members, gain = shift[here], transfers.member_row[here], float(gain_s[stream])
        if not gain > 0 or not np.isfinite(own).all() or transfers.streams[stream].op == "recv":
            continue
        if len(members) == 2:
            odd[members] += np.where(own < own.mean() - 0.1 * gain, 0.5, 0.0)
        else:
            odd[members] = np.maximum(odd[members], _alone(np.abs(own - np.median(own)) / gain))
    alone = np.bincount(places.behind_place, minlength=len(hints)) == 1
    single = alone[places.behind_place]
    hints[places.behind_place[single]] = EXIT_WEIGHT * np.minimum(1.0, odd[places.behind_row[single]])
    return hints


def of_processes(places: Places, signals: Signals, rows: Ints, before: Ints, after: Ints, share: float) -> Floats:
    """Log-likelihood of each place from processes that get less of a processor than before: they transfer late.

    share: of a step that the transfers gained.
    """
    lost = np.zeros(int(rows.max(initial=0)) + 1)
    for metric in STOLEN:
        for row in rows.tolist():
            now = signals.rate(metric, row, int(after[0]), int(after[-1]))
            usual = signals.rate(metric, row, int(before[0]), int(before[-1]))
            if now is not None and usual is not None:
                lost[row] = max(lost[row], (now - usual) / max(0.5 * share, 0.02))
    says = np.clip(lost - float(np.median(lost[rows])) if len(rows) else lost, 0, 1)
    hints = np.zeros(len(places.places))
    single = np.bincount(places.behind_place, minlength=len(hints))[places.behind_place] == 1
    single &= places.behind_row < len(says)
    hints[places.behind_place[single]] = STOLEN_WEIGHT * says[places.behind_row[single]]
    return hints


def _alone(deviation: Floats) -> Floats:
    """1 for the only rank that deviates by half of the gain or more, else 0."""
    order = np.argsort(deviation)
    lonely = deviation[order[-1]] > 0.3 and deviation[order[-2]] < 0.5 * deviation[order[-1]]
    result = np.zeros(len(deviation))
    result[order[-1]] = float(lonely)
    return result


def _shift(frame: Frame, transfers: Transfers, before: Ints, after: Ints) -> Floats:
    """How much longer each member's part of a stream takes since the onset, in seconds a step [members]."""
    ranks = frame.shape[1]
    members = transfers.member_stream * ranks + transfers.member_row
    known, member_at = np.unique(members, return_inverse=True)
    rows = np.flatnonzero((transfers.stream_of >= 0) & frame.collectives.complete)
    cell = transfers.stream_of[rows] * ranks + frame.collectives.row[rows]
    member = np.isin(cell, known)
    rows, cell = rows[member], np.searchsorted(known, cell[member])
    step, means = frame.collectives.step[rows], []
    for steps in (before, after):
        inside: Array = np.isin(step, steps)
        total = np.bincount(cell[inside], weights=transfers.x[rows][inside], minlength=len(known))
        means.append(total / max(len(steps), 1))
    seen = np.bincount(cell, minlength=len(known)) > 0
    result: Floats = np.where(seen, means[1] - means[0], np.nan)[member_at]
    return result
