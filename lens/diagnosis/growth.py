"""Does a series of samples grow without end? Leaks rise in their lower envelope, not only in their peaks.

Memory that fills up once (caches, first batches, a larger buffer) jumps or saturates; memory that is used and freed
goes up and down. What leaks keeps rising in its troughs, at a pace that does not fade.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis.arrays import Floats, Ints

FEWEST_SAMPLES = 5
MOST_POINTS = 48
"""Longer series are judged by the lowest samples of so many equal parts."""
MOST_SEGMENTS = 8
SAMPLES_A_SEGMENT = 3
LATE_SHARE = 0.3
"""Share of the rise that must come in its second half; half of it does when the pace is even."""
LARGEST_JUMP = 0.55
"""Share of the rise that may come between two neighbouring troughs."""
FALL = 0.1
"""Share of the rise by which a trough may lie below the one before."""
NOISE = 4.0
"""The rise must exceed the usual difference of neighbouring samples by this factor."""


@dataclass(frozen=True)
class Growth:
    """A rise that goes on. onset: number of the sample after which it began; base: the level until then; rise: how much
    so far; late: share of it in its second half."""

    onset: int
    base: float
    rise: float
    late: float


def growing(t_ns: Ints, values: Floats) -> Growth | None:
    """The growth at the end of a series in order of time; None where it does not grow, or nobody can say yet."""
    if len(values) < FEWEST_SAMPLES:
        return None
    seconds, lowest, number = _thinned((t_ns - t_ns[0]) * 1e-9, values)
    onset = _knee(seconds, lowest)
    if len(lowest) - onset < FEWEST_SAMPLES - 1:
        return None
    troughs = _troughs(lowest[onset:])
    rise, steps = float(troughs[-1] - troughs[0]), np.diff(troughs)
    if rise <= 0 or steps.min() < -FALL * rise or steps.max() > LARGEST_JUMP * rise:
        return None
    late = 1 - float(np.interp((len(troughs) - 1) / 2, np.arange(len(troughs)), troughs) - troughs[0]) / rise
    before = lowest[: onset + 1]
    noise = float(np.median(np.abs(np.diff(before)))) if len(before) > 3 else 0.0
    if late < LATE_SHARE or rise < NOISE * noise:
        return None
    return Growth(int(number[onset]), float(np.median(before)), rise, late)


def _thinned(seconds: Floats, values: Floats) -> tuple[Floats, Floats, Ints]:
    """The lowest sample of each of at most MOST_POINTS equal parts: its time, value and number."""
    if len(values) <= MOST_POINTS:
        return seconds, values, np.arange(len(values))
    parts = np.array_split(np.arange(len(values)), MOST_POINTS)
    lowest = np.array([part[np.argmin(values[part])] for part in parts], np.int64)
    return seconds[lowest], values[lowest], lowest


def _knee(seconds: Floats, values: Floats) -> int:
    """The sample after which a line that was level rises best; 0 where it rises from the first one on."""
    ramps = np.maximum(seconds[None, :] - seconds[: len(values) - FEWEST_SAMPLES + 2, None], 0)
    ramps -= ramps.mean(axis=1, keepdims=True)
    centred = values - values.mean()
    # Least squares of a level and a ramp: what a ramp explains is its squared covariance by its variance.
    explained = np.maximum(ramps @ centred, 0) ** 2 / np.maximum((ramps**2).sum(axis=1), 1e-30)
    return int(np.argmax(explained))


def _troughs(values: Floats) -> Floats:
    """Lowest values of equal parts of the series, in order."""
    parts = int(np.clip(len(values) // SAMPLES_A_SEGMENT, 4, MOST_SEGMENTS))
    return np.array([part.min() for part in np.array_split(values, min(parts, len(values)))])
