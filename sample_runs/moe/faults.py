"""Faults with real effects, asked for by ``--fault NAME@STEP:RANK`` or ``NAME@STEP:RANKxFACTOR``.

| name | what happens from STEP on, on RANK only | factor |
|---|---|---|
| slow_compute | forward and backward take FACTOR times as long; its simulated card clocks down as much | 2 |
| slow_loader | its loader's workers sleep over each batch, FACTOR times as long as a step took before | 2 |
| nan | the local loss is NaN at STEP, once | - |
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

DEFAULT_FACTORS = {"slow_compute": 2.0, "slow_loader": 2.0, "nan": math.nan}
_SPELLING = re.compile(r"(?P<name>\w+)@(?P<step>\d+):(?P<rank>\d+)(?:x(?P<factor>[\d.]+))?")


@dataclass(frozen=True)
class Fault:
    """One fault: what, from which step, on which rank, how strong."""

    name: str
    step: int
    rank: int
    factor: float

    @classmethod
    def parse(cls, text: str) -> Fault:
        """The fault that `text` asks for.

        Raises:
            ValueError: not NAME@STEP:RANK, or a name that is not known.
        """
        found = _SPELLING.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not NAME@STEP:RANK, such as slow_compute@40:1")
        name = found["name"]
        if name not in DEFAULT_FACTORS:
            raise ValueError(f"unknown fault {name!r}; known: {', '.join(DEFAULT_FACTORS)}")
        factor = float(found["factor"]) if found["factor"] else DEFAULT_FACTORS[name]
        return cls(name, int(found["step"]), int(found["rank"]), factor)


class Faults:
    """The faults of one rank."""

    def __init__(self, faults: list[Fault], rank: int, batch: int, workers: int) -> None:
        self._own = {fault.name: fault for fault in faults if fault.rank == rank}
        self.pace = Pace()
        # Shared with the loader's workers, which prefetch in processes of their own.
        self.sample_seconds = torch.zeros((), dtype=torch.float64).share_memory_()
        self._samples_at_once = batch / max(1, workers)
        self._began = 0.0
        self._took: list[float] = []

    def begin_step(self, step: int) -> None:
        """Let faults that begin at this step take effect."""
        self._learn_pace(step)
        slow = self._own.get("slow_compute")
        if slow and step == slow.step:
            self.pace.factor = slow.factor
            slow_down_card(1 / slow.factor)

    def spoil_loss(self, step: int, loss: torch.Tensor) -> torch.Tensor:
        """The loss, made NaN where that was asked for."""
        nan = self._own.get("nan")
        return loss * math.nan if nan and step == nan.step else loss

    def slow_loader_from(self) -> int | None:
        """First step whose batch is slow to load; None when the loader keeps its pace."""
        slow = self._own.get("slow_loader")
        return slow.step if slow else None

    def _learn_pace(self, step: int) -> None:
        """Until the loader's fault begins: how long a step takes here, so that the fault is felt on any machine."""
        slow = self._own.get("slow_loader")
        now = time.monotonic()
        if slow and 0 < step < slow.step:
            self._took.append(now - self._began)
            seconds = slow.factor * statistics.median(self._took)
            self.sample_seconds.fill_(seconds / self._samples_at_once)
        self._began = now

    def end(self) -> None:
        """Give the simulated card its speed back."""
        if self.pace.factor != 1:
            slow_down_card(1)


class Pace:
    """Stretches this rank's own work by a factor, as a card that has clocked down would.

    Work is the time inside `working` but not inside `paused` (collectives, where a rank waits for others). It is
    stretched before each collective and at the end: the delay arises where the work is done.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._since = 0

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """A stretch of work, such as a forward pass."""
        self._since = time.monotonic_ns()
        yield
        self._stretch()
        self._since = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A collective in between, which no card speed changes."""
        self._stretch()
        yield
        if self._since:
            self._since = time.monotonic_ns()

    def _stretch(self) -> None:
        if self.factor != 1 and self._since:
            worked = time.monotonic_ns() - self._since
            time.sleep((self.factor - 1) * worked / 1e9)


def slow_down_card(factor: float) -> None:
    """Tell the simulation of this rank's card, if there is one, to run its clock at this share of normal."""
    device = os.environ.get("LENS_DEVICE")
    if not device:
        return
    folder = Path(os.environ.get("LENS_RINGS") or f"/dev/shm/lens-{os.getuid()}") / "sim"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    target = folder / f"{device.replace('/', '_')}.fault.json"
    partial = target.with_suffix(".new")
    partial.write_text(json.dumps({"clock_factor": factor}))
    partial.replace(target)
