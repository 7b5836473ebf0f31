"""Causes that do not begin with one rank's time: what all ranks share, what comes in pauses, what memory and numbers say.

Each family of such causes reads the run once (`of`) and answers for any step place (`at`); what it answers at a place
hangs on the records up to there alone. Places are taken on a grid (`grids`), since none of these changes from step to step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lens.diagnosis import policy
from lens.diagnosis.arrays import Floats, Ints

if TYPE_CHECKING:
    from lens.diagnosis.examine import Examiner


@dataclass(frozen=True)
class Evidence:
    """One measured number behind a notice, as the reply shows it; a baseline of None is not known."""

    metric: str
    baseline: float | None
    observed: float | str | None


@dataclass(frozen=True)
class Notice:
    """A cause that a family saw.

    rows: places of its ranks, () where it sits in no particular one. onset, last: step places; last None while it
    lasts. confidence: that cause and ranks are both right. ratio: step time over what it would be without, None where
    it costs no time or that is not known. said: what was seen, as the beginning of a sentence without its point.
    rivals: other causes with what speaks against them. requests: time of requests (of their tokens, or until the first)
    over what it would be without, where a run serves and its steps do not tell. onset is -1 in a run without steps.
    """

    cause: str
    rows: tuple[int, ...]
    onset: int
    last: int | None
    confidence: float
    said: str
    evidence: tuple[Evidence, ...]
    ratio: float | None = None
    component: str | None = None
    rivals: tuple[tuple[str, str], ...] = ()
    requests: float | None = None


class Family(Protocol):
    """Causes that are read from the same records."""

    @classmethod
    def of(cls, run: Examiner) -> Family:
        """Read what the family judges by."""

    def at(self, place: int) -> list[Notice]:
        """What it has to say with the records visible at a step place of the grid."""


@dataclass(frozen=True)
class Cause:
    """How a noticed cause is told. absorbs: parts of the step whose excess on its ranks it explains. brings: causes that
    it brings about."""

    advice: str
    severity: str = "warning"
    absorbs: tuple[str, ...] = ()
    brings: tuple[str, ...] = ()


def begins(values: Floats, least: int = 1, latest: int | None = None) -> tuple[int, float, float]:
    """Where a series splits best into a lower and a higher part: its place, and the means of both.

    Each part has at least so many entries, and the higher begins at `latest` or before. A series too short, or one
    that does not rise, begins at 0 with its mean.
    """
    count = len(values)
    last = count - least if latest is None else min(latest, count - least)
    if last < least:
        return 0, 0.0, float(values.mean()) if count else 0.0
    total = np.cumsum(values)
    number = np.arange(least, last + 1)
    below, above = total[number - 1] / number, (total[-1] - total[number - 1]) / (count - number)
    gap = above - below
    weight = np.where(gap > 0, gap**2 * number * (count - number), -1.0)
    best = int(np.argmax(weight))
    if weight[best] <= 0:
        return 0, 0.0, float(values.mean())
    return int(number[best]), float(below[best]), float(above[best])


def judged_steps(place: int) -> Ints:
    """Steps of a run that may be judged at a place: all after the warm-up."""
    return np.arange(policy.WARM_UP_STEPS, place + 1)


def sureness(excess: float, bar: float, most: float = 0.97) -> float:
    """Confidence that grows from a bare pass of the bar (0.6) to `most` at three times the bar and beyond."""
    return float(np.clip(0.6 + (most - 0.6) * (excess / bar - 1) / 2, 0.05, most))


def listed(rows: Iterable[int] | Ints) -> tuple[int, ...]:
    """Rows as a finding bears them: ascending, each once."""
    return tuple(sorted({int(row) for row in rows}))


def short(seconds: float) -> str:
    """Seconds in words: "4.2 ms", "310 ms", "2.4 s"."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"
