"""Steps and phases of the thread that trains: they lie inside each other and never overlap.

A phase entered inside another one splits it: the outer one ends there and goes on afterwards. Phases marked by hand
win over those found automatically. A batch waited for between two steps belongs to the step that follows, which
then begins with the wait.

Each of these moments is met with cold caches, where every function called is another microsecond: what is done at one
of them stands in one place, and what one of them calls never raises, so that nobody needs to stand around it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

from lens.hooks import native
from lens.hooks.guard import Part
from lens.hooks.marked import Step
from lens.hooks.unseen import leave_alone, unseen
from lens.recorder import (
    CONTROL_WORD,
    OPEN_PHASE_BYTE,
    OPEN_PHASE_WORD,
    OPEN_STEP_BYTE,
    Recorder,
    pack_slot,
    pack_three,
)
from lens.slots import NULL, PHASE, STEP

_clock = time.monotonic_ns
_this_thread = threading.get_ident
_NO_ATTRIBUTES = (NULL, NULL, NULL)
_SAYS_NOTHING = (None, None, None, None)
_PART = "steps and phases"


def _word(value: int | None) -> int:
    return NULL if value is None else value


class _Outer(NamedTuple):
    """A phase that was interrupted by one inside it."""

    name: int
    micro_batch: int
    by_hand: bool


def timeline_of(recorder: Recorder, compiled: bool) -> Timeline:
    """The timeline of the calling thread: in C where that may be and is built for this Python, else in Python."""
    loaded = native.load("timeline") if compiled else None
    if loaded is not None:
        try:
            return cast(Timeline, loaded.Timeline(recorder, Part(_PART)))
        except Exception:
            # A recorder that is not laid out as it was built for.
            return Timeline(recorder)
    return Timeline(recorder)


class Timeline:
    """Where the training thread is: step, phase, and what the hook itself has cost so far."""

    __slots__ = (
        "_attributes",
        "_by_hand",
        "_data",
        "_end",
        "_gc_before",
        "_ids",
        "_micro_batch",
        "_names",
        "_outer",
        "_phase_t0",
        "_plain_step",
        "_recorder",
        "_spent_before",
        "_waited",
        "_waiting_since",
        "errands",
        "gc_ns",
        "last_end",
        "last_step",
        "look_at",
        "next_number",
        "part",
        "phase",
        "spent",
        "spent_on_collectives",
        "spent_on_experts",
        "step",
        "step_t0",
        "steps",
        "steps_by_hand",
        "thread",
    )

    def __init__(self, recorder: Recorder) -> None:
        self.part = Part(_PART)
        self.step = NULL
        self.step_t0 = 0
        self.phase = 0
        """String id of the phase that is open, 0 for none."""
        self.spent = 0
        """Nanoseconds that the hook has taken since the process was watched, but for the two that follow."""
        self.spent_on_collectives = 0
        self.spent_on_experts = 0
        self.gc_ns = 0
        """Nanoseconds of garbage collection since the process was watched."""
        self.steps = 0
        """Steps that have ended."""
        self.errands = True
        """Whether something else is to be done at the end of this step, which is then not ended by `end_alone`."""
        self.look_at = 0
        """From then on, too: the time of the next look at this process's counters."""
        self._end: Callable[[], Any] = self.end_step
        self._plain_step = Step(self, _SAYS_NOTHING)
        """Serves all steps of which nothing is said: it keeps nothing of its own."""
        self.last_end = 0
        """When the last step ended."""
        self.last_step = NULL
        """The step that ended last."""
        leave_alone(*vars(Timeline).values())
        self._recorder = recorder
        self.thread = _this_thread()
        """The thread that trains."""
        self._ids: dict[str, int] = {}
        self._names = {0: ""}
        self._data = self.phase_id("data")
        self.next_number = 0
        """Number of the step that follows, where its beginning does not say another."""
        self.steps_by_hand = False
        """Whether the training marks its steps; else the optimizer's step ends them."""
        self._attributes = _NO_ATTRIBUTES
        self._gc_before = 0
        self._spent_before = 0
        self._phase_t0 = 0
        self._micro_batch = NULL
        self._by_hand = False
        self._outer: list[_Outer] = []
        self._waited: list[tuple[int, int]] = []
        self._waiting_since = 0

    def here(self) -> bool:
        """Whether the calling thread is the one that trains and recording is on."""
        return self.part.on and _this_thread() == self.thread

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

    def begin_step(
        self, number: int | None, tokens: int | None, micro_batches: int | None, seq_sq: int | None
    ) -> None:
        """A step begins, with the wait for its batch if there was one; a step found automatically gives way."""
        try:
            now = _clock()
            self.steps_by_hand = True
            waited = self._waited
            began = waited[0][0] if waited else now
            self._open_step(self.next_number if number is None else number, began)
            if not (tokens is micro_batches is seq_sq is None):
                self._attributes = _word(tokens), _word(micro_batches), _word(seq_sq)
            self.spent += _clock() - now
        except Exception as error:
            self.part.fail(error)

    def end_step(self) -> int:
        """The step ends, and with it every phase still open; returns the time of its end."""
        now = _clock()
        if self.phase:
            self._close_phases(now)
        # As `Recorder.step` writes it.
        recorder, number = self._recorder, self.step
        words, sequence = recorder.words, recorder.next
        pack_slot(
            words, recorder.first_byte + ((sequence - 1 & recorder.mask) << 7),
            sequence, STEP, self.step_t0, now, number, 0, *self._attributes,
            NULL, self.gc_ns - self._gc_before, NULL,
            self.spent + self.spent_on_collectives + self.spent_on_experts - self._spent_before + _clock() - now,
            0, 0, sequence,
        )  # fmt: skip
        recorder.next = sequence + 1
        pack_three(words, OPEN_STEP_BYTE, 0, number, now)
        self.steps += 1
        self.last_step = number
        self.step = NULL
        self.last_end = now
        return now

    def end_alone(self) -> bool:
        """End the step, unless there is something else to do at its end, or somebody asks the hook to leave."""
        if self.errands or _clock() >= self.look_at or self._recorder.words[CONTROL_WORD]:
            return False
        self.end_step()
        return True

    def steps_end_with(self, end: Callable[[], Any]) -> Callable[..., AbstractContextManager[Any] | None]:
        """Let steps marked by hand end by this where they do not by `end_alone`; what makes such steps, of the arguments
        of `begin_step`, and None where nothing is recorded."""
        self._end = end
        return self.new_step

    def new_step(self, *about: int | None) -> Step | None:
        """A step marked by hand, of the arguments of `begin_step`; None where nothing is recorded."""
        if not self.part.on or _this_thread() != self.thread:
            return None
        return self._plain_step if about == _SAYS_NOTHING else Step(self, about)

    def all_spent(self) -> int:
        """Nanoseconds that the hook has taken since the process was watched."""
        return self.spent + self.spent_on_collectives + self.spent_on_experts

    def arrive(self) -> None:
        """A step of which only the end was seen is over: the next one begins here."""
        self.last_end = _clock()

    def begin_found(self) -> bool:
        """Something of the training begins: with it a step, where none is open and none is marked by hand.

        Returns whether it may be noted: not in another thread, nor in a wait for data.
        """
        if not self.here() or self._waiting_since:
            return False
        if self.step == NULL and not self.steps_by_hand:
            waited = self._waited
            self._open_step(self.next_number, self.last_end or (waited[0][0] if waited else _clock()))
        return True

    def abandon_step(self) -> None:
        """An exception left the step: it stays open in the ring, where a post-mortem finds it."""
        self._forget_phases()
        self.step = NULL

    def _open_step(self, number: int, began: int) -> None:
        recorder, waited = self._recorder, self._waited
        if self.phase:
            self._close_phases(began)
        self._spent_before = self.spent + self.spent_on_collectives + self.spent_on_experts
        self.step = number
        self.next_number = number + 1
        self._gc_before = self.gc_ns
        self.step_t0 = began
        self._attributes = _NO_ATTRIBUTES
        if waited:
            for since, arrived in waited:
                recorder.phase(self._data, since, arrived, number)
            waited.clear()
        pack_three(recorder.words, OPEN_STEP_BYTE, began, number, 0)

    # --- phases ------------------------------------------------------------------------------------------------

    def enter(self, name: int, micro_batch: int = NULL, found: bool = False) -> bool:
        """A phase begins; one that is open is split around it.

        One that was found, not marked by hand, gives way: it does not begin in another thread, inside a phase marked
        by hand, in a wait for data, or inside its like. Returns whether it begins.
        """
        try:
            if found:
                if _this_thread() != self.thread or not self.part.on:
                    return False
                if self._by_hand or self.phase == name or self._waiting_since:
                    return False
                if self.step == NULL and not self.steps_by_hand:
                    waited = self._waited
                    self._open_step(self.next_number, self.last_end or (waited[0][0] if waited else _clock()))
            now = _clock()
            recorder, step = self._recorder, self.step
            if self.phase:
                recorder.phase(self.phase, self._phase_t0, now, step, self._micro_batch)
                self._outer.append(_Outer(self.phase, self._micro_batch, self._by_hand))
            elif step == NULL:
                self._waited.clear()  # what was fetched belongs to this, not to the step that will follow
            self.phase = name
            self._phase_t0 = now
            self._micro_batch = micro_batch
            self._by_hand = not found
            pack_three(recorder.words, OPEN_PHASE_BYTE, now, name, step)
            self.spent += _clock() - now
            return True
        except Exception as error:
            self.part.fail(error)
            return False

    def found(self, name: int) -> bool:
        """A phase found by itself begins, if it may; see `enter`."""
        try:
            if self.phase or self.step == NULL or self._by_hand or self._waiting_since:
                return self.enter(name, NULL, True)
            # As a rule: `enter`, with all that needs no asking left out.
            if _this_thread() != self.thread or not self.part.on:
                return False
            now = self._phase_t0 = _clock()
            self.phase = name
            self._micro_batch = NULL
            pack_three(self._recorder.words, OPEN_PHASE_BYTE, now, name, self.step)
            self.spent += _clock() - now
            return True
        except Exception as error:
            self.part.fail(error)
            return False

    def around(self, original: Callable[..., Any], phase: int) -> Callable[..., Any]:
        """A function that calls the original in this phase, found by itself."""
        found, leave = self.found, self.leave

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not found(phase):
                return original(*args, **kwargs)
            result = original(*args, **kwargs)
            leave()
            return result

        unseen(wrapper, original)
        return wrapper

    def leave(self) -> None:
        """The innermost phase ends and the one around it goes on."""
        try:
            phase = self.phase
            if not phase:
                return  # the step ended first and closed it
            now = _clock()
            # As `Recorder.phase` writes it.
            recorder = self._recorder
            words, sequence = recorder.words, recorder.next
            pack_slot(
                words, recorder.first_byte + ((sequence - 1 & recorder.mask) << 7),
                sequence, PHASE, self._phase_t0, now, self.step, phase, self._micro_batch,
                0, 0, 0, 0, 0, 0, 0, 0, sequence,
            )  # fmt: skip
            recorder.next = sequence + 1
            if self._outer:
                self._go_on_with(self._outer.pop(), now)
            else:
                self.phase = 0
                self._by_hand = False
                words[OPEN_PHASE_WORD] = 0
            self.spent += _clock() - now
        except Exception as error:
            self.part.fail(error)

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
        self._recorder.enter_phase(self.phase, now, self.step)

    def _close_phases(self, now: int) -> None:
        self._recorder.phase(self.phase, self._phase_t0, now, self.step, self._micro_batch)
        self._forget_phases()

    def _forget_phases(self) -> None:
        self._outer.clear()
        self.phase = 0
        self._by_hand = False

    # --- waiting for data --------------------------------------------------------------------------------------

    def begin_wait(self) -> bool:
        """The next batch is asked for; False in another thread, or when this wait is timed already."""
        try:
            if _this_thread() != self.thread or not self.part.on:
                return False
            if self._waiting_since or self.phase == self._data:
                return False
            if self.step != NULL:
                return self.enter(self._data)
            now = self._waiting_since = _clock()
            pack_three(self._recorder.words, OPEN_PHASE_BYTE, now, self._data, self.next_number)
            return True
        except Exception as error:
            self.part.fail(error)
            return False

    def end_wait(self, arrived: bool) -> None:
        """The batch is there, or the loader has ended or failed."""
        try:
            if not self._waiting_since:
                self.leave()
                return
            if arrived:
                self._waited.append((self._waiting_since, _clock()))
            self._waiting_since = 0
            self._recorder.words[OPEN_PHASE_WORD] = 0
        except Exception as error:
            self.part.fail(error)

    def wait_for(self, fetch: Callable[[Any], Any], source: Any) -> Any:
        """``fetch(source)``, with the wait for it recorded as phase data."""
        if not self.begin_wait():
            return fetch(source)
        arrived = False
        try:
            batch = fetch(source)
            arrived = True
            return batch
        finally:
            self.end_wait(arrived)
