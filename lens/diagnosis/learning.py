"""What the numbers of the training say while they are finite: a loss that jumps, a rank that computes something else.

A loss is compared with its own past, on all ranks at once: data that is bad for everybody, or an update that went
wrong. A rank's gradient norm before any reduction is compared with its peers', and that with its own past: experts
and stages differ by design, but by the same factor from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lens.diagnosis import notices, policy
from lens.diagnosis.arrays import Floats, Ints, median, median_of_others, spread
from lens.diagnosis.examine import Examiner
from lens.diagnosis.notices import Cause, Evidence, Notice
from lens.slots import NULL

CAUSES = {
    "loss_spike": Cause(
        "Look at the batches of these steps and at the learning rate; if the loss does not come back, return to the "
        "checkpoint before and skip them."
    ),
    "silent_corruption": Cause(
        "Take {component} out of the job and test its arithmetic (a fixed input through a fixed layer, twice), since "
        "nothing else would show it; go back to a checkpoint before step {onset}."
    ),
}

LOCAL_LOSS, LOSS, NORM = "train.loss.local", "train.loss", "train.grad_norm.local"
SPIKE = 5.0
"""A loss so many times its own past is a spike …"""
SPIKE_SIGMAS = 12.0
"""… and so many of its own standard deviations above it: a loss near zero multiplies easily."""
PAST_STEPS, FEWEST_PAST = 32, 8
ALL_RANKS = 0.8
"""Share of the reporting ranks that must spike together; fewer have odd data of their own."""
CORRUPT_SIGMAS = 10.0
CORRUPT_RATIO = 1.5
"""Factor by which a rank's norm must leave its peers', either way."""
CORRUPT_STEPS = 4
"""In a row: one odd batch is over after a step."""
SMALLEST_SIGMA = 0.02
FEWEST_PEERS = 3


@dataclass(frozen=True)
class Learning:
    """Losses and gradient norms by step. local: of each rank [steps, ranks]; loss: reduced [steps]; norms: before any
    reduction [steps, ranks]. Not finite and not known are NaN."""

    run: Examiner
    local: Floats
    loss: Floats
    norms: Floats

    @classmethod
    def of(cls, run: Examiner) -> Learning:
        """Read them once."""
        reduced = _by_step(run, LOSS)
        return cls(run, _by_step(run, LOCAL_LOSS), median(reduced, axis=1), _by_step(run, NORM))

    def at(self, place: int) -> list[Notice]:
        """Spikes and corruption up to a place."""
        found = [self._spike(place), *self._corrupt(place)]
        return [notice for notice in found if notice is not None]

    def _spike(self, place: int) -> Notice | None:
        """The last spike of the loss, from its first step to its last."""
        metric, values = self._typical
        high = [(step, base) for step, base in self._high if step <= place]
        if not high:
            return None
        # Spikes far apart are different events: the last one is told.
        last = high[-1][0]
        onset = next(
            step for place_of, (step, _) in enumerate(high)
            if all(b[0] - a[0] <= FEWEST_PAST for a, b in zip(high[place_of:], high[place_of + 1 :], strict=False))
        )  # fmt: skip
        base = next(base for step, base in high if step == onset)
        peak = float(np.nanmax(values[onset : last + 1]))
        over = np.isfinite(values[last + 1 : place + 1]).any()
        return Notice(
            "loss_spike", (), onset, last if over else None, 0.92 if metric == LOCAL_LOSS else 0.8,
            f"the loss of all ranks rose from {base:.3g} to {peak:.3g} at step {{onset}}",
            (Evidence(metric, base, peak),),
        )  # fmt: skip

    @cached_property
    def _typical(self) -> tuple[str, Floats]:
        """The loss that more steps have, the median of the ranks' own or the reduced one: its name and values [steps]."""
        typical = median(self.local, axis=1)
        told = np.isfinite(typical).sum() >= np.isfinite(self.loss).sum()
        return (LOCAL_LOSS, typical) if told else (LOSS, self.loss)

    @cached_property
    def _high(self) -> list[tuple[int, float]]:
        """Every step whose loss jumped from its past, ascending, with the median of that past."""
        metric, values = self._typical
        past: list[float] = []
        high: list[tuple[int, float]] = []
        for step in range(policy.WARM_UP_STEPS, len(values)):
            value = float(values[step])
            if not np.isfinite(value):
                continue
            if len(past) >= FEWEST_PAST and _jumped(value, past) and self._shared(metric, step, past):
                high.append((step, float(np.median(past))))
                continue
            past = [*past[1 - PAST_STEPS :], value]
        return high

    def _shared(self, metric: str, step: int, past: list[float]) -> bool:
        """Whether nearly all ranks rose; unknown where only the reduced loss is."""
        if metric != LOCAL_LOSS:
            return True
        row = self.local[step]
        row = row[np.isfinite(row)]
        return bool((row > SPIKE / 2 * float(np.median(past))).mean() >= ALL_RANKS)

    def _corrupt(self, place: int) -> list[Notice]:
        """Ranks whose norm left their peers' and stays away, while their loss does not."""
        steps = notices.judged_steps(place)
        found = []
        for group in self.run.groups:
            if len(group) < FEWEST_PEERS or len(steps) < FEWEST_PAST + CORRUPT_STEPS:
                continue
            away = _apart(self.norms[np.ix_(steps, group)])
            loss = _apart(self.local[np.ix_(steps, group)])
            enough = np.isfinite(away).sum(axis=0) >= FEWEST_PAST + CORRUPT_STEPS
            for member in np.flatnonzero(enough).tolist():
                notice = self._one(int(group[member]), away[:, member], loss[:, member], steps)
                if notice is not None:
                    found.append(notice)
        # Ranks that leave together are no broken card: their data or their part of the model changed.
        return found if len(found) <= max(1, len(self.run.topology) // 8) else []

    def _one(self, row: int, away: Floats, loss: Floats, steps: Ints) -> Notice | None:
        known = np.flatnonzero(np.isfinite(away))
        split = _departure(away[known])
        if split is None:
            return None
        past, after = known[:split], known[split:]
        before, now = float(np.median(away[past])), float(np.median(away[after]))
        if abs(_level(loss, after) - _level(loss, past)) > 0.5 * abs(now - before):
            return None
        ratio = float(np.exp(now - before))
        word = "rose" if ratio > 1 else "fell"
        return Notice(
            "silent_corruption", (row,), int(steps[after[0]]), None, 0.9,
            f"the local gradient norm of {{ranks}} {word} to {ratio:.2f} times what its peers' would give, before any "
            "reduction, while its loss stayed with theirs",
            (Evidence(NORM, float(np.exp(before)), float(np.exp(now))),),
            rivals=(("loss_spike", "the loss of this rank stayed with its peers'"),),
        )  # fmt: skip


def _by_step(run: Examiner, metric: str) -> Floats:
    """A metric's finite values [steps, ranks]; the later of two of one step; a rank that is not known gives nothing."""
    table, timeline = run.tables.samples, run.timeline
    values = np.full((len(timeline), len(run.topology)), np.nan)
    rows = np.flatnonzero((table["metric"] == run.tables.code(metric)) & (table["step"] != NULL))
    if not len(rows) or not len(timeline):
        return values
    rows = rows[np.lexsort((table["value"][rows], table["t_ns"][rows]))]
    step = np.minimum(np.searchsorted(timeline.steps, table["step"][rows]), len(timeline) - 1)
    place = run.topology.row(table["rank"][rows])
    fits = (timeline.steps[step] == table["step"][rows]) & (place >= 0) & np.isfinite(table["value"][rows])
    values[step[fits], place[fits]] = table["value"][rows][fits]
    return values


def _jumped(value: float, past: list[float]) -> bool:
    """Whether a loss is far above its past, by factor and by spread."""
    base = float(np.median(past))
    if not 0 < SPIKE * base < value:
        return False
    sigma = max(1.4826 * float(np.median(np.abs(np.array(past) - base))), SMALLEST_SIGMA * abs(base))
    return value > base + SPIKE_SIGMAS * sigma


def _apart(values: Floats) -> Floats:
    """Logarithm of each member by the median of the others [steps, members]; what is not positive is not known."""
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.where(values > 0, np.log(values), np.nan)
    return logs - median_of_others(logs)


def _departure(away: Floats) -> int | None:
    """Where a series left its past for good: from there on every value is out on the same side."""
    for side in (1.0, -1.0):
        split, _, _ = notices.begins(side * away, CORRUPT_STEPS)
        if split < FEWEST_PAST:
            continue
        past = away[:split]
        bar = max(CORRUPT_SIGMAS * max(float(spread(past)), SMALLEST_SIGMA), float(np.log(CORRUPT_RATIO)))
        if (side * (away[split:] - np.median(past)) > bar).all():
            return split
    return None


def _level(values: Floats, steps: Ints) -> float:
    known = values[steps]
    known = known[np.isfinite(known)]
    return float(np.median(known)) if len(known) else 0.0
