"""Parts of the hook: each undoes what it patched, and switches itself off when it fails, with one line."""

from __future__ import annotations

import functools
import sys
import weakref
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


class StandIn:
    """Stands in for a method of one instance. It holds the instance, as a method does; nothing else of lens may.

    An object, not a closure: an instance that is pickled or deep-copied takes its own plain method along.
    """

    def __init__(self, owner: Any, attribute: str) -> None:
        original: Callable[..., Any] = getattr(owner, attribute)
        functools.update_wrapper(self, original)
        self.before = vars(owner).get(attribute, _MISSING)
        self._owner = owner
        self._attribute = attribute
        self._original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._original(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, self._attribute)

    def look_again(self) -> None:
        """Stand in for what is there now; only while this is not in place."""
        self.before = vars(self._owner).get(self._attribute, _MISSING)
        self._original = getattr(self._owner, self._attribute)

    def is_gone(self) -> bool:
        """Whether what was there before is back; else somebody has wrapped this, and calls it."""
        return vars(self._owner).get(self._attribute, _MISSING) is self.before

    def put(self) -> Callable[[], None]:
        """Take the method's place; returns what gives it back. That one keeps neither the instance nor us alive."""
        setattr(self._owner, self._attribute, self)
        reference = weakref.ref(self)

        def give_back() -> None:
            found = reference()
            if found is not None:
                _put_back(found._owner, found._attribute, found, found.before)

        return give_back


class Part:
    """One part of the hook. Its wrappers ask `on` first and fall through to the original when it is off.

    A wrapper that somebody kept a reference to, or wrapped again, therefore stays harmless after `switch_off`.
    """

    __slots__ = ("_undo", "gone", "name", "on", "tell")

    def __init__(self, name: str) -> None:
        self.name = name
        self.on = True
        self.gone = False
        """Whether it is off for good."""
        self.tell: Callable[[str], None] | None = None
        """Takes the sentence of `fail`, beside the terminal."""
        self._undo: list[Callable[[], None]] = []

    def patch(self, owner: Any, attribute: str, replacement: Any) -> None:
        """Set an attribute of a module or class until the part is switched off."""
        # From the dictionary, not by getattr: a method of a C class must go back as the descriptor it was.
        before = vars(owner).get(attribute, _MISSING)
        setattr(owner, attribute, replacement)
        self._undo.append(functools.partial(_put_back, owner, attribute, replacement, before))

    def at_end(self, undo: Callable[[], None]) -> None:
        """Call this when the part is switched off."""
        self._undo.append(undo)

    def switch_off(self) -> None:
        """Put everything back as it was, last patch first."""
        self.on = False
        self.gone = True
        self.undo()

    def rest(self) -> None:
        """Record nothing until `wake`."""
        self.on = False

    def wake(self) -> None:
        """Record again, unless it was switched off."""
        self.on = not self.gone

    def undo(self) -> None:
        """Take back what was patched so far; the part stays on."""
        while self._undo:
            self._undo.pop()()

    def fail(self, error: BaseException) -> None:
        """Switch off after an error of our own; training goes on and the other parts too."""
        if self.gone:
            return
        self.on = False
        self.gone = True
        text = f"{self.name} are no longer recorded, training goes on ({type(error).__name__}: {error})"
        warn(text)
        try:
            if self.tell is not None:
                self.tell(text)
            self.switch_off()
        except Exception as second:
            warn(f"a patch could not be undone ({type(second).__name__}: {second})")


def _put_back(owner: Any, attribute: str, replacement: Any, before: Any) -> None:
    if vars(owner).get(attribute, _MISSING) is not replacement:
        return  # somebody wrapped ours: leave theirs alone, ours falls through
    if before is _MISSING:
        delattr(owner, attribute)
    else:
        setattr(owner, attribute, before)
