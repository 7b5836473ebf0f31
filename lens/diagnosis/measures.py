"""What moved with a finding and what did not: every feature that signatures speak of, measured before and after.

A measure's `level` says how far it moved on a scale where 1 is "as far as it would if it belonged to this finding",
0 is unmoved and None is unknown. Levels of times and shares are relative to the finding's own excess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from lens.diagnosis import card_measures
from lens.diagnosis.arrays import Array, Floats, Ints, finite_mean, finite_median
from lens.diagnosis.scenes import MOST_PEERS, Measure, Scene, bounds

BIT_POWER_CAP, BIT_THERMAL, BIT_POWER_BRAKE = 0x4, 0x60, 0x80
BEFORE_STEPS = 128
SCATTERS, BY_NATURE = 2.0, 0.5
"""So many deviations of what the other ranks lose may be a rank's by chance; where its past is not known, it may always
have lost this share more than they do."""


def take(scene: Scene) -> dict[str, Measure]:
    """All measures of a scene by name."""
    return {name: make(scene) for name, make in MEASURES.items()}


def _clip(level: float) -> float:
    return float(np.clip(level, -1, 1))


def _mean(values: Floats | None, steps: Ints, rows: Array | tuple[int, ...]) -> float | None:
    return None if values is None or not len(steps) else finite_mean(values[np.ix_(steps, np.asarray(rows, int))])


def _time(feature: str, metric: str, title: str) -> Callable[[Scene], Measure]:
    """Self time of a part of the step, in seconds; what peers gained too does not count."""

    def make(scene: Scene) -> Measure:
        values = scene.features.get(feature)
        before, after = _mean(values, scene.before, scene.rows), _mean(values, scene.after, scene.rows)
        if before is None or after is None:
            return Measure(metric, title, "s", before, after, None)
        peers = _mean(values, scene.before, scene.others), _mean(values, scene.after, scene.others)
        common = peers[1] - peers[0] if peers[0] is not None and peers[1] is not None else 0.0
        return Measure(metric, title, "s", before, after, _clip((after - before - common) / (0.5 * scene.extra_s)))

    return make


def _work(values_of: Callable[[Scene], Floats | None], metric: str, title: str) -> Callable[[Scene], Measure]:
    """An amount of work; level 1 when it grew by at least half of what the self time did."""

    def make(scene: Scene) -> Measure:
        values = values_of(scene)
        before, after = _mean(values, scene.before, scene.rows), _mean(values, scene.after, scene.rows)
        if not before or after is None:
            return Measure(metric, title, "", before, after, None)
        peers = _mean(values, scene.before, scene.others), _mean(values, scene.after, scene.others)
        common = peers[1] / peers[0] if peers[0] and peers[1] is not None else 1.0
        growth = after / before / (common or 1.0) - 1
        return Measure(metric, title, "", before, after, _clip(growth / max(0.5 * (scene.ratio - 1), 0.05)))

    return make


def _counted(name: str, metric: str, title: str, factor: float, unit: str) -> Callable[[Scene], Measure]:
    """A time per step that the hook counted; level 1 when it explains half of the excess."""

    def make(scene: Scene) -> Measure:
        values = scene.frame.count.get(name)
        before, after = _mean(values, scene.before, scene.rows), _mean(values, scene.after, scene.rows)
        if after is None:
            return Measure(metric, title, unit, None, None, None)
        before = (before or 0.0) * factor
        return Measure(
            metric, title, unit, before, after * factor, _clip((after * factor - before) / (0.5 * scene.extra_s))
        )

    return make


def _recompiles(scene: Scene) -> Measure:
    values = scene.frame.count.get("recompiles")
    before, after = _mean(values, scene.before, scene.rows), _mean(values, scene.after, scene.rows)
    level = None if after is None else _clip((after - (before or 0.0)) / 0.1)
    return Measure("train.recompiles", "recompilations per step", "", before, after, level)


def _gauge(
    metric: str, title: str, unit: str, scale: Callable[[Scene, float], float]
) -> Callable[[Scene], Measure]:
    """A gauge of the ranks' cards or processes; scale gives the level from the relative change."""

    def make(scene: Scene) -> Measure:
        first, last = bounds(scene.after)
        after = _settled([scene.signals.gauge(metric, row, first + 1, last) for row in scene.rows])
        low, high = scene.surely_before
        before = _middle([scene.signals.gauge(metric, row, low, high) for row in scene.rows])
        like = scene.like
        peers_after = _settled([scene.signals.gauge(metric, row, first + 1, last) for row in like])
        if after is None or (before is None and peers_after is None):
            return Measure(metric, title, unit, before, after, None)
        if before is None:
            # No past: what cards of the same make show at the same time stands for it.
            before = peers_after
        elif peers_after is not None:
            peers_before = _middle([scene.signals.gauge(metric, row, low, high) for row in like])
            if peers_before:
                common = peers_after / peers_before
                return Measure(
                    metric, title, unit, before, after, scale(scene, after / (before * common or 1.0) - 1)
                )
        assert before is not None
        return Measure(metric, title, unit, before, after, scale(scene, after / before - 1) if before else None)

    return make


def _bits(mask: int, title: str) -> Callable[[Scene], Measure]:
    """Share of the samples of gpu.throttle.reasons that have a bit, or of the time where a counter tells that instead;
    peers that have it too take it away."""

    def make(scene: Scene) -> Measure:
        def share(rows: list[int], low: int, high: int) -> float | None:
            if scene.signals.series("gpu.throttle.reasons") is None:
                return card_measures.throttled_share(scene.signals, mask, rows, low, high)
            values = [scene.signals.gauge("gpu.throttle.reasons", row, low, high) for row in rows]
            known = np.concatenate(values) if values else np.zeros(0)
            return float(((known.astype(np.int64) & mask) != 0).mean()) if len(known) else None

        first, last = bounds(scene.after)
        after = share(list(scene.rows), first + 1, last)
        before = share(list(scene.rows), *scene.surely_before)
        if after is None:
            return Measure("gpu.throttle.reasons", title, "", before, after, None)
        reference = before
        if reference is None:
            reference = share(scene.like, first + 1, last) or 0.0
        return Measure("gpu.throttle.reasons", title, "", reference, after, _clip((after - reference) / 0.5))

    return make


