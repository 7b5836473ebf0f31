"""One watched process: its ring, the parts of the hook, and what is done once a step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lens.hooks import automatic, process
from lens.hooks.collectives import Collectives
from lens.hooks.groups import Kinds
from lens.hooks.guard import Part
from lens.hooks.timeline import Phase, Timeline
from lens.hooks.values import Values
from lens.recorder import Recorder
from lens.settings import Settings

_COUNTERS_NS = 1_000_000_000
"""Time between two records of this process's own counters."""


class Session:
    """From `watch` to `detach`, or to the end of the process.

    Raises:
        RecorderError: there is no room or no right to record here.
    """

    def __init__(self, settings: Settings, about: Mapping[str, Any], kinds: Kinds) -> None:
        self.recorder = Recorder.create(settings, about)
        self.timeline = Timeline(self.recorder)
        self.values = Values(self.recorder, self.timeline)
        self.collectives = Collectives(self.recorder, self.timeline, kinds)
        self.phases: dict[tuple[str, int | None], Phase] = {}
        self.clean = True
        self._watched: list[Any] = []
        self._counters_at = 0
        self._gc_column = self.recorder.intern("process.gc.time")
        self.parts: list[Part] = [
            process.watch_collector(self.timeline),
            process.watch_errors(self.recorder, self.timeline, self._ends_in_error),
            self.values.part,
            self.timeline.part,
            self.collectives.part,
        ]

    def install(self) -> None:
        """Patch what is the same for every model."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_available():
            self.collectives.install()

    def watch(self, model: Any, optimizer: Any) -> None:
        """Find the phases of this model and optimizer; each is taken once, however often it is given."""
        new = [thing for thing in (model, optimizer) if thing is not None and not self._knows(thing)]
        if new and not self._watched:
            automatic.watch_backward(self.timeline)
            automatic.watch_loaders(self.timeline)
        self._watched += new
        if any(thing is model for thing in new):
            automatic.watch_model(model, self.timeline)
        if any(thing is optimizer for thing in new):
            automatic.watch_optimizer(optimizer, self.timeline, self._after_optimizer)

    def end_step(self) -> bool:
        """The step is over; returns whether somebody asks the hook to leave."""
        now = self.timeline.end_step()
        return self._after_step(now)

    def close(self) -> None:
        """Put everything back and close the ring."""
        if self.values.part.on:
            self.values.later.use_all()
        for part in reversed(self.parts):
            part.switch_off()
        self.recorder.close(self.clean)

    def forget(self) -> None:
        """In a forked child: nothing is recorded any more; what was patched falls through."""
        for part in self.parts:
            part.on = False

    def _knows(self, thing: Any) -> bool:
        return any(known is thing for known in self._watched)

    def _after_optimizer(self) -> None:
        from lens.hooks import api

        if self.timeline.end_automatic_step() and self._after_step(self.timeline.last_end):
            api.detach()

    def _after_step(self, now: int) -> bool:
        if self.values.part.on:
            self.values.use_what_arrived()
        if now - self._counters_at >= _COUNTERS_NS:
            self._counters_at = now
            self.recorder.row(self._gc_column, (self.timeline.gc_ns / 1e9,), now)
        return self.recorder.detach_asked()

    def _ends_in_error(self) -> None:
        self.clean = False
