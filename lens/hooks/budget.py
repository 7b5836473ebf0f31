"""The hook's share of the training's time: measured all the time, reported, and kept within its budget.

What can be left out of a step without losing its meaning is then recorded in one step of 2, 4, 8 …: first the tokens
of experts, then collectives. Steps are chosen by their number, so that ranks that leave out differently still have
steps in common. Steps, phases and what the training hands over are always recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lens.hooks.guard import Part

_LONGEST = 64
"""Of so many steps, one is always recorded."""
_ENOUGH = 2
"""Steps of each part that must have been recorded before it is judged."""
_PATIENCE = 2
"""Times in a row that the share must be too large before something is left out."""
_CAUTION = 10
"""Times in a row that there must be room for more before it comes back."""


class Thinned(NamedTuple):
    """A part that can be left out of steps."""

    part: Part
    spent: Callable[[], int]
    """Nanoseconds it has taken since the process was watched."""
    woken: Callable[[], None]
    """Called before the first step after some that were left out."""


class _Look(NamedTuple):
    """How it stood at one moment."""

    now: int
    steps: int
    spent: int
    parts: list[int]


class Budget:
    """Looks at the hook's share from time to time, and says which steps record what.

    Args:
        parts: what can be left out, the most dispensable first.
        tell: takes a sentence about what is left out from now on.
    """

    def __init__(self, parts: Sequence[Thinned], tell: Callable[[str], None]) -> None:
        self.periods = [1] * len(parts)
        """Each part is recorded in one step of so many."""
        self.thins = False
        """Whether any is left out at all: else nothing need be asked of `choose`."""
        self._parts = parts
        self._tell = tell
        self._before: _Look | None = None
        self._over = self._under = 0

    def look(self, limit: float, now: int, steps: int, spent: int) -> None:
        """Compare with the last look.

        Args:
            limit: share of the time that the hook may take, 0..1.
            now: the time, ns.
            steps: steps that have ended so far.
            spent: time that the whole hook has taken so far, ns.
        """
        look = _Look(now, steps, spent, [thinned.spent() for thinned in self._parts])
        before = self._before
        if before is None:
            self._before = look
            return
        elapsed = now - before.now
        if elapsed <= 0 or steps - before.steps < _ENOUGH * max(self.periods):
            return
        self._before = look
        whole = spent - before.spent
        parts = [after - earlier for after, earlier in zip(look.parts, before.parts, strict=True)]
        wanted = periods_within(limit * elapsed, whole - sum(parts), parts, self.periods)
        less = any(new > old for new, old in zip(wanted, self.periods, strict=True))
        more = not less and wanted != self.periods
        self._over = self._over + 1 if less else 0
        self._under = self._under + 1 if more else 0
        if self._over >= _PATIENCE or self._under >= _CAUTION:
            self._over = self._under = 0
            took, may = 100 * whole / elapsed, 100 * limit
            self._change_to(wanted, f"the hook took {took:.2f} % of the time and may take {may:g} %")

    def choose(self, step: int) -> None:
        """Let each part record the step that comes now, or leave it out."""
        for thinned, period in zip(self._parts, self.periods, strict=True):
            records = step % period == 0
            if records and not thinned.part.on:
                thinned.part.wake()
                thinned.woken()
            elif not records:
                thinned.part.rest()

    def _change_to(self, periods: list[int], because: str) -> None:
        for thinned, before, after in zip(self._parts, self.periods, periods, strict=True):
            if before != after and not thinned.part.gone:
                how_often = "every step" if after == 1 else f"one step of {after}"
                self._tell(f"{thinned.part.name}: recorded in {how_often} from now on, since {because}")
        self.periods = periods
        self.thins = max(periods) > 1
        if not self.thins:
            self.choose(0)


def periods_within(allowed: float, fixed: float, parts: Sequence[float], periods: Sequence[int]) -> list[int]:
    """How often each part can be recorded, the first giving way first.

    Args:
        allowed: time that all may take.
        fixed: time that cannot be saved.
        parts: time that each part took, being recorded in one step of its period.
    """
    whole = [spent * period for spent, period in zip(parts, periods, strict=True)]
    found = [1] * len(whole)

    def needed() -> float:
        return fixed + sum(spent / period for spent, period in zip(whole, found, strict=True))

    for place, spent in enumerate(whole):
        while spent and needed() > allowed and found[place] < _LONGEST:
            found[place] *= 2
    return found
