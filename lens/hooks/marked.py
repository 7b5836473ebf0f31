"""Steps and phases that the training marks itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lens.slots import NULL

if TYPE_CHECKING:
    from lens.hooks.timeline import Timeline


class Step:
    """``with lens.step()``."""

    __slots__ = ("_about", "_timeline")

    def __init__(self, timeline: Timeline, about: tuple[int | None, ...]) -> None:
        self._timeline = timeline
        self._about = about

    def __enter__(self) -> None:
        self._timeline.begin_step(*self._about)

    def __exit__(self, kind: object, *_: object) -> None:
        timeline = self._timeline
        if not timeline.part.on:
            return
        try:
            if kind is not None:
                timeline.abandon_step()
            elif not timeline.end_alone():
                timeline._end()
        except Exception as error:
            timeline.part.fail(error)


class Phase:
    """``with lens.phase(...)``. Keeps nothing of its own while open, so that one object serves all steps."""

    __slots__ = ("_micro_batch", "_name", "_timeline")

    def __init__(self, timeline: Timeline, name: str, micro_batch: int | None) -> None:
        self._timeline = timeline
        self._name = timeline.phase_id(name)
        self._micro_batch = NULL if micro_batch is None else micro_batch

    def __enter__(self) -> None:
        self._timeline.enter(self._name, self._micro_batch)

    def __exit__(self, kind: object, *_: object) -> None:
        timeline = self._timeline
        if not timeline.part.on:
            return
        if kind is None:
            timeline.leave()
        else:
            timeline.abandon()
