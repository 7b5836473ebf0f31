"""Slower transfers: which streams left their past, what place explains all of them, and why.

Streams and ranks' totals are watched for changes like self times are. What changed together is one event; its place
is found by all streams of the run, also those that stayed as they were. X alone does not prove the network: what
throttles a process is weighed among the causes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from lens.diagnosis import hints, link_measures, policy, replay, signatures, standing
from lens.diagnosis.arrays import Floats, Ints
from lens.diagnosis.changes import Change
from lens.diagnosis.counters import Counters, Ports
from lens.diagnosis.decompose import Frame
from lens.diagnosis.grids import STANDING, on_grid
from lens.diagnosis.hints import Window
from lens.diagnosis.kept import Kept
from lens.diagnosis.link_measures import LinkScene
from lens.diagnosis.locate import Effects, Located, locate, relative
from lens.diagnosis.measures import BEFORE_STEPS
from lens.diagnosis.places import Place, Places
from lens.diagnosis.routing import ExpertLoad
from lens.diagnosis.scenes import ONSET_MARGIN_STEPS, Measure
from lens.diagnosis.signals import Signals
from lens.diagnosis.signatures import Explained, Scored
from lens.diagnosis.transfers import Transfers
from lens.diagnosis.watched import MOST_ALONE, Watched, watch
from lens.tables import Tables

SAME_ONSET_STEPS = 5
MOST_EVENTS = 6
CONFIRMING = (
    "link_rate", "port_errors", "port_pressure", "wide_pressure", "card_errors", "fallback", "throttled",
    "run_delay",
)  # fmt: skip
"""Measures that do not come from the transfers themselves."""
PROCESSOR_CAUSES = {"cpu_contention", "cpu_quota"}
PLACED = 0.5
"""A place with a smaller probability than this is not told from everywhere."""
SETTLED_STEPS = 32
"""Slower than a shorter past everywhere, and nothing that confirms it: then the first steps were fast, not these slow."""
WEATHER = 1.5
"""Shared fabrics are slower for a while by some tens of percent: what slows everything, and what no counter confirms, must
be more than that."""
STILL_LOSES = 0.5
"""How surely a port's counters must move for its losses to go on."""
OWN_SHARE = 0.25
"""A rank whose self time grew by this much of what its transfers did has one problem, not two."""


@dataclass(frozen=True)
class Pair:
    """A cause at a place: its probability among all of them, and what was measured there."""

    explained: Explained
    place: Place
    probability: float
    measures: Mapping[str, Measure]


@dataclass(frozen=True)
class LinkVerdict:
    """Slower transfers with their cost and explanations.

    pairs: likeliest first. groups: names of what became slower. after: step places. gain_s: seconds a step that they
    gained. share: of a usual step. sure, ratio: as of `Verdict`. confirmed: whether another signal says the same.
    """

    pairs: list[Pair]
    groups: list[str]
    streams: frozenset[int]
    onset: int
    last: int | None
    after: Ints
    gain_s: float
    share: float
    sure: float
    ratio: float | None
    standing: bool
    confirmed: bool

    @property
    def best(self) -> Pair:
        """The likeliest explanation."""
        return self.pairs[0]

    @property
    def listed(self) -> list[Pair]:
        """The best and the rivals worth listing, each cause and place once."""
        kept: list[Pair] = []
        for pair in self.pairs:
            known = any((k.explained.cause, k.place.rows) == (pair.explained.cause, pair.place.rows) for k in kept)
            if not known and (not kept or pair.probability >= policy.RIVAL_SHARE):
                kept.append(pair)
        return kept


