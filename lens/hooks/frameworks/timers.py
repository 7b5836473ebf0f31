"""Megatron-LM's own timers as phases: what it calls forward-compute, optimizer, save-checkpoint.

Its pipeline schedules run backward past ``torch.autograd.backward``, so that only its timers tell of it. Which of them
run is Megatron's ``timing_log_level``; of those that do not, phases are found as elsewhere.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from lens.hooks.frameworks.marks import Marks
from lens.hooks.guard import Part

PHASES: Mapping[str, str] = {
    "batch-generator": "data",
    "forward-compute": "forward",
    "backward-compute": "backward",
    "optimizer": "optimizer",
    "save-checkpoint": "checkpoint",
    "save-checkpoint-non-persistent": "checkpoint",
    "eval-time": "eval",
}
"""Timer -> phase."""


def watch_timers(part: Part, marks: Marks) -> None:
    """Mark a phase from ``start`` to ``stop`` of each timer that is one."""
    timer = getattr(sys.modules.get("megatron.core.timers"), "Timer", None)
    if timer is None:
        return
    running: list[int] = []

    def start(self: Any) -> None:
        phase = PHASES.get(self.name)
        if phase is not None and marks.begin(phase):
            running.append(id(self))

    def stop(self: Any) -> None:
        if running and running[-1] == id(self):
            running.pop()
            marks.end()

    # Each waits for the device before it takes the time: the wait is part of a phase where it ends one.
    part.patch(timer, "start", _after(part, timer.start, start))
    part.patch(timer, "stop", _after(part, timer.stop, stop))


def _after(part: Part, original: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if part.on:
            try:
                note(self)
            except Exception as error:
                part.fail(error)
        return result

    return wrapper
