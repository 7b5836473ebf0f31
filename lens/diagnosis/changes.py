"""When did a rank begin to differ from its own past and from its peers? Clipped robust CUSUM with verification.

Each rank's series is compared with its baseline and with what its peers did in the same step, so that what all
share (longer sequences, a busy machine) is no change. The CUSUM finds a candidate; it becomes a change only when
the mean effect since its onset exceeds both the smallest effect worth naming and the noise that means of that
length show in this very run (half of it: what other signals confirm needs less). Everything at step t depends on
steps ≤ t only: the same answer comes from the records up to t.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lens.diagnosis import policy
from lens.diagnosis.arrays import Array, Floats, median, median_of_others, spread

VERIFIED_LENGTHS = (5, 8, 12, 16, 24, 32, 48, 64)
"""A candidate is verified by the mean effect of its last steps, over each of these lengths that it has."""
SPLIT_MARGIN = 8
"""Steps before a candidate's onset that the split is fitted on too."""


@dataclass(frozen=True)
class Change:
    """A rank's series that left its baseline, upwards.

    onset, raised: index of the first differing step, and of the step at which it was sure. settled: index of the
    step at which it was seen to be over (None while it lasts), last: index of the last differing step then.
    effect: mean excess as a share of the usual step. noise: what noise alone could have reached then.
    """

    row: int
    onset: int
    raised: int
    effect: float
    noise: float
    settled: int | None = None
    last: int | None = None

    def seen_at(self, index: int) -> Change | None:
        """This change as known at a step: not yet raised is None, not yet settled lasts."""
        if self.raised > index:
            return None
        return self if self.settled is None or self.settled <= index else replace(self, settled=None, last=None)

    def noise_by(self, index: int) -> float:
        """What noise could have reached over its length up to a step; correlated noise averages out slowly."""
        length = (index if self.last is None else self.last) - self.onset + 1
        return float(self.noise * max(1.0, length / (self.raised - self.onset + 1)) ** -0.25)


def baseline(values: Floats, peers: list[Array], proportional: bool) -> Floats:
    """Each rank's usual seconds over these steps, with what its peers shared in each step taken out [ranks]."""
    usual = median(values)
    result = usual.copy()
    for members in peers:
        if len(members) < 2:
            continue
        part, own = values[:, members], usual[members]
        if proportional:
            common = median(part / np.where(own > 0, own, np.nan), axis=1)[:, None]
            result[members] = median(part / np.where(common > 0, common, np.nan))
        else:
            common = median(part - own, axis=1)[:, None]
            result[members] = median(part - common)
    return np.where(np.isfinite(result), result, usual)


def excess(values: Floats, base: Floats, peers: list[Array], proportional: bool) -> Floats:
    """How much more each rank took than its baseline times (or plus) what its peers' changed by [steps, ranks]."""
    result = np.full(values.shape, np.nan)
    for members in peers:
        part, own = values[:, members], base[members]
        if proportional:
            others = median_of_others(part / np.where(own > 0, own, np.nan))
            result[:, members] = part - own * np.where(np.isfinite(others), others, 1.0)
        else:
            others = median_of_others(part - own)
            result[:, members] = part - own - np.nan_to_num(others)
    return result


