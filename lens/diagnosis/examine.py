"""From changed ranks to weighed explanations: what `diagnose` knows about slow ranks at any step of a run.

Everything expensive (alignment, decomposition, change points) is done once and depends, at step t, on steps ≤ t
only. So the question "what would the reply up to step N have been" costs little for every N, and its answer is exactly
what a diagnosis of the records up to N gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from lens.diagnosis import changes, measures, peers, policy, replay, several, signatures, wholes
from lens.diagnosis.arrays import Array, Floats, Ints, finite_mean, mean, median
from lens.diagnosis.changes import Change
from lens.diagnosis.decompose import Frame
from lens.diagnosis.findings import LOADING, Finding, Verdict, Weighed, listed
from lens.diagnosis.grids import STANDING, on_grid
from lens.diagnosis.kept import Kept
from lens.diagnosis.network import OWN_SHARE, LinkVerdict, Network
from lens.diagnosis.parts import WITHIN, parts_of_step, parts_within
from lens.diagnosis.routing import ExpertLoad
from lens.diagnosis.scenes import Measure, Scene
from lens.diagnosis.segments import NOW_AND_THEN, Where
from lens.diagnosis.select import Timeline
from lens.diagnosis.signals import Signals
from lens.diagnosis.signatures import Explained, confirmed
from lens.diagnosis.topology import Topology
from lens.diagnosis.wholes import Whole
from lens.tables import Tables

PROPORTIONAL = {"compute", *(part for part, whole in WITHIN.items() if whole == "compute")}
"""Parts of the step that peers share as factors: longer sequences slow all of them by the same share."""
STANDING_PARTS = ("compute", "data", "h2d")
"""Parts in which a rank may have been slower since the first step."""
SAME_ONSET_STEPS = 5
MOST_LASTING = 16
"""So many findings are kept weighed and priced: what is asked of one step place is asked of it again at once."""


@dataclass
class Examiner:
    """A run made ready to be judged at any of its steps."""

    tables: Tables
    timeline: Timeline
    topology: Topology
    frame: Frame
    signals: Signals
    features: dict[str, Floats]
    within: dict[str, Floats]
    usual: Floats
    found: dict[str, list[Change]]
    network: Network
    wholes: list[Whole]
    _verdicts: Kept[int, list[Verdict]] = field(default_factory=Kept)
    _lasting: Kept[Finding, Weighed | None] = field(default_factory=lambda: Kept(MOST_LASTING))
    _over: dict[Finding, Weighed | None] = field(default_factory=dict)
    _priced: Kept[Finding, Verdict] = field(default_factory=lambda: Kept(MOST_LASTING))
    _standing_at: Kept[int, list[Finding]] = field(default_factory=Kept)
    _shares: dict[tuple[str, Change], float] = field(default_factory=dict)

    @classmethod
    def of(cls, tables: Tables, timeline: Timeline, topology: Topology) -> Examiner:
        """Align, decompose and look for changes."""
        frame = Frame.of(tables, timeline, topology)
        features, within = parts_of_step(frame), parts_within(frame)
        usual = median(frame.duration, axis=1)
        groups = peers.comparable(topology)
        found = {
            name: changes.track(values, usual, groups, name in PROPORTIONAL)
            for name, values in (features | within).items()
        }
        signals = Signals(tables, timeline, topology)
        network = Network.of(frame, tables, signals, features, usual)
        sets = wholes.watch(features["compute"], usual, topology)
        return cls(tables, timeline, topology, frame, signals, features, within, usual, found, network, sets)

    @cached_property
    def load(self) -> ExpertLoad | None:
        """Tokens for each rank's experts; read only when a rank is slow."""
        return ExpertLoad.of(self.tables, self.timeline, self.topology)

    def _part(self, feature: str) -> Floats:
        """Self time of a part of the step, or of one within a part [steps, ranks]."""
        return self.features[feature] if feature in self.features else self.within[feature]

    @cached_property
    def groups(self) -> list[Array]:
        """Places of ranks whose changes compare."""
        return peers.comparable(self.topology)

    @cached_property
    def fates(self) -> list[tuple[str, set[int]]]:
        """Places of ranks that one cause can hit together."""
        return self.topology.shared_fates()

    def finished_steps(self, index: int) -> int:
        """Steps up to this place that at least one rank finished."""
        return int(np.isfinite(self.usual[: index + 1]).sum())

    def first_raised(self) -> int | None:
        """The first place at which a changed rank could be in a reply; None if there is none."""
        raised = [change.raised for found in self.found.values() for change in found]
        raised += [whole.change.raised for whole in self.wholes]
        slower = self.network.first_raised()
        return min(raised if slower is None else [*raised, slower], default=None)

    def verdicts(self, index: int) -> list[Verdict]:
        """Slow ranks as judged by the records visible at a step place, costliest first."""
        return self._verdicts.get(index, self._verdicts_at)

    def _verdicts_at(self, index: int) -> list[Verdict]:
        changed = self._with_wholes(self._judged(self._changed(index)), index)
        taken = {row for v in changed if not v.finding.second for row in v.finding.rows}
        judged = several.settled(self, changed + self._judged(self._standing(index, taken)))
        return sorted(judged, key=lambda v: (-v.share, v.finding.rows))

    def _judged(self, findings: list[Finding]) -> list[Verdict]:
        return [verdict for finding in findings if (verdict := self._judge(finding)) is not None]

    def _with_wholes(self, judged: list[Verdict], index: int) -> list[Verdict]:
        """Hosts and stages that are slow as a whole, in the place of those of their ranks that were seen to be."""
        known = [
            (whole.rows, change.onset, change.last, change.noise_by(index))
            for whole in self.wholes if (change := whole.change.seen_at(index)) is not None
        ]  # fmt: skip
        known += wholes.told_sets(judged, self.fates)
        for rows, onset, last, noise in sorted(known, key=lambda item: (-len(item[0]), *item[:2])):
            within = [v for v in judged if v.finding.feature == "compute" and set(v.finding.rows) & set(rows)]
            if any(set(rows) <= set(v.finding.rows) for v in within):
                continue
            found = self._judge(Finding("compute", rows, onset, last, index, noise, whole=True))
            if found is not None:
                judged = [v for v in judged if v not in within or not set(v.finding.rows) <= set(rows)] + [found]
        return judged

    def links(self, index: int) -> list[LinkVerdict]:
        """Slower transfers at a step place, costliest first, but for those that a rank's own slowness explains."""
        own = self.verdicts(index)
        found = self.network.verdicts(index, self.load)
        return [link for link in found if link.confirmed or not any(_explains(v, link) for v in own)]

    def _changed(self, index: int) -> list[Finding]:
        """Changes known at this place, one finding for each rank's episode, whole hosts and expert owners as one."""
        episodes: list[tuple[str, Change, float]] = []
        for feature, found in self.found.items():
            for change in found:
                known = change.seen_at(index)
                if known is not None:
                    episodes.append((feature, known, self._mean_share(feature, known, index)))
        episodes.sort(key=lambda item: (-item[2], item[1].row, item[0]))
        first: list[tuple[str, Change]] = []
        second: list[tuple[str, Change]] = []
        for feature, change, _ in episodes:
            rivals = [c for _, c in first if c.row == change.row]
            (second if any(_overlap(change, c, index) for c in rivals) else first).append((feature, change))
        more = [replace(finding, second=True) for finding in self._grouped(second, index)]
        return self._grouped(first, index) + more

    def _grouped(self, chosen: list[tuple[str, Change]], index: int) -> list[Finding]:
        """Ranks that share a fate and changed together in the same part of the step are one finding."""
        findings = []
        left = sorted(chosen, key=lambda item: (item[0], item[1].onset, item[1].row))
        while left:
            feature, change = left[0]
            together = [
                (f, c) for f, c in left
                if f == feature and abs(c.onset - change.onset) <= SAME_ONSET_STEPS
                and (c.last is None) == (change.last is None)
            ]  # fmt: skip
            effects = {c.row: self._mean_share(feature, c, index) for _, c in together}
            alike = {
                c.row for _, c in together
                if 0.5 * effects[change.row] <= effects[c.row] <= 2 * effects[change.row]
                and effects[c.row] >= c.noise_by(index)
            }  # fmt: skip
            whole = self._whole_set(change, alike, index)
            group = [(f, c) for f, c in together if c.row in whole]
            left = [item for item in left if item not in group]
            lasts = [c.last for _, c in group]
            last = None if None in lasts else max(x for x in lasts if x is not None)
            rows = tuple(sorted(c.row for _, c in group))
            noise = max(c.noise_by(index) for _, c in group)
            findings.append(Finding(feature, rows, min(c.onset for _, c in group), last, index, noise))
        return findings

    def _whole_set(self, change: Change, changed: set[int], index: int) -> set[int]:
        """The largest set that shares a reason with this rank and changed as a whole, else the rank alone."""
        wholes = [
            places for kind, places in self.fates
            if change.row in places and places <= changed and (kind != "expert" or self._loaded(places, change.onset, index))
        ]  # fmt: skip
        return max(wholes, key=lambda places: (len(places), -min(places)), default={change.row})

    def _loaded(self, places: set[int], onset: int, index: int) -> bool:
        """Whether the experts of these ranks get more tokens since a step."""
        if self.load is None:
            return False
        tokens = self.load.tokens[:, sorted(places)]
        before, after = finite_mean(tokens[:onset]), finite_mean(tokens[onset : index + 1])
        return before is not None and after is not None and after > 1.1 * before

    def _mean_share(self, feature: str, change: Change, index: int) -> float:
        """Mean excess of a change as known at a place, as a share of a usual step."""
        if change.last is None:
            return self._share_of(feature, change, index)
        # What is over stays as it is.
        if (feature, change) not in self._shares:
            self._shares[feature, change] = self._share_of(feature, change, index)
        return self._shares[feature, change]

    def _share_of(self, feature: str, change: Change, index: int) -> float:
        before = self._before(feature, change.row, change.onset)
        after = np.arange(change.onset, (index if change.last is None else change.last) + 1)
        extra = self._extra(feature, before, after)[:, change.row]
        return (
            float(np.nanmean(np.clip(extra / self.usual_seconds(before), -1, 2)))
            if np.isfinite(extra).any()
            else 0.0
        )

    def _before(self, feature: str, row: int, onset: int) -> Ints:
        """The rank's past up to an onset, without its earlier episodes."""
        steps = np.arange(max(policy.WARM_UP_STEPS, onset - measures.BEFORE_STEPS), onset)
        for change in self.found[feature]:
            if change.row == row and change.last is not None and change.last < onset:
                steps = steps[(steps < change.onset) | (steps > change.last)]
        return steps

    def _extra(self, feature: str, before: Ints, after: Ints) -> Floats:
        """Seconds above baseline and peers, [after, ranks]."""
        values = self._part(feature)
        base = self._base(feature, before)
        return changes.excess(values[after], base, self.groups, feature in PROPORTIONAL)

    def _base(self, feature: str, before: Ints) -> Floats:
        return changes.baseline(self._part(feature)[before], self.groups, feature in PROPORTIONAL)

    def usual_seconds(self, steps: Ints) -> float:
        """Median duration of these steps; NaN where none is known."""
        known = self.usual[steps][np.isfinite(self.usual[steps])]
        return float(np.median(known)) if len(known) else float("nan")

    def _standing(self, index: int, taken: set[int]) -> list[Finding]:
        """Ranks that were slower than their like since the first step, judged on the grid of such."""
        at = on_grid(index, STANDING)
        return [finding for finding in self.stands(at) if finding.rows[0] not in taken]

    def stands(self, at: int) -> list[Finding]:
        """Ranks that were slower than their like since the first step, by the steps up to a place."""
        return self._standing_at.get(at, self._stands)

    def _stands(self, at: int) -> list[Finding]:
        steps = np.arange(policy.WARM_UP_STEPS, at + 1)
        if len(steps) < policy.STANDING_STEPS_CONFIRMED:
            return []
        long_enough = len(steps) >= policy.STANDING_STEPS
        findings = []
        for feature in STANDING_PARTS:
            values = self.features.get(feature)
            if values is None:
                continue
            for rank in peers.standing(values, self.usual_seconds(steps), self.topology, steps):
                finding = Finding(feature, (rank.row,), int(steps[0]), None, at, rank.noise, standing=True)
                weighed = self._weighed(finding)
                if weighed is None:
                    continue
                alone = long_enough and not rank.few and rank.effect >= policy.STANDING_EFFECT
                if confirmed(weighed.explained[0]) or alone:
                    findings.append(finding)
        return findings

    def _judge(self, finding: Finding) -> Verdict | None:
        """Measure and weigh a finding; None when it costs too little, or is too uncertain, to be named."""
        if finding.upto > self.named_until(finding):
            return None
        return replace(self._priced.get(finding.alone, self._price), finding=finding)

    def causes_of(self, finding: Finding) -> set[str]:
        """The causes that a finding is listed with; none where it need not be named."""
        weighed = self._weighed(finding.alone)
        if weighed is None or finding.upto > self.named_until(finding):
            return set()
        return {explained.cause for explained in listed(weighed.explained)}

    def named_until(self, finding: Finding) -> float:
        """The last place at which a finding is worth naming, should it be as it is now; -1 where it is not at all."""
        weighed = self._weighed(finding.alone)
        if weighed is None or (finding.last is not None and len(weighed.after) < policy.SHORTEST_ENDED_STEPS):
            return -1
        if finding.last is None:
            return np.inf
        needed = policy.WORTH_KEEPING if confirmed(weighed.explained[0]) else policy.UNCONFIRMED_COST
        return weighed.share * len(weighed.after) / needed - 1

    def _weighed(self, finding: Finding) -> Weighed | None:
        if finding.last is None:
            return self._lasting.get(finding, self._weigh)
        if finding not in self._over:
            self._over[finding] = self._weigh(finding)
        return self._over[finding]

    def _weigh(self, finding: Finding) -> Weighed | None:
        """Measure a finding; None when it is too small, or too uncertain, to be named."""
        end = finding.upto if finding.last is None else finding.last
        after = np.arange(finding.onset, end + 1)
        before = after[:0] if finding.standing else self._before(finding.feature, finding.rows[0], finding.onset)
        unit = self.usual_seconds(after if finding.standing else before)
        own, base = self._excess_of(finding, before, after)
        if not np.isfinite(own).any() or not np.isfinite(unit) or unit <= 0:
            return None
        share = float(np.nanmean(np.clip(own / unit, -1, 2)))
        if share < max(policy.WORTH_KEEPING, signatures.LOWEST_BAR * finding.noise):
            return None
        seconds = float(np.nanmean(np.clip(own, -unit, 4 * unit)))
        step_s = self.usual_seconds(after)
        scene = Scene(
            self.frame, self.signals, self.load, self.features | self.within, finding.rows, before, after, end,
            max(seconds, 1e-9), 1 + seconds / base if base > 0 else 10.0, step_s if np.isfinite(step_s) else unit,
        )  # fmt: skip
        taken = measures.take(scene)
        explained = signatures.weigh(WITHIN.get(finding.feature, finding.feature), taken)
        if finding.whole and not wholes.told_by_all(scene, explained[0].cause):
            return None
        if share < self._bar(explained[0], taken) * finding.noise:
            return None
        return Weighed(before, after, own, unit, share, explained, taken)

    def _price(self, finding: Finding) -> Verdict:
        """What a weighed finding costs."""
        weighed = self._weighed(finding)
        assert weighed is not None
        before, after, own, share = weighed.before, weighed.after, weighed.own, weighed.share
        noise = float(np.nanstd(np.clip(own / weighed.unit, -1, 2))) / np.sqrt(len(after))
        sure = 1 - 0.5 * float(np.exp(-share / max(2 * noise, 0.02)))
        extra = self._extra_of(finding, after, own)
        at_begin = finding.feature in LOADING
        where = None if at_begin or finding.standing else Where.of(self.frame, before, after, extra)
        ratio = self.cost_of(after, extra, at_begin, where)
        return Verdict(finding, weighed.explained, weighed.measures, after, extra, share, sure, ratio, where)

    def _excess_of(self, finding: Finding, before: Ints, after: Ints) -> tuple[Floats, float]:
        """Seconds too long of the finding's ranks [after, rows], and what they should take on average."""
        rows, values = np.array(finding.rows), self._part(finding.feature)
        if finding.standing:
            like = np.setdiff1d(np.flatnonzero(self.topology.kind == self.topology.kind[rows[0]]), rows)
            others = median(values[np.ix_(after, like)], axis=1)[:, None]
            return values[np.ix_(after, rows)] - others, float(np.nanmean(others))
        if finding.whole:
            own, past = wholes.excess(values, finding.rows, before, after)
            return (own, float(np.nanmean(past))) if wholes.alike(own, past) else (own * np.nan, 0.0)
        base = self._base(finding.feature, before)[rows]
        return self._extra(finding.feature, before, after)[:, rows], float(np.nanmean(base))

    def _extra_of(self, finding: Finding, after: Ints, own: Floats) -> Floats:
        """The excess as a share of each step's self time: taking it out leaves the rank its usual noise."""
        rows = np.array(finding.rows)
        values = np.nan_to_num(self._part(finding.feature)[np.ix_(after, rows)])
        total = values.sum(axis=0)
        part = np.clip(np.nansum(own, axis=0) / np.where(total > 0, total, np.inf), 0, 1)
        extra = np.zeros((len(after), len(self.topology)))
        extra[:, rows] = values * part
        return extra

    @staticmethod
    def _bar(best: Explained, taken: Mapping[str, Measure]) -> float:
        """How much of what noise could reach the excess must exceed, given what else speaks for it."""
        if best.signature is not None and confirmed(best):
            return best.signature.bar
        clock = taken["clock"]
        pending = best.cause == "slow_device" and clock.baseline is not None and clock.observed is None
        return policy.PENDING_BAR if pending else policy.UNCONFIRMED_BAR

    def cost_ratio(
        self, after: Ints, extra: Floats, at_begin: bool = False, before: Ints | None = None
    ) -> float | None:
        """Mean step time over what the same steps would have taken without this self time [after, ranks].

        before: steps that tell where within the step it lies; without them it is taken to be spread over the step, or to
        lie before its first collective.
        """
        if at_begin or before is None:
            return self.cost_of(after, extra, at_begin, None)
        return self.cost_of(after, extra, False, Where.of(self.frame, before, after, extra))

    def cost_of(self, after: Ints, extra: Floats, at_begin: bool, where: Where | None) -> float | None:
        """The same for an excess that is known to lie somewhere."""
        touched = (extra > 0).any(axis=1)
        seldom = 0 < touched.sum() < NOW_AND_THEN * len(after)
        steps, lost = (after[touched], extra[touched]) if seldom else (after, extra)
        seconds = replay.without(self.frame, steps, [replay.Excess(lost, at_begin, where)])
        if seconds is not None and seldom:
            # What comes now and then is replayed where it came; the other steps stay as they are.
            whole = float(np.nansum(mean(self.frame.duration[after], axis=1)))
            saved = (seconds[0] - seconds[1]) * int(touched.sum())
            return whole / (whole - saved) if whole > saved else None
        if seconds is not None and seconds[1] > 0:
            return seconds[0] / seconds[1]
        return replay.without_graph(self.usual[after], extra)

    def step_seconds(self, steps: Ints) -> float | None:
        """Mean duration of these steps over all ranks."""
        known = self.frame.duration[steps]
        return float(np.nanmean(known)) if np.isfinite(known).any() else None


def _explains(verdict: Verdict, link: LinkVerdict) -> bool:
    """Whether slower transfers come from a rank that is slow itself: it is late in them as in all it does."""
    rows = {row for pair in link.listed for row in (pair.place.rows or pair.place.among)}
    starts, ends = (verdict.finding.onset, link.onset), (verdict.finding.last, link.last)
    limit = max(int(verdict.after[-1]), int(link.after[-1]))
    until = [limit if end is None else end for end in ends]
    together = min(until) - max(starts) + 1 >= 0.5 * (min(until[0] - starts[0], until[1] - starts[1]) + 1)
    near = not rows or bool(rows & set(verdict.finding.rows)) or verdict.explained[0].cause == "hot_expert"
    return near and together and verdict.share >= OWN_SHARE * link.share


def _overlap(a: Change, b: Change, index: int) -> bool:
    """Whether two episodes of a rank are one: they run together for most of the shorter."""
    ends = [index if c.last is None else c.last for c in (a, b)]
    together = min(ends) - max(a.onset, b.onset) + 1
    shorter = min(ends[0] - a.onset, ends[1] - b.onset) + 1
    return together >= 0.5 * shorter
