"""What can go wrong: each fault acts on the state of cards, processes, ports and loaders, and the physics does the rest.

A new fault is one row of `FAULTS`. Strengths are factors where the row says so, else shares of a usual step.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sample_runs.cluster.condition import POWER_BRAKE, POWER_CAP, THERMAL, Condition
from sample_runs.cluster.layout import Layout

MIB = 1024.0**2
_SPELLING = re.compile(r"(?P<name>\w+)@(?P<step>\d+)(?::(?P<rank>\d+))?(?:x(?P<strength>[\d.]+))?")


@dataclass(frozen=True)
class Moment:
    """A step of a fault. rows: its ranks; strength; since: steps since its onset; step_s: seconds of a usual step."""

    rows: list[int]
    strength: float
    since: int
    step_s: float
    random: np.random.Generator


Act = Callable[[Condition, Moment], None]


@dataclass(frozen=True)
class Kind:
    """One fault. cause: the code that is right. where: which ranks it touches (`rows_of`). weak, strong: bounds of its
    strength. act: what it does to the state; None where it is of the layout or ends the run. ends: how it ends it.
    always: since the first step. needs: what the cluster must have. free: whether it costs no time. meaning: what
    happens."""

    cause: str
    where: str
    weak: float
    strong: float
    act: Act | None
    meaning: str
    ends: str = ""
    always: bool = False
    needs: str = ""
    free: bool = False


@dataclass(frozen=True)
class Fault:
    """One fault of a run: what, from which step on, at which rank (or where that rank is), how strong."""

    name: str
    step: int
    rank: int = 0
    strength: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in FAULTS:
            raise ValueError(f"unknown fault {self.name!r}; known: {', '.join(FAULTS)}")
        if not self.strength:
            object.__setattr__(self, "strength", (self.kind.weak + self.kind.strong) / 2)

    @classmethod
    def parse(cls, text: str) -> Fault:
        """The fault that NAME@STEP:RANK or NAME@STEP:RANKxSTRENGTH asks for.

        Raises:
            ValueError: it is not spelt so, or the name is not known.
        """
        found = _SPELLING.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not NAME@STEP:RANK, such as slow_link@40:3")
        return cls(found["name"], int(found["step"]), int(found["rank"] or 0), float(found["strength"] or 0))

    @property
    def kind(self) -> Kind:
        """What is known of this fault."""
        return FAULTS[self.name]

    def rows(self, layout: Layout) -> list[int]:
        """Ranks that it touches, ascending."""
        return rows_of(self.kind.where, self.rank, layout)

    def named(self, layout: Layout) -> list[int]:
        """Ranks that a right verdict names: none where it touches all."""
        return [] if self.kind.where == "all" else self.rows(layout)


def rows_of(where: str, rank: int, layout: Layout) -> list[int]:
    """Ranks of a place: the rank itself, its host, leaf switch, stage, the owners of the same experts, or all."""
    host = layout.host
    same = {
        "rank": np.arange(layout.ranks) == rank,
        "host": host == host[rank],
        "leaf": host // layout.hosts_per_switch == host[rank] // layout.hosts_per_switch,
        "stage": layout.stage == layout.stage[rank],
        "owners": layout.owner == layout.owner[rank],
        "all": np.ones(layout.ranks, bool),
    }[where]
    return [int(row) for row in np.flatnonzero(same)]


def _slow_card(condition: Condition, m: Moment) -> None:
    condition.clock[m.rows] /= m.strength


def _hot_card(condition: Condition, m: Moment) -> None:
    condition.clock[m.rows] /= m.strength
    condition.bits[m.rows], condition.heat_c[m.rows] = THERMAL, 24.0
    condition.power[m.rows] *= 0.85


def _capped(condition: Condition, m: Moment) -> None:
    condition.clock[m.rows] /= m.strength
    condition.bits[m.rows] = POWER_CAP
    # Power goes with about the third power of the clock.
    condition.power[m.rows] *= m.strength**-3


def _braked(condition: Condition, m: Moment) -> None:
    condition.clock[m.rows] /= m.strength
    condition.bits[m.rows], condition.power[m.rows] = POWER_BRAKE, 0.5


def _remapping(condition: Condition, m: Moment) -> None:
    condition.compute[m.rows] *= m.strength
    condition.remapped[m.rows] = 1 + m.since // 12


def _shared_card(condition: Condition, m: Moment) -> None:
    condition.compute[m.rows] *= m.strength
    condition.foreign_bytes[m.rows] = 22e9


def _inside(condition: Condition, m: Moment) -> None:
    condition.inside[m.rows] /= m.strength
    condition.card_errors[m.rows] += m.random.poisson(5, len(m.rows))


def _narrow(condition: Condition, m: Moment) -> None:
    condition.lanes[m.rows] /= m.strength
    condition.h2d[m.rows] *= m.strength


def _pageable(condition: Condition, m: Moment) -> None:
    condition.h2d[m.rows] *= m.strength


def _contended(condition: Condition, m: Moment) -> None:
    condition.off_cpu[m.rows] = np.minimum(condition.off_cpu[m.rows] + m.strength, 0.8)


def _throttled(condition: Condition, m: Moment) -> None:
    condition.quota[m.rows] = m.strength


def _late_data(condition: Condition, m: Moment) -> None:
    condition.data_s[m.rows] += m.strength * m.step_s * np.exp(0.2 * m.random.standard_normal(len(m.rows)))


def _collecting(condition: Condition, m: Moment) -> None:
    if m.since % 4 == 0:
        pause = 4 * m.strength * m.step_s * np.exp(0.1 * m.random.standard_normal(len(m.rows)))
        condition.pause_s[m.rows] += pause
        condition.gc_s[m.rows] += pause


def _leaking(condition: Condition, m: Moment) -> None:
    condition.host_bytes[m.rows] += m.strength * MIB * m.since


def _leaking_card(condition: Condition, m: Moment) -> None:
    condition.device_bytes[m.rows] += m.strength * MIB * m.since


def _fragmented(condition: Condition, m: Moment) -> None:
    condition.reserved_bytes[m.rows] += min(30e9, 1e9 * m.since)
    again = m.random.poisson(0.7, len(m.rows))
    condition.retries[m.rows] += again
    condition.pause_s[m.rows] += again * m.strength * m.step_s


def _swapping(condition: Condition, m: Moment) -> None:
    condition.swapped[m.rows] = m.random.poisson(4000, len(m.rows))
    condition.data_s[m.rows] += 0.5 * m.strength * m.step_s * m.random.exponential(1.0, len(m.rows))
    condition.pause_s[m.rows] += 0.5 * m.strength * m.step_s * m.random.exponential(1.0, len(m.rows))


def _slow_disk(condition: Condition, m: Moment) -> None:
    condition.save[m.rows] *= m.strength


def _logging(condition: Condition, m: Moment) -> None:
    condition.host_s[m.rows] += m.strength * m.step_s
    condition.log_s[m.rows] += m.strength * m.step_s


def _compiling(condition: Condition, m: Moment) -> None:
    again = m.random.random(len(m.rows)) < 0.35
    condition.recompiled[m.rows] += again
    condition.pause_s[m.rows] += again * m.strength * m.step_s


def _long_sequences(condition: Condition, m: Moment) -> None:
    condition.sequence[m.rows] *= np.exp(m.strength * m.random.standard_normal(len(m.rows)))


def _interrupted(condition: Condition, m: Moment) -> None:
    hit = m.random.random(len(m.rows)) < 0.02
    condition.pause_s[m.rows] += hit * m.random.exponential(m.strength * m.step_s, len(m.rows))


def _more_layers(condition: Condition, m: Moment) -> None:
    condition.compute[m.rows] *= m.strength


def _spread_port(condition: Condition, m: Moment) -> None:
    condition.port[m.rows] /= m.strength
    condition.pressed[m.rows] += 0.3


def _renegotiated(condition: Condition, m: Moment) -> None:
    _spread_port(condition, m)
    condition.rate[m.rows] /= m.strength


def _lossy(condition: Condition, m: Moment) -> None:
    condition.loss[m.rows] *= m.strength
    condition.resent[m.rows] += m.random.poisson(25, len(m.rows))


def _crowded(condition: Condition, m: Moment) -> None:
    condition.port[m.rows] /= 1 + (m.strength - 1) * np.exp(0.3 * m.random.standard_normal())
    condition.pressed[m.rows] += 0.3
    condition.told[m.rows] += 120.0


def _long_way(condition: Condition, m: Moment) -> None:
    condition.latency_s[m.rows] += m.strength * m.step_s / 16


def _slow_transport(condition: Condition, m: Moment) -> None:
    condition.port[m.rows] /= m.strength
    condition.fast[m.rows] = 0.0


def _not_a_number(condition: Condition, m: Moment) -> None:
    # One reduction later every rank has it.
    condition.local_loss[m.rows if m.since == 0 else slice(None)] = np.nan
    condition.gradient[:] = np.nan


def _spike(condition: Condition, m: Moment) -> None:
    if m.since < 6:
        condition.local_loss *= m.strength * np.exp(-m.since / 4)


def _corrupt(condition: Condition, m: Moment) -> None:
    condition.gradient[m.rows] *= m.strength


def _odd_card(condition: Condition, m: Moment) -> None:
    condition.compute[m.rows] *= m.strength


def _odd_pause(condition: Condition, m: Moment) -> None:
    condition.host_s[m.rows] += m.strength * m.step_s


def _odd_update(condition: Condition, m: Moment) -> None:
    condition.optimizer[m.rows] += m.strength * 20


def _crowding(condition: Condition, m: Moment) -> None:
    condition.collapse = m.strength * min(1.0, (m.since + 1) / 10)


def _dropping(condition: Condition, m: Moment) -> None:
    condition.dropped = m.strength


def _starved(condition: Condition, m: Moment) -> None:
    condition.dead = (0, m.rows[0])


def _unbalanced(condition: Condition, m: Moment) -> None:
    # By the owner's position, which `simulation` looks up.
    condition.router = {m.rows[0]: m.strength}


FAULTS: dict[str, Kind] = {
    "slow_device": Kind("slow_device", "rank", 1.2, 2.0, _slow_card, "the card's clock stays low, for no reason it tells (factor)"),
    "thermal_throttle": Kind("thermal_throttle", "rank", 1.2, 1.8, _hot_card, "the card is too hot and clocks down (factor)"),
    "power_cap": Kind("power_cap", "host", 1.15, 1.6, _capped, "a host's cards reach a lowered power limit (factor)"),
    "power_brake": Kind("power_brake", "rank", 1.9, 2.1, _braked, "the board halves the card's clock (factor)"),
    "ecc_remap": Kind("ecc_remap", "rank", 1.15, 1.6, _remapping, "memory rows fail and are replaced, Xid 63 (factor)"),
    "shared_device": Kind("shared_device", "rank", 1.3, 2.0, _shared_card, "another process works on the card (factor)"),
    "scaleup_link_degraded": Kind(
        "scaleup_link_degraded", "rank", 10.0, 25.0, _inside, "the card's links to its neighbours fail (factor)", needs="inside",
    ),
    "pcie_downgrade": Kind("pcie_downgrade", "rank", 4.0, 8.0, _narrow, "fewer PCIe lanes: copies to the card take longer (factor)"),
    "h2d_blocking": Kind("h2d_blocking", "all", 8.0, 14.0, _pageable, "all copy from pageable memory and wait for it (factor)"),
    "cpu_contention": Kind("cpu_contention", "rank", 0.2, 0.5, _contended, "others take the rank's cores (share)"),
    "cpu_quota": Kind("cpu_quota", "rank", 0.2, 0.5, _throttled, "the control group's quota stops the process (share)"),
    "slow_dataloader": Kind("slow_dataloader", "rank", 0.15, 0.8, _late_data, "the rank's batches come late"),
    "input_bound": Kind("input_bound", "all", 0.3, 0.8, _late_data, "all ranks' batches come late"),
    "python_gc": Kind("python_gc", "rank", 0.1, 0.3, _collecting, "the collector stops the rank every fourth step"),
    "recompilation": Kind("recompilation", "rank", 0.4, 1.2, _compiling, "shapes change and the compiler works in every third step"),
    "logging_overhead": Kind("logging_overhead", "rank", 0.12, 0.5, _logging, "the rank logs too much between its phases"),
    "memory_leak_host": Kind("memory_leak_host", "rank", 4.0, 12.0, _leaking, "host memory is never given back (MiB a step)", free=True),
    "memory_leak_device": Kind(
        "memory_leak_device", "rank", 40.0, 160.0, _leaking_card, "tensors are kept from step to step (MiB a step)", free=True,
    ),
    "fragmentation": Kind("fragmentation", "rank", 0.1, 0.4, _fragmented, "the allocator empties its cache again and again", free=True),
    "host_swap": Kind("host_swap", "host", 0.2, 0.6, _swapping, "the host swaps"),
    "checkpoint_stall": Kind("checkpoint_stall", "rank", 6.0, 15.0, _slow_disk, "its disk is slow (factor)", needs="saves"),
    "variable_sequence_length": Kind("variable_sequence_length", "all", 0.45, 0.7, _long_sequences, "lengths differ (spread)"),
    "pipeline_imbalance": Kind("pipeline_imbalance", "stage", 1.25, 1.6, _more_layers, "a stage has more layers", always=True, needs="pp"),
    "mixed_vendor_imbalance": Kind("mixed_vendor_imbalance", "all", 1.0, 1.0, None, "cards of two makes", always=True, needs="makes"),
    "hot_expert": Kind("hot_expert", "owners", 1.5, 2.6, _unbalanced, "routers prefer the experts of one owner (factor)"),
    "router_collapse": Kind("router_collapse", "all", 0.65, 0.9, _crowding, "tokens crowd on few experts of every layer (share)"),
    "dead_expert": Kind("dead_expert", "all", 1.0, 1.0, _starved, "one expert of a layer gets nothing", free=True),
    "dropped_tokens": Kind("dropped_tokens", "all", 0.12, 0.35, _dropping, "tokens beyond the capacity are dropped (share)", free=True),
    "slow_link": Kind("slow_link", "rank", 2.5, 6.0, _renegotiated, "a port trained down to a lower rate (factor)", needs="hosts"),
    "lossy_link": Kind("lossy_link", "rank", 3.0, 7.0, _lossy, "a port loses packets, which are sent again (factor)", needs="hosts"),
    "congestion": Kind("congestion", "leaf", 2.0, 4.0, _crowded, "a leaf switch is full (factor)", needs="leaves"),
    "high_latency": Kind("high_latency", "all", 0.6, 2.0, _long_way, "messages between hosts take a longer way", needs="hosts"),
    "transport_fallback": Kind("transport_fallback", "all", 8.0, 16.0, _slow_transport, "bytes take the slow network", needs="hosts"),
    "nan_origin": Kind("nan_origin", "rank", 1.0, 1.0, _not_a_number, "the rank's loss is not a number", free=True),
    "loss_spike": Kind("loss_spike", "all", 9.0, 20.0, _spike, "the loss of all ranks jumps (factor)", free=True),
    "silent_corruption": Kind("silent_corruption", "rank", 2.5, 6.0, _corrupt, "the card computes wrong gradients (factor)", free=True),
    "rank_dead": Kind("rank_dead", "rank", 1.0, 1.0, None, "the process is killed", ends="killed", free=True),
    "out_of_memory": Kind("out_of_memory", "rank", 1.0, 1.0, None, "an allocation on the card fails", ends="memory", free=True),
    "dataloader_worker_death": Kind("dataloader_worker_death", "rank", 1.0, 1.0, None, "a worker is killed", ends="worker", free=True),
    "rank_stuck": Kind("rank_stuck", "rank", 1.0, 1.0, None, "the process loops outside of any collective", ends="stuck", free=True),
    "process_stopped": Kind("process_stopped", "rank", 1.0, 1.0, None, "the process is stopped (SIGSTOP)", ends="stopped", free=True),
    "collective_mismatch": Kind("collective_mismatch", "rank", 1.0, 1.0, None, "it skips a call", ends="skipped", needs="dp", free=True),
    "jitter_amplification": Kind(
        "jitter_amplification", "all", 0.5, 1.5, _interrupted, "each of many ranks is interrupted now and then", always=True, needs="many",
    ),
    "odd_card": Kind("unexplained", "rank", 1.25, 1.8, _odd_card, "the card computes slower and nothing it tells says why (factor)"),
    "odd_pause": Kind("unexplained", "rank", 0.15, 0.5, _odd_pause, "the rank waits for a lock between its phases"),
    "odd_update": Kind("unexplained", "rank", 0.2, 0.4, _odd_update, "the rank's optimizer takes longer"),
}  # fmt: skip
"""Every fault by name. `odd_…` are faults for which there is no code: the right verdict is `unexplained`."""
