"""A stand-in for the module amdsmi, over simulated cards: answers of amdsmi 7.0, in its units and with its "N/A".

The real module does not even import where there is no AMD driver, so what stands in is the module itself. Only ever
installed in the agent's own process: torch on ROCm counts devices through amdsmi, so a training process must not
see this.
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType
from typing import Any, cast

from lens.collectors.simulated.device import SimDevice

INVALID, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, DRIVER_NOT_LOADED, NO_DATA = 1, 2, 10, 31, 34, 40
ABSENT = "N/A"
_MIB = 1024 * 1024
_KIB = 1024
_ENERGY_TICK_UJ = 15.259
_MICRO = 1e6
_SAMPLES_A_SECOND = 1000
"""Firmware samples its limiters each millisecond."""
_DIES = 8
_LINKS = 8
_LANES = 16
_MEMORY_IS_HOTTER_CELSIUS = 6
_PCIE_MEGATRANSFERS = {4: 16000, 5: 32000, 6: 64000}


class AmdSmiException(Exception):  # noqa: N818 the module's own name
    """As in amdsmi."""


class AmdSmiLibraryException(AmdSmiException):
    """A status other than success."""

    def __init__(self, err_code: int) -> None:
        super().__init__(err_code)
        self.err_code = abs(err_code)

    def get_error_code(self) -> int:
        """The status."""
        return self.err_code


class AmdSmiParameterException(AmdSmiException):
    """An argument of the wrong kind."""


class AmdSmiClkType(IntEnum):
    """As in amdsmi, what is used of it."""

    GFX = 0
    MEM = 4


class AmdSmiTemperatureType(IntEnum):
    """As in amdsmi, what is used of it."""

    EDGE = 0
    HOTSPOT = 1
    VRAM = 2


class AmdSmiTemperatureMetric(IntEnum):
    """As in amdsmi, what is used of it."""

    CURRENT = 0
    CRITICAL = 5


class AmdSmiMemoryType(IntEnum):
    """As in amdsmi."""

    VRAM = 0
    VIS_VRAM = 1
    GTT = 2


class AmdSmiEvtNotificationType(IntEnum):
    """As in amdsmi, what is used of it."""

    NONE = 0
    VMFAULT = 1
    THERMAL_THROTTLE = 2
    GPU_PRE_RESET = 3
    GPU_POST_RESET = 4


@dataclass(frozen=True)
class Handle:
    """What the library gives for a processor; opaque to its user."""

    value: int


@dataclass
class Failures:
    """What the library is told to refuse, by card index."""

    missing: set[str] = field(default_factory=set)
    """Functions that the library does not have."""
    functions: dict[tuple[int, str], int] = field(default_factory=dict)
    """Status by (card, function)."""
    absent: set[tuple[int, str]] = field(default_factory=set)
    """(card, key) of answers that are "N/A"."""
    init: int = 0
    """Status of amdsmi_init."""


class FakeAmdSmi:
    """The functions of amdsmi that the collector calls, over simulated cards.

    A function not written here is missing, as in an older amdsmi: AttributeError.

    Args:
        cards: the cards, one processor each.
        partitions: the partition each card is of its socket, for cards split into several; partition 0 by default.
    """

    AmdSmiException = AmdSmiException
    AmdSmiLibraryException = AmdSmiLibraryException
    AmdSmiParameterException = AmdSmiParameterException
    AmdSmiClkType = AmdSmiClkType
    AmdSmiTemperatureType = AmdSmiTemperatureType
    AmdSmiTemperatureMetric = AmdSmiTemperatureMetric
    AmdSmiMemoryType = AmdSmiMemoryType
    AmdSmiEvtNotificationType = AmdSmiEvtNotificationType

    def __init__(self, cards: Sequence[SimDevice], partitions: Mapping[int, int] | None = None) -> None:
        self.cards = list(cards)
        self.partitions = dict(partitions or {})
        self.failures = Failures()
        self.calls: list[tuple[int, str]] = []
        """(card, function) of what was asked."""
        self._notices: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = _CALLS.get(name)
        if call is None or name in self.failures.missing:
            raise AttributeError(f"module 'amdsmi' has no attribute {name!r}")
        return lambda handle, *arguments: self._on_card(name, call, handle, arguments)

    def amdsmi_init(self, flag: int = 2) -> None:
        """Open the library."""
        if self.failures.init:
            raise AmdSmiLibraryException(self.failures.init)

    def amdsmi_shut_down(self) -> None:
        """Close the library."""

    def amdsmi_get_processor_handles(self) -> list[Handle]:
        """A handle for each card."""
        return [Handle(place) for place in range(len(self.cards))]

    def AmdSmiEventReader(self, handle: Handle, kinds: Sequence[int]) -> _EventReader:  # noqa: N802 the module's name
        """A reader of what the driver notices."""
        if "AmdSmiEventReader" in self.failures.missing:
            raise AmdSmiLibraryException(NOT_SUPPORTED)
        return _EventReader(self._notices)

    def report_event(self, index: int, event: str, message: str) -> None:
        """Let the driver notice something of a card, such as GPU_PRE_RESET."""
        self._notices.put({"processor_handle": Handle(index), "event": event, "message": message})

    def report_xid(self, index: int, xid: int) -> None:
        """Let a card fail as one of the other maker does with an Xid: the driver resets it."""
        self.report_event(index, "GPU_PRE_RESET", f"fault {xid}")

    def _on_card(self, name: str, call: Callable[..., Any], handle: Any, arguments: tuple[Any, ...]) -> Any:
        if not isinstance(handle, Handle):
            raise AmdSmiParameterException(f"{handle!r} is no processor handle")
        index = handle.value
        self.calls.append((index, name))
        card = self.cards[index]
        if card.faults.lost:
            raise AmdSmiLibraryException(NOT_FOUND)
        refused = self.failures.functions.get((index, name))
        if refused:
            raise AmdSmiLibraryException(refused)
        answer = call(card, self.partitions.get(index, 0), *arguments)
        if isinstance(answer, dict):
            return {key: ABSENT if (index, key) in self.failures.absent else value for key, value in answer.items()}
        return answer


class _EventReader:
    def __init__(self, notices: queue.SimpleQueue[dict[str, Any]]) -> None:
        self._notices = notices

    def read(self, timestamp: int, num_elem: int = 10) -> list[dict[str, Any]]:
        """What was noticed within `timestamp` milliseconds."""
        try:
            return [self._notices.get(timeout=timestamp / 1000)]
        except queue.Empty:
            raise AmdSmiLibraryException(NO_DATA) from None

    def stop(self) -> None:
        """Read no more."""


def _activity(card: SimDevice, partition: int) -> dict[str, Any]:
    return {
        "gfx_activity": round(100 * card.utilization),
        "umc_activity": round(100 * card.dram),
        "mm_activity": ABSENT,
    }


def _vram(card: SimDevice, partition: int) -> dict[str, Any]:
    return {"vram_total": card.profile.memory_bytes // _MIB, "vram_used": card.memory_used // _MIB}


def _power(card: SimDevice, partition: int) -> dict[str, Any]:
    watts = ABSENT if partition else round(card.power_w)
    return {"current_socket_power": watts, "average_socket_power": ABSENT, "gfx_voltage": ABSENT}


def _cap_watts(card: SimDevice) -> float:
    return min(card.profile.board_w, card.faults.power_cap_w or card.profile.board_w)


def _power_cap(card: SimDevice, partition: int) -> dict[str, Any]:
    cap, board = (int(watts * _MICRO) for watts in (_cap_watts(card), card.profile.board_w))
    return {"power_cap": cap, "default_power_cap": board, "min_power_cap": 0, "max_power_cap": board}


def _energy(card: SimDevice, partition: int) -> dict[str, Any]:
    ticks = int(card.totals.energy_j * _MICRO / _ENERGY_TICK_UJ)
    return {
        "energy_accumulator": ticks,
        "counter_resolution": _ENERGY_TICK_UJ,
        "timestamp": int(card.totals.seconds * 1e9),
    }


def _clock(card: SimDevice, partition: int, kind: int) -> dict[str, Any]:
    clocks = {
        AmdSmiClkType.GFX: (card.clock_mhz, card.profile.max_mhz),
        AmdSmiClkType.MEM: (card.profile.memory_mhz, card.profile.memory_mhz),
    }
    if kind not in clocks:
        raise AmdSmiLibraryException(NOT_SUPPORTED)
    now, highest = clocks[AmdSmiClkType(kind)]
    return {"clk": int(now), "min_clk": int(card.profile.idle_mhz), "max_clk": int(highest), "clk_locked": ABSENT}


def _temperature(card: SimDevice, partition: int, sensor: int, metric: int) -> int:
    values = {
        (AmdSmiTemperatureType.HOTSPOT, AmdSmiTemperatureMetric.CURRENT): card.celsius,
        (AmdSmiTemperatureType.VRAM, AmdSmiTemperatureMetric.CURRENT): card.celsius + _MEMORY_IS_HOTTER_CELSIUS,
        (AmdSmiTemperatureType.HOTSPOT, AmdSmiTemperatureMetric.CRITICAL): card.profile.slowdown_celsius,
    }
    found = values.get((AmdSmiTemperatureType(sensor), AmdSmiTemperatureMetric(metric)))
    if found is None:
        raise AmdSmiLibraryException(NOT_SUPPORTED)
    return round(found)


def _gpu_metrics(card: SimDevice, partition: int) -> dict[str, Any]:
    totals, links = card.totals, min(_LINKS, card.profile.links)
    thermal = int(totals.thermal_throttle_s * _SAMPLES_A_SECOND)

    def over_links(size: float) -> list[Any]:
        return [int(size / links / _KIB)] * links + [ABSENT] * (_LINKS - links)

    return {
        "current_gfxclks": [int(card.clock_mhz)] * _DIES,
        "throttle_status": ABSENT,
        "accumulation_counter": int(totals.seconds * _SAMPLES_A_SECOND),
        "ppt_residency_acc": int(totals.power_throttle_s * _SAMPLES_A_SECOND),
        "socket_thm_residency_acc": thermal,
        "hbm_thm_residency_acc": 0,
        "vr_thm_residency_acc": 0,
        "prochot_residency_acc": int(totals.brake_s * _SAMPLES_A_SECOND),
        "xgmi_write_data_acc": over_links(totals.nvlink_transmit),
        "xgmi_read_data_acc": over_links(totals.nvlink_receive),
        "xgmi_link_speed": int(card.profile.link_bandwidth * 8 / 1e9 / _LANES),
        "xgmi_link_width": _LANES,
    }


def _violations(card: SimDevice, partition: int) -> dict[str, Any]:
    active = {"active_ppt_pwr": 0x4, "active_socket_thrm": 0x40, "active_prochot_thrm": 0x80}
    flags = {name: bool(card.throttle & bit) for name, bit in active.items()}
    return {**flags, "active_hbm_thrm": False, "active_vr_thrm": ABSENT}


def _link_status(card: SimDevice, partition: int) -> dict[str, Any]:
    links = min(_LINKS, card.profile.links)
    states = ["D" if place in card.faults.nvlink_down else "U" for place in range(links)]
    return {"status": states + ["X"] * (_LINKS - links), "total_links": _LINKS}


def _pcie(card: SimDevice, partition: int) -> dict[str, Any]:
    profile = card.profile
    speed = _PCIE_MEGATRANSFERS.get(profile.pcie_generation, ABSENT)
    width = card.faults.pcie_width or profile.pcie_width
    return {
        "pcie_static": {"max_pcie_width": profile.pcie_width, "max_pcie_speed": speed, "slot_type": "OAM"},
        "pcie_metric": {
            "pcie_width": width,
            "pcie_speed": speed,
            "pcie_bandwidth": ABSENT,
            "pcie_replay_count": 0,
        },
    }


def _ecc(card: SimDevice, partition: int) -> dict[str, Any]:
    return {
        "correctable_count": card.faults.ecc_corrected,
        "uncorrectable_count": card.faults.ecc_uncorrected,
        "deferred_count": 0,
    }


def _processes(card: SimDevice, partition: int) -> list[dict[str, Any]]:
    return [
        {
            "name": ABSENT,
            "pid": pid,
            "mem": size,
            "engine_usage": {"gfx": 0, "enc": 0},
            "memory_usage": {"gtt_mem": 0, "cpu_mem": 0, "vram_mem": size},
            "cu_occupancy": ABSENT,
        }
        for pid, size in card.processes
    ]


def _fan(card: SimDevice, partition: int, sensor: int) -> int:
    # A module in a server has no fan of its own.
    raise AmdSmiLibraryException(NOT_SUPPORTED)


def _gtt(card: SimDevice, partition: int, kind: int) -> int:
    if kind != AmdSmiMemoryType.GTT:
        raise AmdSmiLibraryException(NOT_SUPPORTED)
    return 0


_CALLS: Mapping[str, Callable[..., Any]] = {
    "amdsmi_get_gpu_activity": _activity,
    "amdsmi_get_gpu_vram_usage": _vram,
    "amdsmi_get_power_info": _power,
    "amdsmi_get_power_cap_info": _power_cap,
    "amdsmi_get_energy_count": _energy,
    "amdsmi_get_clock_info": _clock,
    "amdsmi_get_temp_metric": _temperature,
    "amdsmi_get_gpu_metrics_info": _gpu_metrics,
    "amdsmi_get_violation_status": _violations,
    "amdsmi_get_gpu_xgmi_link_status": _link_status,
    "amdsmi_get_pcie_info": _pcie,
    "amdsmi_get_gpu_total_ecc_count": _ecc,
    "amdsmi_get_gpu_bad_page_info": lambda card, partition: [],
    "amdsmi_get_gpu_process_list": _processes,
    "amdsmi_get_gpu_fan_speed": _fan,
    "amdsmi_get_gpu_memory_usage": _gtt,
    "amdsmi_get_gpu_device_uuid": lambda card, partition: card.uuid,
    "amdsmi_get_gpu_device_bdf": lambda card, partition: f"0000:{card.index + 1:02x}:00.{partition}",
    "amdsmi_get_gpu_driver_info": lambda card, partition: {"driver_name": "amdgpu", "driver_version": "simulated"},
    "amdsmi_get_gpu_asic_info": lambda card, partition: {"market_name": card.profile.model, "vendor_id": "0x1002"},
    "amdsmi_get_gpu_board_info": lambda card, partition: {"product_name": ABSENT, "model_number": ABSENT},
    "amdsmi_get_gpu_enumeration_info": lambda card, partition: {"drm_card": card.index, "hip_uuid": card.uuid},
    "amdsmi_get_gpu_kfd_info": lambda card, partition: {
        "kfd_id": card.index + 1,
        "node_id": card.index,
        "current_partition_id": partition,
    },
}


def install(cards: Sequence[SimDevice], partitions: Mapping[int, int] | None = None) -> FakeAmdSmi:
    """Put the stand-in in amdsmi's place in this process, and give it."""
    library = FakeAmdSmi(cards, partitions)
    sys.modules["amdsmi"] = cast(ModuleType, library)
    return library
