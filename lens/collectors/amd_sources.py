"""What amdsmi is asked, as tables: one row a question, with the unit of its answer; read by `lens.collectors.amd`.

Facts the tables rest on: a value a card does not have is the string "N/A" or an integer of ones; memory is in MB
(2^20 bytes), power caps in µW, PCIe speed in MT/s, energy in ticks of 15.259 µJ. ``amdsmi_get_violation_status``
waits 100 ms between two looks at the residency counters of ``gpu_metrics``, so those are read instead, and the call
is left to cards that hide them. A card split into partitions (CPX) has one power meter: what belongs to the whole
socket is asked of partition 0 alone, or sums over devices would count a socket eight times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MIB, KIB = 1024 * 1024, 1024
MICRO = 1e-6
ENERGY_TICK_J = 15.259e-6
"""One tick of the energy accumulator where the library does not say."""
POWER_CAP, HEAT, POWER_BRAKE = 0x4, 0x40, 0x80
"""Bits of ``gpu.throttle.reasons``, NVML's values: a reader needs one table for both makers."""
_ALL_ONES = frozenset((0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF))
_MILLIDEGREES_FROM = 1000
_FAN_STEPS = 255

Values = Iterable[tuple[str, float | None, Mapping[str, str]]]
_NONE: Mapping[str, str] = {}
_GPU = {"hw.type": "gpu"}


@dataclass(frozen=True)
class Row:
    """One question and the readings made of its answer; a value of None is left out."""

    group: str
    metrics: tuple[str, ...]
    read: Callable[[Any], Values]
    """Given the card as its door knows it."""
    socket: bool = False
    """Whether the answer belongs to the whole socket and not to a partition of it."""


