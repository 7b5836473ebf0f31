"""What NVML is asked, as tables: one row a metric, with its unit factor; read by `lens.collectors.nvidia`.

Facts the tables rest on: ``PowerUsage`` is a one-second mean on Hopper, so power is field 186; ``PcieThroughput``
blocks about 20 ms a call, so PCIe is read from its byte counters; throttle time counters say more than the reason
bits, which are a moment's view; GPM values are means between two samples at least 100 ms apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MIB = 1024 * 1024
MILLI, NANO = 1e-3, 1e-9
ALL_LINKS = 0xFFFFFFFF
PCIE_TRANSFERS = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}
"""GT/s a lane by PCIe generation."""

Values = Iterable[tuple[str, float, Mapping[str, str]]]
_NONE: Mapping[str, str] = {}


@dataclass(frozen=True)
class FieldRow:
    """One field value of the batch read each tick."""

    field_id: int
    metric: str
    factor: float = 1.0
    labels: Mapping[str, str] = field(default_factory=dict)
    scope: int = 0
    instead_of: int | None = None
    """Read only where this other field is not supported."""


def _direction(name: str, link: str | None = None) -> dict[str, str]:
    labels = {"network.io.direction": name}
    return {"link": link, **labels} if link else labels


FIELDS = (
    FieldRow(186, "hw.power", MILLI, {"hw.type": "gpu"}),
    FieldRow(186, "gpu.power.module", MILLI, scope=1),
    FieldRow(83, "hw.energy", MILLI, {"hw.type": "gpu"}),
    FieldRow(82, "hw.temperature", 1.0, {"sensor": "memory"}),
    FieldRow(138, "hw.gpu.io", 1024, _direction("transmit", "nvlink"), ALL_LINKS),
    FieldRow(139, "hw.gpu.io", 1024, _direction("receive", "nvlink"), ALL_LINKS),
    FieldRow(197, "hw.gpu.io", 1.0, _direction("transmit", "pcie")),
    FieldRow(198, "hw.gpu.io", 1.0, _direction("receive", "pcie")),
    FieldRow(74, "gpu.throttle.power.time", NANO),
    FieldRow(269, "gpu.throttle.thermal.time", NANO, {"source": "software"}),
    FieldRow(270, "gpu.throttle.thermal.time", NANO, {"source": "hardware"}),
    FieldRow(75, "gpu.throttle.thermal.time", NANO, {"source": "policy"}, instead_of=269),
    FieldRow(164, "gpu.link.speed", 1e6, {"link": "nvlink"}),
    FieldRow(271, "gpu.throttle.brake.time", NANO),
)


@dataclass(frozen=True)
class GpmRow:
    """One mean between two GPM samples."""

    gpm_id: int
    metric: str
    factor: float
    labels: Mapping[str, str] = field(default_factory=dict)


GPM = (
    GpmRow(1, "gpu.graphics.active", 0.01),
    GpmRow(2, "gpu.sm.active", 0.01),
    GpmRow(3, "gpu.sm.occupancy", 0.01),
    GpmRow(5, "gpu.tensor.active", 0.01),
    GpmRow(10, "gpu.dram.active", 0.01),
    GpmRow(11, "gpu.fp64.active", 0.01),
    GpmRow(12, "gpu.fp32.active", 0.01),
    GpmRow(13, "gpu.fp16.active", 0.01),
    GpmRow(60, "gpu.nvlink.bandwidth", MIB, _direction("receive")),
    GpmRow(61, "gpu.nvlink.bandwidth", MIB, _direction("transmit")),
    GpmRow(100, "gpu.c2c.bandwidth", MIB, _direction("transmit")),
    GpmRow(101, "gpu.c2c.bandwidth", MIB, _direction("receive")),
)


@dataclass(frozen=True)
class CallRow:
    """One library call and the readings made of it."""

    group: str
    metrics: tuple[str, ...]
    read: Callable[[Any, Any], Values]
    """Given the pynvml module and a handle."""


def _utilization(nvml: Any, handle: Any) -> Values:
    rates = nvml.nvmlDeviceGetUtilizationRates(handle)
    return (("hw.gpu.utilization", rates.gpu / 100, _NONE), ("gpu.memory.activity", rates.memory / 100, _NONE))


def _memory(nvml: Any, handle: Any) -> Values:
    info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    yield "hw.gpu.memory.limit", info.total, _NONE
    yield "hw.gpu.memory.usage", info.used, _NONE
    yield "gpu.memory.reserved_driver", info.reserved, _NONE
    if info.total:
        yield "hw.gpu.memory.utilization", info.used / info.total, _NONE


def _single(metric: str, function: str, *arguments: int, factor: float = 1.0, **labels: str) -> CallRow:
    return _grouped("fast", metric, function, *arguments, factor=factor, **labels)


def _grouped(
    group: str, metric: str, function: str, *arguments: int, factor: float = 1.0, **labels: str
) -> CallRow:
    def read(nvml: Any, handle: Any) -> Values:
        return ((metric, getattr(nvml, function)(handle, *arguments) * factor, labels),)

    return CallRow(group, (metric,), read)


def _error_count(kind: str, code: int) -> CallRow:
    def read(nvml: Any, handle: Any) -> Values:
        count = nvml.nvmlDeviceGetTotalEccErrors(handle, code, nvml.NVML_VOLATILE_ECC)
        return (("hw.errors", count, {"error.type": kind, "block": "memory"}),)

    return CallRow("slow", ("hw.errors",), read)


def _remapped_rows(nvml: Any, handle: Any) -> Values:
    counts = nvml.nvmlDeviceGetRemappedRows(handle)
    kinds = ("correctable", "uncorrectable", "pending", "failure")
    return [("gpu.rows.remapped", count, {"kind": kind}) for kind, count in zip(kinds, counts, strict=True)]


def _links_up(nvml: Any, handle: Any) -> Values:
    """State of each link; a link number the card does not have ends the list."""
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            state = nvml.nvmlDeviceGetNvLinkState(handle, link)
        except nvml.NVMLError as error:
            if link == 0 or error.value not in (nvml.NVML_ERROR_INVALID_ARGUMENT, nvml.NVML_ERROR_NOT_SUPPORTED):
                raise
            return
        yield "gpu.link.up", state, {"link": f"nvlink{link}"}


def _pcie_speed(metric: str, function: str) -> CallRow:
    def read(nvml: Any, handle: Any) -> Values:
        speed = PCIE_TRANSFERS.get(getattr(nvml, function)(handle))
        return () if speed is None else ((metric, speed, _NONE),)

    return CallRow("slow", (metric,), read)


CALLS = (
    CallRow("fast", ("hw.gpu.utilization", "gpu.memory.activity"), _utilization),
    CallRow("fast", ("hw.gpu.memory.usage", "hw.gpu.memory.limit"), _memory),
    _single("gpu.clock.sm", "nvmlDeviceGetClockInfo", 1),
    _single("gpu.clock.memory", "nvmlDeviceGetClockInfo", 2),
    _single("gpu.throttle.reasons", "nvmlDeviceGetCurrentClocksEventReasons"),
    _single("hw.temperature", "nvmlDeviceGetTemperatureV", 0, sensor="core"),
    _single("gpu.power.limit", "nvmlDeviceGetEnforcedPowerLimit", factor=MILLI),
    _grouped("slow", "gpu.clock.sm.max", "nvmlDeviceGetMaxClockInfo", 1),
    _grouped("slow", "hw.temperature.limit", "nvmlDeviceGetTemperatureThreshold", 1, limit="slowdown"),
    _grouped("slow", "gpu.perf_state", "nvmlDeviceGetPerformanceState"),
    _grouped("slow", "gpu.pcie.replays", "nvmlDeviceGetPcieReplayCounter"),
    _grouped("slow", "gpu.pcie.link.width", "nvmlDeviceGetCurrPcieLinkWidth"),
    _grouped("slow", "gpu.pcie.link.width.max", "nvmlDeviceGetMaxPcieLinkWidth"),
    _pcie_speed("gpu.pcie.link.speed", "nvmlDeviceGetCurrPcieLinkGeneration"),
    _pcie_speed("gpu.pcie.link.speed.max", "nvmlDeviceGetMaxPcieLinkGeneration"),
    _grouped("slow", "hw.fan.speed_ratio", "nvmlDeviceGetFanSpeed", factor=0.01),
    _error_count("corrected", 0),
    _error_count("uncorrected", 1),
    CallRow("slow", ("gpu.rows.remapped",), _remapped_rows),
    CallRow("slow", ("gpu.link.up",), _links_up),
)
