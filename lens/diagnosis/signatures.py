"""The table of causes: what rises, what falls and what must not move when a rank takes too long.

A new cause is one row. Each expectation adds a log-likelihood ratio against "unexplained", which stands at 0: the
row's weight when the measure moved as expected, minus the miss when it is known not to have, and a small doubt when
nobody measured it. No single measure can settle a case alone beyond its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lens.diagnosis import policy
from lens.diagnosis.scenes import Measure

RISES, FALLS, STILL, NO_MORE = 1, -1, 0, 2
UNMOVED = 0.35
"""Levels below this count as unmoved."""


@dataclass(frozen=True)
class Expect:
    """What a cause does to a measure.

    weight: gain when seen (for STILL: loss when it moved, for NO_MORE: when it rose). miss: loss when known not to
    have happened. unknown: loss when nobody measured it.
    """

    measure: str
    direction: int
    weight: float = 2.0
    miss: float = 2.0
    unknown: float = 0.0

    def gain(self, level: float | None) -> float:
        """Log-likelihood ratio of what was measured."""
        if level is None:
            return -self.unknown
        if self.direction in (STILL, NO_MORE):
            moved = abs(level) if self.direction == STILL else level
            return -self.weight * max(0.0, moved - UNMOVED) / (1 - UNMOVED)
        seen = level * self.direction
        if seen <= UNMOVED:
            return -self.miss * (1 - max(0.0, seen))
        return self.weight * seen


@dataclass(frozen=True)
class Signature:
    """A cause of a rank's excess.

    features: the parts of the step in which the excess may lie. bar: share of what noise could reach that the excess
    must exceed once confirmed; higher where the confirming signal is itself part of the noise.
    """

    cause: str
    features: tuple[str, ...]
    prior: float
    expects: tuple[Expect, ...]
    advice: str
    severity: str = "warning"
    bar: float = policy.CONFIRMED_BAR


def _rises(measure: str, weight: float = 2.0, miss: float = 2.0, unknown: float = 0.0) -> Expect:
    return Expect(measure, RISES, weight, miss, unknown)


def _falls(measure: str, weight: float = 2.0, miss: float = 2.0, unknown: float = 0.0) -> Expect:
    return Expect(measure, FALLS, weight, miss, unknown)


def _still(measure: str, weight: float = 2.5) -> Expect:
    return Expect(measure, STILL, weight)


def _no_more(measure: str, weight: float = 2.5) -> Expect:
    return Expect(measure, NO_MORE, weight)


_NOT_BEHIND_IT = (
    _no_more("throttled", 5.0), _no_more("run_delay", 4.0), _no_more("compute", 1.5), _no_more("size", 3.0),
    _no_more("expert_tokens", 2.0),
)  # fmt: skip
"""Transfers also take longer when a process gets no processor or has more to send: then it is no link."""

SIGNATURES: tuple[Signature, ...] = (
    Signature(
        "slow_device", ("compute",), 0.9,
        (
            _falls("clock", 3.0, 4.0, 0.3), _no_more("thermal_bit", 4.0), _no_more("power_cap_bit", 3.0),
            _no_more("power_brake_bit", 4.0), _no_more("tokens"), _no_more("expert_tokens"), _no_more("seq_sq"),
            _no_more("run_delay", 1.5), _no_more("throttled"), _no_more("gc", 4.0), _no_more("recompiles"),
            _no_more("data", 0.5),
        ),
        "Take {component} out of the job and test it (clock locks, power limit, memory errors), or move {ranks} "
        "to a spare card.",
    ),
    Signature(
        "thermal_throttle", ("compute",), -0.5,
        (
            _rises("thermal_bit", 4.5, 5.0, 3.0), _falls("clock", 1.5, 2.0, 0.3), _rises("temperature", 1.0, 0.5),
            _no_more("power_cap_bit", 1.0), _no_more("tokens"), _no_more("run_delay", 1.5), _no_more("throttled"),
        ),
        "Look at the cooling of {component}: airflow, inlet temperature, dust, a neighbour's exhaust.",
    ),
    Signature(
        "power_cap", ("compute",), -0.5,
        (
            _rises("power_cap_bit", 4.5, 5.0, 3.0), _falls("clock", 1.5, 2.0, 0.3), _no_more("thermal_bit", 2.0),
            _still("temperature", 0.5), _no_more("tokens"), _no_more("run_delay", 1.5), _no_more("throttled"),
        ),
        "Compare the power limit of {component} with its peers' and raise it, or ask who lowered the host's budget.",
    ),
    Signature(
        "power_brake", ("compute",), -1.0,
        (_rises("power_brake_bit", 5.0, 5.0, 3.5), _falls("clock", 1.5, 2.0, 0.3), _no_more("tokens")),
        "Check the power supplies of {component}: the board asked its card to brake.",
    ),
    Signature(
        "ecc_remap", ("compute", "h2d", "host"), -0.5,
        (
            _rises("memory_faults", 5.0, 5.0, 4.0), _still("clock", 1.0), _no_more("tokens"), _no_more("run_delay", 1.0),
            _no_more("throttled", 1.0),
        ),
        "Drain {component} at the next checkpoint, reset it and run its memory diagnostics; replace it when rows keep failing.",
    ),
    Signature(
        "shared_device", ("compute", "h2d", "host"), -0.5,
        (
            _rises("foreign", 5.0, 5.0, 4.0), _no_more("tokens"), _no_more("expert_tokens"), _no_more("thermal_bit", 1.5),
            _no_more("run_delay", 1.0), _no_more("throttled", 1.0),
        ),
        "Find the other process on {component} (nvidia-smi, rocm-smi) and move it, or give the job cards of its own.",
    ),
    Signature(
        "pcie_downgrade", ("h2d", "data", "compute", "host"), -0.5,
        (
            _falls("pcie", 5.0, 5.0, 4.0), _still("clock", 1.5), _no_more("tokens"), _no_more("run_delay", 1.0),
            _no_more("throttled", 1.0),
        ),
        "Reseat {component} or its riser and look at the slot's width and generation (lspci -vv, PCIe replay counters).",
    ),
    Signature(
        "h2d_blocking", ("h2d",), 3.0,
        (
            _no_more("compute", 2.0), _still("pcie", 4.0), _no_more("foreign", 3.0), _no_more("run_delay", 3.0),
            _no_more("throttled", 3.0), _no_more("gc", 2.0), _no_more("tokens", 1.0),
        ),
        "Pin the host memory of {ranks} and copy with non_blocking=True, a batch ahead of the step that needs it.",
    ),
    Signature(
        "hot_expert", ("compute",), -0.5,
        (_rises("expert_tokens", 4.5, 5.0, 3.5), _still("clock"), _no_more("run_delay", 1.0), _no_more("throttled", 1.0)),
        "Balance the router (auxiliary loss, bias, capacity factor) or spread the experts of {ranks} over more cards.",
        bar=1.2,
    ),
    Signature(
        "cpu_contention", ("compute", "data", "h2d", "host", "transfer"), -0.5,
        (
            _rises("run_delay", 4.0, 4.0, 3.0), _no_more("throttled", 3.0), _still("clock", 4.0), _no_more("gc", 2.0),
            _no_more("tokens", 1.0),
        ),
        "Find what else runs on the cores of {ranks} and pin the trainer and its loaders away from it.",
        bar=policy.UNCONFIRMED_BAR,
    ),
    Signature(
        "cpu_quota", ("compute", "data", "h2d", "host", "transfer"), -0.5,
        (_rises("throttled", 5.0, 5.0, 3.5), _still("clock", 2.0)),
        "Raise the CPU quota of the container of {ranks}: it is throttled by its control group.",
    ),
    Signature(
        "slow_dataloader", ("data",), 3.0,
        (
            _no_more("compute", 2.0), _falls("queue", 1.5, 2.0), _no_more("run_delay", 3.0), _no_more("throttled", 3.0),
            _no_more("gc", 2.0),
        ),
        "Give {ranks} more loader workers or faster storage, and look at what its samples cost to prepare.",
    ),
    Signature(
        "python_gc", ("compute", "host", "data", "h2d"), -0.5,
        (_rises("gc", 5.0, 5.0, 4.0), _still("clock", 1.0)),
        "Freeze what lives long (gc.freeze) and collect on a schedule that all ranks share instead of on {ranks} alone.",
    ),
    Signature(
        "recompilation", ("compute",), -0.5,
        (_rises("recompiles", 4.5, 5.0, 4.0), _still("clock", 1.0)),
        "Mark the changing dimension as dynamic or pad it on {ranks}, so that nothing is compiled again.",
    ),
    Signature(
        "logging_overhead", ("host",), -0.5,
        (_rises("logging", 5.0, 5.0, 4.0),),
        "Log less often on {ranks}, or from another thread.",
    ),
    Signature(
        "slow_link", ("transfer",), 1.5,
        (
            _falls("link_rate", 4.0, 0.3), _no_more("port_errors", 4.0), _no_more("wide_pressure", 2.0),
            _no_more("wide", 3.0), _no_more("inside", 5.0), _no_more("latency", 3.0), *_NOT_BEHIND_IT,
        ),
        "Look at the port, cable and switch port of {component} (rate, width, lanes), and move {ranks} off it.",
    ),
    Signature(
        "lossy_link", ("transfer",), -1.0,
        (
            _rises("port_errors", 6.0, 5.0, 3.0), _rises("tail", 0.8, 0.3), _no_more("wide", 1.0),
            _no_more("inside", 5.0), *_NOT_BEHIND_IT,
        ),
        "Clean or replace the cable and transceiver of {component}: what it loses is sent again.",
    ),
    Signature(
        "congestion", ("transfer",), -0.5,
        (
            _rises("wide_pressure", 4.0, 2.5, 0.5), _rises("wide", 2.5, 2.0), _no_more("port_errors", 3.0),
            _no_more("inside", 5.0), _no_more("latency", 2.0), *_NOT_BEHIND_IT,
        ),
        "Look at what else shares {component} and at its buffers (PFC, ECN thresholds, routing).",
    ),
    Signature(
        "high_latency", ("transfer",), -0.5,
        (
            _rises("latency", 4.5, 3.5, 2.5), _rises("wide", 1.5, 1.5), _no_more("port_errors", 3.0),
            _no_more("wide_pressure", 1.5), _no_more("inside", 3.0), *_NOT_BEHIND_IT,
        ),
        "Look for a longer route, a power-saving mode or a polling change on {component}; fuse small collectives.",
    ),
    Signature(
        "transport_fallback", ("transfer",), -1.5,
        (_rises("fallback", 6.0, 6.0, 4.0), _rises("whole", 1.0, 6.0), *_NOT_BEHIND_IT),
        "Check which transport the communication library chose (NCCL_DEBUG=INFO, NCCL_IB_HCA, the RDMA driver): it is "
        "not the fast one.",
    ),
    Signature(
        "scaleup_link_degraded", ("transfer",), 0.5,
        (_rises("inside", 3.0, 6.0), _rises("card_errors", 2.5, 0.3), *_NOT_BEHIND_IT),
        "Look at the card-to-card links of {component} (state, lanes, replay and CRC counters).",
    ),
)  # fmt: skip
UNEXPLAINED_ADVICE = (
    "Profile {ranks} for a few steps and compare it with a peer: nothing that was measured says why it is slower."
)

LOWEST_BAR = min(signature.bar for signature in SIGNATURES)
"""What an excess must exceed of noise whatever confirms it."""
ADVICE = {signature.cause: signature.advice for signature in SIGNATURES}
"""What to do about a cause; those that families notice too are told in the same words."""


@dataclass(frozen=True)
class Explained:
    """A cause weighed against a finding: its probability among the rivals, and what spoke for and against it."""

    cause: str
    probability: float
    signature: Signature | None
    gains: Mapping[str, float]


@dataclass(frozen=True)
class Scored:
    """A cause's log-likelihood ratio against `unexplained`, with what each measure added to it."""

    cause: str
    score: float
    signature: Signature | None
    gains: Mapping[str, float]


def score(feature: str, measures: Mapping[str, Measure]) -> list[Scored]:
    """All causes that can show in this part of the step; `unexplained` is always among them, at 0."""
    rivals = [Scored("unexplained", 0.0, None, {})]
    for signature in SIGNATURES:
        if feature not in signature.features:
            continue
        gains = {e.measure: e.gain(measures[e.measure].level) for e in signature.expects if e.measure in measures}
        rivals.append(Scored(signature.cause, signature.prior + sum(gains.values()), signature, gains))
    return sorted(rivals, key=lambda rival: (-rival.score, rival.cause))


def weigh(feature: str, measures: Mapping[str, Measure]) -> list[Explained]:
    """The causes with their probabilities among each other, likeliest first."""
    rivals = score(feature, measures)
    weights = np.exp(np.array([rival.score for rival in rivals]) - rivals[0].score)
    shares = weights / weights.sum()
    return [
        Explained(rival.cause, float(share), rival.signature, rival.gains)
        for share, rival in zip(shares, rivals, strict=True)
    ]


def confirmed(explained: Explained) -> bool:
    """Whether something besides the self time speaks for an explanation."""
    return any(gain >= 1 for gain in explained.gains.values())
