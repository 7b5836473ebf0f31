"""What a finding's cards say about themselves: failing memory, the way to the host, other processes, throttling times.

Levels are those of `measures`: 1 is moved as far as it would if it belonged to the finding, 0 unmoved, None unknown.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lens.diagnosis.arrays import finite_median
from lens.diagnosis.scenes import ONSET_MARGIN_STEPS, Measure, Scene
from lens.diagnosis.signals import Series, Signals

MEMORY_XIDS = frozenset((48, 63, 64, 94, 95))
"""Double-bit error, row remapping (done, failed), contained and uncontained memory errors."""
ROWS, ERRORS = "gpu.rows.remapped", "hw.errors"
PROCESS_METRICS = ("gpu.process.utilization", "gpu.process.memory.usage")
WORKS = 0.02
"""A process that uses less of a card's time watches it."""
TAKEN_BYTES, TAKEN_SHARE = 256 * 1024.0 * 1024.0, 0.05
"""Card memory beyond what the trainer's allocator holds: so much more of it, and of all that is used, is somebody else's."""
LINK = (
    ("gpu.pcie.link.width", "PCIe link width", "lanes"),
    ("gpu.pcie.link.speed", "PCIe link speed", "GT/s"),
)  # fmt: skip
THROTTLE_SECONDS = {
    0x4: "gpu.throttle.power.time",
    0x60: "gpu.throttle.thermal.time",
    0x80: "gpu.throttle.brake.time",
}
"""Counters that say the same as the bits of gpu.throttle.reasons."""


def rows_grown(signals: Signals, row: int, low: int, high: int) -> float | None:
    """Memory rows remapped, and memory errors not corrected, within these steps; None where nobody counts them."""
    series = [series for _, series in signals.parts(ROWS)]
    uncorrected = signals.series(ERRORS)
    grown = [_growth(each, row, low, high) for each in (*series, *([] if uncorrected is None else [uncorrected]))]
    known = [value for value in grown if value is not None]
    return sum(known) if known else None


def _growth(series: Series, row: int, low: int, high: int) -> float | None:
    value = series.value[series.of(row, low, high)]
    return float(np.maximum(np.diff(value), 0).sum()) if len(value) > 1 else None


def memory_faults(scene: Scene) -> Measure:
    """Whether rows of the cards' memory failed around the onset: counted, or told by an Xid."""
    low = max(0, int(scene.after[0]) - ONSET_MARGIN_STEPS)
    grown = [rows_grown(scene.signals, row, low, scene.upto) for row in scene.rows]
    told = [xid for row in scene.rows for at, xid in scene.signals.xids(row) if low <= at and xid in MEMORY_XIDS]
    known = [value for value in grown if value is not None]
    total = sum(known) if known else None
    if told:
        return Measure("gpu.xid", "memory errors reported by the card", "", 0.0, float(told[0]), 1.0)
    level = None if total is None else float(total > 0)
    return Measure(ROWS, "memory rows that failed", "", None if total is None else 0.0, total, level)


def host_link(scene: Scene) -> Measure:
    """Bandwidth of the PCIe link by its lanes and speed, against its past, its like, or what it can do at best."""
    after = int(scene.after[0]) + 1, int(scene.after[-1])
    changes: list[Measure] = []
    for metric, title, unit in LINK:
        now = _middle(scene.signals, metric, scene.rows, *after)
        usual = _middle(scene.signals, metric, scene.rows, *scene.surely_before)
        if usual is None:
            usual = _middle(scene.signals, metric, scene.like, *after)
        if usual is None:
            usual = _middle(scene.signals, f"{metric}.max", scene.rows, 0, scene.upto)
        level = float(np.clip((now / usual - 1) / 0.4, -1, 1)) if now is not None and usual else None
        changes.append(Measure(metric, title, unit, usual, now, level))
    return min(changes, key=lambda measure: 0.0 if measure.level is None else measure.level)


def _middle(signals: Signals, metric: str, rows: Iterable[int], low: int, high: int) -> float | None:
    values = [signals.gauge(metric, row, low, high) for row in rows]
    return finite_median(np.concatenate(values)) if values else None


def foreign(scene: Scene) -> Measure:
    """Processes on the cards that were not there before, or that no like card has."""
    for metric in PROCESS_METRICS:
        if not scene.signals.parts(metric):
            continue
        works = WORKS if metric == PROCESS_METRICS[0] else 0.0
        now = max(_users(scene.signals, metric, row, int(scene.after[0]), scene.upto, works) for row in scene.rows)
        usual = max(_users(scene.signals, metric, row, *scene.surely_before, works) for row in scene.rows)
        if not usual:
            on_peers = [
                _users(scene.signals, metric, row, int(scene.after[0]), scene.upto, works) for row in scene.like
            ]
            usual = int(np.median(on_peers)) if on_peers else 0
        if now:
            return Measure(
                metric, "processes on its card", "", float(usual), float(now), float(now > max(1, usual))
            )
    return _taken(scene)


def _users(signals: Signals, metric: str, row: int, low: int, high: int, works: float) -> int:
    """Most processes at once that use a rank's card in these steps; each was seen at least twice."""
    spans = []
    for labels, series in signals.parts(metric):
        part = series.of(row, low, high)
        if "pid" in labels and part.stop - part.start > 1 and float(np.median(series.value[part])) > works:
            spans.append((int(series.t_ns[part][0]), int(series.t_ns[part][-1])))
    return max((sum(begin <= at <= end for begin, end in spans) for at, _ in spans), default=0)


def _taken(scene: Scene) -> Measure:
    """Card memory that is used and not held by the trainer's allocator, where processes are not told apart."""
    metric, title = "hw.gpu.memory.usage", "card memory that is not the trainer's"
    after = int(scene.after[0]) + 1, int(scene.after[-1])

    def beyond(steps: tuple[int, int]) -> float | None:
        used, held = (
            _middle(scene.signals, name, scene.rows, *steps) for name in (metric, "torch.memory.reserved")
        )
        return None if used is None or held is None else used - held

    usual, now = beyond(scene.surely_before), beyond(after)
    used = _middle(scene.signals, metric, scene.rows, *after)
    if usual is None or now is None or used is None:
        return Measure(metric, title, "B", usual, now, None)
    return Measure(
        metric, title, "B", usual, now, float(np.clip((now - usual) / max(TAKEN_BYTES, TAKEN_SHARE * used), 0, 1))
    )


def throttled_share(signals: Signals, mask: int, rows: list[int], low: int, high: int) -> float | None:
    """Share of the time that cards were throttled for a reason, by the counter of it; None where nobody counts."""
    found = []
    for row in rows:
        rates = [_rate(series, row, low, high) for _, series in signals.parts(THROTTLE_SECONDS[mask])]
        found += [max(known)] if (known := [rate for rate in rates if rate is not None]) else []
    return float(np.mean(found)) if found else None


def _rate(series: Series, row: int, low: int, high: int) -> float | None:
    part = series.of(row, low, high)
    value, t_ns = series.value[part], series.t_ns[part]
    if len(value) < 2 or t_ns[-1] <= t_ns[0]:
        return None
    return float(np.maximum(np.diff(value), 0).sum() / ((t_ns[-1] - t_ns[0]) * 1e-9))
