"""A library in the place of libnvidia-ml.so: the real pynvml on top keeps its structures, versions and errors.

``pynvml.nvmlLib = FakeNvml(cards)``. pynvml looks functions up by name and calls them with ctypes objects:
``byref(x)`` arrives with ``x`` as ``_obj``, arrays arrive as themselves. Only ever installed in the agent's own
process: torch counts devices through NVML, so a training process must not see this.
"""

from __future__ import annotations

import ctypes
import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lens.collectors.simulated.device import RESERVED_BYTES, SimDevice, Totals

SUCCESS, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION = 0, 2, 3, 4
INSUFFICIENT_SIZE, TIMEOUT, GPU_IS_LOST = 7, 10, 15
_ULONGLONG = 3
_CORRECTED = 0
_NO_INSTANCE = 0xFFFFFFFF
_MIB = 1024 * 1024


@dataclass
class Failures:
    """What the library is told to refuse, by card index."""

    missing: set[str] = field(default_factory=set)
    """Functions that the library does not have."""
    functions: dict[tuple[int, str], int] = field(default_factory=dict)
    """Error code by (card, function)."""
    fields: dict[tuple[int, int], int] = field(default_factory=dict)
    """Error code by (card, field id)."""


class FakeNvml:
    """The functions of NVML that the collector calls, over simulated cards.

    A function not written here is missing, as in an older driver: pynvml reports FunctionNotFound.
    """

    def __init__(self, cards: Sequence[SimDevice], pynvml: Any) -> None:
        self.cards = list(cards)
        self.failures = Failures()
        self._pynvml = pynvml
        self._handles = [pynvml.struct_c_nvmlDevice_t() for _ in cards]
        self._index_of = {ctypes.addressof(handle): index for index, handle in enumerate(self._handles)}
        self._samples: dict[int, tuple[Any, Totals | None]] = {}
        self._event_set = pynvml.struct_c_nvmlEventSet_t()
        self._xids: queue.Queue[tuple[int, int]] = queue.Queue()
        self._functions: dict[str, _Function] = {}

    def __getattr__(self, name: str) -> _Function:
        if name.startswith("_") or name in self.failures.missing:
            raise AttributeError(name)
        if name not in self._functions:
            self._functions[name] = self._make(name)
        return self._functions[name]

    def report_xid(self, index: int, xid: int) -> None:
        """Let a card report an Xid."""
        self._xids.put((index, xid))

    def _make(self, name: str) -> _Function:
        if name in _LIBRARY_CALLS:
            call = _LIBRARY_CALLS[name]
            return _Function(lambda *arguments: call(self, *arguments) or SUCCESS)
        if name in _CARD_CALLS:
            on_card = _CARD_CALLS[name]
            return _Function(lambda handle, *arguments: self._on_card(name, on_card, handle, arguments))
        raise AttributeError(name)

    def _on_card(self, name: str, call: Callable[..., int | None], handle: Any, arguments: tuple[Any, ...]) -> int:
        index = self._index_of.get(ctypes.addressof(handle.contents)) if handle else None
        if index is None:
            return INVALID_ARGUMENT
        card = self.cards[index]
        if card.faults.lost:
            return GPU_IS_LOST
        refused = self.failures.functions.get((index, name))
        return refused if refused else call(self, card, *arguments) or SUCCESS

    def _point_at(self, pointer: Any, index: int) -> None:
        _out(pointer).contents = self._handles[index]


