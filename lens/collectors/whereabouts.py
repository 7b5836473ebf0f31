"""Where a rank stands in its code, once it has been in the same place for a while: what a verdict on a hang points at.

The stack is read from the process's memory, from outside: nothing runs in it and it is never stopped for it. Where that
is not allowed (another user's process, Yama) or not known how, there is no stack, and the heartbeat says nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STILL_NS = 3_000_000_000
"""A place that is left sooner is not looked at …"""
AGAIN_NS = 5_000_000_000
"""… and one that is not left only so often."""
MOST_FRAMES = 32
"""The innermost are kept: who calls the training loop does not matter."""


class Whereabouts:
    """The place of one process.

    Args:
        pid: the process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._place: int | None = None
        self._looked_ns = 0
        self._stack: Sequence[dict[str, Any]] | None = None

    def stack(self, since_ns: int | None, now_ns: int) -> Sequence[dict[str, Any]] | None:
        """Frames of its main thread, innermost last, each with file, line and name; None while it moves on.

        Args:
            since_ns: when what it is in began, CLOCK_MONOTONIC; None where it is in nothing that is recorded.
            now_ns: the time on that clock.
        """
        if since_ns is None or now_ns - since_ns < STILL_NS:
            return None
        if since_ns != self._place or now_ns - self._looked_ns >= AGAIN_NS:
            self._place, self._looked_ns = since_ns, now_ns
            self._stack = read_stack(self._pid)
        return self._stack


def read_stack(pid: int) -> Sequence[dict[str, Any]] | None:
    """Frames of a process's main thread, innermost last; None where they cannot be read without touching it."""
    # Only here: an agent starts beside the training, and most never see a rank stand still.
    from lens.attach import frames, preflight
    from lens.attach.facts import look

    facts = look(pid)
    if facts.version is None or facts.forbidden or preflight.judge(facts, preflight.READING_RULES) is not None:
        return None
    try:
        found = frames.read(pid, facts.version, stop=False)
    except frames.UnreadableError:
        return None
    main = found[0].frames[:MOST_FRAMES] if found[0].main else ()
    return [{"file": one.file, "line": one.line, "name": one.name} for one in reversed(main)] or None
