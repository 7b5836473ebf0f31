"""Faults with real effects, asked for by ``--fault NAME@STEP:RANK`` or ``NAME@STEP:RANKxFACTOR``.

| name | what happens from STEP on, on RANK only | factor |
|---|---|---|
| slow_compute | forward and backward take FACTOR times as long; its simulated card clocks down as much | 2 |
| slow_loader | its loader's workers sleep over each batch, FACTOR times as long as a step took before | 2 |
| nan | the local loss is NaN at STEP, once | - |
| hot_expert | all routers send its experts FACTOR times their even share of tokens; nothing is dropped | 1.8 |
| gc | it makes FACTOR x 15,000 records a step that refer to each other: the collector works long and often | 1 |
| checkpoint | its checkpoints go to a slow disk: each takes as long as FACTOR steps took before | 20 |
| leak | it keeps FACTOR MiB of each step in host memory for ever | 2 |
| thermal | its simulated card is too hot and clocks down, and it computes as slowly as the card says | - |
| collapse | all routers get a bias by which each token goes to the same experts, as many as a token has | 20 |
| stop | its process is stopped (SIGSTOP) for FACTOR seconds, once | 3 |
| quota | its control group gives it 1/FACTOR of the processor time that it used before (needs root) | 2 |
| hog | FACTOR other busy processes run on its core; all ranks are dealt out over the cores in order | 4 |
| link | its interface sends so slowly that a step's bytes take as long as FACTOR steps (`tc`; needs a namespace) | 2 |
| worker_death | a worker of its loader is killed | - |
| killed | its process is killed | - |
| skip | it leaves out one collective | - |
| shape | it calls one collective with fewer numbers than the others | - |
| stuck | it never comes out of its own code | - |

The last ten befall the process (`process_faults`). ``checkpoint@STEP`` without a rank is a slow disk below all ranks;
``collapse@STEP`` needs none. Every rank has experts at the same place of its
expert parallel group as some others, so a hot expert burdens all of these (`Fault.ranks`).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sample_runs.moe.card import Card
from sample_runs.moe.process_faults import ProcessFaults, crowded, stand_still

DEFAULT_FACTORS = {
    "slow_compute": 2.0,
    "slow_loader": 2.0,
    "nan": math.nan,
    "hot_expert": 1.8,
    "gc": 1.0,
    "checkpoint": 20.0,
    "leak": 2.0,
    "thermal": math.nan,
    "collapse": 20.0,
    "stop": 3.0,
    "quota": 2.0,
    "hog": 4.0,
    "link": 2.0,
    "worker_death": math.nan,
    "killed": math.nan,
    "skip": math.nan,
    "shape": math.nan,
    "stuck": math.nan,
}
RECORDS = 15_000
"""Records that the gc fault makes a step: enough for a collection of all generations every few steps."""
ROW_SECONDS = 15e-6
"""Time that a card takes for one row of an expert's work, where experts are to be felt (`Pace.hold`)."""
_DISK_BLOCK_BYTES = 256 * 1024
_MIB = 1024 * 1024
_SPELLING = re.compile(r"(?P<name>\w+)@(?P<step>\d+)(?::(?P<rank>\d+))?(?:x(?P<factor>[\d.]+))?")
_OF_ALL_RANKS = ("checkpoint", "collapse")


@dataclass(frozen=True)
class Fault:
    """One fault: what, from which step, on which rank (None: on all), how strong."""

    name: str
    step: int
    rank: int | None
    factor: float

    @classmethod
    def parse(cls, text: str) -> Fault:
        """The fault that `text` asks for.

        Raises:
            ValueError: not NAME@STEP:RANK, or a name that is not known.
        """
        found = _SPELLING.fullmatch(text)
        if found is None or (found["rank"] is None and found["name"] not in _OF_ALL_RANKS):
            raise ValueError(f"{text!r} is not NAME@STEP:RANK, such as slow_compute@40:1")
        name = found["name"]
        if name not in DEFAULT_FACTORS:
            raise ValueError(f"unknown fault {name!r}; known: {', '.join(DEFAULT_FACTORS)}")
        factor = float(found["factor"]) if found["factor"] else DEFAULT_FACTORS[name]
        return cls(name, int(found["step"]), None if found["rank"] is None else int(found["rank"]), factor)

    def ranks(self, world: int, expert_parallel: int) -> list[int]:
        """Where the cause sits: the ranks that a true verdict names; none where all routers are told the same."""
        if self.name == "collapse":
            return []
        if self.rank is None:
            return list(range(world))
        if self.name == "hog":
            return crowded(self.rank, world)
        if self.name == "hot_expert":
            return list(range(self.rank % expert_parallel, world, expert_parallel))
        return [self.rank]


