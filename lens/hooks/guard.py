"""Parts of the hook: each undoes what it patched, and switches itself off when it fails, with one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

_MISSING = object()


def warn(text: str) -> None:
    """One line for the person at the terminal; never raises."""
    try:
        sys.stderr.write(f"lens: {text}\n")
    except Exception:
        # A closed or replaced stderr must not reach the training code.
        return


class Part:
    """One part of the hook. Its wrappers ask `on` first and fall through to the original when it is off.

    A wrapper that somebody kept a reference to, or wrapped again, therefore stays harmless after `switch_off`.
    """

    __slots__ = ("_undo", "name", "on")

    def __init__(self, name: str) -> None:
        self.name = name
        self.on = True
        self._undo: list[Callable[[], None]] = []

    def patch(self, owner: Any, attribute: str, replacement: Any) -> None:
        """Set an attribute of a module, class or instance until the part is switched off."""
        # From the dictionary, not by getattr: a method of a C class must go back as the descriptor it was.
        before = vars(owner).get(attribute, _MISSING)
        setattr(owner, attribute, replacement)

        def restore() -> None:
            if vars(owner).get(attribute, _MISSING) is not replacement:
                return  # somebody wrapped ours: leave theirs alone, ours falls through
            if before is _MISSING:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, before)

        self._undo.append(restore)

    def at_end(self, undo: Callable[[], None]) -> None:
        """Call this when the part is switched off."""
        self._undo.append(undo)

    def switch_off(self) -> None:
        """Put everything back as it was, last patch first."""
        self.on = False
        self.undo()

    def undo(self) -> None:
        """Take back what was patched so far; the part stays on."""
        while self._undo:
            self._undo.pop()()

    def fail(self, error: BaseException) -> None:
        """Switch off after an error of our own; training goes on and the other parts too."""
        if not self.on:
            return
        self.on = False
        warn(f"{self.name} are no longer recorded, training goes on ({type(error).__name__}: {error})")
        try:
            self.switch_off()
        except Exception as second:
            warn(f"a patch could not be undone ({type(second).__name__}: {second})")