_cap_bit = _bits(BIT_POWER_CAP, "power capping")
_power_limit = _gauge("gpu.power.limit", "power limit", "W", lambda _, change: _clip(change / 0.08))


def _capped(scene: Scene) -> Measure:
    """Whether the card runs into its power limit more than before, or into a lower one: a card at full load may always
    run into it."""
    bit, limit = _cap_bit(scene), _power_limit(scene)
    if limit.level is None or limit.level > -0.9 or (bit.observed is not None and bit.observed < 0.5):
        return bit
    return Measure(limit.metric, limit.title, limit.unit, limit.baseline, limit.observed, 1.0)


def _stolen(metric: str, title: str) -> Callable[[Scene], Measure]:
    """Seconds per second that a process could not run; level 1 when the growth explains half of the excess.

    On a busy host every process loses some time, now more, now less: what the other ranks gained, and how far they
    differ in it, does not count. Where there is no past, or nobody measured it, what the others lose stands for it.
    """

    def make(scene: Scene) -> Measure:
        def rates(rows: Iterable[int], steps: Ints) -> Floats:
            found = [scene.signals.rate(metric, row, *bounds(steps)) for row in rows]
            return np.array([np.nan if value is None else value for value in found])

        others = [int(row) for row in scene.others[:: max(1, len(scene.others) // MOST_PEERS)]]
        before, after = finite_mean(rates(scene.rows, scene.before)), finite_mean(rates(scene.rows, scene.after))
        gained = rates(others, scene.after) - (0.0 if before is None else rates(others, scene.before))
        common = finite_median(gained)
        if after is None or (before is None and common is None):
            return Measure(metric, title, "s/s", before, after, None)
        by_nature = 0.0 if before is not None else BY_NATURE * (common or 0.0)
        own = after - (before or 0.0) - max(0.0, common or 0.0) - SCATTERS * (_scatter(gained) or 0.0) - by_nature
        share = scene.extra_s / scene.step_s
        level = _clip(own / max(0.5 * share, 0.02))
        return Measure(metric, title, "s/s", common if before is None else before, after, level)

    return make


def _scatter(values: Floats) -> float | None:
    """How far values lie from their middle: 1.48 median absolute deviations, a standard deviation of normal ones."""
    middle = finite_median(values)
    apart = None if middle is None else finite_median(np.abs(values - middle))
    return None if apart is None else 1.4826 * apart


def _middle(parts: list[Floats]) -> float | None:
    return finite_median(np.concatenate(parts)) if parts else None


def _settled(parts: list[Floats]) -> float | None:
    """Median of the samples after an onset; the first may still show a mean over the time before."""
    return _middle([part[1:] if len(part) > 2 else part for part in parts])


def _clock_level(scene: Scene, change: float) -> float:
    """A clock that explains the excess falls by the factor by which self time grows."""
    expected = 1 - 1 / max(scene.ratio, 1.05)
    return 0.0 if abs(change) < 0.02 else _clip(change / max(0.5 * expected, 0.03))


def _tokens(scene: Scene) -> Floats | None:
    return scene.frame.count.get("tokens")


def _squares(scene: Scene) -> Floats | None:
    return scene.frame.count.get("seq_sq")


def _expert_tokens(scene: Scene) -> Floats | None:
    return None if scene.load is None else scene.load.tokens


MEASURES: dict[str, Callable[[Scene], Measure]] = {
    "compute": _time("compute", "comm.self", "its own compute time per step"),
    "data": _time("data", "phase.duration", "its data phase"),
    "h2d": _time("h2d", "phase.duration", "its copies to the card"),
    "optimizer": _time("optimizer", "phase.duration", "its optimizer step"),
    "host": _time("host", "comm.self", "its time between the phases"),
    "tokens": _work(_tokens, "train.tokens", "tokens per step"),
    "seq_sq": _work(_squares, "train.sequence.squared", "squared sequence length"),
    "expert_tokens": _work(_expert_tokens, "moe.expert.tokens", "tokens sent to its experts"),
    "gc": _counted("gc_ns", "process.gc.time", "garbage collection per step", 1e-9, "s"),
    "logging": _counted("log_ns", "train.log.time", "logging per step", 1e-9, "s"),
    "recompiles": _recompiles,
    "clock": _gauge("gpu.clock.sm", "SM clock", "MHz", _clock_level),
    "temperature": _gauge("hw.temperature", "temperature", "°C", lambda _, change: _clip(change / 0.12)),
    "power": _gauge("hw.power", "power draw", "W", lambda _, change: _clip(change / 0.2)),
    "queue": _gauge("train.data.queue_depth", "loader queue", "batches", lambda _, change: _clip(change / 0.6)),
    "thermal_bit": _bits(BIT_THERMAL, "thermal throttling"),
    "power_cap_bit": _capped,
    "power_brake_bit": _bits(BIT_POWER_BRAKE, "power brake"),
    "memory_faults": card_measures.memory_faults,
    "pcie": card_measures.host_link,
    "foreign": card_measures.foreign,
    "run_delay": _stolen("process.cpu.run_delay", "time runnable but not running"),
    "throttled": _stolen("container.cpu.throttled.time", "CPU quota throttling"),
}
