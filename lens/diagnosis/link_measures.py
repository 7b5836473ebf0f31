"""What moved with slower transfers and what did not: the features that the signatures of links and fabrics speak of.

Levels are on the scale of `measures`: 1 = as far as it would if it belonged to this finding, 0 = unmoved, None =
unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lens.diagnosis import hints
from lens.diagnosis.arrays import Floats, Ints, finite_mean, finite_median, median
from lens.diagnosis.counters import Counters, Ports
from lens.diagnosis.hints import Window
from lens.diagnosis.locate import Located
from lens.diagnosis.measures import MEASURES
from lens.diagnosis.places import CARD, FABRIC, PORT, SWITCH, UPLINK, Place
from lens.diagnosis.scenes import Measure, Scene
from lens.diagnosis.transfers import Transfers

BUS_BYTES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}
"""Bytes that cross a rank's link for each byte of its input, × (n - 1) / n (all_gather: × (n - 1))."""
LIMIT_REACHED = 0.25
"""A transport that reaches less than this share of the link's rate is not the one that the link is for."""
SILENT_PORT = 1e3
"""Bytes per second of a port that carries nothing of the training."""
SHARED = ("throttled", "run_delay", "compute", "expert_tokens")
"""Measures of ranks that tell a link from what lies behind it."""


@dataclass(frozen=True)
class LinkScene(Scene):
    """A finding about transfers. rows: ranks behind the place, all of them for the fabric. extra_s: seconds a step
    that its streams gained. seconds: X [steps, streams]."""

    transfers: Transfers
    seconds: Floats
    located: Located
    place: Place
    ports: Ports
    cards: Counters
    card_of_row: Ints
    window: Window

    @property
    def standing(self) -> bool:
        """Whether it is so since the first step."""
        return not len(self.before)


def take(scene: LinkScene) -> dict[str, Measure]:
    """All measures of a scene by name."""
    result = {name: make(scene) for name, make in LINK_MEASURES.items()}
    shared = {name: MEASURES[name](scene) for name in SHARED}
    if not len(scene.others):
        # Without a past there is nobody to compare with: what all ranks lose says nothing.
        shared = {n: m if m.baseline is not None else replace(m, level=None) for n, m in shared.items()}
    return result | shared


def _clip(level: float) -> float:
    return float(np.clip(level, -1, 1))