def number(value: Any) -> float | None:
    """A value of amdsmi as a number; None for its ways to say that there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Nothing asked here is ever negative: -1 is all ones in a signed answer.
    return float(value) if math.isfinite(value) and value >= 0 and value not in _ALL_ONES else None


def first(answer: Mapping[str, Any], *keys: str) -> float | None:
    """The first of these keys that holds a number; versions of amdsmi name some of them differently."""
    for key in keys:
        found = number(answer.get(key))
        if found is not None:
            return found
    return None


def scaled(value: float | None, factor: float) -> float | None:
    """The value in another unit; None stays None."""
    return None if value is None else value * factor


def _numbers(values: Any) -> list[float]:
    """The numbers of a list that may hold "N/A", or of what is no list."""
    if not isinstance(values, list | tuple):
        return []
    return [found for found in map(number, values) if found is not None]


@dataclass(frozen=True)
class Limiter:
    """One reason why firmware lowers clocks, and its residency counter."""

    accumulator: str
    active: str
    """The same reason in ``amdsmi_get_violation_status``."""
    metric: str
    labels: Mapping[str, str]
    bit: int


_THERMAL = "gpu.throttle.thermal.time"
LIMITERS = (
    Limiter("ppt_residency_acc", "active_ppt_pwr", "gpu.throttle.power.time", _NONE, POWER_CAP),
    Limiter("socket_thm_residency_acc", "active_socket_thrm", _THERMAL, {"source": "socket"}, HEAT),
    Limiter("hbm_thm_residency_acc", "active_hbm_thrm", _THERMAL, {"source": "memory"}, HEAT),
    Limiter("vr_thm_residency_acc", "active_vr_thrm", _THERMAL, {"source": "regulator"}, HEAT),
    Limiter("prochot_residency_acc", "active_prochot_thrm", "gpu.throttle.brake.time", _NONE, POWER_BRAKE),
)


@dataclass
class Residency:
    """Turns the firmware's residency counters into seconds.

    Between two looks a limiter's counter moved by some share of what the counter of all samples moved by; for that
    share of the time between them the limiter held. Summed up from the first look on.
    """

    known: bool = False
    """Whether the card has given these counters."""
    _seconds: dict[str, float] = field(default_factory=dict)
    _before: dict[str, float] = field(default_factory=dict)
    _samples_before: float | None = None
    _t_before: int = 0
    _bits: float | None = None

    def look(self, metrics: Mapping[str, Any], t_ns: int) -> Values:
        """Seconds of each limiter, and the reasons since the look before (none on the first)."""
        samples = number(metrics.get("accumulation_counter"))
        counters = {row.accumulator: number(metrics.get(row.accumulator)) for row in LIMITERS}
        present = {name: value for name, value in counters.items() if value is not None}
        if samples is None or not present:
            return
        self.known = True
        self._add(present, samples, t_ns)
        for row in LIMITERS:
            if row.accumulator in present:
                yield row.metric, self._seconds[row.accumulator], row.labels
        yield "gpu.throttle.reasons", self._bits, _NONE

    def _add(self, present: Mapping[str, float], samples: float, t_ns: int) -> None:
        passed = None if self._samples_before is None else samples - self._samples_before
        for name in present:
            self._seconds.setdefault(name, 0.0)
        if passed == 0:
            # The firmware has not taken a sample since: the next look covers this stretch too.
            return
        if passed is not None and passed > 0:
            moved = {name: present[name] - self._before[name] for name in present if name in self._before}
            for name, steps in moved.items():
                # A counter that went back was reset: what it held since is not known.
                self._seconds[name] += max(0.0, min(1.0, steps / passed)) * (t_ns - self._t_before) * 1e-9
            held = {row.bit for row in LIMITERS if moved.get(row.accumulator, 0.0) > 0}
            self._bits = float(sum(held))
        else:
            self._bits = None
        self._samples_before, self._t_before, self._before = samples, t_ns, dict(present)


@dataclass
class SmiCard:
    """One processor handle, and what is kept of it between ticks."""

    smi: Any
    handle: Any
    partition: int = 0
    residency: Residency = field(default_factory=Residency)
    gives_die_clocks: bool = False
    _metrics: Mapping[str, Any] | None = None

    def call(self, function: str, *arguments: Any) -> Any:
        """Ask the library about this card; AttributeError when it does not have the function."""
        return getattr(self.smi, function)(self.handle, *arguments)

    def table(self, function: str, *arguments: Any) -> Mapping[str, Any]:
        """An answer that is a dictionary; empty where the library says "N/A" in its place."""
        answer = self.call(function, *arguments)
        return answer if isinstance(answer, Mapping) else {}

    def metrics(self) -> Mapping[str, Any]:
        """The firmware's metrics table, read once a tick."""
        if self._metrics is None:
            self._metrics = self.table("amdsmi_get_gpu_metrics_info")
        return self._metrics

    def begin(self) -> None:
        """A new tick."""
        self._metrics = None


def _activity(card: SmiCard) -> Values:
    answer = card.table("amdsmi_get_gpu_activity")
    yield "hw.gpu.utilization", scaled(number(answer.get("gfx_activity")), 0.01), _NONE
    yield "gpu.memory.activity", scaled(number(answer.get("umc_activity")), 0.01), _NONE


def _memory(card: SmiCard) -> Values:
    answer = card.table("amdsmi_get_gpu_vram_usage")
    total, used = number(answer.get("vram_total")), number(answer.get("vram_used"))
    if not total:
        return
    yield "hw.gpu.memory.limit", total * MIB, _NONE
    yield "hw.gpu.memory.usage", scaled(used, MIB), _NONE
    yield "hw.gpu.memory.utilization", scaled(used, 1 / total), _NONE


def _host_visible(card: SmiCard) -> Values:
    used = card.call("amdsmi_get_gpu_memory_usage", card.smi.AmdSmiMemoryType.GTT)
    yield "gpu.memory.host_visible.usage", number(used), _NONE


def _power(card: SmiCard) -> Values:
    answer = card.table("amdsmi_get_power_info")
    watts = first(answer, "current_socket_power", "average_socket_power", "socket_power")
    # No card that answers draws nothing: firmware that does not know says 0.
    yield "hw.power", watts or None, _GPU