@dataclass
class Network:
    """The transfers of a run, ready to be judged at any of its steps."""

    frame: Frame
    tables: Tables
    signals: Signals
    features: dict[str, Floats]
    usual: Floats
    transfers: Transfers
    watched: list[Watched]
    _verdicts: Kept[int, list[LinkVerdict]] = field(default_factory=Kept)
    _standing_at: Kept[int, list[LinkVerdict]] = field(default_factory=Kept)

    @classmethod
    def of(
        cls, frame: Frame, tables: Tables, signals: Signals, features: dict[str, Floats], usual: Floats
    ) -> Network:
        """Read the streams and look for changes."""
        transfers = Transfers.of(frame, tables)
        return cls(frame, tables, signals, features, usual, transfers, watch(frame, transfers, usual))

    @cached_property
    def places(self) -> Places:
        """Where a fault can sit."""
        return Places.of(self.frame.topology, self.transfers)

    @cached_property
    def ports(self) -> Ports:
        """Network ports and what they count."""
        return Ports(self.tables, self.frame.timeline, self.frame.topology)

    @cached_property
    def cards(self) -> tuple[Counters, Ints]:
        """Cards and what their links count; place of each rank's card."""
        names = self.frame.topology.device
        counters = Counters(self.tables, self.frame.timeline, [name for name in names if name])
        return counters, np.array([counters.place(name) for name in names], np.int64)

    def first_raised(self) -> int | None:
        """The first place at which a slower link could be in a reply."""
        return min((item.change.raised for item in self.watched), default=None)

    def verdicts(self, index: int, load: ExpertLoad | None) -> list[LinkVerdict]:
        """Slower transfers as judged by the records visible at a step place, costliest first."""

        def judged(index: int) -> list[LinkVerdict]:
            found = self._changed(index, load)
            found += self._standing(index, load, found)
            return sorted(found, key=lambda v: (-v.share, v.best.place.rows))

        return self._verdicts.get(index, judged)

    def _changed(self, index: int, load: ExpertLoad | None) -> list[LinkVerdict]:
        known = _joined([
            Watched(change, item.streams, item.relative)
            for item in self.watched if (change := item.change.seen_at(index)) is not None
        ])  # fmt: skip
        known.sort(key=lambda w: (-w.change.effect * len(_span(w.change, index)), not w.relative, w.streams))
        found: list[LinkVerdict] = []
        for _ in range(MOST_EVENTS):
            if not known:
                break
            together = [w for w in known if self._same_event(w.change, known[0].change)]
            verdict = self._event(together, found, index, load)
            if verdict is None or any(_same(verdict, other) for other in found):
                known = [w for w in known if w not in together]
                continue
            found.append(verdict)
            known = [w for w in known[1:] if not _accounts_for(verdict, w, index)]
        return found

    def _standing(self, index: int, load: ExpertLoad | None, taken: list[LinkVerdict]) -> list[LinkVerdict]:
        """What was slow since the first step, judged on the grid of such."""
        at = on_grid(index, STANDING)
        found: list[LinkVerdict] = []
        for verdict in self._standing_at.get(at, lambda at: self._stands(at, load)):
            if all(verdict.streams.isdisjoint(other.streams) for other in [*taken, *found]):
                found.append(verdict)
        return found

    def _stands(self, at: int, load: ExpertLoad | None) -> list[LinkVerdict]:
        steps = np.arange(policy.WARM_UP_STEPS, at + 1)
        if len(steps) < policy.STANDING_STEPS_CONFIRMED or not len(self.transfers):
            return []
        found: list[LinkVerdict] = []
        unit, none = self._unit(steps), steps[:0]
        for effects, place, streams, noise in standing.suspects(
            self.transfers, self.places, self.ports, self.frame.topology, unit, steps
        ):
            if place is None:
                located = self._locate(effects, unit, none, steps)
            else:
                located = Located([(place, 0.0)], np.flatnonzero(streams), effects, None)
            verdict = None if located is None else self._judge(
                located, self.transfers.seconds, none, steps, noise, None, at, load
            )  # fmt: skip
            if verdict is None:
                continue
            apart = place is None and len(steps) >= policy.STANDING_STEPS
            if verdict.confirmed or (apart and verdict.share >= policy.STANDING_EFFECT):
                found.append(verdict)
        return found

    @staticmethod
    def _same_event(change: Change, lead: Change) -> bool:
        return abs(change.onset - lead.onset) <= SAME_ONSET_STEPS and (change.last is None) == (lead.last is None)

    def _event(
        self, together: list[Watched], found: list[LinkVerdict], index: int, load: ExpertLoad | None
    ) -> LinkVerdict | None:
        """Judge what changed together."""
        lead = together[0].change
        onset, last = lead.onset, lead.last
        end = index if last is None else last
        before = np.arange(max(policy.WARM_UP_STEPS, onset - BEFORE_STEPS), onset)
        for other in found:
            apart = before[(before < other.onset) | (before > int(other.after[-1]))]
            if other.onset < onset and other.last is None:
                apart = before[before >= other.onset]
            before = apart if len(apart) >= policy.FIRST_JUDGED_STEPS else before
        after = np.arange(onset, end + 1)
        unit = self._unit(before)
        if len(before) < policy.FIRST_JUDGED_STEPS - 2 or not unit > 0:
            return None
        located, seconds = self._located(unit, before, after)
        if located is not None and last is not None and self._loses_still(located, before, last, index):
            # Losses hit transfers by chance: while the port counts them, calm steps are no end.
            last, after = None, np.arange(onset, index + 1)
            located, seconds = self._located(unit, before, after)
        if located is None:
            return None
        noise = max(w.change.noise_by(index) for w in together)
        return self._judge(located, seconds, before, after, noise, last, index, load)

    def _loses_still(self, located: Located, before: Ints, last: int, index: int) -> bool:
        """Whether the ports behind the likeliest place count losses after what seemed to be the last of them."""
        if index - last < policy.SHORTEST_CHANGE_STEPS:
            return False
        window = Window(_window(before, np.arange(last, index + 1)).before, (last + 1, index))
        counted = hints.moved(self.ports.counters, hints.ERRORS, window)
        own = self.ports.of_rows(self._rows(located.places[0][0]))
        return bool(len(own)) and bool(np.nanmax(np.nan_to_num(counted[own])) > STILL_LOSES)

    def _located(self, unit: float, before: Ints, after: Ints) -> tuple[Located | None, Floats]:
        """The place that explains most, against the streams' own past or against what their class did meanwhile."""
        plain = self.transfers.seconds
        rivals = []
        for seconds in (plain, relative(self.transfers, plain, before)):
            effects = Effects.since(self.transfers, seconds, before, after)
            located = self._locate(effects, unit, before, after)
            if located is not None:
                rivals.append((located, seconds))
        return max(rivals, key=lambda rival: rival[0].places[0][1], default=(None, plain))

    def _locate(self, effects: Effects, unit: float, before: Ints, after: Ints) -> Located | None:
        first = locate(self.places, effects, unit, self.frame.topology)
        if first is None:
            return None
        cards, card_of_row = self.cards
        said = hints.of_places(self.places, self.ports, cards, card_of_row, _window(before, after))
        if len(before):
            gain = float(np.nanmax(effects.gain[first.streams])) if len(first.streams) else 0.0
            said += hints.of_exits(
                self.places, self.frame, self.transfers, first.streams, effects.gain, before, after
            )
            rows = np.unique(self.transfers.member_row[np.isin(self.transfers.member_stream, first.streams)])
            share = gain / max(self._unit(after), 1e-9)
            said += hints.of_processes(self.places, self.signals, rows[:MOST_ALONE], before, after, share)
        return locate(self.places, effects, unit, self.frame.topology, said) if said.any() else first

    def _judge(
        self, located: Located, seconds: Floats, before: Ints, after: Ints, noise: float, last: int | None,
        index: int, load: ExpertLoad | None,
    ) -> LinkVerdict | None:  # fmt: skip
        """Weigh the causes and the cost; None when it costs too little, or is too uncertain, to be named."""
        unit = self._unit(before if len(before) else after)
        streams, effects = located.streams, located.effects
        pairs = self._pairs(located, seconds, before, after, index, load)
        if not pairs or _in_no_process(pairs[0]):
            return None
        best, rows = pairs[0], self._rows(pairs[0].place)
        gain = self._gain_of_rows(streams, effects, rows)
        confirmed = any(best.explained.gains.get(name, 0.0) >= 1 for name in CONFIRMING)
        share = gain / unit
        signature = best.explained.signature
        bar = signature.bar if confirmed and signature is not None else policy.UNCONFIRMED_BAR
        if share < bar * noise or share < policy.WORTH_KEEPING:
            return None
        longest = float(np.nanmax(effects.now[streams] / np.fmax(effects.usual[streams], 1e-12)))
        placed = sum(pair.probability for pair in pairs if pair.place == best.place) if best.place.rows else 0.0
        if not confirmed and placed < PLACED and (longest < WEATHER or 0 < len(before) < SETTLED_STEPS):
            return None
        if last is not None:
            needed = policy.WORTH_KEEPING if confirmed else policy.UNCONFIRMED_COST
            if len(after) < policy.SHORTEST_ENDED_STEPS or share * len(after) / (index + 1) < needed:
                return None
        ratio = self._cost_ratio(streams, effects, rows, after)
        if ratio is not None and ratio - 1 < policy.WORTH_KEEPING:
            return None
        spread = float(np.nanmedian(effects.noise[streams])) / max(unit, 1e-12)
        sure = 1 - 0.5 * float(np.exp(-share / max(2 * spread, 0.02)))
        groups = sorted({self.transfers.streams[stream].group for stream in streams.tolist()})
        return LinkVerdict(
            pairs, groups, frozenset(streams.tolist()), int(after[0]), last, after, gain, share, sure, ratio,
            not len(before), confirmed,
        )  # fmt: skip

    def _rows(self, place: Place) -> tuple[int, ...]:
        """Ranks that a place's measures are taken of."""
        return place.rows or place.among or tuple(range(self.frame.shape[1]))

    def _pairs(
        self, located: Located, seconds: Floats, before: Ints, after: Ints, index: int, load: ExpertLoad | None
    ) -> list[Pair]:
        """Every cause at every likely place, weighed against each other."""
        unit, step_s = self._unit(before if len(before) else after), self._unit(after)
        streams, effects = located.streams, located.effects
        usual = float(np.nansum(effects.usual[streams]))
        growth = 1 + float(np.nansum(effects.gain[streams])) / usual if usual > 0 else 10.0
        cards, card_of_row = self.cards
        found: list[tuple[float, Scored, Place, Mapping[str, Measure]]] = []
        for place, likely in located.places:
            rows = self._rows(place)
            gain = self._gain_of_rows(streams, effects, rows)
            if not gain > 0:
                continue
            scene = LinkScene(
                self.frame, self.signals, load, self.features, rows, before, after, index, gain, growth,
                step_s if step_s > 0 else unit, self.transfers, seconds, located, place, self.ports, cards,
                card_of_row, _window(before, after),
            )  # fmt: skip
            taken = link_measures.take(scene)
            found += [
                (likely + scored.score, scored, place, taken) for scored in signatures.score("transfer", taken)
            ]
        found.sort(key=lambda item: (-item[0], item[1].cause, item[2].rows))
        weights = np.exp(np.array([item[0] for item in found]) - found[0][0]) if found else np.zeros(0)
        return [
            Pair(Explained(s.cause, float(w), s.signature, s.gains), place, float(w), taken)
            for w, (_, s, place, taken) in zip(weights / weights.sum(), found, strict=True)
        ]

    def _gain_of_rows(self, streams: Ints, effects: Effects, rows: tuple[int, ...]) -> float:
        """Seconds a step that the ranks behind the place lose in these streams, those of one rank at most."""
        inside = np.isin(self.transfers.member_stream, streams)
        gains = np.bincount(
            self.transfers.member_row[inside],
            weights=np.nan_to_num(effects.gain[self.transfers.member_stream[inside]]), minlength=self.frame.shape[1],
        )  # fmt: skip
        return float(gains[list(rows)].max())

    def _cost_ratio(self, streams: Ints, effects: Effects, rows: tuple[int, ...], after: Ints) -> float | None:
        """Mean step time over what the same steps would have taken with these transfers as before."""
        cut = np.zeros(len(self.transfers))
        kept = np.clip(effects.usual[streams] / np.fmax(effects.now[streams], 1e-12), 0, 1)
        cut[streams] = 1 - np.nan_to_num(kept, nan=1.0)
        known = self.transfers.stream_of >= 0
        less = np.where(known, self.transfers.x * cut[self.transfers.stream_of], 0.0) if len(cut) else None
        extra = np.zeros((len(after), self.frame.shape[1]))
        ratio = replay.step_ratio(self.frame, extra, after, less)
        if ratio is not None:
            return ratio
        lost = np.nan_to_num(self.transfers.seconds[np.ix_(after, streams)]) * cut[streams]
        steps = np.zeros((len(after), self.frame.shape[1]))
        for place, stream in enumerate(streams.tolist()):
            steps[:, list(self.transfers.streams[stream].rows)] += lost[:, place][:, None]
        return replay.without_graph(self.usual[after], steps[:, list(rows)])

    def _unit(self, steps: Ints) -> float:
        known = self.usual[steps][np.isfinite(self.usual[steps])]
        return float(np.median(known)) if len(known) else float("nan")


