"""Memory that is never given back, on the host or on the card, and memory that is cut into pieces too small to use."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lens.diagnosis import notices, policy
from lens.diagnosis.examine import Examiner
from lens.diagnosis.growth import Growth, growing
from lens.diagnosis.notices import Cause, Evidence, Notice
from lens.diagnosis.signals import Series

CAUSES = {
    "memory_leak_host": Cause(
        "Take two heap profiles of {ranks} some steps apart (tracemalloc, memray) and look for what is kept from step to step.",
        # New pages take time outside of all phases.
        absorbs=("host",),
    ),
    "memory_leak_device": Cause(
        "Look for tensors that {ranks} keep{s} from step to step (losses kept with their graph, growing caches; "
        "torch.cuda.memory._snapshot shows who holds them)."
    ),
    "fragmentation": Cause(
        "Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True on {ranks}, or pad to fewer different tensor sizes.",
        absorbs=("compute", "host"),
    ),
}  # fmt: skip

MIB = 1024.0 * 1024.0
LEAST_RISE = 0.025
LEAST_BYTES = 24 * MIB
"""What must have leaked, as a share of what was in use before and in bytes."""
TOGETHER_RISE = 0.15
TOGETHER_STEPS = 60
"""Where all ranks grow, as they do while caches fill, more of it and longer."""
OWN = 3.0
"""A rank's growth is its own when it is this many times that of its like."""
LEAST_STEPS = 20
FEWEST_RETRIES = 3
RESERVED_RATIO = 1.25
RESERVED_GROWN = 0.15
FLAT = 0.04
"""Change of the memory in live tensors, as a share of it, that counts as none."""


@dataclass(frozen=True)
class Leak:
    """Where memory can leak, by the metrics that show it, best first."""

    cause: str
    metrics: tuple[str, ...]
    said: str


LEAKS = (
    Leak("memory_leak_host", ("process.memory.usage", "container.memory.usage", "system.memory.usage"), "host memory"),
    Leak("memory_leak_device", ("torch.memory.allocated", "gpu.process.memory.usage", "hw.gpu.memory.usage"), "device memory"),
)  # fmt: skip
ALLOCATOR = ("torch.memory.allocated",)
LESS_CERTAIN = {"container.memory.usage": 0.85, "system.memory.usage": 0.75, "hw.gpu.memory.usage": 0.8}
"""Metrics that grow for other reasons too (page cache, other processes, the allocator's pool)."""


