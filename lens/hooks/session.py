"""One watched process: its ring, the parts of the hook, and what is done once a step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lens.hooks import automatic, native, process
from lens.hooks.budget import Budget, Thinned
from lens.hooks.collectives import Collectives
from lens.hooks.experts import Experts
from lens.hooks.frameworks.places import Places
from lens.hooks.groups import Kinds
from lens.hooks.guard import Part
from lens.hooks.learning import Learning
from lens.hooks.marked import Phase
from lens.hooks.memory import Memory
from lens.hooks.observer import Observer
from lens.hooks.oom import OutOfMemory
from lens.hooks.profiling import Profiling
from lens.hooks.roots import RootSearch, watch_every_optimizer
from lens.hooks.timeline import timeline_of
from lens.hooks.values import Values
from lens.hooks.work import WorkDone
from lens.recorder import Recorder
from lens.settings import Settings
from lens.slots import COLUMN_SEPARATOR

if TYPE_CHECKING:
    from lens.hooks.requests import Requests

COUNTERS = ("process.gc.time", "lens.overhead.ratio")
_COUNTERS_NS = 1_000_000_000
"""Time between two records of this process's own counters."""


class Session:
    """From `watch` to `detach`, or to the end of the process.

    Args:
        leave: called at the end of a step when somebody asks the hook to leave.

    Raises:
        RecorderError: there is no room or no right to record here.
    """

    def __init__(
        self, settings: Settings, about: Mapping[str, Any], kinds: Kinds, leave: Callable[[], None]
    ) -> None:
        self.recorder = Recorder.create(settings, about)
        self.timeline = timeline_of(self.recorder, settings.native)
        self._leave = leave
        self.new_step = self.timeline.steps_end_with(self._end_marked_step)
        self.values = Values(self.recorder, self.timeline)
        self.collectives = Collectives(self.recorder, self.timeline, kinds)
        self.observer = Observer(self.recorder, self.timeline, kinds)
        self.experts = Experts(self.timeline, self.values, settings.compiled_experts)
        self.memory = Memory(self.recorder)
        self.profiling = Profiling(self.recorder, self.timeline, settings)
        self.out_of_memory = OutOfMemory(self.recorder, self.timeline)
        self.work = WorkDone(self.recorder, self.timeline)
        self.places = Places(self.timeline, self.values)
        self.learning = Learning(self.recorder, self.timeline, self.values)
        self._requests: Requests | None = None
        self.trains = False
        """Whether an optimizer is watched, or any that comes."""
        self.unprepared = False
        """Whether the training has no line of lens in it so far."""
        self.phases: dict[tuple[str, int | None], Phase] = {}
        self.clean = True
        self._native = settings.native
        self._awaits_native = False
        """Whether the native observer takes over once it is built."""
        self._watched: list[Callable[[], Any]] = []
        """Models and optimizers known already: references that keep none of them alive."""
        self._process_watched = False
        self._roots: RootSearch | None = None
        self._counters = [self.recorder.intern(COLUMN_SEPARATOR.join(COUNTERS[:n])) for n in (1, 2)]
        self._before = (0, 0)
        """When the counters were recorded last, and what the hook had taken until then, ns."""
        self.parts: list[Part] = [
            process.watch_collector(self.timeline),
            process.watch_errors(self.recorder, self.timeline, self._ends_in_error),
            self.values.part,
            self.timeline.part,
            self.collectives.part,
            self.observer.part,
            self.experts.part,
            self.memory.part,
            self.profiling.part,
            self.out_of_memory.part,
            self.work.part,
            self.places.part,
            self.learning.part,
        ]
        for part in self.parts:
            part.tell = self._tell_of_failure
        self._limit = settings.max_overhead_pct
        self.budget = Budget(
            (
                Thinned(self.experts.part, self._spent_on_experts, _nothing),
                Thinned(self.collectives.part, self._spent_on_collectives, self.collectives.catch_up),
            ),
            self._tell_of_budget,
        )

    def install(self) -> None:
        """Patch what is the same for every model."""
        torch = sys.modules.get("torch")
        if torch is None:
            return
        self.out_of_memory.install()
        if not torch.distributed.is_available():
            return
        # One of the two sees a collective, never both.
        sees_all = self._native and self.observer.install()
        if not sees_all:
            self.collectives.install()
            self._awaits_native = self._native
        lacks = self._native and not (sees_all and native.complete())
        self.recorder.describe(
            collectives="native" if sees_all else "python", lacks_native=sys.executable if lacks else None
        )

    def know_groups(self, kinds: Kinds) -> None:
        """The person has said which groups are of which kind."""
        self.collectives.kinds = kinds
        self.observer.know(kinds)

    def watch(self, model: Any, optimizer: Any) -> None:
        """Find the phases of this model and optimizer; each is taken once, however often it is given."""
        new = [thing for thing in (model, optimizer) if thing is not None and not self._knows(thing)]
        if new:
            self._watch_process()
            self._watched = [known for known in self._watched if known() is not None] + [*map(_reference, new)]
        if any(thing is model for thing in new):
            root = automatic.watch_model(model, self.timeline)
            self.experts.watch(model)
            self.work.watch(model, root)
            if callable(getattr(model, "generate", None)):
                from lens.hooks.inference import watch_generate

                watch_generate(model, self.requests())
        if any(thing is optimizer for thing in new):
            self.trains = True
            automatic.watch_optimizer(optimizer, self.timeline, self._after_optimizer, self.learning)

    def requests(self) -> Requests:
        """What records requests: made when a model that generates is watched, or a request is told by hand."""
        if self._requests is None:
            from lens.hooks.requests import Requests

            self._requests = Requests(self.recorder, self.timeline, self.values, self.experts, lambda: self.trains)
            self._requests.part.tell = self._tell_of_failure
            self.parts.append(self._requests.part)
        return self._requests

    def watch_unprepared(self) -> None:
        """Find models and optimizers by themselves."""
        self.unprepared = self.trains = True
        self._watch_process()
        watch_every_optimizer(self.timeline, self._after_optimizer)
        self._search_roots()

    def _search_roots(self) -> None:
        self._roots = RootSearch(self.timeline, lambda module: self.watch(module, None))
        self.parts.append(self._roots.part)
        self._roots.begin()
        self.timeline.errands = True

    def watch_running(self) -> None:
        """Find models and optimizers by themselves, from the end of the step that is under way on."""
        self.unprepared = self.trains = True
        self.timeline.part.on = False

        def arrive() -> None:
            self.timeline.part.on = True
            self.timeline.arrive()
            self._watch_process()
            self._search_roots()

        watch_every_optimizer(self.timeline, self._after_optimizer, arrive)

    def end_step(self) -> bool:
        """The step is over, and there is more to do than `Timeline.end_alone` does.

        Returns whether somebody asks the hook to leave.
        """
        if self.experts.counted or self.experts.in_graphs:
            self.experts.before_step_ends()
        if self.observer.records:
            self.observer.before_step_ends()
        return self._after_step(self.timeline.end_step())

    def close(self) -> None:
        """Put everything back and close the ring."""
        if self.values.part.on:
            self.values.later.use_all()
        self.observer.clean = self.clean
        for part in reversed(self.parts):
            part.switch_off()
        self.recorder.close(self.clean)

    def forget(self) -> None:
        """In a forked child: nothing is recorded any more; what was patched falls through."""
        for part in self.parts:
            part.on = False
            part.gone = True

    def _watch_process(self) -> None:
        if self._process_watched:
            return
        self._process_watched = True
        automatic.watch_backward(self.timeline, self.learning.reading)
        self.learning.install()
        automatic.watch_loaders(self.timeline)
        self.places.install()

    def _knows(self, thing: Any) -> bool:
        return any(known() is thing for known in self._watched)

    def _end_marked_step(self) -> None:
        try:
            if self.end_step():
                self._leave()
        except Exception as error:
            self.timeline.part.fail(error)

    def _after_optimizer(self, optimizer: Any) -> None:
        if self.learning.held:
            self.learning.record(optimizer)
        if self.timeline.steps_by_hand:
            return
        if not self.timeline.end_alone() and self.end_step():
            # The optimizer is going through its hooks now: taking ours away would end that with an exception.
            self.forget()
            automatic.at_next_backward(self._leave)

    def _after_step(self, now: int) -> bool:
        if self.values.later.copies and self.values.part.on:
            self.values.use_what_arrived()
        if self._roots is not None and self._roots.after_step():
            self._roots = None
            self._update_rank()
        timeline = self.timeline
        if self.work.measured:
            self.work.after_step(now)
        if now >= timeline.look_at:
            timeline.look_at = now + _COUNTERS_NS
            self._count(now)
            if self._awaits_native and native.built("observer"):
                self._go_native()
            self._profile_if_asked()
        if self.profiling.waits:
            self.profiling.after_step(timeline.last_step)
        if self.budget.thins:
            self.budget.choose(timeline.last_step + 1)
        timeline.errands = bool(
            self.experts.counted
            or self.experts.in_graphs
            or self.values.later.copies
            or self._roots
            or self.budget.thins
            or self.profiling.waits
            or (self.observer.records and not self.observer.tells)
        )
        return self.recorder.detach_asked()

    def _count(self, now: int) -> None:
        """Record this process's own counters, and look at what the hook costs."""
        timeline = self.timeline
        self.memory.read(now, timeline.last_step)
        before, taken_before = self._before
        taken = timeline.all_spent()
        self._before = now, taken
        known = [timeline.gc_ns / 1e9]
        if before:
            known.append((taken - taken_before) / (now - before))
        self.recorder.row(self._counters[len(known) - 1], known, now)
        percent = self.recorder.control().backoff_pct or self._limit
        self.budget.look(percent / 100, now, timeline.steps, taken)
        self.work.arm()

    def _profile_if_asked(self) -> None:
        control = self.recorder.control()
        if control.profile_steps:
            self.recorder.answer("profile_steps")
            self.profiling.ask(control.profile_steps, control.profile_step)

    def _go_native(self) -> None:
        """The library has been built since: let it see what Python cannot, from here on."""
        numbering = self.collectives.hand_over()
        if numbering is None:
            return  # perhaps at another step
        self._awaits_native = False
        if self.observer.install():
            self.collectives.part.switch_off()
            self.observer.go_on(numbering)
            self.recorder.describe(collectives="native", lacks_native=None)
            change = {"key": "collectives", "old": "python", "new": "native"}
            text = "collectives of every caller are seen from here on"
            self.recorder.event("run.config", text, step=self.timeline.last_step, attrs=change)
        else:
            self.collectives.install()

    def _spent_on_experts(self) -> int:
        return self.timeline.spent_on_experts

    def _spent_on_collectives(self) -> int:
        """Nothing where it could not be saved: in C++, or where a group that has no number would lose count."""
        can_rest = not self.observer.records and self.collectives.can_rest()
        return self.timeline.spent_on_collectives if can_rest else 0

    def _tell_of_budget(self, text: str) -> None:
        self.recorder.event("lens.backoff", text, step=self.timeline.last_step)

    def _tell_of_failure(self, text: str) -> None:
        self.recorder.for_thread().event("lens.part_failed", text, "warning", step=self.timeline.step)

    def _update_rank(self) -> None:
        """The process group may have been made after the optimizer."""
        distributed = process.initialised_distributed()
        if distributed is None:
            return
        known = {"rank": distributed.get_rank(), "world_size": distributed.get_world_size()}
        if any(self.recorder.about.get(key) != value for key, value in known.items()):
            self.recorder.describe(**known)

    def _ends_in_error(self, error: BaseException) -> None:
        self.clean = False
        self.out_of_memory.ends_with(error)


def _reference(thing: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(thing)
    except TypeError:  # a class of the training's own that allows none
        return lambda: thing


def _nothing() -> None:
    """Nothing is to be done."""
