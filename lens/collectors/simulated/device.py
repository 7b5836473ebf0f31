"""The model of one card: what the run does goes in, what sensors would show comes out.

utilisation = busy time by window, communication counted as busy · tensor = FLOPs by window and peak · power =
idle + (board − idle) · (.78 compute + .28 communication + .25 copy + .3 tensor), capped · energy = ∫ power ·
temperature first order · clock under a cap ∝ (cap / wanted)^(1/2.2), in 15 MHz steps · throttle bits and times from
the same state. The coefficients are estimates. Deterministic: the same work gives the same readings.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lens.collectors.simulated.profiles import CardProfile

IDLE, POWER_CAP, SOFTWARE_HEAT, HARDWARE_HEAT, POWER_BRAKE = 0x1, 0x4, 0x20, 0x40, 0x80
KINDS = ("compute", "comm", "copy")
WINDOW_S = 1.0
AMBIENT_CELSIUS, HEAT_TAU_S = 30.0, 8.0
CONTEXT_BYTES = 600 * 1024 * 1024
RESERVED_BYTES = 600 * 1024 * 1024
MEMORY_SCALE = 64
"""Bytes of card memory that stand for one byte of the toy's process memory."""
TOY_PEAK_FLOPS = 5e9
"""FLOP/s of a toy rank on its core that count as the card's full tensor rate."""
_POWER_SHARE = {"compute": 0.78, "comm": 0.28, "copy": 0.25}
_TENSOR_POWER_SHARE = 0.3
_DRAM_SHARE = {"compute": 0.45, "comm": 0.10, "copy": 0.20}
_CLOCK_STEP_MHZ = 15
_MINIMUM_CLOCK_SHARE = 0.4
_BUSY = 0.01


@dataclass(frozen=True)
class Faults:
    """What is wrong with a card, as written into its fault file."""

    clock_factor: float = 1.0
    power_cap_w: float | None = None
    clock_lock_mhz: float | None = None
    hot: bool = False
    power_brake: bool = False
    lost: bool = False
    ecc_corrected: int = 0
    ecc_uncorrected: int = 0
    xid: int | None = None
    nvlink_down: tuple[int, ...] = ()
    pcie_width: int | None = None

    @classmethod
    def from_file(cls, content: Mapping[str, Any]) -> Faults:
        """Faults from the JSON of a fault file; unknown keys are passed over."""
        known = {key: value for key, value in content.items() if key in cls.__dataclass_fields__}
        if "nvlink_down" in known:
            known["nvlink_down"] = tuple(known["nvlink_down"])
        return cls(**known)


@dataclass
class _Tick:
    seconds: float
    busy: dict[str, float]
    flops: float


@dataclass
class Totals:
    """What only grows: the counters of the card, in SI units."""

    seconds: float = 0.0
    compute_s: float = 0.0
    busy_s: float = 0.0
    tensor_s: float = 0.0
    """Seconds at full tensor rate that the FLOPs done amount to."""
    dram_s: float = 0.0
    energy_j: float = 0.0
    power_throttle_s: float = 0.0
    thermal_throttle_s: float = 0.0
    brake_s: float = 0.0
    nvlink_transmit: float = 0.0
    nvlink_receive: float = 0.0
    pcie_transmit: float = 0.0
    pcie_receive: float = 0.0
    network_transmit: float = 0.0
    network_receive: float = 0.0