class _Function:
    """A function pointer as ctypes would give it: pynvml sets ``restype`` on some."""

    restype: Any = None

    def __init__(self, call: Callable[..., int]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> int:
        return self._call(*arguments)


def _out(reference: Any) -> Any:
    return getattr(reference, "_obj", reference)


def _number(read: Callable[[SimDevice], float | None]) -> Callable[..., int | None]:
    """A call whose last argument takes one number; None is NotSupported."""

    def call(library: FakeNvml, card: SimDevice, *arguments: Any) -> int | None:
        value = read(card)
        if value is None:
            return NOT_SUPPORTED
        _out(arguments[-1]).value = int(value)
        return None

    return call


def _text(read: Callable[[SimDevice], str]) -> Callable[..., None]:
    def call(library: FakeNvml, card: SimDevice, buffer: Any, size: Any) -> None:
        buffer.value = read(card).encode()

    return call


def _ignore(library: FakeNvml, *arguments: Any) -> None:
    return None


def _count(library: FakeNvml, out: Any) -> None:
    _out(out).value = len(library.cards)


def _handle_by_index(library: FakeNvml, index: Any, out: Any) -> int | None:
    if index.value >= len(library.cards):
        return INVALID_ARGUMENT
    if library.cards[index.value].faults.lost:
        return GPU_IS_LOST
    library._point_at(out, index.value)
    return None


def _driver_version(library: FakeNvml, buffer: Any, size: Any) -> None:
    buffer.value = b"simulated"


def _pci(library: FakeNvml, card: SimDevice, out: Any) -> None:
    info = _out(out)
    info.busId = info.busIdLegacy = f"0000:{card.index + 1:02X}:00.0".encode()
    info.bus = card.index + 1


def _utilization(library: FakeNvml, card: SimDevice, out: Any) -> None:
    rates = _out(out)
    rates.gpu, rates.memory = round(100 * card.utilization), round(100 * card.dram)


def _memory(library: FakeNvml, card: SimDevice, out: Any) -> None:
    info = _out(out)
    info.total, info.reserved, info.used = card.profile.memory_bytes, RESERVED_BYTES, card.memory_used
    info.free = info.total - info.reserved - info.used


def _clock(library: FakeNvml, card: SimDevice, kind: Any, out: Any) -> int | None:
    clocks = {1: card.clock_mhz, 2: card.profile.memory_mhz}
    return _choose(clocks, kind, out)


def _maximum_clock(library: FakeNvml, card: SimDevice, kind: Any, out: Any) -> int | None:
    return _choose({1: card.profile.max_mhz, 2: card.profile.memory_mhz}, kind, out)


def _choose(values: dict[int, float], kind: Any, out: Any) -> int | None:
    value = values.get(int(getattr(kind, "value", kind)))
    if value is None:
        return NOT_SUPPORTED
    _out(out).value = int(value)
    return None


def _temperature(library: FakeNvml, card: SimDevice, out: Any) -> None:
    _out(out).temperature = round(card.celsius)


def _temperature_threshold(library: FakeNvml, card: SimDevice, kind: Any, out: Any) -> int | None:
    return _choose({1: card.profile.slowdown_celsius}, kind, out)


def _errors(library: FakeNvml, card: SimDevice, kind: Any, counter: Any, out: Any) -> None:
    corrected = int(getattr(kind, "value", kind)) == _CORRECTED
    _out(out).value = card.faults.ecc_corrected if corrected else card.faults.ecc_uncorrected


def _remapped_rows(library: FakeNvml, card: SimDevice, *out: Any) -> None:
    for reference, count in zip(out, (0, card.faults.ecc_uncorrected, 0, 0), strict=True):
        _out(reference).value = count


def _link_state(library: FakeNvml, card: SimDevice, link: Any, out: Any) -> int | None:
    number = int(getattr(link, "value", link))
    if number >= card.profile.links:
        return INVALID_ARGUMENT
    _out(out).value = 0 if number in card.faults.nvlink_down else 1
    return None


def _running_processes(library: FakeNvml, card: SimDevice, count: Any, array: Any) -> int | None:
    room, _out(count).value = _out(count).value, len(card.processes)
    if array is None or room < len(card.processes):
        return INSUFFICIENT_SIZE if card.processes else None
    for entry, (pid, size) in zip(array, card.processes, strict=False):
        entry.pid, entry.usedGpuMemory = pid, size
        entry.gpuInstanceId = entry.computeInstanceId = _NO_INSTANCE
    return None


_FIELD_VALUES: dict[tuple[int, int], Callable[[SimDevice], float | None]] = {
    (186, 0): lambda card: card.power_w * 1000,
    (83, 0): lambda card: card.totals.energy_j * 1000,
    (82, 0): lambda card: card.celsius + 6,
    (74, 0): lambda card: card.totals.power_throttle_s * 1e9,
    (269, 0): lambda card: card.totals.thermal_throttle_s * 1e9,
    (270, 0): lambda card: card.totals.thermal_throttle_s * 1e9,
    (271, 0): lambda card: card.totals.brake_s * 1e9,
    (138, 0xFFFFFFFF): lambda card: card.totals.nvlink_transmit / 1024,
    (139, 0xFFFFFFFF): lambda card: card.totals.nvlink_receive / 1024,
    (164, 0): lambda card: card.profile.link_bandwidth / 1e6,
    (197, 0): lambda card: card.totals.pcie_transmit,
    (198, 0): lambda card: card.totals.pcie_receive,
}


def _field_values(library: FakeNvml, card: SimDevice, count: Any, array: Any) -> None:
    values = _out(array)
    for place in range(count.value):
        value = values[place]
        read = _FIELD_VALUES.get((value.fieldId, value.scopeId))
        refused = library.failures.fields.get((card.index, value.fieldId))
        if read is None or refused:
            value.nvmlReturn = refused or NOT_SUPPORTED
            continue
        value.nvmlReturn, value.valueType = SUCCESS, _ULONGLONG
        value.value.ullVal = int(read(card) or 0)


def _gpm_support(library: FakeNvml, card: SimDevice, out: Any) -> None:
    _out(out).isSupportedDevice = 1


def _gpm_allocate(library: FakeNvml, out: Any) -> None:
    sample = library._pynvml.struct_c_nvmlGpmSample_t()
    library._samples[ctypes.addressof(sample)] = (sample, None)
    _out(out).contents = sample


def _gpm_free(library: FakeNvml, sample: Any) -> None:
    library._samples.pop(ctypes.addressof(sample.contents), None)


def _gpm_sample(library: FakeNvml, card: SimDevice, sample: Any) -> None:
    address = ctypes.addressof(sample.contents)
    tensor_known = card.tensor is not None
    totals = Totals(**vars(card.totals))
    totals.tensor_s = totals.tensor_s if tensor_known else -1.0
    library._samples[address] = (library._samples[address][0], totals)


def _share(name: str, factor: float = 100.0) -> Callable[[Totals, Totals], float | None]:
    return lambda before, after: (
        factor * (getattr(after, name) - getattr(before, name)) / (after.seconds - before.seconds)
    )


def _tensor_share(before: Totals, after: Totals) -> float | None:
    known = before.tensor_s >= 0 and after.tensor_s >= 0
    return _share("tensor_s")(before, after) if known else None


_GPM_VALUES: dict[int, Callable[[Totals, Totals], float | None]] = {
    1: _share("busy_s"),
    2: _share("compute_s", 90.0),
    5: _tensor_share,
    10: _share("dram_s"),
    60: _share("nvlink_receive", 1 / _MIB),
    61: _share("nvlink_transmit", 1 / _MIB),
}


def _gpm_metrics(library: FakeNvml, out: Any) -> int | None:
    question = _out(out)
    before = library._samples[ctypes.addressof(question.sample1.contents)][1]
    after = library._samples[ctypes.addressof(question.sample2.contents)][1]
    if before is None or after is None:
        return INVALID_ARGUMENT
    for place in range(question.numMetrics):
        answer = question.metrics[place]
        read = _GPM_VALUES.get(answer.metricId)
        value = read(before, after) if read is not None and after.seconds > before.seconds else None
        # No work counted yet is "no data", which may change; a metric the model does not have is not supported.
        answer.nvmlReturn = SUCCESS if value is not None else NOT_SUPPORTED if read is None else 21
        answer.value = value or 0.0
    return None


def _create_event_set(library: FakeNvml, out: Any) -> None:
    _out(out).contents = library._event_set


def _wait_for_event(library: FakeNvml, events: Any, out: Any, timeout_ms: Any) -> int | None:
    try:
        index, xid = library._xids.get(timeout=timeout_ms.value / 1000)
    except queue.Empty:
        return TIMEOUT
    data = _out(out)
    data.device = ctypes.pointer(library._handles[index])
    data.eventType, data.eventData = library._pynvml.nvmlEventTypeXidCriticalError, xid
    return None


_LIBRARY_CALLS: dict[str, Callable[..., int | None]] = {
    "nvmlInitWithFlags": _ignore,
    "nvmlShutdown": _ignore,
    "nvmlSystemGetDriverVersion": _driver_version,
    "nvmlDeviceGetCount_v2": _count,
    "nvmlDeviceGetHandleByIndex_v2": _handle_by_index,
    "nvmlGpmSampleAlloc": _gpm_allocate,
    "nvmlGpmSampleFree": _gpm_free,
    "nvmlGpmMetricsGet": _gpm_metrics,
    "nvmlEventSetCreate": _create_event_set,
    "nvmlEventSetFree": _ignore,
    "nvmlEventSetWait_v2": _wait_for_event,
}
_CARD_CALLS: dict[str, Callable[..., int | None]] = {
    "nvmlDeviceGetName": _text(lambda card: card.profile.model),
    "nvmlDeviceGetUUID": _text(lambda card: card.uuid),
    "nvmlDeviceGetPciInfo_v3": _pci,
    "nvmlDeviceGetUtilizationRates": _utilization,
    "nvmlDeviceGetMemoryInfo_v2": _memory,
    "nvmlDeviceGetClockInfo": _clock,
    "nvmlDeviceGetMaxClockInfo": _maximum_clock,
    "nvmlDeviceGetCurrentClocksEventReasons": _number(lambda card: card.throttle),
    "nvmlDeviceGetTemperatureV": _temperature,
    "nvmlDeviceGetTemperatureThreshold": _temperature_threshold,
    "nvmlDeviceGetEnforcedPowerLimit": _number(
        lambda card: 1000 * min(card.profile.board_w, card.faults.power_cap_w or card.profile.board_w)
    ),
    "nvmlDeviceGetPerformanceState": _number(lambda card: 0),
    "nvmlDeviceGetPcieReplayCounter": _number(lambda card: 0),
    "nvmlDeviceGetCurrPcieLinkWidth": _number(lambda card: card.faults.pcie_width or card.profile.pcie_width),
    "nvmlDeviceGetMaxPcieLinkWidth": _number(lambda card: card.profile.pcie_width),
    "nvmlDeviceGetCurrPcieLinkGeneration": _number(lambda card: card.profile.pcie_generation),
    "nvmlDeviceGetMaxPcieLinkGeneration": _number(lambda card: card.profile.pcie_generation),
    # A board in a server has no fan of its own.
    "nvmlDeviceGetFanSpeed": _number(lambda card: None),
    "nvmlDeviceGetTotalEccErrors": _errors,
    "nvmlDeviceGetRemappedRows": _remapped_rows,
    "nvmlDeviceGetNvLinkState": _link_state,
    "nvmlDeviceGetComputeRunningProcesses_v3": _running_processes,
    "nvmlDeviceGetFieldValues": _field_values,
    "nvmlGpmQueryDeviceSupport": _gpm_support,
    "nvmlGpmSampleGet": _gpm_sample,
    "nvmlDeviceRegisterEvents": _ignore,
}


def install(cards: Sequence[SimDevice]) -> FakeNvml:
    """Put the cards beneath pynvml in this process, and give the library that does it."""
    import pynvml

    library = FakeNvml(cards, pynvml)
    pynvml.nvmlLib = library
    # Looked-up functions are cached: those of a library that was there before would be called otherwise.
    pynvml._nvmlGetFunctionPointer_cache.clear()
    return library