class Faults:
    """The faults of one rank."""

    def __init__(self, faults: list[Fault], rank: int, batch: int, workers: int, world: int = 1) -> None:
        self._rank = rank
        self._own = {fault.name: fault for fault in faults if fault.rank in (rank, None)}
        # Felt by the routers of all ranks.
        everywhere = {fault.name: fault for fault in faults}
        self.hot_expert, self.collapse = everywhere.get("hot_expert"), everywhere.get("collapse")
        self._process = ProcessFaults(self._own, set(everywhere), rank, world)
        self.pace = Pace(ROW_SECONDS if self.hot_expert else 0.0)
        # Shared with the loader's workers, which prefetch in processes of their own.
        self.sample_seconds = torch.zeros((), dtype=torch.float64).share_memory_()
        self._samples_at_once = batch / max(1, workers)
        self._card = Card.of_this_rank()
        self._began = 0.0
        self._took: list[float] = []
        self._tangles: deque[list[dict[str, Any]]] = deque(maxlen=3)
        self._kept: list[torch.Tensor] = []

    def begin_step(self, step: int) -> None:
        """Let faults that begin at this step take effect."""
        for fault in self._own.values():
            if step == fault.step:
                said = f"fault {fault.name} on rank {self._rank} at step {step}, {time.time():.3f}"
                print(said, file=sys.stderr, flush=True)
        self._learn_pace(step)
        self._process.begin_step(step)
        slow, hot = self._own.get("slow_compute"), self._own.get("thermal")
        if slow and step == slow.step:
            self._card.suffer(clock_factor=1 / slow.factor)
        if hot and step == hot.step:
            self._card.suffer(hot=True)
        stretched = slow.factor if slow and step >= slow.step else 1.0
        self.pace.factor = stretched / self._card.speed()
        if littering := self._active("gc", step):
            self._tangles.append(tangle(round(littering.factor * RECORDS)))
        if leak := self._active("leak", step):
            # Written, not only reserved: memory that nobody has touched is not resident.
            self._kept.append(torch.full((round(leak.factor * _MIB),), step % 256, dtype=torch.uint8))

    def spoil_loss(self, step: int, loss: torch.Tensor) -> torch.Tensor:
        """The loss, made NaN where that was asked for."""
        nan = self._own.get("nan")
        return loss * math.nan if nan and step == nan.step else loss

    def out_of_line(self, step: int, totals: torch.Tensor) -> torch.Tensor | None:
        """What this rank hands to the step's last collective: the totals, too few of them, or nothing at all."""
        if self._begins("stuck", step):
            stand_still()
        if self._begins("skip", step):
            return None
        return totals[:-1].clone() if self._begins("shape", step) else totals

    def slow_loader_from(self) -> int | None:
        """First step whose batch is slow to load; None when the loader keeps its pace."""
        slow = self._own.get("slow_loader")
        return slow.step if slow else None

    def write(self, step: int, path: Path, content: memoryview) -> None:
        """Write a checkpoint to its disk, which may be slow."""
        slow = self._active("checkpoint", step)
        if slow is None:
            path.write_bytes(content)
            return
        write_slowly(path, content, slow.factor * statistics.median(self._took))

    def end(self) -> None:
        """Give the simulated card its health back, and the process its freedom."""
        self._card.recover()
        self._process.end()

    def _begins(self, name: str, step: int) -> bool:
        fault = self._own.get(name)
        return fault is not None and fault.step == step

    def _active(self, name: str, step: int) -> Fault | None:
        fault = self._own.get(name)
        return fault if fault and step >= fault.step else None

    def _learn_pace(self, step: int) -> None:
        """Until its fault begins: how long a step takes here, so that the fault is felt on any machine."""
        now = time.monotonic()
        paced = self._own.get("slow_loader") or self._own.get("checkpoint")
        if paced and 0 < step < max(2, paced.step):
            self._took.append(now - self._began)
            if paced.name == "slow_loader":
                self.sample_seconds.fill_(paced.factor * statistics.median(self._took) / self._samples_at_once)
        self._began = now


class Pace:
    """Stretches this rank's own work by a factor, as a card that has clocked down would.

    Work is the time inside `working` but not inside `paused` (collectives, where a rank waits for others). It is
    stretched before each collective and at the end: the delay arises where the work is done.

    Args:
        row_seconds: time that the card takes for a row of an expert's work, beside the processor's own. Where ranks
            are more than cores, what one rank has less to compute another gets in processor time: without a card's
            time, uneven experts would not be felt.
    """

    def __init__(self, row_seconds: float = 0.0) -> None:
        self.factor = 1.0
        self.row_seconds = row_seconds
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

    def hold(self, rows: int) -> None:
        """Take the card's time for these rows."""
        time.sleep(rows * self.row_seconds)

    def _stretch(self) -> None:
        if self.factor != 1 and self._since:
            worked = time.monotonic_ns() - self._since
            time.sleep((self.factor - 1) * worked / 1e9)


def tangle(records: int) -> list[dict[str, Any]]:
    """Records that know their neighbours on both sides: only the garbage collector can take them away."""
    made: list[dict[str, Any]] = [{"place": place} for place in range(records)]
    for before, after in zip(made, [*made[1:], made[0]], strict=True):
        before["next"], after["previous"] = after, before
    return made


def write_slowly(path: Path, content: memoryview, seconds: float) -> None:
    """Write to a disk that is done with each block before it takes the next, and needs `seconds` for all."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), _DISK_BLOCK_BYTES):
            began = time.monotonic()
            block = content[start : start + _DISK_BLOCK_BYTES]
            file.write(block)
            os.fsync(file.fileno())
            left = seconds * len(block) / len(content) - (time.monotonic() - began)
            time.sleep(max(0.0, left))
