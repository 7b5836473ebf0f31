"""Processes that were stopped for a while (SIGSTOP, a debugger, a frozen container) and went on.

All ranks wait meanwhile, so single steps are far too long. Who was stopped is told by the heartbeats, which the agent
writes on a process's behalf: state "stopped", or none at all while those of others go on. A slow loader, a busy
processor and a long checkpoint look the same in the step time and keep their heartbeats. Processor time that stands
still proves little alone, since a rank that waits for batches uses none either: it counts inside the computing only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from lens.diagnosis import notices, policy
from lens.diagnosis.arrays import Array, Floats, Ints, finite_median, median
from lens.diagnosis.decompose import SECONDS
from lens.diagnosis.examine import Examiner
from lens.diagnosis.notices import Cause, Evidence, Notice
from lens.slots import NULL

CAUSES = {
    "process_stopped": Cause(
        "Find who stops the process of {ranks} (a debugger, job control, a scheduler that suspends, a frozen container, a "
        "paused machine).",
        absorbs=("compute", "data", "h2d", "host"),
    ),
}  # fmt: skip

LEAST_S, LEAST_OF_STEP = 0.5, 0.3
"""What a step must be too long by, in seconds and as a share of the usual one: shorter stops fall between heartbeats."""
PAST_STEPS = 64
FEWEST_BEATS = 3
"""So many heartbeats must have been due before their absence says anything."""
STANDS_STILL = 0.15
"""Share of the usual processor time that a stopped process may seem to use: samples lie beside the stop's borders."""
AT_WORK = 0.3
"""Processor seconds per second below which standing still says nothing."""
TAKEN = 0.3
"""Share of the time for which something else kept the process off the processor: then it was not stopped."""
SEEN, SILENT, SILENT_AND_STILL, STILL = 0.96, 0.75, 0.9, 0.6
"""How sure: the state itself, no heartbeat, also no processor time, no processor time alone."""


@dataclass(frozen=True)
class Stall:
    """A step that was much too long. place: of the step. from_ns, to_ns: its bounds. excess_s: too long by so much."""

    place: int
    from_ns: int
    to_ns: int
    excess_s: float


