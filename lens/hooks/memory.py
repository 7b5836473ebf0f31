"""What torch's allocator says of its device memory. Read on the host: the device is never waited for."""

from __future__ import annotations

import sys
from typing import Any

from lens.hooks.guard import Part
from lens.recorder import Recorder
from lens.slots import COLUMN_SEPARATOR

STATISTICS: dict[str, tuple[str, ...]] = {
    "torch.memory.allocated": ("allocated_bytes", "all", "current"),
    "torch.memory.reserved": ("reserved_bytes", "all", "current"),
    "torch.memory.active": ("active_bytes", "all", "current"),
    "torch.memory.inactive_split": ("inactive_split_bytes", "all", "current"),
    "torch.memory.allocated_peak": ("allocated_bytes", "all", "peak"),
    "torch.memory.alloc_retries": ("num_alloc_retries",),
    "torch.memory.ooms": ("num_ooms",),
}
"""Metric, and where ``torch.cuda.memory_stats_as_nested_dict`` has it."""


class Memory:
    """The allocator of the device in use, CUDA or ROCm; says nothing where there is none."""

    def __init__(self, recorder: Recorder) -> None:
        self.part = Part("memory statistics")
        self._recorder = recorder

    def read(self, now: int, step: int) -> None:
        """Record the statistics that this torch has."""
        torch: Any = sys.modules.get("torch")
        if torch is None or not self.part.on:
            return
        try:
            if torch.cuda.is_initialized():
                self._record(read_statistics(), now, step)
        except Exception as error:
            self.part.fail(error)

    def _record(self, known: dict[str, float], now: int, step: int) -> None:
        if known:
            columns = self._recorder.intern(COLUMN_SEPARATOR.join(known))
            self._recorder.row(columns, tuple(known.values()), now, step)


class StageMemory:
    """Most device memory allocated while one stage of a request runs.

    The device's own peak is not reset, since whoever trains or serves may be reading it: the peak of a stage is known
    where it is more than ever before, else it is absent.
    """

    __slots__ = ("_before", "peak")

    def __init__(self, on_device: bool) -> None:
        self._before = _peak() if on_device else None
        self.peak: float | None = None
        """Bytes."""

    def end(self) -> None:
        """The stage is over; said once, what comes later does not count."""
        before, self._before = self._before, None
        now = _peak() if before is not None else None
        if before is not None and now is not None and now > before:
            self.peak = now


def _peak() -> float | None:
    return read_statistics().get("torch.memory.allocated_peak")


def read_statistics(device: int | None = None) -> dict[str, float]:
    """Those of the statistics that this torch has, of one device or of the one in use."""
    torch: Any = sys.modules["torch"]
    of = () if device is None else (device,)
    held = torch.cuda.memory_stats_as_nested_dict(*of)
    found = {metric: _at(held, path) for metric, path in STATISTICS.items()}
    return {metric: float(value) for metric, value in found.items() if value is not None}


def _at(statistics: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(statistics, dict) or key not in statistics:
            return None
        statistics = statistics[key]
    return statistics
