"""Beginning to record a training that is under way, asked for from outside; see ``lens attach``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from lens.hooks import api
from lens.hooks.automatic import at_next_backward
from lens.settings import Settings


class Say(Protocol):
    """Takes what came of it so far: waiting, watching, already or failed, and a sentence."""

    def __call__(self, state: str, text: str, **more: Any) -> None: ...


def begin(values: Mapping[str, Any], attacher: str, say: Say) -> None:
    """Let the hooks begin at the next backward pass, in the thread that trains. Never raises.

    Args:
        values: the settings they shall have.
        attacher: who asks, for the line on standard error.
        say: told at once, and again from the thread that trains.
    """
    try:
        if sys.modules.get("torch") is None:
            say("failed", "torch is not loaded in it")
        elif api.enabled():
            say("already", "it is watched already")
        else:
            settings = Settings.load(**values)
            say("waiting", "it has not begun a backward pass since")
            at_next_backward(lambda: _watch(settings, attacher, say))
    except BaseException as error:
        say("failed", f"{type(error).__name__}: {error}")


def _watch(settings: Settings, attacher: str, say: Say) -> None:
    try:
        api.watch_running(settings)
        found = api.recording()
        if found is None:
            say("failed", "it cannot record here; its standard error says why")
            return
        say("watching", "", ring=str(found["ring"]), rank=found["rank"], run=found["run"])
        if sys.stderr is not None:
            print(f"lens: attached by {attacher}; lens detach {os.getpid()} ends it", file=sys.stderr, flush=True)
    except BaseException as error:
        say("failed", f"{type(error).__name__}: {error}")
