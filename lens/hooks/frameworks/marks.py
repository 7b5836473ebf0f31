"""Phases of what frameworks do as a whole: what is found inside one of them belongs to it."""

from __future__ import annotations

from lens.hooks.timeline import Timeline
from lens.slots import NULL

APART = frozenset(("checkpoint", "eval", "logging"))
"""Done between steps, or instead of them: before the first step it is part of no training yet."""


class Marks:
    """Opens and closes phases on a timeline; each lies in the step that is open, or else in the one that follows."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._open: list[int] = []

    def begin(self, name: str) -> bool:
        """A phase begins, unless one is open that a person or a hook has begun. Returns whether it does."""
        timeline = self._timeline
        if name in APART and timeline.step == NULL and not timeline.steps:
            return False
        inside, identity = timeline.phase, timeline.phase_id(name)
        if not inside:
            self._open.clear()  # steps end with all their phases
        elif not self._open or inside == identity or inside != self._open[-1]:
            return False
        if not timeline.begin_found() or not timeline.enter(identity, NULL, False):
            return False
        self._open.append(identity)
        return True

    def end(self) -> None:
        """The phase that began last ends; one that was closed with its step already has."""
        if self._open and self._open.pop() == self._timeline.phase:
            self._timeline.leave()

    def abandon(self) -> None:
        """An exception left the phase that began last: it stays open in the ring until another one begins."""
        if self._open and self._open.pop() == self._timeline.phase:
            self._timeline.abandon()
