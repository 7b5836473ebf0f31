"""What the agent tells the server about a run: the ``about.json`` of its ranks on this host, merged."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens.collectors.spool_state import write_atomically

_OF_RUN = ("name", "world_size", "groups", "experts", "config", "tags", "data_versions")
_OF_RANK = (
    "rank",
    "host",
    "device",
    "vendor",
    "model",
    "local_rank",
    "nic",
    "switch",
    "collectives",
    "pid",
    "uuid",
    "simulated",
)


class RunDescription:
    """The object for POST /api/v1/runs, kept beside the spool so that it can be sent when the ranks are gone.

    Args:
        path: where it is kept.
        run: run id.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._content: dict[str, Any] = {"run": run}
        self.server: str | None = None
        self.version = 1
        """Grows with each change; the shipper sends the description again when it is behind."""
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(path.read_text())
            if isinstance(kept, dict):
                self._content = {**kept, "run": run}

    def merge(self, about: Mapping[str, Any], device: Mapping[str, Any]) -> None:
        """Take over what a rank says of itself and of the run; `device` fills in what the driver knows."""
        with self._lock:
            before = json.dumps(self._content, sort_keys=True)
            if about.get("server"):
                self.server = str(about["server"])
            for key in _OF_RUN:
                if about.get(key) is not None:
                    self._content[key] = about[key]
            if about.get("rank") is not None:
                entry = {key: about[key] for key in _OF_RANK if about.get(key) is not None}
                entry = {**{key: value for key, value in device.items() if value}, **entry}
                others = [rank for rank in self._content.get("ranks", []) if rank.get("rank") != about["rank"]]
                self._content["ranks"] = sorted([*others, entry], key=lambda rank: int(rank["rank"]))
            if json.dumps(self._content, sort_keys=True) == before:
                return
            self.version += 1
            with contextlib.suppress(OSError):
                write_atomically(self._path, self._content)

    def to_json(self) -> tuple[int, bytes]:
        """The version and the body to send."""
        with self._lock:
            return self.version, json.dumps(self._content).encode()