@dataclass
class SimDevice:
    """One simulated card. `work` feeds it, `advance` moves its time on."""

    profile: CardProfile
    uuid: str
    index: int = 0
    faults: Faults = field(default_factory=Faults)
    memory_used: int = 0
    processes: list[tuple[int, int]] = field(default_factory=list)
    """(pid, bytes) of the ranks on this card."""

    def __post_init__(self) -> None:
        self.totals = Totals()
        self.power_w = self.profile.idle_w
        self.clock_mhz: float = self.profile.idle_mhz
        self.celsius = AMBIENT_CELSIUS
        self.throttle = IDLE
        self.utilization = 0.0
        self.dram = 0.0
        self.tensor: float | None = None
        self.speed_factor = 1.0
        self._pending = dict.fromkeys(KINDS, 0.0)
        self._pending_flops: float | None = None
        self._ticks: deque[_Tick] = deque()
        self._now_ns: int | None = None

    def work(self, kind: str, seconds: float, flops: float | None = None) -> None:
        """Add busy time of a kind (compute, comm, copy) and FLOPs done, to be spent as time goes on."""
        self._pending[kind] += seconds
        if flops is not None:
            self._pending_flops = (self._pending_flops or 0.0) + flops

    def transfer(self, link: str, transmit: float, receive: float) -> None:
        """Add bytes over ``nvlink``, ``pcie`` or ``network``, the network card beside this one."""
        for direction, size in (("transmit", transmit), ("receive", receive)):
            name = f"{link}_{direction}"
            setattr(self.totals, name, getattr(self.totals, name) + size)

    def use_memory(self, processes: list[tuple[int, int]]) -> None:
        """Set the processes on the card and the bytes (of the toy) each holds."""
        scaled = [(pid, CONTEXT_BYTES + size * MEMORY_SCALE) for pid, size in processes]
        room = self.profile.memory_bytes - RESERVED_BYTES
        self.memory_used = min(room, sum(size for _, size in scaled))
        self.processes = scaled

    def advance(self, now_ns: int) -> None:
        """Let time go on to `now_ns` (CLOCK_MONOTONIC)."""
        before, self._now_ns = self._now_ns, now_ns
        if before is None or now_ns <= before:
            return
        seconds = (now_ns - before) * 1e-9
        self._ticks.append(self._spend(seconds))
        while len(self._ticks) > 1 and sum(t.seconds for t in self._ticks) - self._ticks[0].seconds >= WINDOW_S:
            self._ticks.popleft()
        window = sum(tick.seconds for tick in self._ticks)
        shares = {kind: sum(tick.busy[kind] for tick in self._ticks) / window for kind in KINDS}
        self.utilization = min(1.0, sum(shares.values()))
        self.dram = min(1.0, sum(_DRAM_SHARE[kind] * share for kind, share in shares.items()))
        if self._pending_flops is not None:
            peak = self.profile.flops["bf16"]
            done = sum(tick.flops for tick in self._ticks) * peak / TOY_PEAK_FLOPS
            self.tensor = min(1.0, done / window / peak)
        self._set_temperature(seconds)
        self._set_power_and_clock(shares, seconds)
        self._count(seconds, shares)

    def _spend(self, seconds: float) -> _Tick:
        """Take from what is pending as much as fits into this stretch of time; the rest stays for the next."""
        busy, room = {}, seconds
        for kind in KINDS:
            busy[kind] = min(room, self._pending[kind])
            # Two ranks on one card can ask for more than its time; what waits longer than a window is let go.
            self._pending[kind] = min(WINDOW_S, self._pending[kind] - busy[kind])
            room -= busy[kind]
        flops, self._pending_flops = self._pending_flops or 0.0, None if self._pending_flops is None else 0.0
        return _Tick(seconds, busy, flops)

    def _set_power_and_clock(self, shares: Mapping[str, float], seconds: float) -> None:
        profile, faults = self.profile, self.faults
        load = sum(_POWER_SHARE[kind] * share for kind, share in shares.items())
        load += _TENSOR_POWER_SHARE * (self.tensor or 0.0)
        wanted = profile.idle_w + (profile.board_w - profile.idle_w) * min(1.1, load)
        busy = self.utilization > _BUSY
        highest = profile.max_mhz if busy else profile.idle_mhz
        clock, self.throttle = highest, 0 if busy else IDLE
        cap = min(profile.board_w, faults.power_cap_w or math.inf)
        if wanted > cap:
            clock *= max(_MINIMUM_CLOCK_SHARE, (cap / wanted) ** (1 / 2.2))
            wanted, self.throttle = cap, self.throttle | POWER_CAP
            self.totals.power_throttle_s += seconds
        if self.celsius >= profile.slowdown_celsius:
            clock, wanted = min(clock, 0.6 * profile.max_mhz), min(wanted, 0.7 * profile.board_w)
            self.throttle |= SOFTWARE_HEAT | HARDWARE_HEAT
            self.totals.thermal_throttle_s += seconds
        if faults.power_brake:
            clock, self.throttle = 0.5 * clock, self.throttle | POWER_BRAKE
            self.totals.brake_s += seconds
        if faults.clock_lock_mhz is not None:
            clock = min(clock, faults.clock_lock_mhz)
        # What the trainer may obey: only slow-downs that began in the card. The clock factor began in the trainer.
        self.speed_factor = clock / highest
        clock *= faults.clock_factor if busy else 1.0
        self.clock_mhz = round(clock / _CLOCK_STEP_MHZ) * _CLOCK_STEP_MHZ
        self.power_w = wanted

    def _set_temperature(self, seconds: float) -> None:
        goal = AMBIENT_CELSIUS + 49.0 * self.power_w / self.profile.board_w
        self.celsius += (goal - self.celsius) * (1 - math.exp(-seconds / HEAT_TAU_S))
        if self.faults.hot:
            self.celsius = max(self.celsius, self.profile.slowdown_celsius + 2)

    def _count(self, seconds: float, shares: Mapping[str, float]) -> None:
        totals = self.totals
        totals.seconds += seconds
        totals.compute_s += shares["compute"] * seconds
        totals.busy_s += self.utilization * seconds
        totals.tensor_s += (self.tensor or 0.0) * seconds
        totals.dram_s += self.dram * seconds
        totals.energy_j += self.power_w * seconds
