"""A window of torch's own profiler over some steps, when somebody asks for one; otherwise nothing of it is there.

It begins and ends where a step does, in the thread that trains. Its trace is written as torch writes it, one file a
rank, so that every tool for such traces reads it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.hooks.guard import Part, warn
from lens.hooks.timeline import Timeline
from lens.recorder import Recorder
from lens.settings import Settings
from lens.slots import NULL

DONE, REFUSED = "profile.window", "profile.refused"
"""Kinds of the events by which a window is told. attrs of the first: path, first, last (steps), seconds (that it took to
begin, to end and to write)."""
_TEARDOWN = "TEARDOWN_CUPTI"


@dataclass
class _Window:
    """A profiler that runs."""

    profiler: Any
    mark: Any
    """The range of the step that is under way, as tools for traces look for it."""
    first: int
    left: int
    put_back: Callable[[], None]
    taken_ns: int
    """What it has cost beside the steps."""


class Profiling:
    """Windows that were asked for, one at a time."""

    def __init__(self, recorder: Recorder, timeline: Timeline, settings: Settings) -> None:
        self.part = Part("profiler windows")
        self.part.at_end(self._stop_at_end)
        self._recorder = recorder
        self._timeline = timeline
        self._folder = settings.data.absolute() / "traces"
        self._asked: tuple[int, int | None] | None = None
        self._window: _Window | None = None

    @property
    def waits(self) -> bool:
        """Whether there is something to do at the end of the next step."""
        return self._asked is not None or self._window is not None

    def ask(self, steps: int, first: int | None = None) -> None:
        """Profile so many steps, from this step on; from the next one on when it is left out."""
        if steps < 1 or self.waits or not self.part.on:
            why = "a window of it waits or runs already" if self.waits else f"{steps} steps were asked for"
            self._refuse(why)
            return
        self._asked = steps, first
        self._timeline.errands = True
        between = self._timeline.step == NULL and self._timeline.here()
        if first is None and between:
            self.after_step(self._timeline.last_step)

    def after_step(self, last: int) -> None:
        """A step has ended: begin, go on or end."""
        try:
            if self._window is not None:
                self._next_step(self._window, last)
            elif self._asked is not None:
                steps, first = self._asked
                following = 0 if last == NULL else last + 1
                if first is None or following == first:
                    self._asked = None
                    self._start(following, steps)
                elif following > first:
                    self._asked = None
                    self._refuse(f"step {first} was over when this rank learned of it")
        except Exception as error:
            self._window = self._asked = None
            self.part.fail(error)

    def _start(self, first: int, steps: int) -> None:
        import torch.profiler

        began = time.monotonic_ns()
        if torch.autograd._profiler_enabled():
            self._refuse("the training runs a profiler of its own, and there can be only one")
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        put_back = _nothing
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
            put_back = _leave_nothing_in_the_driver()
        profiler = torch.profiler.profile(activities=kinds)
        try:
            profiler.start()
        except Exception as error:
            put_back()
            self._refuse(f"torch's profiler does not start ({type(error).__name__}: {error})")
            return
        self._window = _Window(profiler, _mark(first), first, steps, put_back, time.monotonic_ns() - began)
        self._timeline.arrive()  # what that took belongs to no step

    def _next_step(self, window: _Window, last: int) -> None:
        window.left -= 1
        window.mark.__exit__(None, None, None)
        if window.left:
            window.mark = _mark(last + 1)
        else:
            self._stop(window, last)

    def _stop(self, window: _Window, last: int) -> None:
        self._window = None
        began = time.monotonic_ns()
        try:
            window.profiler.stop()
        finally:
            window.put_back()
        path = self._path(window.first, last)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial = path.with_suffix(".part")
            window.profiler.export_chrome_trace(str(partial))
            partial.replace(path)
        except Exception as error:
            self._refuse(f"the trace cannot be written to {path} ({type(error).__name__}: {error})")
            return
        finally:
            # It refers to itself, and would stay, with all its events, until garbage is collected.
            vars(window.profiler).clear()
            self._timeline.arrive()
        seconds = (window.taken_ns + time.monotonic_ns() - began) * 1e-9
        about = {"path": str(path), "first": window.first, "last": last, "seconds": seconds}
        text = f"steps {window.first} to {last} were profiled: {path}"
        self._recorder.event(DONE, text, step=last, attrs=about)
        warn(text)

    def _stop_at_end(self) -> None:
        """The hook leaves in the middle of a window: what there is of it is kept."""
        self._asked = None
        if self._window is None:
            return
        try:
            self._window.mark.__exit__(None, None, None)
            self._stop(self._window, self._timeline.last_step)
        except Exception as error:
            warn(f"the profiler's window is lost ({type(error).__name__}: {error})")

    def _path(self, first: int, last: int) -> Path:
        about = self._recorder.about
        folder = self._folder / str(about.get("run"))
        return folder / f"rank{about.get('rank')}-steps{first}-{last}.json"

    def _refuse(self, why: str) -> None:
        text = f"nothing is profiled: {why}"
        self._recorder.for_thread().event(REFUSED, text, "warning", step=self._timeline.last_step)
        warn(text)


def _mark(step: int) -> Any:
    import torch

    mark = torch.autograd.profiler.record_function(f"ProfilerStep#{step}")
    mark.__enter__()
    return mark


def _leave_nothing_in_the_driver() -> Callable[[], None]:
    """Let the profiler take its callbacks out of the driver when it ends, which it does only where this is set."""
    if _TEARDOWN in os.environ:
        return _nothing
    os.environ[_TEARDOWN] = "1"

    def put_back() -> None:
        os.environ.pop(_TEARDOWN, None)

    return put_back


def _nothing() -> None:
    """Nothing is to be put back."""
