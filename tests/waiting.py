"""Waiting for what other processes and threads do: for what is asked about, never for a length of time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 90.0
"""Far more than anything here takes on a machine that lets a process stand for seconds: who waits so long has found a
fault."""


def wait_for(condition: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """What the condition gives, once it gives something."""
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {patience_s:g} s: {condition}"
        time.sleep(0.02)
    return found
