"""What the device's memory held when an allocation failed: written beside the ring, before anybody sees the exception.

torch tells its observers of a failed allocation in the thread that asked for it, also when the training catches the
exception and goes on. Where it has no observers, the exception that ends the process is looked at. The exception is
the training's own in either case: it is neither caught nor changed.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lens.hooks.guard import Part
from lens.hooks.memory import read_statistics
from lens.hooks.timeline import Timeline
from lens.recorder import Recorder
from lens.slots import NULL

_LARGEST = 12
"""Sizes of blocks that are named."""
_MOST_FILES = 8
"""Failed allocations of one process that are kept; a training may catch thousands."""


class OutOfMemory:
    """Writes ``oom-N.json`` of this rank for each allocation that failed."""

    def __init__(self, recorder: Recorder, timeline: Timeline) -> None:
        self.part = Part("out-of-memory snapshots")
        self._recorder = recorder
        self._timeline = timeline
        self._written = 0

    def install(self) -> None:
        """Ask torch to be told. That cannot be taken back, so what is told keeps nothing alive and falls silent."""
        torch: Any = sys.modules.get("torch")
        attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
        if attach is None:
            return
        known = weakref.ref(self)

        def observe(device: int, wanted: int, total: int, free: int) -> None:
            me = known()
            if me is not None:
                me.note({"device": device, "wanted": wanted, "limit": total, "free": free})

        attach(observe)

    def ends_with(self, error: BaseException) -> None:
        """This exception ends the process: note it where torch did not tell of it."""
        torch: Any = sys.modules.get("torch")
        if torch is not None and not self._written and isinstance(error, torch.cuda.OutOfMemoryError):
            self.note({})

    def note(self, told: Mapping[str, Any]) -> None:
        """Write down what the memory holds; never raises.

        Args:
            told: device, wanted, limit, free (bytes), as far as torch told them.
        """
        if not self.part.on or self._written >= _MOST_FILES:
            return
        try:
            timeline = self._timeline
            # The loop that trains is waiting in the allocation that failed, whichever thread asked for it.
            found = {
                **told,
                "rank": self._recorder.about.get("rank"),
                "step": None if timeline.step == NULL else timeline.step,
                "phase": timeline.phase_name() or None,
                **snapshot(told.get("device")),
            }
            self._written += 1
            self._write(f"oom-{self._written}.json", found)
            self._recorder.for_thread().event(
                "memory.oom", sentence(found), "error", step=timeline.step, attrs=found
            )
        except Exception as error:
            self.part.fail(error)

    def _write(self, name: str, found: Mapping[str, Any]) -> None:
        path = self._recorder.path.parent / name
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(found, file)


def snapshot(device: int | None) -> dict[str, Any]:
    """torch's own numbers by metric, the share that is fragmented, and the largest live blocks."""
    torch: Any = sys.modules["torch"]
    held = read_statistics(device)
    allocated, reserved = held.get("torch.memory.allocated"), held.get("torch.memory.reserved")
    return {
        "statistics": held,
        "fragmentation": 1 - allocated / reserved if allocated is not None and reserved else None,
        "largest": largest(torch.cuda.memory_snapshot(), device),
    }


def largest(segments: Iterable[Mapping[str, Any]], device: int | None) -> list[dict[str, Any]]:
    """Live blocks by size, those first that hold the most together: {bytes, count, where}.

    Args:
        segments: as ``torch.cuda.memory_snapshot()`` has them.

    ``where`` is the innermost line of the training's own that made them, known only while torch records its history
    (``torch.cuda.memory._record_memory_history()``).
    """
    found: Counter[tuple[int, str | None]] = Counter()
    for segment in segments:
        if device is None or segment.get("device") in (None, device):
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    found[block.get("requested_size") or block["size"], _line(block.get("frames", ()))] += 1
    heaviest = sorted(found.items(), key=lambda entry: (-entry[0][0] * entry[1], entry[0][0]))
    return [{"bytes": size, "count": count, "where": where} for (size, where), count in heaviest[:_LARGEST]]


def _line(frames: Iterable[Mapping[str, Any]]) -> str | None:
    for frame in frames:
        name = frame["filename"]
        if name.endswith(".py") and f"{os.sep}torch{os.sep}" not in name:
            return f"{name}:{frame['line']}"
    return None


def sentence(found: Mapping[str, Any]) -> str:
    """What happened, in one line."""
    where = f"in {found['phase']} of step {found['step']}" if found["phase"] else f"at step {found['step']}"
    parts = [f"out of device memory {where}"]
    if found.get("wanted") is not None:
        parts.append(f"{_size(found['wanted'])} wanted, {_size(found['free'])} free of {_size(found['limit'])}")
    held = found["statistics"]
    if "torch.memory.allocated" in held and "torch.memory.reserved" in held:
        live, taken = held["torch.memory.allocated"], held["torch.memory.reserved"]
        parts.append(f"{_size(live)} in live tensors of {_size(taken)} that torch has taken")
    if found["largest"]:
        most = found["largest"][0]
        parts.append(f"most in {most['count']} blocks of {_size(most['bytes'])}")
    return "; ".join(parts)


def _size(count: float) -> str:
    return f"{count / 1024**3:.2f} GiB" if count >= 1024**3 else f"{count / 1024**2:.1f} MiB"
