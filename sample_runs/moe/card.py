"""The simulated card beneath a rank: what it is told to suffer, and how fast it says it runs.

Both ways are files in the folder of the simulation: the agent that simulates the card reads the one and writes the
other. Where no card is simulated nothing is written and the speed is full.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

STALE_S = 10.0
"""Age after which a state is that of a card which nobody simulates any more."""


class Card:
    """One card by its name, such as ``host1/gpu0``; None is a rank without one."""

    def __init__(self, name: str | None, folder: Path) -> None:
        self._place = folder / name.replace("/", "_") if name else None
        self._faults: dict[str, Any] = {}

    @classmethod
    def of_this_rank(cls) -> Card:
        """The card that this process plays to run on."""
        rings = os.environ.get("LENS_RINGS") or f"/dev/shm/lens-{os.getuid()}"
        return cls(os.environ.get("LENS_DEVICE"), Path(rings) / "sim")

    def suffer(self, **faults: Any) -> None:
        """Let something be wrong with the card, such as ``hot=True``, from its next look on."""
        self._faults |= faults
        self._tell(self._faults)

    def recover(self) -> None:
        """Let nothing be wrong with the card any more, if something was."""
        if self._faults:
            self._faults = {}
            self._tell({})

    def speed(self) -> float:
        """Share of its full speed at which the card runs by its own account; 1 when it says nothing."""
        if self._place is None:
            return 1.0
        state = self._place.with_name(f"{self._place.name}.state.json")
        try:
            if time.time() - state.stat().st_mtime > STALE_S:
                return 1.0
            return float(json.loads(state.read_text())["speed_factor"])
        except (OSError, ValueError, KeyError):
            return 1.0

    def _tell(self, faults: dict[str, Any]) -> None:
        if self._place is None:
            return
        self._place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = self._place.with_name(f"{self._place.name}.fault.json")
        partial = target.with_suffix(".new")
        partial.write_text(json.dumps(faults))
        partial.replace(target)