@dataclass
class Memory:
    """What the run says of memory."""

    run: Examiner
    _grown: dict[tuple[str, int, int], Growth | None] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Examiner) -> Memory:
        """Nothing is read before it is asked for."""
        return cls(run)

    def at(self, place: int) -> list[Notice]:
        """Leaks and fragmentation that the samples up to a place show."""
        fragmented = self._fragmented(place)
        leaks = [notice for leak in LEAKS if (notice := self._leak(leak, place)) is not None]
        if (
            len(leaks) == 2
            and leaks[1].evidence[0].metric not in ALLOCATOR
            and set(leaks[1].rows) <= set(leaks[0].rows)
        ):
            # What a card holds for a process may follow what the process holds: one leak, seen twice.
            leaks = leaks[:1]
        return [*leaks, *([] if fragmented is None else [fragmented])]

    def _leak(self, leak: Leak, place: int) -> Notice | None:
        metric = next((name for name in leak.metrics if self.run.signals.series(name) is not None), None)
        grown = {} if metric is None else self._growths(metric, place)
        if metric is None or not grown:
            return None
        own = {row: growth for row, growth in grown.items() if self._is_own(metric, row, growth, place)}
        if own:
            most = max(growth.rise for growth in own.values())
            own = {row: growth for row, growth in own.items() if growth.rise >= 0.25 * most}
        elif len(grown) >= 0.5 * len(self.run.topology):
            own = {row: growth for row, growth in grown.items() if growth.rise >= TOGETHER_RISE * growth.base}
            if not own or place - self._first_step(metric, own) < TOGETHER_STEPS:
                return None
        return self._told(leak, metric, notices.listed(own), own, place) if own else None

    def _is_own(self, metric: str, row: int, growth: Growth, place: int) -> bool:
        """Whether a rank grew much more than the others did in the same steps: what all do at first is no leak."""
        series = self.run.signals.series(metric)
        assert series is not None
        since = int(series.step[series.of(row, policy.WARM_UP_STEPS + 1, place)][growth.onset])
        others = []
        for other in np.unique(series.row).tolist():
            values = series.value[series.of(other, since, place)]
            if other != row and len(values) > 1:
                others.append(max(0.0, float(values[-1] - values[0])))
        shared = float(np.median(others)) if others else 0.0
        return growth.rise >= OWN * shared and growth.rise - shared >= _least(growth.base)

    def _growths(self, metric: str, place: int) -> dict[int, Growth]:
        """Ranks whose series grows, by enough to speak of."""
        series = self.run.signals.series(metric)
        assert series is not None
        found = {}
        for row in _changed(series, place):
            part = series.of(row, policy.WARM_UP_STEPS + 1, place)
            growth = self._growth(metric, row, part, series)
            if growth is None or growth.rise < _least(growth.base):
                continue
            if place - int(series.step[part][growth.onset]) >= LEAST_STEPS:
                found[row] = growth
        return found

    def _growth(self, metric: str, row: int, part: slice, series: Series) -> Growth | None:
        key = metric, row, part.stop
        if key not in self._grown:
            self._grown[key] = growing(series.t_ns[part], series.value[part])
        return self._grown[key]

    def _first_step(self, metric: str, grown: dict[int, Growth]) -> int:
        series = self.run.signals.series(metric)
        assert series is not None
        last = len(self.run.timeline) - 1
        return min(
            int(series.step[series.of(row, policy.WARM_UP_STEPS + 1, last)][growth.onset])
            for row, growth in grown.items()
        )

    def _told(self, leak: Leak, metric: str, rows: tuple[int, ...], grown: dict[int, Growth], place: int) -> Notice:
        onset = self._first_step(metric, grown)
        growths = [grown[row] for row in rows]
        rise = max(growth.rise for growth in growths)
        share = min(g.rise / _least(g.base) for g in growths)
        even = 1.0 if min(g.late for g in growths) >= 0.4 else 0.85
        base = float(np.mean([g.base for g in growths]))
        said = f"{leak.said} of {{ranks}} has grown by {rise / MIB:.0f} MiB since step {{onset}} and keeps growing"
        limit = self._time_left(metric, rows, growths, onset, place)
        return Notice(
            leak.cause, rows, onset, None,
            notices.sureness(share, 1.0, 0.96) * even * LESS_CERTAIN.get(metric, 1.0), said + limit,
            (Evidence(metric, base, base + rise),),
        )  # fmt: skip

    def _time_left(self, metric: str, rows: tuple[int, ...], growths: list[Growth], onset: int, place: int) -> str:
        """When the limit will be reached, in words; nothing where no limit is known."""
        limits = {
            "process.memory.usage": ("container.memory.limit", "system.memory.limit"),
            "container.memory.usage": ("container.memory.limit",),
            "system.memory.usage": ("system.memory.limit",),
        }.get(metric, ("hw.gpu.memory.limit",))
        for name in limits:
            known = [v for row in rows if len(v := self.run.signals.gauge(name, row, 0, place))]
            if known:
                left = float(min(v[-1] for v in known)) - max(g.base + g.rise for g in growths)
                pace = max(g.rise for g in growths) / max(1, place - onset)
                return (
                    f"; at this pace its limit is reached in {max(0.0, left) / pace:.0f} steps" if pace > 0 else ""
                )
        return ""

    def _fragmented(self, place: int) -> Notice | None:
        """Cards whose allocator must empty its cache again and again, or reserves ever more for the same tensors."""
        retried = {}
        for row in range(len(self.run.topology)) if self.run.signals.series("torch.memory.reserved") else ():
            found = self._pieces(row, place)
            if found is not None:
                retried[row] = found
        if not retried:
            return None
        most = max(weight for weight, *_ in retried.values())
        rows = notices.listed([row for row, (weight, *_) in retried.items() if weight >= 0.25 * most])
        onset = min(retried[row][1] for row in rows)
        confidence = min(retried[row][2] for row in rows)
        evidence = retried[rows[0]][3]
        return Notice(
            "fragmentation", rows, onset, None, confidence,
            "the allocator of {ranks} holds much more device memory than its tensors use and keeps emptying its cache",
            evidence,
        )  # fmt: skip

    def _pieces(self, row: int, place: int) -> tuple[float, int, float, tuple[Evidence, ...]] | None:
        """Weight, onset, confidence and evidence of one card's fragmentation."""
        low = policy.WARM_UP_STEPS + 1
        reserved, allocated = (
            self.run.signals.gauge(f"torch.memory.{name}", row, low, place) for name in ("reserved", "allocated")
        )
        if len(reserved) < 4 or len(allocated) < 4:
            return None
        quarter = max(1, len(allocated) // 4)
        used, used_before = float(np.median(allocated[-quarter:])), float(np.median(allocated[:quarter]))
        held, held_before = float(np.median(reserved[-quarter:])), float(np.median(reserved[:quarter]))
        if used > (1 + 2 * FLAT) * used_before or held < RESERVED_RATIO * used:
            return None
        evidence = (Evidence("torch.memory.reserved", held_before, held),)
        retries = self.run.signals.series("torch.memory.alloc_retries")
        if retries is not None:
            part = retries.of(row, low, place)
            steps, rises = retries.step[part][1:], np.maximum(np.diff(retries.value[part]), 0)
            if rises.sum() < FEWEST_RETRIES or (rises > 0).sum() < 2:
                return None
            onset = int(steps[np.flatnonzero(rises > 0)[0]])
            more = Evidence(
                "torch.memory.alloc_retries", float(retries.value[part][0]), float(retries.value[part][-1])
            )
            return (
                float(rises.sum()),
                onset,
                notices.sureness(float(rises.sum()), FEWEST_RETRIES),
                (more, *evidence),
            )
        if held < (1 + RESERVED_GROWN) * held_before:
            return None
        series = self.run.signals.series("torch.memory.reserved")
        assert series is not None
        part = series.of(row, low, place)
        onset, _, _ = notices.begins(series.value[part])
        return held / held_before - 1, int(series.step[part][onset]), 0.6, evidence


def _least(base: float) -> float:
    """What must have leaked, in bytes, where so much was in use before."""
    return max(LEAST_RISE * base, LEAST_BYTES)


def _changed(series: Series, place: int) -> list[int]:
    """Rows whose last sample up to a place lies above their first by enough to look closer."""
    rows = []
    for row in np.unique(series.row).tolist():
        part = series.of(row, policy.WARM_UP_STEPS + 1, place)
        values = series.value[part]
        if len(values) >= 4 and values[-1] - values[0] >= 0.8 * _least(float(values[0])):
            rows.append(row)
    return rows