@dataclass(frozen=True)
class Stops:
    """The stalls of a run, and the heartbeats around them, in order of time."""

    run: Examiner
    lap_s: Floats
    stalls: tuple[Stall, ...]
    beat_ns: Ints
    beat_row: Ints
    stopped: Array

    @classmethod
    def of(cls, run: Examiner) -> Stops:
        """Find the stalls and read the heartbeats."""
        end = run.frame.end_ns.max(axis=1, initial=NULL)
        lap = np.full(len(end), np.nan)
        known = (end[1:] != NULL) & (end[:-1] != NULL)
        lap[1:][known] = (end[1:] - end[:-1])[known] * SECONDS
        stalls = []
        for place in np.flatnonzero(lap > LEAST_S).tolist():
            usual = finite_median(lap[max(policy.WARM_UP_STEPS, place - PAST_STEPS) : place])
            if usual is not None and lap[place] - usual >= max(LEAST_S, LEAST_OF_STEP * usual):
                stalls.append(Stall(place, int(end[place - 1]), int(end[place]), float(lap[place] - usual)))
        return cls(run, lap, tuple(stalls), *(_beats(run) if stalls else _NO_BEATS))

    def at(self, place: int) -> list[Notice]:
        """Ranks that were stopped up to a place; those stopped in the same steps together."""
        by_row: dict[int, list[tuple[Stall, float]]] = {}
        for stall in self.stalls:
            if policy.ENOUGH_STEPS <= stall.place <= place:
                for row, sure in self._stopped_in(stall, int(self.run.timeline.ended_ns[place])).items():
                    by_row.setdefault(row, []).append((stall, sure))
        together: dict[tuple[int, ...], list[int]] = {}
        for row, found in by_row.items():
            together.setdefault(tuple(stall.place for stall, _ in found), []).append(row)
        told = [self._told(notices.listed(rows), by_row[rows[0]], place) for rows in together.values()]
        return [notice for notice in told if notice is not None]

    def _told(self, rows: tuple[int, ...], found: list[tuple[Stall, float]], place: int) -> Notice | None:
        places = [stall.place for stall, _ in found]
        lost = sum(stall.excess_s for stall, _ in found)
        onset, newest = places[0], places[-1]
        if lost / float(np.nansum(self.lap_s[policy.WARM_UP_STEPS : place + 1])) < policy.WORTH_KEEPING:
            return None
        calm = max([policy.CALM_STEPS, *(2 * np.diff(places)).tolist()])
        last = newest if place - newest > calm else None
        whole = float(np.nansum(self.lap_s[onset : (place if last is None else last) + 1]))
        often = f" {len(found)} times" if len(found) > 1 else ""
        return Notice(
            "process_stopped", rows, onset, last, max(sure for _, sure in found),
            f"the process of {{ranks}} was stopped{often} for {notices.short(lost / len(found))} and did not run",
            (Evidence("process.stopped", 0.0, lost / len(found)),), whole / max(whole - lost, 1e-9), None,
            (("slow_dataloader", "the process gave no sign of life meanwhile; one that waits does"),),
        )  # fmt: skip

    def _stopped_in(self, stall: Stall, now_ns: int) -> dict[int, float]:
        """Ranks that were stopped during a stall, each with how sure that is."""
        low, high = np.searchsorted(self.beat_ns, [stall.from_ns, min(stall.to_ns, now_ns) + 1])
        rows, ranks = self.beat_row[low:high], self.run.frame.shape[1]
        beats = np.bincount(rows, minlength=ranks)
        seen = np.bincount(rows, weights=self.stopped[low:high], minlength=ranks)
        if seen.any():
            return dict.fromkeys(np.flatnonzero(seen > 0).tolist(), SEEN)
        heard = np.bincount(self.beat_row, minlength=ranks) > FEWEST_BEATS
        found = {}
        if heard.sum() > 1 and beats[heard].max() >= FEWEST_BEATS:
            for row in np.flatnonzero(heard & (beats == 0)).tolist():
                still = self._stood_still(row, stall, now_ns)
                if still is not False:
                    found[row] = SILENT if still is None else SILENT_AND_STILL
            return found if len(found) <= ranks / 2 else {}
        for row in self._late_in_computing(stall) if not heard.any() else ():
            if self._stood_still(row, stall, now_ns):
                found[row] = STILL
        return found

    def _late_in_computing(self, stall: Stall) -> list[int]:
        """Ranks whose own computing took most of the stall."""
        compute = self.run.features["compute"]
        past = compute[max(policy.WARM_UP_STEPS, stall.place - PAST_STEPS) : stall.place]
        excess = compute[stall.place] - median(past)
        return [int(row) for row in np.flatnonzero(excess >= 0.7 * stall.excess_s)]

    def _stood_still(self, row: int, stall: Stall, now_ns: int) -> bool | None:
        """Whether a process used no processor during a stall, and nothing kept it off one; None when not known."""
        ran = self._used("process.cpu.time", row, stall, now_ns)
        usual = self.run.signals.rate("process.cpu.time", row, policy.WARM_UP_STEPS, stall.place - 1)
        if ran is None or usual is None or usual < AT_WORK:
            return None
        for metric in ("process.cpu.run_delay", "container.cpu.throttled.time"):
            kept_off = self._used(metric, row, stall, now_ns)
            if kept_off is not None and kept_off[0] >= TAKEN * stall.excess_s:
                return False
        used, seconds = ran
        return used <= usual * (max(0.0, seconds - stall.excess_s) + STANDS_STILL * stall.excess_s)

    def _used(self, metric: str, row: int, stall: Stall, now_ns: int) -> tuple[float, float] | None:
        """Growth of a counter from the last sample before a stall to the first after it, and the seconds between."""
        series = self.run.signals.series(metric)
        if series is None:
            return None
        part = series.of(row, 0, len(self.run.timeline))
        t_ns, value = series.t_ns[part], series.value[part]
        first = int(np.searchsorted(t_ns, stall.from_ns, "right")) - 1
        last = int(np.searchsorted(t_ns, stall.to_ns, "left"))
        if first < 0 or last >= len(t_ns) or t_ns[last] > now_ns:
            return None
        return float(value[last] - value[first]), float(t_ns[last] - t_ns[first]) * SECONDS


_NO_BEATS = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))


def _beats(run: Examiner) -> tuple[Ints, Ints, Array]:
    """Time, rank and whether stopped, of every heartbeat."""
    table = run.tables.events
    mine = np.flatnonzero((table["kind"] == run.tables.code("heartbeat")) & (table["rank"] >= 0))
    mine = mine[np.argsort(table["t_ns"][mine], kind="stable")]
    row = run.topology.row(table["rank"][mine])
    mine, row = mine[row >= 0], row[row >= 0]
    states = {
        code: json.loads(run.tables.strings[code]).get("state") == "stopped" if code >= 0 else False
        for code in np.unique(table["attrs"][mine]).tolist()
    }
    stopped = np.array([states[code] for code in table["attrs"][mine].tolist()], bool)
    return table["t_ns"][mine], row, stopped
