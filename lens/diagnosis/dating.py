"""When would each hypothesis first have been in a reply? The smallest step whose reply holds it.

What a reply up to a step would hold can be asked at every step, but a run has many. So each hypothesis is asked for at
those places alone at which it can be: a rank's own at those where something about that rank is worth naming, what
families notice on their grid, what was slow since the first step on the grid of that. Long after something changed, when
means over hundreds of steps move slowly, it is asked for on a grid and then step by step before the first place that
has it; only what came and went between two places of that grid is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lens.diagnosis import exits, numerics, report, signatures
from lens.diagnosis.arrays import Ints
from lens.diagnosis.changes import Change
from lens.diagnosis.exits import End
from lens.diagnosis.findings import Finding
from lens.diagnosis.grids import STANDING, grid
from lens.diagnosis.judge import CAUSES, Judge
from lens.diagnosis.report import Hypothesis

Key = tuple[str, tuple[int, ...]]
"""Cause and ranks."""
Onsets = dict[Key, int | None]
"""Hypotheses that a reply holds, with the places of their onsets; None where that cannot change later."""

END_CAUSES = {"rank_dead", "out_of_memory", "dataloader_worker_death"}
FATAL_CAUSES = END_CAUSES | {"nan_origin", "rank_stuck", "collective_mismatch"}
LINK_CAUSES = {s.cause for s in signatures.SIGNATURES if "transfer" in s.features} | {"unexplained"}
NEAR = 256
"""So many places are asked one by one from where something changed."""


@dataclass(frozen=True)
class _Source:
    """One way into a reply: the places at which it may lead there, ascending, and whether it can at one of them."""

    places: Ints
    may: Callable[[int], bool]


def date(judge: Judge, hypotheses: list[Hypothesis], index: int) -> None:
    """Fill in when each hypothesis would first have been in a reply."""
    steps, limit = judge.run.timeline.steps, judge.run.timeline.complete_from
    waiting: dict[Key, list[Hypothesis]] = {}
    for item in hypotheses:
        waiting.setdefault((item["cause"], tuple(item["ranks"])), []).append(item)
    asked = _Asked(judge, index, limit)
    for key, items in waiting.items():
        place, begun = asked.first(key)
        for item in items if len(steps) else ():
            # Seen only with every record: from the first step on at which every record is visible.
            item["detected_step"] = int(steps[limit if place is None else place])
            if place is None or begun is None or item["onset_step"] is None:
                continue
            if item["onset_step"] > item["detected_step"]:
                # All records together may date the beginning anew, but not after it was seen.
                item["onset_step"] = int(steps[begun])


def by_attempt(ended: list[End]) -> Iterable[tuple[End, list[End]]]:
    """The cause of each failure with its victims: before a restart, and at the end of the run."""
    for restarted in (True, False):
        group = [end for end in ended if end.restarted == restarted]
        if group:
            cause = exits.cause_first(group)
            yield cause[0], cause[1:]


class _Asked:
    """What replies hold at places before `limit`."""

    def __init__(self, judge: Judge, index: int, limit: int) -> None:
        self._judge, self._run, self._index, self._limit = judge, judge.run, index, limit
        self._held: dict[int, Onsets] = {}

    def first(self, key: Key) -> tuple[int | None, int | None]:
        """The first place at which a reply holds a hypothesis, and the place of the onset that it gives there."""
        cause, ranks = key
        if cause in FATAL_CAUSES:
            return next(((p, begun[key]) for p, begun in self._fatal(cause) if key in begun), (None, None))
        sources = list(self._sources(cause, ranks))
        within = np.zeros((len(sources), self._limit), bool)
        near, marked = np.zeros(self._limit, bool), np.zeros(self._limit, bool)
        for inside, source in zip(within, sources, strict=True):
            places = source.places[source.places < self._limit]
            inside[places] = marked[places] = True
            near[places[:NEAR]] = True
        near[grid(self._limit)] = True

        def held_at(place: int) -> bool:
            may = any(sources[number].may(place) for number in np.flatnonzero(within[:, place]).tolist())
            return may and key in self._at(place)

        passed = -1
        for place in np.flatnonzero(near & marked).tolist():
            if held_at(place):
                skipped = passed + 1 + np.flatnonzero(marked[passed + 1 : place])
                first = next((earlier for earlier in skipped.tolist() if held_at(earlier)), place)
                return first, self._at(first)[key]
            passed = place
        return None, None

    def _at(self, place: int) -> Onsets:
        """What a reply up to a place says of slowness."""
        if place not in self._held:
            ranks = self._run.topology.ranks
            named = self._judge.onsets(place).items()
            self._held[place] = {
                (cause, tuple(ranks[list(rows)].tolist())): onset for (cause, rows), onset in named
            }
        return self._held[place]

    def _sources(self, cause: str, ranks: tuple[int, ...]) -> Iterator[_Source]:
        rows = tuple(np.searchsorted(self._run.topology.ranks, ranks).tolist())
        if cause in CAUSES:
            yield _Source(
                grid(self._limit), lambda place: any(n.cause == cause for n in self._judge.noticed(place))
            )
        if cause not in CAUSES or cause in signatures.ADVICE:
            yield from self._links(cause, rows)
            yield from self._of_rank(rows[0], cause) if len(rows) == 1 else self._of_set(rows)

    def _links(self, cause: str, rows: tuple[int, ...]) -> Iterator[_Source]:
        """Slower transfers: from the first change on, and on the grid of what always was slow."""
        if cause not in LINK_CAUSES:
            return
        raised = self._run.network.first_raised()

        def may(place: int) -> bool:
            found = self._run.network.verdicts(place, self._run.load)
            return any(p.explained.cause == cause and p.place.rows == rows for link in found for p in link.listed)

        yield _Source(grid(self._limit, STANDING), may)
        if raised is not None:
            yield _Source(np.arange(raised, self._limit), may)

    def _of_set(self, rows: tuple[int, ...]) -> Iterator[_Source]:
        """Several ranks: from the first change of one of them on."""
        raised = [c.raised for found in self._run.found.values() for c in found if c.row in rows]
        raised += [whole.change.raised for whole in self._run.wholes if whole.rows == rows]
        if raised:
            yield _Source(np.arange(min(raised), self._limit), lambda place: True)

    def _of_rank(self, row: int, cause: str) -> Iterator[_Source]:
        """One rank: while a change of it is worth naming, or it stands out since the first step."""
        for feature, found in self._run.found.items():
            for change in found:
                if change.row == row:
                    yield self._of_change(feature, change, cause)
        alone = [whole.change.raised for whole in self._run.wholes if whole.rows == (row,)]
        if alone:
            yield _Source(np.arange(min(alone), self._limit), lambda place: True)
        places = grid(self._limit, STANDING).tolist()
        if places:
            stands = [any(finding.rows[0] == row for finding in self._run.stands(at)) for at in places]
            # Between two places of its grid it says the same, but what else is known of the rank may give way to it.
            lasting = np.repeat(stands, np.diff([*places, self._limit]))
            yield _Source(np.flatnonzero(lasting) + places[0], lambda place: True)

    def _of_change(self, feature: str, change: Change, cause: str) -> _Source:
        def finding(place: int) -> Finding:
            known = change.seen_at(place) or change
            return Finding(feature, (change.row,), known.onset, known.last, place, known.noise_by(place))

        end = self._limit
        if change.settled is not None and change.settled < end:
            end = max(change.settled, min(end, int(self._run.named_until(finding(change.settled))) + 1))
        return _Source(np.arange(change.raised, end), lambda place: cause in self._run.causes_of(finding(place)))

    def _fatal(self, cause: str) -> Iterator[tuple[int, Onsets]]:
        """Places from the first on at which an end or a number that is not finite shows, with what a reply says of them."""
        run, timeline = self._run, self._run.timeline
        ended = exits.ends(run.tables, timeline, self._index) if cause in END_CAUSES else []
        marks = [end.visible for end in ended]
        origin = numerics.origin(run.tables, timeline, run.topology, self._index) if cause == "nan_origin" else None
        for place in range(min([*marks, origin.visible] if origin else marks, default=self._limit), self._limit):
            held: Onsets = {}
            found = numerics.origin(run.tables, timeline, run.topology, place) if origin else None
            if found is not None:
                held["nan_origin", tuple(int(run.topology.ranks[row]) for row in found.rows)] = None
            for end, victims in by_attempt(exits.ends(run.tables, timeline, place)) if marks else ():
                held[report.of_end(run, end, victims, False)[0]["cause"], (end.rank,)] = None
            yield place, held
