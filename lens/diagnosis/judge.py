"""Everything a reply says about slowness at a step place: slow ranks, and what the families of causes noticed.

Two views of one thing are one finding: a cause that a family saw takes the place of the slow ranks it explains.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lens.diagnosis import (
    balance,
    bounds,
    cards,
    checkpoints,
    experts,
    feeding,
    learning,
    memory,
    pauses,
    serving,
    several,
    stops,
    swapping,
)
from lens.diagnosis.examine import Examiner
from lens.diagnosis.findings import Verdict
from lens.diagnosis.grids import on_grid
from lens.diagnosis.network import LinkVerdict
from lens.diagnosis.notices import Cause, Family, Notice
from lens.diagnosis.parts import WITHIN
from lens.diagnosis.signatures import confirmed

FAMILIES: tuple[type[Family], ...] = (
    cards.Cards, checkpoints.Saves, pauses.Pauses, experts.Experts, memory.Memory, balance.Balance, feeding.Feeding, learning.Learning,
    stops.Stops, swapping.Swapping, bounds.Bounds, serving.Serving,
)  # fmt: skip
CAUSES: dict[str, Cause] = {
    **cards.CAUSES, **checkpoints.CAUSES, **pauses.CAUSES, **experts.CAUSES, **memory.CAUSES, **balance.CAUSES,
    **feeding.CAUSES, **learning.CAUSES, **stops.CAUSES, **swapping.CAUSES, **bounds.CAUSES,
    **serving.CAUSES,
}  # fmt: skip


@dataclass
class Judge:
    """A run's slowness, ready to be told at any of its steps."""

    run: Examiner
    _families: list[Family] = field(default_factory=list)
    _noticed: dict[int, list[Notice]] = field(default_factory=dict)

    def at(self, index: int) -> tuple[list[Verdict], list[Notice]]:
        """Slow ranks and noticed causes at a step place, those that are one thing merged."""
        noticed, verdicts = self.noticed(index), self.run.verdicts(index)
        if self._serves:
            verdicts = [verdict for verdict in verdicts if _lasts(verdict, index)]
        kept: list[Verdict] = []
        owned: dict[int, list[Verdict]] = {}
        for verdict in verdicts:
            owner = next((p for p, notice in enumerate(noticed) if _explains(notice, verdict, index)), None)
            (kept if owner is None else owned.setdefault(owner, [])).append(verdict)
        priced = [
            notice if notice.ratio is not None or place not in owned else replace(notice, ratio=self._cost(owned[place]))
            for place, notice in enumerate(noticed)
        ]  # fmt: skip
        return kept, priced

    def _cost(self, owned: list[Verdict]) -> float | None:
        """What the slow ranks that a cause explains cost together."""
        known = [verdict.ratio for verdict in owned if verdict.ratio is not None]
        together = several.joint_ratio(self.run, owned) if len(owned) > 1 else None
        return max(known, default=None) if together is None else together

    def links(self, index: int) -> list[LinkVerdict]:
        """Slower transfers at a step place, but for those that a noticed cause explains."""
        noticed = self.noticed(index)
        return [link for link in self.run.links(index) if not any(_lengthens(n, link, index) for n in noticed)]

    def named(self, index: int) -> set[tuple[str, tuple[int, ...]]]:
        """Cause and rows of every hypothesis that a reply at a step place holds."""
        return set(self.onsets(index))

    def onsets(self, index: int) -> dict[tuple[str, tuple[int, ...]], int]:
        """The same, with the place of the onset that it gives to each."""
        verdicts, noticed = self.at(index)
        found = {(e.cause, v.finding.rows): int(v.after[0]) for v in verdicts for e in v.listed}
        found |= {(p.explained.cause, p.place.rows): link.onset for link in self.links(index) for p in link.listed}
        return found | {(notice.cause, notice.rows): notice.onset for notice in noticed}

    @property
    def _serves(self) -> bool:
        """Whether the run serves requests, of which each rank may have its own."""
        return any(isinstance(family, serving.Serving) and family.serves for family in self._families)

    def noticed(self, index: int) -> list[Notice]:
        """What the families see at a step place."""
        place = on_grid(index)
        if place not in self._noticed:
            if not self._families:
                self._families = [family.of(self.run) for family in FAMILIES]
            # A server may have no steps at all; its requests are judged all the same.
            able = [f for f in self._families if place >= 0 or isinstance(f, serving.Serving)]
            found = [notice for family in able for notice in family.at(place)]
            if self._serves:
                # Of serving, what is decoded tells which owners have too much: prompts of a rank's own come and go.
                found = [notice for notice in found if notice.cause != "hot_expert"]
            self._noticed[place] = [n for n in found if not any(_brings(other, n, place) for other in found)]
        return self._noticed[place]


def _lasts(verdict: Verdict, index: int) -> bool:
    """Whether a rank that serves is slow for longer than prompts of its own make it, or its card or host says so too."""
    best, finding = verdict.explained[0], verdict.finding
    end = index if finding.last is None else finding.last
    told = confirmed(best) and best.cause not in ("hot_expert", "unexplained")
    return told or end - finding.onset + 1 >= serving.PROMPT_STEPS


def _explains(notice: Notice, verdict: Verdict, index: int) -> bool:
    """Whether a slow rank is what a noticed cause does: there, then, and in a part of the step that it touches."""
    finding = verdict.finding
    if WITHIN.get(finding.feature, finding.feature) not in CAUSES[notice.cause].absorbs:
        return False
    if notice.rows and not set(finding.rows) <= set(notice.rows):
        return False
    if not _overlap(notice, finding.onset, finding.last, index):
        return False
    best = verdict.explained[0]
    return best.cause in (notice.cause, *CAUSES[notice.cause].brings) or not confirmed(best)


def _brings(notice: Notice, other: Notice, index: int) -> bool:
    """Whether what one family saw is what another cause brings about."""
    there = not notice.rows or not other.rows or set(other.rows) <= set(notice.rows)
    return other.cause in CAUSES[notice.cause].brings and there and _overlap(notice, other.onset, other.last, index)


def _lengthens(notice: Notice, link: LinkVerdict, index: int) -> bool:
    """Whether transfers take longer because of a noticed cause, which no port or switch confirms."""
    reached = "transfer" in CAUSES[notice.cause].absorbs and not link.confirmed
    return reached and _overlap(notice, link.onset, link.last, index)


def _overlap(notice: Notice, onset: int, last: int | None, index: int) -> bool:
    """Whether a notice and something else run together for most of the shorter."""
    ends = [index if end is None else end for end in (notice.last, last)]
    together = min(ends) - max(notice.onset, onset) + 1
    return together >= 0.5 * (min(ends[0] - notice.onset, ends[1] - onset) + 1)