def track(values: Floats, usual: Floats, peers: list[Array], proportional: bool) -> list[Change]:
    """Changes of every rank's series.

    values: seconds [steps, ranks]. usual: each step's typical duration in seconds [steps]. peers: disjoint sets of
    rank places that do comparable work. proportional: peers share factors (compute) rather than sums (stalls).
    """
    steps, ranks = values.shape
    first = policy.WARM_UP_STEPS + policy.FIRST_JUDGED_STEPS
    if steps <= first or not ranks or not _large_enough(values, usual, proportional):
        return []
    tracker = _Tracker(values, usual, peers, proportional)
    low = first
    while low < steps:
        high = min(steps, low + max(4, low // 2))
        tracker.segment(low, high)
        low = low + max(4, low // 2)
    return tracker.finished()


def _large_enough(values: Floats, usual: Floats, proportional: bool) -> bool:
    """Whether any step of a rank is long enough for an effect worth naming: what a rank took bounds its excess, to which
    sums that its peers lost can add as much again."""
    longest = np.fmax.reduce(values[policy.WARM_UP_STEPS :], axis=None)
    shortest = np.fmin.reduce(usual[policy.WARM_UP_STEPS :])
    return bool(longest * (1 if proportional else 2) >= policy.SMALLEST_EFFECT * shortest)


class _Tracker:
    """State that runs through the segments; within one, the baseline stands still."""

    def __init__(self, values: Floats, usual: Floats, peers: list[Array], proportional: bool) -> None:
        self.values, self.usual, self.peers, self.proportional = values, usual, peers, proportional
        steps, ranks = values.shape
        self.excluded = np.zeros((steps, ranks), bool)
        self.certain = np.zeros((steps, ranks), bool)
        self.level = np.zeros(ranks)
        self.since = np.full(ranks, policy.WARM_UP_STEPS)
        self.base = np.full(ranks, np.nan)
        self.open: dict[int, Change] = {}
        self.closed: list[Change] = []

    def finished(self) -> list[Change]:
        """All changes, those that last included."""
        return sorted([*self.closed, *self.open.values()], key=lambda c: (c.row, c.onset))

    def segment(self, low: int, high: int) -> None:
        """Judge the steps low … high - 1 by the baseline of the steps before low."""
        begin = max(policy.WARM_UP_STEPS, low - policy.REFERENCE_STEPS)
        unit = float(median(self.usual[policy.WARM_UP_STEPS : low])) if low else np.nan
        if not np.isfinite(unit) or unit <= 0:
            return
        clean = ~self.excluded[begin:low]
        suspicious = self.level > policy.CUSUM_ALARM / 2
        clean &= ~(suspicious & (np.arange(begin, low)[:, None] >= self.since))
        enough = (clean & np.isfinite(self.values[begin:low])).sum(axis=0) >= policy.FIRST_JUDGED_STEPS - 2
        base = baseline(np.where(clean, self.values[begin:low], np.nan), self.peers, self.proportional)
        self.base = np.where(enough, base, self.base)
        share = excess(self.values[begin:high], self.base, self.peers, self.proportional) / unit
        own = (self.values[begin:high] - self.base) / unit
        past = np.where(clean, share[: low - begin], np.nan)
        # What may yet turn out to be noise is left in when noise is measured.
        certain = self.certain[begin:low]
        noisy = past if not certain.any() and clean.all() else np.where(certain, np.nan, share[: low - begin])
        sigma = spread(past)
        pooled = np.nanmedian(sigma) if np.isfinite(sigma).any() else np.nan
        sigma = np.fmax(np.fmax(sigma, 0.7 * pooled), policy.SMALLEST_SIGMA)
        window = _Window(begin, low, high, share, own, sigma, NoiseFloor.of(noisy, past, sigma))
        self._candidates(window)
        self._follow(window)

    def _candidates(self, window: _Window) -> None:
        """Run the CUSUM over the segment and raise what passes the verification."""
        low, high, begin = window.low, window.high, window.begin
        # On a quiet run the effects worth naming set the scale, not the noise.
        clip = np.maximum(policy.CUSUM_CLIP, 2 * policy.SMALLEST_EFFECT / window.sigma)
        drift = np.maximum(policy.CUSUM_DRIFT, 0.5 * policy.SMALLEST_EFFECT / window.sigma)
        score = np.clip(window.share[low - begin :] / window.sigma, -clip, clip)
        walk = np.cumsum(np.nan_to_num(score - drift), axis=0)
        # max(0, g + x) step by step is the walk minus its running minimum, begun at the level carried over.
        lowest = np.minimum.accumulate(np.minimum(walk, -self.level), axis=0)
        level = walk - lowest
        at = np.arange(low, high)[:, None]
        # Onset: the step after the walk last stood at its minimum.
        since = np.maximum.accumulate(np.where(walk <= lowest, at + 1, self.since), axis=0)
        alarm = level > policy.CUSUM_ALARM
        for row in np.flatnonzero(alarm.any(axis=0)).tolist():
            if row not in self.open:
                self._verify(window, row, low + np.flatnonzero(alarm[:, row]), since[:, row])
        self.level, self.since = level[-1], since[-1]

    def _verify(self, window: _Window, row: int, places: Array, since: Array) -> None:
        """Raise a candidate at the first step at which its effect exceeds what noise explains."""
        # A short past has not shown all of its noise yet, least of all noise correlated over many steps.
        factor = self._odds(window.low) * (1 + policy.SHORT_PAST_STEPS / (window.low - window.begin))
        for length in VERIFIED_LENGTHS:
            if not len(places):
                return
            # The baseline is a mean over a number of steps too, and strays as such means do.
            noise = factor * window.noise.of_difference(length, window.low - window.begin, row)
            limit = max(policy.SMALLEST_EFFECT, policy.CONFIRMED_BAR * noise)
            for now in places[places + 1 - since[places - window.low] >= length].tolist():
                if window.mean_of(row, now + 1 - length, now) < limit:
                    continue
                onset = window.split(row, max(int(since[now - window.low]), now + 1 - 2 * length), now)
                effect = window.mean_of(row, onset, now)
                if (
                    now + 1 - onset >= policy.SHORTEST_CHANGE_STEPS
                    and min(effect, window.without_largest(row, onset, now)) >= limit
                    and window.own_mean_of(row, onset, now) >= 0.5 * effect
                ):
                    self._raise(Change(row, onset, now, effect, noise))
                    places = places[places < now]
                    break

    def _raise(self, change: Change) -> None:
        """Keep the earliest of a rank's verified candidates."""
        held = self.open.get(change.row)
        if held is None or change.raised < held.raised:
            self.open[change.row] = change

    def _follow(self, window: _Window) -> None:
        """Close the changes that calmed down; exclude the steps of the others from every later baseline."""
        for row, change in list(self.open.items()):
            for now in range(max(window.low, change.raised + policy.CALM_STEPS), window.high):
                calm = int(np.clip((now - change.onset) // 2, policy.CALM_STEPS, policy.CALM_STEPS_MOST))
                recent = window.mean_of(row, now - calm + 1, now)
                if recent < policy.CALM_SHARE * change.effect:
                    last = window.last_above(row, change.onset, now, 0.5 * change.effect)
                    self.closed.append(replace(change, settled=now, last=max(last, change.onset)))
                    self._exclude(change, last)
                    del self.open[row]
                    self.level[row], self.since[row] = 0.0, window.high
                    break
            else:
                self._exclude(change, window.high - 1)
                onset = max(change.onset, window.begin)
                self.open[row] = replace(change, effect=window.mean_of(row, onset, window.high - 1))

    def _exclude(self, change: Change, last: int) -> None:
        self.excluded[change.onset : last + 1, change.row] = True
        if change.effect >= change.noise:
            self.certain[change.onset : last + 1, change.row] = True

    def _odds(self, low: int) -> float:
        """How many spreads of noise the largest of so many ranks and windows reaches by chance, and one more."""
        tries = self.values.shape[1] * max(low, 8) / 4
        return 1.0 + float(np.sqrt(2 * np.log(tries)))


class _Window:
    """Reference and segment of one pass, with running sums for means over any part of them."""

    def __init__(
        self, begin: int, low: int, high: int, share: Floats, own: Floats, sigma: Floats, noise: NoiseFloor
    ) -> None:
        self.begin, self.low, self.high = begin, low, high
        self.share, self.own, self.sigma, self.noise = share, own, sigma, noise
        self._sums: dict[int, tuple[Floats, Floats]] = {}

    def mean_of(self, row: int, since: int, until: int) -> float:
        """Mean effect (clipped to one usual step) of a rank from step since to until."""
        return self._mean(self.share, row, since, until)

    def own_mean_of(self, row: int, since: int, until: int) -> float:
        """The same against the rank's own past alone."""
        return self._mean(self.own, row, since, until)

    def _mean(self, values: Floats, row: int, since: int, until: int) -> float:
        total, count = self._running(values)
        first, last = max(since - self.begin, 0), until - self.begin + 1
        number = count[last, row] - count[first, row]
        return float((total[last, row] - total[first, row]) / number) if number else 0.0

    def split(self, row: int, since: int, until: int) -> int:
        """Where the rank's series splits best into a lower and a higher part, not before since.

        The CUSUM leaves its minimum early where the noise happened to drift up; the split of least squares does not.
        """
        first = max(self.begin, since - SPLIT_MARGIN)
        part = np.clip(np.nan_to_num(self.share[first - self.begin : until - self.begin + 1, row]), -1, 1)
        number = np.arange(1, len(part))
        below = np.cumsum(part)[:-1]
        gap = (below[-1] + part[-1] - below) / (len(part) - number) - below / number
        between = np.where(gap > 0, gap**2 * number * (len(part) - number), -1.0)
        allowed = first + number >= since
        return first + int(number[allowed][np.argmax(between[allowed])]) if allowed.any() else since

    def without_largest(self, row: int, since: int, until: int) -> float:
        """Mean effect without its largest tenth (at least two steps): no stall or two make a change."""
        part = self.share[max(since - self.begin, 0) : until - self.begin + 1, row]
        part = np.sort(np.clip(part[np.isfinite(part)], -1, 1))
        kept = part[: len(part) - max(2, len(part) // 10)]
        return float(kept.mean()) if len(kept) else 0.0

    def last_above(self, row: int, since: int, until: int, level: float) -> int:
        """The last step from since to until whose effect is above a level; since, if none."""
        first = max(since, self.begin)
        part = np.nan_to_num(self.share[first - self.begin : until - self.begin + 1, row])
        above = np.flatnonzero(part > level)
        return first + int(above[-1]) if len(above) else since

    def _running(self, values: Floats) -> tuple[Floats, Floats]:
        if id(values) not in self._sums:
            known = np.isfinite(values)
            clipped = np.where(known, np.clip(values, -1, 1), 0.0)
            zero = np.zeros((1, values.shape[1]))
            self._sums[id(values)] = (
                np.concatenate([zero, np.cumsum(clipped, axis=0)]),
                np.concatenate([zero, np.cumsum(known, axis=0, dtype=np.float64)]),
            )
        return self._sums[id(values)]


@dataclass(frozen=True)
class NoiseFloor:
    """How far means over a number of steps stray in this run without any change.

    Measured from moving means of the past, because noise that is correlated over steps does not average out as
    independent noise would. spreads: for lengths 1, 2, 4, … [lengths, ranks].
    """

    spreads: Floats

    @classmethod
    def of(cls, past: Floats, clean: Floats, sigma: Floats) -> NoiseFloor:
        """Measure [steps, ranks] of effects.

        past: all that is not certainly a change; its median over ranks holds for every rank. clean: without what may
        be one; a rank that is noisier than most has its own floor. sigma: spread of single steps [ranks].
        """
        spreads = [sigma]
        running = _running_sum(past)
        running_clean = running if past is clean else _running_sum(clean)
        for length in policy.NOISE_WINDOWS:
            if len(past) < 2 * length:
                break
            common = _stray(running, length)
            own = common if past is clean else _stray(running_clean, length)
            spreads.append(np.maximum(np.median(common), own))
        return cls(np.maximum(np.stack(spreads), policy.SMALLEST_SIGMA / 2))

    def of_length(self, length: int, row: int) -> float:
        """Spread of a rank's means over so many steps; longer than measured, it falls by the fourth root only."""
        place = float(np.log2(max(length, 1)))
        longest = len(self.spreads) - 1
        known = float(np.interp(min(place, longest), np.arange(longest + 1), self.spreads[:, row]))
        return known * 2 ** (-0.25 * max(0.0, place - longest))

    def of_lengths(self, length: int) -> Floats:
        """The same for every rank [ranks]."""
        place = float(np.log2(max(length, 1)))
        longest = len(self.spreads) - 1
        low = min(int(place), longest)
        part = min(place, longest) - low
        known = self.spreads[low] * (1 - part) + self.spreads[min(low + 1, longest)] * part
        result: Floats = known * 2 ** (-0.25 * max(0.0, place - longest))
        return result

    def of_difference(self, length: int, other: int, row: int) -> float:
        """Spread of the difference of two such means."""
        return float(np.hypot(self.of_length(length, row), self.of_length(other, row)))


def _running_sum(values: Floats) -> Floats:
    """Sums of each rank's effects up to each step, begun at 0 [ranks, steps + 1]; what is not known counts as none."""
    # Along contiguous memory, sums and sorting are several times faster than across it.
    filled = np.array(values.T, order="C")
    np.clip(filled, -1, 1, out=filled)
    filled[np.isnan(filled)] = 0.0
    running = np.zeros((filled.shape[0], filled.shape[1] + 1))
    np.cumsum(filled, axis=1, out=running[:, 1:])
    return running


def _stray(running: Floats, length: int) -> Floats:
    """How far the moving means of each rank lie from 0, as a standard deviation [ranks]."""
    means = np.abs(running[:, length:] - running[:, :-length]) / length
    place = 0.9 * (means.shape[1] - 1)
    low, high = int(place), min(int(place) + 1, means.shape[1] - 1)
    means.partition((low, high), axis=1)
    result: Floats = (means[:, low] + (place - low) * (means[:, high] - means[:, low])) / 1.645
    return result
