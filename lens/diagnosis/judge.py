"""Everything a reply says about slowness at a step place: slow ranks, and what the families of causes noticed.

Two views of one thing are one finding: a cause that a family saw takes the place of the slow ranks it explains.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lens.diagnosis import balance, cards, checkpoints, experts, feeding, learning, memory, notices, pauses, stops
from lens.diagnosis.examine import Examiner, Verdict
from lens.diagnosis.notices import Cause, Family, Notice
from lens.diagnosis.signatures import confirmed

FAMILIES: tuple[type[Family], ...] = (
    cards.Cards, checkpoints.Saves, pauses.Pauses, experts.Experts, memory.Memory, balance.Balance, feeding.Feeding, learning.Learning,
    stops.Stops,
)  # fmt: skip
CAUSES: dict[str, Cause] = {
    **cards.CAUSES, **checkpoints.CAUSES, **pauses.CAUSES, **experts.CAUSES, **memory.CAUSES, **balance.CAUSES,
    **feeding.CAUSES, **learning.CAUSES, **stops.CAUSES,
}  # fmt: skip


@dataclass
class Judge:
    """A run's slowness, ready to be told at any of its steps."""

    run: Examiner
    _families: list[Family] = field(default_factory=list)
    _noticed: dict[int, list[Notice]] = field(default_factory=dict)

    def at(self, index: int) -> tuple[list[Verdict], list[Notice]]:
        """Slow ranks and noticed causes at a step place, those that are one thing merged."""
        noticed, verdicts = self._notices(index), self.run.verdicts(index)
        kept = []
        for verdict in verdicts:
            owner = next((n for n in noticed if _explains(n, verdict, index)), None)
            if owner is None:
                kept.append(verdict)
            elif owner.ratio is None and verdict.ratio is not None:
                noticed = [replace(n, ratio=verdict.ratio) if n is owner else n for n in noticed]
        return kept, noticed

    def named(self, index: int) -> set[tuple[str, tuple[int, ...]]]:
        """Cause and rows of every hypothesis that a reply at a step place holds."""
        verdicts, noticed = self.at(index)
        pairs = {(e.cause, verdict.finding.rows) for verdict in verdicts for e in verdict.listed}
        pairs |= {(p.explained.cause, p.place.rows) for link in self.run.links(index) for p in link.listed}
        return pairs | {(notice.cause, notice.rows) for notice in noticed}

    def _notices(self, index: int) -> list[Notice]:
        place = notices.on_grid(index)
        if place not in self._noticed:
            if not self._families:
                self._families = [family.of(self.run) for family in FAMILIES]
            found = [notice for family in self._families for notice in family.at(place)] if place >= 0 else []
            self._noticed[place] = found
        return self._noticed[place]


def _explains(notice: Notice, verdict: Verdict, index: int) -> bool:
    """Whether a slow rank is what a noticed cause does: there, then, and in a part of the step that it touches."""
    finding = verdict.finding
    if finding.feature not in CAUSES[notice.cause].absorbs:
        return False
    if notice.rows and not set(finding.rows) <= set(notice.rows):
        return False
    ends = [index if last is None else last for last in (notice.last, finding.last)]
    together = min(ends) - max(notice.onset, finding.onset) + 1
    shorter = min(ends[0] - notice.onset, ends[1] - finding.onset) + 1
    if together < 0.5 * shorter:
        return False
    best = verdict.explained[0]
    return best.cause == notice.cause or not confirmed(best)
