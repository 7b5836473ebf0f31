"""Hosts that fetch memory from disk: pages come back from swap, or are read again, and every rank there waits for them.

One rank asks for the page and its neighbours wait for the same disk, so the whole host is named. What a host always
reads (mapped data sets) is no swapping: the rate must have risen, and the time of its ranks with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis import notices, pauses, policy, wholes
from lens.diagnosis.arrays import Array, Floats, Ints, finite_median
from lens.diagnosis.examine import Examiner
from lens.diagnosis.notices import Cause, Evidence, Notice

CAUSES = {
    "host_swap": Cause(
        "Find what fills the memory of {component} (free -m, smem), give its ranks less to hold (loader workers, prefetched "
        "batches, pinned buffers), and keep the trainer out of swap (swapoff, memory.swap.max=0).",
        absorbs=("compute", "data", "h2d", "host", "transfer"),
        brings=("slow_dataloader", "input_bound", "cpu_contention"),
    ),
}  # fmt: skip
SWAPPED, FAULTS, PRESSURE = "system.paging.operations", "process.paging.faults", "host.pressure.some"
LEAST_RATE = 100.0
"""Pages a second that a host must fetch: a disk gives thousands, and a few are no load."""
RISEN = 4.0
PRESSED = 0.05
"""Share of the time that tasks must wait for memory, where pages that are read again are no swapping by themselves."""
STEPS = 10
STRAYS = 3.0
"""Standard errors of the mean that the gain in time must exceed."""


@dataclass(frozen=True)
class Swapping:
    """Pages that each rank's host fetched in each step. swapped: from swap; faults: major faults of the rank itself
    [steps, ranks]; None where nobody counts them."""

    run: Examiner
    swapped: Floats | None
    faults: Floats | None

    @classmethod
    def of(cls, run: Examiner) -> Swapping:
        """Lay what the counters grew by over the steps."""
        return cls(run, pauses.spread_over_steps(run, SWAPPED), pauses.spread_over_steps(run, FAULTS))

    def at(self, place: int) -> list[Notice]:
        """Hosts that fetch more pages than before up to a place, and whose ranks take longer for it."""
        steps = notices.judged_steps(place)
        hosts = self.run.topology.host_index()
        if len(steps) < policy.FIRST_JUDGED_STEPS + STEPS or (self.swapped is None and self.faults is None):
            return []
        found = [self._judge(np.flatnonzero(hosts == host), steps) for host in np.unique(hosts)]
        return [notice for notice in found if notice is not None]

    def _judge(self, rows: Array, steps: Ints) -> Notice | None:
        seconds = self.run.usual[steps]
        for metric, pages in ((SWAPPED, self._swapped_by(rows)), (FAULTS, self._faults_of(rows))):
            if pages is None:
                continue
            rate = np.nan_to_num(pages[steps] / np.where(seconds > 0, seconds, np.nan))
            onset, before, now = notices.begins(rate, policy.FIRST_JUDGED_STEPS)
            if onset and now - before >= LEAST_RATE and now >= RISEN * before:
                notice = self._priced(metric, rows, steps[:onset], steps[onset:], before, now)
                if notice is not None:
                    return notice
        return None

    def _swapped_by(self, rows: Array) -> Floats | None:
        # A host's counter stands once for each of its ranks.
        return None if self.swapped is None else self.swapped[:, rows].max(axis=1)

    def _faults_of(self, rows: Array) -> Floats | None:
        return None if self.faults is None else self.faults[:, rows].sum(axis=1)

    def _priced(
        self, metric: str, rows: Array, past: Ints, after: Ints, before: float, now: float
    ) -> Notice | None:
        pressure = [self.run.signals.gauge(PRESSURE, int(row), int(after[0]), int(after[-1])) for row in rows]
        pressed = finite_median(np.concatenate(pressure))
        if metric == FAULTS and (pressed is None or pressed < PRESSED):
            return None
        own = np.nansum(list(self.run.features.values()), axis=0)
        inside = tuple(int(row) for row in rows)
        extra, _ = wholes.excess(own, inside, past, after)
        gained = np.clip(extra.mean(axis=1), -1, 1)
        unit = self.run.usual_seconds(past)
        error = float(gained.std()) / np.sqrt(len(gained))
        share = float(gained.mean()) / unit
        if not share >= policy.WORTH_KEEPING or gained.mean() < STRAYS * error:
            return None
        late = np.zeros((len(after), own.shape[1]))
        late[:, rows] = np.maximum(extra, 0)
        ratio = self.run.cost_ratio(after, late)
        if ratio is None or ratio - 1 < policy.SMALLEST_EFFECT:
            return None
        evidence = [Evidence(metric, before, now)]
        if pressed is not None:
            evidence.append(Evidence(PRESSURE, None, pressed))
        what = (
            "pages a second are fetched from swap"
            if metric == SWAPPED
            else "pages a second are read from disk again"
        )
        return Notice(
            "host_swap", inside, int(after[0]), None,
            notices.sureness(share, policy.WORTH_KEEPING, 0.96 if metric == SWAPPED else 0.85),
            f"on {{component}} {now:.0f} {what} since step {{onset}}, {before:.0f} before, and {{ranks}} wait{{s}} for them",
            tuple(evidence), ratio,
            rivals=(("slow_dataloader", "all of the host's ranks are slower, in loading and in computing"),),
        )  # fmt: skip
