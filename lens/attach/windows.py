"""Windows of torch's profiler over the same steps of all ranks, asked for by the control pages of their rings."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.hooks.profiling import DONE, REFUSED
from lens.ring_reader import RingReader, write_control
from lens.slots import EVENT, STEP, iter_records

LOOKED_AT_S = 1.0
"""The hook looks at what is asked of it at the first step that ends so long after the last look."""
_HEADWAY_STEPS = 3
_LOOK_AGAIN_S = 0.02


@dataclass(frozen=True)
class Traced:
    """What came of a window in one process. path: its trace; None where there is none, then text says why."""

    pid: int
    rank: int | None
    path: Path | None
    text: str
    first: int | None = None
    last: int | None = None
    seconds: float | None = None


class Rank:
    """One process that is watched, from now on."""

    def __init__(self, pid: int, ring: Path) -> None:
        self.pid = pid
        self._reader = RingReader(ring)
        self.rank: int | None = self._reader.about.get("rank")
        self._step_ns: list[int] = []
        self.traced: Traced | None = None
        self._take(tell=False)

    def step(self) -> int | None:
        """The step entered last."""
        return self._reader.last_step()

    def step_s(self) -> float | None:
        """The longest of its newest steps; None before the first has ended."""
        return max(self._step_ns[-10:]) * 1e-9 if self._step_ns else None

    def ask(self, first: int, steps: int) -> None:
        """Ask for a window."""
        self._take(tell=False)
        write_control(self._reader.path, profile_step=first, profile_steps=steps)

    def look(self) -> None:
        """Read what it has recorded since."""
        self._take(tell=True)
        if self.traced is None and self._reader.closed:
            self.traced = Traced(self.pid, self.rank, None, "it has ended, or lens has left it")

    def _take(self, *, tell: bool) -> None:
        while (part := self._reader.poll()) is not None:
            for record in iter_records(part):
                if record["type"] == STEP and record["t1"] is not None:
                    self._step_ns.append(record["t1"] - record["t0"])
                elif tell and record["type"] == EVENT and record["kind"] in (DONE, REFUSED):
                    self.traced = self._told(record["text"], record["attrs"])

    def _told(self, text: str, about: Mapping[str, Any]) -> Traced:
        path = about.get("path")
        known = (about.get(name) for name in ("first", "last", "seconds"))
        return Traced(self.pid, self.rank, Path(path) if path else None, text, *known)


def first_step(steps: Sequence[int], step_s: float) -> int:
    """A step that no rank has reached when the last of them learns of it.

    Args:
        steps: the step that each rank is in.
        step_s: what the slowest of them takes for one.
    """
    return max(steps) + _HEADWAY_STEPS + math.ceil(2 * LOOKED_AT_S / max(step_s, 1e-4))


def profile(ranks: Sequence[Rank], steps: int, patience_s: float) -> list[Traced]:
    """Profile the same steps of these ranks, and wait for their traces so long once those steps should be over."""
    end = time.monotonic() + patience_s
    while any(rank.step() is None or rank.step_s() is None for rank in ranks) and time.monotonic() < end:
        time.sleep(_LOOK_AGAIN_S)
        _look(ranks)
    known = [(rank.step(), rank.step_s()) for rank in ranks]
    standing = [step for step, _ in known if step is not None]
    lasting = [seconds for _, seconds in known if seconds is not None]
    if len(standing) < len(ranks) or len(lasting) < len(ranks):
        return [rank.traced or Traced(rank.pid, rank.rank, None, _NO_STEP) for rank in ranks]
    first = first_step(standing, min(lasting))
    for rank in ranks:
        rank.ask(first, steps)
    end = time.monotonic() + (first - min(standing) + steps) * max(lasting) + patience_s
    while any(rank.traced is None for rank in ranks) and time.monotonic() < end:
        time.sleep(_LOOK_AGAIN_S)
        _look(ranks)
    late = f"it has not come to the end of step {first + steps - 1} yet; the trace follows when it does"
    return [rank.traced or Traced(rank.pid, rank.rank, None, late) for rank in ranks]


_NO_STEP = "none of its steps has ended yet, so that none can be named that is to come"


def _look(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        rank.look()