def _transfer(scene: LinkScene) -> Measure:
    streams, effects = scene.located.streams, scene.located.effects
    if not len(streams):
        return Measure("comm.transfer", "transfer time per step", "s", None, None, None)
    usual, now = float(np.nansum(effects.usual[streams])), float(np.nansum(effects.now[streams]))
    per_rank = max(1, len(streams) // max(1, len({scene.transfers.streams[s].kind for s in streams.tolist()})))
    return Measure("comm.transfer", "transfer time per step", "s", usual / per_rank, now / per_rank, 1.0)


def _size(scene: LinkScene) -> Measure:
    streams = scene.located.streams
    if not len(scene.before):
        return Measure("comm.op.bytes", "bytes per step", "B", None, None, None)
    before = finite_mean(scene.transfers.size[np.ix_(scene.before, streams)])
    after = finite_mean(scene.transfers.size[np.ix_(scene.after, streams)])
    if not before or after is None:
        return Measure("comm.op.bytes", "bytes per step", "B", before, after, None)
    level = _clip((after / before - 1) / max(0.5 * (scene.ratio - 1), 0.05))
    return Measure("comm.op.bytes", "bytes per step", "B", before, after, level)


def _reaches(*scopes: str) -> Callable[[LinkScene], Measure]:
    """How far the slowness reaches: whether its place is one of these."""

    def make(scene: LinkScene) -> Measure:
        level = float(scene.place.scope in scopes)
        return Measure("comm.transfer", "transfer of the whole fabric", "s", None, None, level)

    return make


def _inside(scene: LinkScene) -> Measure:
    level = float(scene.place.scope == CARD)
    if level:
        crosses = np.array([stream.crosses for stream in scene.transfers.streams], bool)
        streams, gain = scene.located.streams, np.nan_to_num(scene.located.effects.gain)
        total = float(gain[streams].sum())
        # What leaves the host has become slower too; or nothing leaves it, and nobody can say whether it would have.
        level = 1 - float(gain[streams][crosses[streams]].sum()) / total if total > 0 else 0.0
        level = level if crosses.any() else 0.5
    return Measure("comm.transfer", "transfer within the host alone", "", None, None, level)


def _latency(scene: LinkScene) -> Measure:
    level = scene.located.latency
    return Measure("comm.transfer", "time of small collectives", "s", None, None, level)


def _tail(scene: LinkScene) -> Measure:
    """How far the mean lies above the median since the onset, compared with before."""
    streams = scene.located.streams
    title = "mean over median transfer"

    def heavy(steps: Ints) -> float | None:
        part = scene.seconds[np.ix_(steps, streams)]
        middle = median(part) if len(part) else np.full(len(streams), np.nan)
        with np.errstate(invalid="ignore"):
            ratio = np.nanmean(part, axis=0) / middle if np.isfinite(part).any() else middle
        return finite_median(ratio)

    after, before = heavy(scene.after), heavy(scene.before)
    if after is None:
        return Measure("comm.transfer", title, "", before, after, None)
    return Measure("comm.transfer", title, "", before, after, _clip((after - (before or 1.0)) / 0.2))


def _own_ports(scene: LinkScene) -> Ints:
    return scene.ports.of_rows(scene.rows)


def _mean_at(values: Floats, places: Ints) -> float | None:
    return finite_mean(values[places]) if len(places) else None


def _link_rate(scene: LinkScene) -> Measure:
    usual, now = hints.rates(scene.ports.counters, scene.window)
    places = _own_ports(scene)
    before, after = _mean_at(usual, places), _mean_at(now, places)
    level = _clip((after / before - 1) / 0.2) if before and after is not None else None
    return Measure(hints.LIMIT, "link rate", "B/s", before, after, level)


def _at_ports(metrics: dict[str, float], metric: str, title: str) -> Callable[[LinkScene], Measure]:
    """Counters of the place's own ports against their past."""

    def make(scene: LinkScene) -> Measure:
        counters, places = scene.ports.counters, _own_ports(scene)
        levels = hints.moved(counters, metrics, scene.window)
        known = levels[places][np.isfinite(levels[places])] if len(places) else levels[:0]
        level = float(known.max()) if len(known) and scene.place.scope == PORT else finite_mean(known)
        before, after = (
            _total_rate(counters, metrics, places, w) for w in (scene.window.before, scene.window.after)
        )
        return Measure(metric, title, "1/s", before, after, level)

    return make


def _total_rate(
    counters: Counters, metrics: dict[str, float], places: Ints, steps: tuple[int, int]
) -> float | None:
    found = [counters.rate(metric, *steps)[places] for metric in metrics if counters.known(metric)]
    known = [float(part[np.isfinite(part)].sum()) for part in found if np.isfinite(part).any()]
    return sum(known) if known else None


def _wide_pressure(scene: LinkScene) -> Measure:
    """Whether many ports wait for room: those behind the place when it is a switch, else all of the run."""
    metric, title = "net.ib.xmit_wait.time", "ports that wait for room or are told to slow down"
    counters = scene.ports.counters
    levels = hints.moved(counters, hints.PRESSURE, scene.window)
    places = _own_ports(scene) if scene.place.scope in (SWITCH, UPLINK) else np.arange(len(counters.devices))
    known = levels[places][np.isfinite(levels[places])] if len(places) else levels[:0]
    if len(known) < 2:
        return Measure(metric, title, "", None, None, None)
    share = float((known > 0.5).mean())
    return Measure(metric, title, "", 0.0, share, _clip((share - 0.25) / 0.4))


def _card_errors(scene: LinkScene) -> Measure:
    levels = hints.moved(scene.cards, hints.CARD_ERRORS, scene.window)
    own = scene.card_of_row[list(scene.rows)]
    own = own[own >= 0]
    known = levels[own][np.isfinite(levels[own])] if len(own) else levels[:0]
    level = float(known.max()) if len(known) else None
    return Measure("gpu.link.errors", "errors of the card's links", "", None, None, level)


def bus_bandwidth(transfers: Transfers, seconds: Floats, steps: Ints) -> Floats:
    """Bytes per second that cross a rank's link in each stream, as its operation moves them [streams]."""
    size, time = median(transfers.size[steps]), median(seconds[steps])
    factor = np.full(len(transfers), np.nan)
    for place, stream in enumerate(transfers.streams):
        n = len(stream.rows)
        if stream.small or n < 2 or stream.op not in (*BUS_BYTES, "recv", "broadcast", "reduce"):
            continue
        share = n - 1 if stream.op == "all_gather" else (n - 1) / n
        factor[place] = BUS_BYTES[stream.op] * share if stream.op in BUS_BYTES else 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Floats = np.where(time > 0, size * factor / time, np.nan)
    return result


def _fallback(scene: LinkScene) -> Measure:
    """Whether the fast ports carry nothing although bytes leave the hosts, or a small share of what they could.

    Ports that carry the bytes disprove it, however long these take.
    """
    title = "bytes through the fast ports"
    metric = "hw.network.io"
    counters = scene.ports.counters
    if not counters.devices:
        return Measure(metric, title, "B/s", None, None, None)
    sent = counters.rate(metric, *scene.window.after, label="transmit")
    before = counters.rate(metric, *scene.window.before, label="transmit")
    now, usual = finite_median(sent), finite_median(before)
    expected = _expected_rate(scene)
    reference = usual if usual is not None and usual > 1e3 else expected
    if now is not None:
        if reference is None:
            # How many bytes there should be is not known: none at all is telling all the same.
            return Measure(metric, title, "B/s", usual, now, 0.8 if now < SILENT_PORT else 0.0)
        return Measure(metric, title, "B/s", reference, now, 1.0 if now < 0.05 * reference else 0.0)
    if counters.known(metric) or not scene.standing:
        return Measure(metric, title, "B/s", None, None, None)
    limit = finite_median(counters.level(hints.LIMIT, *scene.window.after))
    crossing = np.array([s.crosses for s in scene.transfers.streams], bool)
    reached = bus_bandwidth(scene.transfers, scene.seconds, scene.after)[crossing]
    reached = reached[np.isfinite(reached)]
    if limit is None or not len(reached):
        return Measure(metric, title, "B/s", None, None, None)
    share = float(np.quantile(reached, 0.9)) / limit
    title, metric = "bus bandwidth", "comm.busbw"
    return Measure(metric, title, "B/s", limit, float(np.median(reached)), 0.8 if share < LIMIT_REACHED else 0.0)


def _expected_rate(scene: LinkScene) -> float | None:
    """Bytes per second that a port should send for the streams that leave its host."""
    reach = bus_bandwidth(scene.transfers, scene.seconds, scene.after) * median(scene.seconds[scene.after])
    moved = np.array([
        value * len(stream.rows) if stream.crosses and np.isfinite(value) else 0.0
        for stream, value in zip(scene.transfers.streams, reach.tolist(), strict=True)
    ])  # fmt: skip
    total = float(moved.sum()) / max(scene.step_s, 1e-9)
    # Of what a ring moves, a host's ports see what crosses its border: at least a rank's worth of every host's ranks.
    ranks = len(scene.frame.topology)
    hosts = len(set(scene.frame.topology.host))
    per_port = total * hosts / max(ranks, 1) / max(len(scene.ports.counters.devices), 1)
    return per_port if per_port > 1e5 else None


LINK_MEASURES: dict[str, Callable[[LinkScene], Measure]] = {
    "transfer": _transfer,
    "size": _size,
    "wide": _reaches(SWITCH, UPLINK, FABRIC),
    "whole": _reaches(FABRIC),
    "inside": _inside,
    "latency": _latency,
    "tail": _tail,
    "link_rate": _link_rate,
    "port_errors": _at_ports(dict(hints.ERRORS), "net.rdma.retransmits", "errors and retransmits of its ports"),
    "port_pressure": _at_ports(dict(hints.PRESSURE), "net.ib.xmit_wait.time", "waiting for room at its ports"),
    "wide_pressure": _wide_pressure,
    "card_errors": _card_errors,
    "fallback": _fallback,
}