def _power_limit(card: SmiCard) -> Values:
    cap = number(card.table("amdsmi_get_power_cap_info").get("power_cap"))
    yield "gpu.power.limit", scaled(cap or None, MICRO), _NONE


def _energy(card: SmiCard) -> Values:
    answer = card.table("amdsmi_get_energy_count")
    ticks = first(answer, "energy_accumulator", "power")
    resolution = number(answer.get("counter_resolution"))
    yield "hw.energy", scaled(ticks, resolution * MICRO if resolution else ENERGY_TICK_J), _GPU


def _die_clocks(card: SmiCard) -> Values:
    """The mean over the dies."""
    card.gives_die_clocks = False
    dies = [clock for clock in _numbers(card.metrics().get("current_gfxclks")) if clock]
    card.gives_die_clocks = bool(dies)
    yield "gpu.clock.sm", sum(dies) / len(dies) if dies else None, _NONE


def _clocks(card: SmiCard) -> Values:
    """The card's one clock where the firmware does not give each die's."""
    kinds = card.smi.AmdSmiClkType
    if not card.gives_die_clocks:
        yield "gpu.clock.sm", _clock(card, kinds.GFX, "clk", "cur_clk"), _NONE
    yield "gpu.clock.memory", _clock(card, kinds.MEM, "clk", "cur_clk"), _NONE


def _highest_clock(card: SmiCard) -> Values:
    yield "gpu.clock.sm.max", _clock(card, card.smi.AmdSmiClkType.GFX, "max_clk"), _NONE


def _clock(card: SmiCard, kind: Any, *keys: str) -> float | None:
    """A clock in MHz; 0 is no clock."""
    return first(card.table("amdsmi_get_clock_info", kind), *keys) or None


def _temperature(metric: str, kind: str, value: str, **labels: str) -> Callable[[SmiCard], Values]:
    def read(card: SmiCard) -> Values:
        types, values = card.smi.AmdSmiTemperatureType, card.smi.AmdSmiTemperatureMetric
        found = number(card.call("amdsmi_get_temp_metric", types[kind], values[value]))
        if found is not None and found >= _MILLIDEGREES_FROM:
            found /= 1000  # before ROCm 6 the answer was in m°C
        yield metric, found or None, labels

    return read


def _throttle(card: SmiCard) -> Values:
    yield from card.residency.look(card.metrics(), time.monotonic_ns())


def _violations(card: SmiCard) -> Values:
    """The reasons right now, of a card whose residency counters are hidden."""
    if card.residency.known:
        return
    answer = card.table("amdsmi_get_violation_status")
    flags = [(answer.get(row.active), row.bit) for row in LIMITERS]
    known = [(flag, bit) for flag, bit in flags if isinstance(flag, bool)]
    bits = {bit for flag, bit in known if flag}
    yield "gpu.throttle.reasons", float(sum(bits)) if known else None, _NONE


def _xgmi(card: SmiCard) -> Values:
    metrics = card.metrics()
    for name, direction in (("xgmi_write_data_acc", "transmit"), ("xgmi_read_data_acc", "receive")):
        links = _numbers(metrics.get(name))
        labels = {"link": "xgmi", "network.io.direction": direction}
        yield "hw.gpu.io", sum(links) * KIB if links else None, labels


def _links(card: SmiCard) -> Values:
    """State of each link: U up, D down; a link that is switched off (X) has none."""
    states = card.table("amdsmi_get_gpu_xgmi_link_status").get("status") or []
    for place, state in enumerate(states):
        yield "gpu.link.up", {"U": 1.0, "D": 0.0}.get(state), {"link": f"xgmi{place}"}


def _link_speed(card: SmiCard) -> Values:
    metrics = card.metrics()
    gigabits, lanes = number(metrics.get("xgmi_link_speed")), number(metrics.get("xgmi_link_width"))
    speed = gigabits * lanes * 1e9 / 8 if gigabits and lanes else None
    yield "gpu.link.speed", speed, {"link": "xgmi"}


