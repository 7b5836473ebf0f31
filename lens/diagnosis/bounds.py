"""What a healthy run is bound by, told as information: its own computing, or the small delays of many ranks.

With n ranks each step waits for the largest of n delays: what is noise on one rank is a cost at scale, and nobody's fault.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis import notices
from lens.diagnosis.arrays import Floats, Ints, mean, median
from lens.diagnosis.examine import Examiner
from lens.diagnosis.notices import Cause, Evidence, Notice

CAUSES = {
    "jitter_amplification": Cause(
        "Look at what interrupts ranks now and then (daemons, interrupts, collections on different steps), synchronise what "
        "can be planned, or overlap more of the collectives.",
        severity="info",
    ),
    "compute_bound": Cause(
        "Nothing holds this run back but its own computing: faster kernels, lower precision or more cards make it faster.",
        severity="info",
    ),
}  # fmt: skip

STEPS = 60
MANY = 64
"""Fewer ranks do not amplify: their delays are told by rank."""
JITTER_COST = 0.10
NOBODY = 0.1
"""A rank that is the slowest of more than this share of the steps is slow itself …"""
STANDING = 0.5
"""… and so are ranks whose mean delay is this share of what the slowest costs."""
BOUND_RANKS = 8
BOUND_SHARE = 0.9
"""Of the step, on nearly every rank."""
NEARLY_ALL = 0.1


@dataclass(frozen=True)
class Bounds:
    """The self times of a run."""

    run: Examiner

    @classmethod
    def of(cls, run: Examiner) -> Bounds:
        """They are known."""
        return cls(run)

    def at(self, place: int) -> list[Notice]:
        """What the run is bound by up to a place."""
        steps = notices.judged_steps(place)
        if len(steps) < STEPS or not self.run.frame.wait:
            return []
        steps = steps[-STEPS:]
        found = self._jitter(steps) or self._computing(steps)
        return [] if found is None else [found]

    def _jitter(self, steps: Ints) -> Notice | None:
        ranks, unit = self.run.frame.shape[1], self.run.usual_seconds(steps)
        if ranks < MANY or not unit > 0:
            return None
        late = self._late(steps)
        worst = np.nan_to_num(late.max(axis=1))
        slowest = np.bincount(np.nan_to_num(late).argmax(axis=1), minlength=ranks).max() / len(steps)
        always = float(np.nanmax(median(late)))
        if worst.mean() < JITTER_COST * unit or slowest > NOBODY or always > STANDING * worst.mean():
            return None
        ratio = self.run.cost_ratio(steps, np.maximum(np.nan_to_num(late), 0))
        if ratio is None or ratio - 1 < JITTER_COST:
            return None
        typical = float(np.nanmean(np.abs(late)))
        said = (
            f"ranks stray from each other by {notices.short(typical)} a step, and each step waits for the one of "
            f"{ranks:,} that was delayed most, by {notices.short(float(worst.mean()))}: another one each time"
        )
        return Notice(
            "jitter_amplification", (), 0, None, notices.sureness(ratio - 1, JITTER_COST, 0.9), said,
            (Evidence("comm.self", typical, float(worst.mean())),), ratio,
            rivals=(("slow_device", "another rank is the slowest in each step"),),
        )  # fmt: skip

    def _late(self, steps: Ints) -> Floats:
        """How much more self time each rank has than the typical one of its kind [steps, ranks]."""
        own = np.nansum([values[steps] for values in self.run.features.values()], axis=0)
        late = np.full(own.shape, np.nan)
        for kind in np.unique(self.run.topology.kind):
            members = np.flatnonzero(self.run.topology.kind == kind)
            late[:, members] = own[:, members] - median(own[:, members], axis=1)[:, None]
        return late

    def _computing(self, steps: Ints) -> Notice | None:
        compute = self.run.features.get("compute")
        if compute is None or compute.shape[1] < BOUND_RANKS:
            return None
        usual = self.run.usual[steps]
        share = mean(compute[steps] / np.where(usual > 0, usual, np.nan)[:, None])
        least = float(np.nanquantile(share, NEARLY_ALL)) if np.isfinite(share).any() else 0.0
        if least < BOUND_SHARE:
            return None
        return Notice(
            "compute_bound", (), 0, None, notices.sureness(least, BOUND_SHARE / 1.5, 0.95),
            f"all ranks compute for {100 * float(np.nanmean(share)):.0f} % of the step and hardly wait for data or each other",
            (Evidence("comm.self", None, float(np.nanmean(compute[steps]))),),
        )  # fmt: skip