def _in_no_process(pair: Pair) -> bool:
    """Whether transfers are slow for want of processor time of nobody in particular: a busy host's noise."""
    return pair.explained.cause in PROCESSOR_CAUSES and not pair.place.rows


def _window(before: Ints, after: Ints) -> Window:
    """Steps whose samples surely lie on either side of an onset that may be found late."""
    low, high = (int(before[0]), int(before[-1]) - ONSET_MARGIN_STEPS) if len(before) else (1, 0)
    # What counters do has no warm-up.
    low = 0 if low <= policy.WARM_UP_STEPS else low
    return Window((low, high), (int(after[0]) + 1, int(after[-1])))


def _span(change: Change, index: int) -> range:
    """The steps that a change lasted, as known at a step."""
    return range(change.onset, (index if change.last is None else change.last) + 1)


def _joined(known: list[Watched]) -> list[Watched]:
    """Episodes of the same streams as one where they lie no further apart than the longer of them lasted: losses come and
    go by chance."""
    result: list[Watched] = []
    for item in sorted(known, key=lambda w: (w.streams, w.relative, w.change.row, w.change.onset)):
        held = result[-1] if result and _of_the_same(result[-1], item) else None
        over = None if held is None else held.change.last
        if held is not None and over is not None:
            one, other = held.change, item.change
            # How long the newer one will have lasted is not known while it lasts.
            longest = max(over - one.onset, 0 if other.last is None else other.last - other.onset)
            if other.onset - over <= longest + 1:
                effect = max(one.effect, other.effect)
                joined = replace(one, effect=effect, last=other.last, settled=other.settled)
                result[-1] = replace(held, change=joined)
                continue
        result.append(item)
    return result


def _of_the_same(one: Watched, other: Watched) -> bool:
    return (one.streams, one.relative, one.change.row) == (other.streams, other.relative, other.change.row)


def _same(verdict: LinkVerdict, other: LinkVerdict) -> bool:
    """Whether two verdicts are about the same streams at the same time."""
    together = min(int(verdict.after[-1]), int(other.after[-1])) - max(verdict.onset, other.onset) + 1
    shorter = min(len(verdict.after), len(other.after))
    return not verdict.streams.isdisjoint(other.streams) and together >= 0.5 * shorter


def _accounts_for(verdict: LinkVerdict, watched: Watched, index: int) -> bool:
    """Whether a change is about the streams and the time of a verdict."""
    span = _span(watched.change, index)
    together = min(span[-1], int(verdict.after[-1])) - max(span[0], verdict.onset) + 1
    return not verdict.streams.isdisjoint(watched.streams) and together >= 0.5 * min(len(span), len(verdict.after))
