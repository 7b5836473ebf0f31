"""The state of every rank's card, process, port and loader in one step: healthy, and then what faults make of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
POWER_CAP, THERMAL, POWER_BRAKE = 0x4, 0x40, 0x80
"""Bits of the throttle reasons, NVML's for every vendor."""


@dataclass
class Condition:
    """One step's state; arrays are over ranks, factors are 1 and amounts 0 while nothing is wrong.

    The physics reads: clock (factor on the card's speed), compute (factor on its time), data_s, h2d (factor), host_s
    (outside of all phases), pause_s (inside forward), optimizer (factor), off_cpu and quota (share of its time that a
    process is kept from the processors, by others or by its quota), tokens and sequence (factors), port (factor on
    bandwidth), loss (factor on transfers, at random moments), latency_s (of every message that leaves a host),
    inside (factor on the bandwidth between the cards of a host), save (factor on checkpoints).
    The sensors read besides: bits, heat_c, power (factor), gc_s, log_s, recompiled, host_bytes, device_bytes,
    reserved_bytes, retries, resent, pressed (share of its time that a port waits for room), told (congestion
    notifications a second), card_errors, rate (factor on the port's nominal rate), fast (whether bytes take the fast
    ports), foreign_bytes (device memory of another process), lanes (factor on PCIe lanes), remapped, swapped.
    """

    ranks: int
    clock: Floats = field(init=False)
    compute: Floats = field(init=False)
    h2d: Floats = field(init=False)
    optimizer: Floats = field(init=False)
    tokens: Floats = field(init=False)
    sequence: Floats = field(init=False)
    port: Floats = field(init=False)
    loss: Floats = field(init=False)
    inside: Floats = field(init=False)
    save: Floats = field(init=False)
    power: Floats = field(init=False)
    rate: Floats = field(init=False)
    fast: Floats = field(init=False)
    lanes: Floats = field(init=False)
    local_loss: Floats = field(init=False)
    gradient: Floats = field(init=False)
    data_s: Floats = field(init=False)
    host_s: Floats = field(init=False)
    pause_s: Floats = field(init=False)
    off_cpu: Floats = field(init=False)
    quota: Floats = field(init=False)
    latency_s: Floats = field(init=False)
    bits: Floats = field(init=False)
    heat_c: Floats = field(init=False)
    gc_s: Floats = field(init=False)
    log_s: Floats = field(init=False)
    recompiled: Floats = field(init=False)
    host_bytes: Floats = field(init=False)
    device_bytes: Floats = field(init=False)
    reserved_bytes: Floats = field(init=False)
    retries: Floats = field(init=False)
    resent: Floats = field(init=False)
    pressed: Floats = field(init=False)
    told: Floats = field(init=False)
    card_errors: Floats = field(init=False)
    foreign_bytes: Floats = field(init=False)
    remapped: Floats = field(init=False)
    swapped: Floats = field(init=False)
    router: dict[int, float] = field(default_factory=dict)
    """Factor on the tokens that routers send to the experts of an owner (its position in the ep group)."""
    collapse: float = 0.0
    """Share of all tokens that crowd on the first experts of every layer."""
    dead: tuple[int, int] | None = None
    """Layer and expert that get nothing."""
    dropped: float = 0.0
    """Share of the routed tokens beyond the capacity, more than usual."""

    FACTORS = (
        "clock", "compute", "h2d", "optimizer", "tokens", "sequence", "port", "loss", "inside", "save", "power",
        "rate", "fast", "lanes", "local_loss", "gradient",
    )  # fmt: skip
    AMOUNTS = (
        "data_s", "host_s", "pause_s", "off_cpu", "quota", "latency_s", "bits", "heat_c", "gc_s", "log_s",
        "recompiled", "host_bytes", "device_bytes", "reserved_bytes", "retries", "resent", "pressed", "told",
        "card_errors", "foreign_bytes", "remapped", "swapped",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in self.FACTORS:
            setattr(self, name, np.ones(self.ranks))
        for name in self.AMOUNTS:
            setattr(self, name, np.zeros(self.ranks))
