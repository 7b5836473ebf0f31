"""Steps and phases of the thread that trains: they lie inside each other and never overlap.

A phase entered inside another one splits it: the outer one ends there and goes on afterwards. Phases marked by hand
win over those found automatically. A batch waited for between two steps belongs to the step that follows, which
then begins with the wait.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from lens.hooks.guard import Part
from lens.recorder import Recorder
from lens.slots import NULL

_clock = time.monotonic_ns
_this_thread = threading.get_ident


class _Outer(NamedTuple):
    """A phase that was interrupted by one inside it."""

    name: int
    micro_batch: int
    by_hand: bool


class Timeline:
    """Where the training thread is: step, phase, and what the hook itself has cost so far."""

    __slots__ = (
        "_attributes",
        "_by_hand",
        "_data",
        "_gc_before",
        "_ids",
        "_micro_batch",
        "_names",
        "_next_number",
        "_note_phase",
        "_outer",
        "_phase_t0",
        "_record_phase",
        "_recorder",
        "_steps_by_hand",
        "_thread",
        "_waited",
        "_waiting_since",
        "gc_ns",
        "last_end",
        "last_step",
        "part",
        "phase",
        "spent",
        "step",
        "step_t0",
    )

    def __init__(self, recorder: Recorder) -> None:
        self.part = Part("steps and phases")
        self.step = NULL
        self.step_t0 = 0
        self.phase = 0
        """String id of the phase that is open, 0 for none."""
        self.spent = 0
        """Nanoseconds that the hook took in this step."""
        self.gc_ns = 0
        """Nanoseconds of garbage collection since the process was watched."""
        self.last_end = 0
        """When the last step ended."""
        self.last_step = NULL
        """The step that ended last."""
        self._recorder = recorder
        self._note_phase = recorder.note_phase
        self._record_phase = recorder.phase
        self._thread = _this_thread()
        self._ids: dict[str, int] = {}
        self._names = {0: ""}
        self._data = self.phase_id("data")
        self._next_number = 0
        self._steps_by_hand = False
        self._attributes = (NULL, NULL, NULL)
        self._gc_before = 0
        self._phase_t0 = 0
        self._micro_batch = NULL
        self._by_hand = False
        self._outer: list[_Outer] = []
        self._waited: list[tuple[int, int]] = []
        self._waiting_since = 0

    def here(self) -> bool:
        """Whether the calling thread is the one that trains and recording is on."""
        return self.part.on and _this_thread() == self._thread

    def phase_id(self, name: str) -> int:
        """String id of a phase's name."""
        found = self._ids.get(name)
        if found is None:
            found = self._ids[name] = self._recorder.intern(name)
            self._names[found] = name
        return found

    def phase_name(self, identity: int | None = None) -> str:
        """Name of a phase, or of the one that is open; empty for none."""
        return self._names[self.phase if identity is None else identity]

    # --- steps -------------------------------------------------------------------------------------------------

    def begin_step(self, number: int | None, tokens: int, micro_batches: int, seq_sq: int) -> None:
        """A step begins, with the wait for its batch if there was one; a step found automatically gives way."""
        now = _clock()
        self._steps_by_hand = True
        began = self._waited[0][0] if self._waited else now
        self._open_step(self._next_number if number is None else number, began)
        self._attributes = (tokens, micro_batches, seq_sq)
        self.spent = _clock() - now

    def end_step(self) -> int:
        """The step ends, and with it every phase still open; returns the time of its end."""
        now = _clock()
        self._close_phases(now)
        tokens, micro_batches, seq_sq = self._attributes
        self._recorder.step(
            self.step, self.step_t0, now, tokens, micro_batches, seq_sq,
            NULL, self.gc_ns - self._gc_before, NULL, self.spent + _clock() - now,
        )  # fmt: skip
        self.last_step = self.step
        self.step = NULL
        self.last_end = now
        return now

    def arrive(self) -> None:
        """A step of which only the end was seen is over: the next one begins here."""
        self.last_end = _clock()

    def abandon_step(self) -> None:
        """An exception left the step: it stays open in the ring, where a post-mortem finds it."""
        self._forget_phases()
        self.step = NULL

    def ends_by_itself(self) -> bool:
        """Whether the optimizer's step ends the step: one is open, and steps are not marked by hand."""
        return self.step != NULL and not self._steps_by_hand

    def _open_step(self, number: int, began: int) -> None:
        self._close_phases(began)
        self.spent = 0
        self.step = number
        self._next_number = number + 1
        self._gc_before = self.gc_ns
        self.step_t0 = began
        for began, ended in self._waited:
            self._record_phase(self._data, began, ended, number)
        self._waited.clear()
        self._attributes = (NULL, NULL, NULL)
        self._recorder.enter_step(number, self.step_t0)

    # --- phases ------------------------------------------------------------------------------------------------

    def enter(self, name: int, micro_batch: int = NULL, by_hand: bool = True) -> None:
        """A phase begins; one that is open is split around it."""
        now = _clock()
        if self.phase:
            self._record_phase(self.phase, self._phase_t0, now, self.step, self._micro_batch)
            self._outer.append(_Outer(self.phase, self._micro_batch, self._by_hand))
        elif self.step == NULL:
            self._waited.clear()  # what was fetched belongs to this, not to the step that will follow
        self.phase = name
        self._phase_t0 = now
        self._micro_batch = micro_batch
        self._by_hand = by_hand
        self._note_phase(now, name, self.step)
        self.spent += _clock() - now

    def enter_found(self, name: int) -> bool:
        """An automatic phase begins, unless the person at work has marked this time, or it is inside its like."""
        if self._by_hand or self.phase == name or self._waiting_since:
            return False
        if self.step == NULL and not self._steps_by_hand:
            began = self.last_end or (self._waited[0][0] if self._waited else _clock())
            self._open_step(self._next_number, began)
        self.enter(name, NULL, False)
        return True

    def leave(self) -> None:
        """The innermost phase ends and the one around it goes on."""
        if not self.phase:
            return  # the step ended first and closed it
        now = _clock()
        self._record_phase(self.phase, self._phase_t0, now, self.step, self._micro_batch)
        if self._outer:
            self._go_on_with(self._outer.pop(), now)
        else:
            self.phase = 0
            self._by_hand = False
        self.spent += _clock() - now

    def abandon(self) -> None:
        """An exception left the phase: it stays open in the ring until another one begins."""
        self.phase = 0
        self._by_hand = False
        if self._outer:
            self.phase, self._micro_batch, self._by_hand = self._outer.pop()
            self._phase_t0 = _clock()

    def _go_on_with(self, outer: _Outer, now: int) -> None:
        self.phase, self._micro_batch, self._by_hand = outer
        self._phase_t0 = now
        self._note_phase(now, self.phase, self.step)

    def _close_phases(self, now: int) -> None:
        if self.phase:
            self._record_phase(self.phase, self._phase_t0, now, self.step, self._micro_batch)
            self._forget_phases()

    def _forget_phases(self) -> None:
        self._outer.clear()
        self.phase = 0
        self._by_hand = False

    # --- waiting for data --------------------------------------------------------------------------------------

    def begin_wait(self) -> bool:
        """The next batch is asked for; False when somebody else already times this wait."""
        if self._waiting_since or self.phase == self._data:
            return False
        if self.step != NULL:
            self.enter(self._data, NULL, True)
            return True
        self._waiting_since = _clock()
        self._note_phase(self._waiting_since, self._data, self._next_number)
        return True

    def end_wait(self, arrived: bool) -> None:
        """The batch is there, or the loader has ended or failed."""
        if not self._waiting_since:
            self.leave()
            return
        if arrived:
            self._waited.append((self._waiting_since, _clock()))
        self._waiting_since = 0
        self._recorder.leave_phase()


class Phase:
    """``with lens.phase(...)``. Keeps nothing of its own while open, so that one object serves all steps."""

    __slots__ = ("_micro_batch", "_name", "_timeline")

    def __init__(self, timeline: Timeline, name: str, micro_batch: int | None) -> None:
        self._timeline = timeline
        self._name = timeline.phase_id(name)
        self._micro_batch = NULL if micro_batch is None else micro_batch

    def __enter__(self) -> None:
        try:
            self._timeline.enter(self._name, self._micro_batch)
        except Exception as error:
            self._timeline.part.fail(error)

    def __exit__(self, kind: object, *_: object) -> None:
        timeline = self._timeline
        if not timeline.part.on:
            return
        try:
            if kind is None:
                timeline.leave()
            else:
                timeline.abandon()
        except Exception as error:
            timeline.part.fail(error)
