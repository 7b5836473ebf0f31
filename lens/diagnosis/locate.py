"""From streams that became slower to the place that made them slower.

Two kinds of slowness are told apart: less bandwidth lengthens a stream by a share of its time, more latency by the
same seconds a message. Each stream's word is weighed by what its own noise could have done.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis.arrays import Array, Floats, Ints, median, spread
from lens.diagnosis.changes import NoiseFloor
from lens.diagnosis.places import Place, Places, alternatives
from lens.diagnosis.topology import Topology
from lens.diagnosis.transfers import Transfers

LOUDEST = 4.0
"""No single stream settles where a fault is."""
SURE = 3.0
HALF = 0.5
"""A stream that a fault touches gains at least about this share of what the one it hits hardest does."""
MODEL_ERROR = 0.25
CAPPED = 9.0


@dataclass(frozen=True)
class Effects:
    """Streams before and after an onset, in seconds a step [streams].

    usual: what each should have taken. now: what it took. gain: now - usual. noise: standard deviation of gain.
    count: collectives a step.
    """

    usual: Floats
    now: Floats
    gain: Floats
    noise: Floats
    count: Floats

    @classmethod
    def since(cls, transfers: Transfers, seconds: Floats, before: Ints, after: Ints) -> Effects:
        """Compare with each stream's own past. seconds: [steps, streams]."""
        past = seconds[before]
        usual, now = _mean_without_stalls(past), _mean_without_stalls(seconds[after])
        strays = past - usual
        sigma = np.fmax(spread(past), 1e-9)
        scale = np.fmax(usual, 1e-9)
        floor = NoiseFloor.of(strays / scale, strays / scale, sigma / scale)
        noise = scale * np.hypot(floor.of_lengths(len(after)), floor.of_lengths(len(before)))
        count = np.nan_to_num(median(transfers.count[after]), nan=1.0)
        return cls(usual, now, now - usual, np.where(np.isfinite(noise), noise, np.inf), np.fmax(count, 1e-9))


@dataclass(frozen=True)
class Located:
    """Places that can be the cause with their log-likelihoods, likeliest first; and what became slower.

    streams: those that became slower because of the first. latency: how much better the same seconds a message
    explain the streams than a share of their time, -1 … 1; None when they are too alike to tell.
    """

    places: list[tuple[Place, float]]
    streams: Ints
    effects: Effects
    latency: float | None


def locate(
    places: Places, effects: Effects, unit: float, topology: Topology, hints: Floats | None = None
) -> Located | None:
    """The likeliest places; None when no stream surely became slower.

    unit: seconds of a usual step. hints: log-likelihoods of the places from other signals.
    """
    sure = (effects.gain > SURE * effects.noise) & (effects.gain > 0.005 * unit)
    if not sure.any():
        return None
    chosen = max(
        (_speak(effects, sure, by) for by in ("time", "message")), key=lambda s: float(places.weigh(s).max())
    )
    weights = places.weigh(chosen) + (0.0 if hints is None else hints)
    best = int(np.argmax(weights))
    return Located(
        alternatives(places.places, weights, topology), places.streams_of(best, chosen), effects,
        _latency(effects, places.must_of(best), sure),
    )  # fmt: skip


def _speak(effects: Effects, sure: Array, by: str) -> Floats:
    """What each stream says, > 0: it became slower by about as much as a touched one should."""
    weight = np.fmax(effects.usual, 0.25 * np.nanmedian(effects.usual[sure])) if by == "time" else effects.count
    expected = HALF * float(np.nanmax(effects.gain[sure] / weight[sure])) * weight
    noise = np.hypot(effects.noise, MODEL_ERROR * expected)
    says = (effects.gain - expected / 2) * expected / noise**2
    result: Floats = np.clip(np.nan_to_num(says), -LOUDEST, LOUDEST)
    return result


def _latency(effects: Effects, streams: Ints, sure: Array) -> float | None:
    """Compare both models by what they predict of the other streams from the surest one."""
    known = streams[np.isfinite(effects.usual[streams])]
    if not sure[known].any():
        return None
    each = effects.usual[known] / effects.count[known]
    if each.max() < 4 * max(float(each.min()), 1e-12):
        return None
    lead = known[np.argmax(np.where(sure[known], effects.gain[known] / np.fmax(effects.noise[known], 1e-12), -1))]
    rest = known[known != lead]
    misses = []
    for weight in (effects.usual, effects.count):
        predicted = effects.gain[lead] / max(float(weight[lead]), 1e-12) * weight[rest]
        noise = np.hypot(effects.noise[rest], 0.3 * predicted)
        misses.append(float(np.minimum(((effects.gain[rest] - predicted) / noise) ** 2, CAPPED).sum()))
    by_time, by_message = misses
    return (by_time - by_message) / (by_time + by_message + 2.0)


def relative(transfers: Transfers, seconds: Floats, before: Ints) -> Floats:
    """Seconds without what all streams of a class share in a step; classes of fewer than three stay as they are.

    The lower quarter stands for what is shared: a fault may touch half of a class.
    """
    result = seconds.copy()
    for number in np.unique(transfers.alike):
        members = np.flatnonzero(transfers.alike == number)
        if len(members) < 3:
            continue
        own = median(seconds[np.ix_(before, members)])
        shares = np.sort(seconds[:, members] / np.where(own > 0, own, np.nan), axis=1)
        common = shares[:, (len(members) - 1) // 4]
        usual = float(np.nanmedian(common[before])) if np.isfinite(common[before]).any() else 1.0
        factor = np.where(common > 0, common, usual) / max(usual, 1e-12)
        result[:, members] = seconds[:, members] / factor[:, None]
    return result


def _mean_without_stalls(values: Floats) -> Floats:
    """Mean in which the largest twentieth (at least the two largest) count for no more than the next."""
    count = np.isfinite(values).sum(axis=0)
    if not len(values):
        return np.full(values.shape[1], np.nan)
    ordered = np.sort(values, axis=0)
    place = np.maximum(count - 1 - np.maximum(2, count // 20), 0)
    top = ordered[place, np.arange(values.shape[1])]
    total = np.where(np.isfinite(values), np.minimum(np.nan_to_num(values), np.nan_to_num(top)), 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
