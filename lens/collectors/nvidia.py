"""NVIDIA cards through NVML, by the vendor's own Python binding.

The library is opened once for the agent's life and handles are kept. A metric that a card does not give is asked
for once, then left out and named in `lens.collector.supported` with the reason; a card that fell off the bus marks
only itself failed. The same code reads simulated cards: `lens.collectors.simulated` puts a fake library beneath.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lens.collectors.cards import Card, CardCollector, clock_below_maximum
from lens.collectors.nvidia_sources import CALLS, FIELDS, GPM, FieldRow
from lens.collectors.protocol import CollectorEvent, DeviceInfo, Probe, ProcessUse, Reading
from lens.collectors.simulated.profiles import find_profile

GPM_INTERVAL_NS = 100_000_000
_UNSUPPORTED = {2: "unsupported", 3: "unsupported", 4: "permission", 13: "missing_symbol", 25: "unsupported"}
_UNSUPPORTED[26] = "unsupported"
_LOST = frozenset((15, 16, 28))
_TIMEOUT = 10
_NO_DATA_YET = frozenset((_TIMEOUT, 21, 27))


@dataclass
class _Card(Card):
    unsupported: dict[tuple[str, str], str] = field(default_factory=dict)
    """Reason by (metric, source): asked for once, left out since."""
    gpm_sample: Any = None
    gpm_t_ns: int = 0


class NvidiaCollector(CardCollector[_Card]):
    """Readings of every NVIDIA card of this host.

    Args:
        host: the host's name; card i is called ``host/gpu<i>``.
        simulated: whether the library beneath is a simulation; then every reading says so.
    """

    backend = "nvidia"

    def __init__(self, host: str, simulated: bool = False) -> None:
        super().__init__(host, simulated)
        self._nvml: Any = None
        self._event_set: Any = None
        self._metrics_get: Any = None

    def probe(self) -> Probe:
        """Open NVML and find the cards. Never raises."""
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return Probe(False, "the package nvidia-ml-py is not installed")
        if not hasattr(nvml, "nvmlDeviceGetFieldValues"):
            return Probe(False, "another package named pynvml hides nvidia-ml-py: pip uninstall pynvml")
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            return Probe(False, f"no NVIDIA driver answers here ({error})")
        self._nvml = nvml
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            return Probe(False, f"the NVIDIA driver does not say how many cards there are ({error})")
        for index in range(count):
            with contextlib.suppress(nvml.NVMLError):
                self._cards.append(self._open_card(index))
        if not self._cards:
            return Probe(False, "the NVIDIA driver reports no card")
        self._register_events()
        return Probe(True)

    def events(self, timeout_s: float) -> Sequence[CollectorEvent]:
        """Xids and lost cards; waits in the library, so call it from a thread of its own."""
        if self._event_set is None:
            time.sleep(timeout_s)
        else:
            self._wait_for_xid(timeout_s)
        return self._reported()

    def processes(self) -> Sequence[ProcessUse]:
        """Compute processes by card; memory is None where the driver hides it."""
        uses = []
        for card in self._cards:
            if card.lost:
                continue
            with contextlib.suppress(self._nvml.NVMLError):
                for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(card.handle):
                    uses.append(ProcessUse(int(process.pid), card.info.name, process.usedGpuMemory))
        return uses

    def close(self) -> None:
        """Close NVML."""
        if self._nvml is None:
            return
        for card in self._cards:
            if card.gpm_sample is not None:
                with contextlib.suppress(self._nvml.NVMLError):
                    self._nvml.nvmlGpmSampleFree(card.gpm_sample)
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()
        self._nvml = None
        self._cards = []

    def _open_card(self, index: int) -> _Card:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)

        def ask(function: str, *arguments: Any, default: Any) -> Any:
            try:
                return getattr(nvml, function)(*arguments)
            except nvml.NVMLError:
                return default

        model = ask("nvmlDeviceGetName", handle, default="unknown")
        pci = ask("nvmlDeviceGetPciInfo_v3", handle, default=None)
        memory = ask("nvmlDeviceGetMemoryInfo", handle, nvml.nvmlMemory_v2, default=None)
        profile = find_profile(model)
        info = DeviceInfo(
            uuid=ask("nvmlDeviceGetUUID", handle, default=""),
            index=index,
            name=f"{self._host}/gpu{index}",
            vendor="nvidia",
            model=model,
            pci=str(pci.busId) if pci is not None else "",
            memory_bytes=memory.total if memory is not None else None,
            peaks=profile.peaks() if profile else {},
            driver=ask("nvmlSystemGetDriverVersion", default=""),
            simulated=self._simulated,
        )
        max_clock = ask("nvmlDeviceGetMaxClockInfo", handle, 1, default=None)
        return _Card(info, handle, max_clock)

    def _read_card(self, card: _Card, group: str) -> list[Reading]:
        readings: list[Reading] = []
        for row in CALLS:
            if row.group == group and not card.lost:
                self._ask(card, row.metrics, row.read, readings)
        if group == "fast" and not card.lost:
            readings += self._read_fields(card)
            readings += self._read_gpm(card)
            readings += clock_below_maximum(card, readings)
        return [] if card.lost else readings

    def _ask(
        self,
        card: _Card,
        metrics: tuple[str, ...],
        read: Callable[[Any, Any], Iterable[tuple[str, float, Mapping[str, str]]]],
        readings: list[Reading],
    ) -> None:
        source = f"{read.__qualname__}{id(read)}"
        if (metrics[0], source) in card.unsupported:
            return
        try:
            values = list(read(self._nvml, card.handle))
        except self._nvml.NVMLError as error:
            self._failed(card, metrics, source, int(error.value))
            return
        for metric, value, labels in values:
            readings.append(self._reading(card, metric, float(value), labels))

    def _read_fields(self, card: _Card) -> list[Reading]:
        rows = [row for row in FIELDS if self._wanted(card, row)]
        if not rows:
            return []
        try:
            values = self._nvml.nvmlDeviceGetFieldValues(card.handle, [(r.field_id, r.scope) for r in rows])
        except self._nvml.NVMLError as error:
            for row in rows:
                self._failed(card, (row.metric,), _field_source(row), int(error.value))
            return []
        readings = []
        for row, value in zip(rows, values, strict=True):
            if value.nvmlReturn:
                self._failed(card, (row.metric,), _field_source(row), int(value.nvmlReturn))
                continue
            number = _field_number(value) * row.factor
            readings.append(self._reading(card, row.metric, number, row.labels))
        return readings

    def _wanted(self, card: _Card, row: FieldRow) -> bool:
        if (row.metric, _field_source(row)) in card.unsupported:
            return False
        if row.instead_of is None:
            return True
        return any(source == f"field {row.instead_of}/0" for _, source in card.unsupported)

    def _read_gpm(self, card: _Card) -> list[Reading]:
        """Means since the last sample; nothing on the first call and on cards before Hopper."""
        nvml, key = self._nvml, ("gpu.sm.active", "gpm")
        if key in card.unsupported or time.monotonic_ns() - card.gpm_t_ns < GPM_INTERVAL_NS:
            return []
        try:
            if card.gpm_sample is None and not nvml.nvmlGpmQueryDeviceSupport(card.handle).isSupportedDevice:
                card.unsupported[key] = "unsupported"
                return []
            sample = nvml.nvmlGpmSampleGet(card.handle, nvml.nvmlGpmSampleAlloc())
        except nvml.NVMLError as error:
            self._failed(card, (key[0],), key[1], int(error.value))
            return []
        before, card.gpm_sample, card.gpm_t_ns = card.gpm_sample, sample, time.monotonic_ns()
        if before is None:
            return []
        try:
            return self._gpm_means(card, before, sample)
        except nvml.NVMLError as error:
            self._failed(card, (key[0],), key[1], int(error.value))
            return []
        finally:
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlGpmSampleFree(before)

    def _gpm_means(self, card: _Card, before: Any, after: Any) -> list[Reading]:
        nvml = self._nvml
        rows = [row for row in GPM if (row.metric, f"gpm {row.gpm_id}") not in card.unsupported]
        question = self._metrics_get = self._metrics_get or nvml.c_nvmlGpmMetricsGet_t()
        question.version = nvml.NVML_GPM_METRICS_GET_VERSION
        question.numMetrics = len(rows)
        question.sample1, question.sample2 = before, after
        for place, row in enumerate(rows):
            question.metrics[place].metricId = row.gpm_id
        nvml.nvmlGpmMetricsGet(question)
        readings = []
        for place, row in enumerate(rows):
            answer = question.metrics[place]
            if answer.nvmlReturn:
                self._failed(card, (row.metric,), f"gpm {row.gpm_id}", int(answer.nvmlReturn))
                continue
            value = float(answer.value) * row.factor
            readings.append(self._reading(card, row.metric, value, row.labels))
        return readings

    def _missing(self, card: _Card) -> Mapping[str, str]:
        return {metric: reason for (metric, _), reason in card.unsupported.items()}

    def _failed(self, card: _Card, metrics: tuple[str, ...], source: str, code: int) -> None:
        if code in _UNSUPPORTED:
            for metric in metrics:
                card.unsupported[metric, source] = _UNSUPPORTED[code]
        elif code in _LOST:
            card.gpm_sample = None
            self._lose(card, f"NVML error {code}", code)
        elif code not in _NO_DATA_YET:
            self._count_error(card, metrics[0], str(code))

    def _try_again(self, card: _Card) -> None:
        with contextlib.suppress(self._nvml.NVMLError):
            card.handle = self._nvml.nvmlDeviceGetHandleByIndex(card.info.index)
            self._nvml.nvmlDeviceGetUtilizationRates(card.handle)
            card.lost = False

    def _register_events(self) -> None:
        nvml = self._nvml
        try:
            events = nvml.nvmlEventSetCreate()
            for card in self._cards:
                nvml.nvmlDeviceRegisterEvents(card.handle, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError:
            return
        self._event_set = events

    def _wait_for_xid(self, timeout_s: float) -> None:
        try:
            event = self._nvml.nvmlEventSetWait(self._event_set, int(timeout_s * 1000))
        except self._nvml.NVMLError as error:
            if error.value != _TIMEOUT:
                self._event_set = None
            return
        card = next((c for c in self._cards if _same_device(c.handle, event.device)), None)
        device = card.info.name if card else None
        xid = int(event.eventData)
        self._report("gpu.xid", f"Xid {xid} on {device}", device, {"xid": xid})


def _field_source(row: FieldRow) -> str:
    return f"field {row.field_id}/{row.scope}"


def _field_number(value: Any) -> float:
    """The number of a field value by its type (double, uint, ulong, ulonglong, longlong, int, ushort)."""
    union = value.value
    members = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
    return float(getattr(union, members[value.valueType]))


def _same_device(one: Any, other: Any) -> bool:
    """Whether two handles, pointers to something opaque, point to the same place."""
    return bool(other) and ctypes.addressof(one.contents) == ctypes.addressof(other.contents)