def _pcie(card: SmiCard) -> Values:
    answer = card.table("amdsmi_get_pcie_info")
    now, best = answer.get("pcie_metric") or {}, answer.get("pcie_static") or {}
    yield "gpu.pcie.link.width", number(now.get("pcie_width")) or None, _NONE
    yield "gpu.pcie.link.speed", scaled(number(now.get("pcie_speed")) or None, 1e-3), _NONE
    yield "gpu.pcie.link.width.max", number(best.get("max_pcie_width")) or None, _NONE
    yield "gpu.pcie.link.speed.max", scaled(number(best.get("max_pcie_speed")) or None, 1e-3), _NONE
    yield "gpu.pcie.replays", number(now.get("pcie_replay_count")), _NONE
    both = scaled(number(now.get("pcie_bandwidth")), 1e6 / 8)
    yield "gpu.pcie.throughput", both, {"network.io.direction": "both"}


def _errors(card: SmiCard) -> Values:
    answer = card.table("amdsmi_get_gpu_total_ecc_count")
    for key, kind in (("correctable", "corrected"), ("uncorrectable", "uncorrected"), ("deferred", "deferred")):
        yield "hw.errors", number(answer.get(f"{key}_count")), {"error.type": kind, "block": "all"}


def _bad_pages(card: SmiCard) -> Values:
    pages = card.call("amdsmi_get_gpu_bad_page_info")
    yield "gpu.retired_pages", float(len(pages)) if isinstance(pages, list) else None, _NONE


def _fan(card: SmiCard) -> Values:
    yield "hw.fan.speed_ratio", scaled(number(card.call("amdsmi_get_gpu_fan_speed", 0)), 1 / _FAN_STEPS), _NONE


_TIMES = ("gpu.throttle.power.time", "gpu.throttle.thermal.time", "gpu.throttle.brake.time")
_PCIE_METRICS = (
    "gpu.pcie.link.width",
    "gpu.pcie.link.speed",
    "gpu.pcie.link.width.max",
    "gpu.pcie.link.speed.max",
    "gpu.pcie.replays",
    "gpu.pcie.throughput",
)
_CORE = _temperature("hw.temperature", "HOTSPOT", "CURRENT", sensor="core")
_MEMORY = _temperature("hw.temperature", "VRAM", "CURRENT", sensor="memory")
_LIMIT = _temperature("hw.temperature.limit", "HOTSPOT", "CRITICAL", limit="critical")

SMI_ROWS = (
    Row("fast", ("hw.gpu.utilization", "gpu.memory.activity"), _activity),
    Row("fast", ("hw.gpu.memory.usage", "hw.gpu.memory.limit", "hw.gpu.memory.utilization"), _memory),
    Row("fast", ("hw.power",), _power, socket=True),
    Row("fast", ("hw.energy",), _energy, socket=True),
    Row("fast", ("gpu.power.limit",), _power_limit, socket=True),
    Row("fast", ("gpu.clock.sm",), _die_clocks),
    Row("fast", ("gpu.clock.sm", "gpu.clock.memory"), _clocks),
    Row("fast", ("hw.temperature",), _CORE, socket=True),
    Row("fast", ("hw.temperature",), _MEMORY, socket=True),
    Row("fast", _TIMES, _throttle, socket=True),
    Row("fast", ("hw.gpu.io",), _xgmi, socket=True),
    Row("slow", ("gpu.throttle.reasons",), _violations, socket=True),
    Row("slow", ("gpu.clock.sm.max",), _highest_clock),
    Row("slow", ("hw.temperature.limit",), _LIMIT, socket=True),
    Row("slow", ("gpu.memory.host_visible.usage",), _host_visible),
    Row("slow", ("gpu.link.up",), _links, socket=True),
    Row("slow", ("gpu.link.speed",), _link_speed, socket=True),
    Row("slow", _PCIE_METRICS, _pcie, socket=True),
    Row("slow", ("hw.errors",), _errors, socket=True),
    Row("slow", ("gpu.retired_pages",), _bad_pages, socket=True),
    Row("slow", ("hw.fan.speed_ratio",), _fan, socket=True),
)
