"""How a run ends that does not finish: what the agents see of the rank that stands, and of those that wait for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sample_runs.cluster.condition import Floats
from sample_runs.cluster.faults import Fault
from sample_runs.cluster.layout import Layout
from sample_runs.cluster.writer import Writer

WATCHED_S = 45
"""Seconds for which agents go on after the last progress."""
NOTICED_S = 2.0
"""A broken connection is noticed by its other side within this time."""
ERROR = 2
STACK = ["train.py:88 in main", "train.py:41 in wait_for_token"]
MESSAGES = {
    "memory": ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB"),
    "worker": ("RuntimeError", "DataLoader worker (pid 4242) is killed by signal: Killed."),
}
BROKEN = (
    "DistBackendError",
    "NCCL error: remote process exited or there was a network error; connection closed by peer",
)


def tell(
    fault: Fault, layout: Layout, writer: Writer, stamp: Callable[..., NDArray[np.int64]], begun: Floats, before: Floats, step: int,
) -> None:  # fmt: skip
    """Events and heartbeats after a rank went no further in a step; begun, before: when each rank began the step, and
    where its clock stood as the fault struck."""
    ranks = layout.ranks
    struck = float(before[fault.rank])
    hosts = writer.codes(layout.host_name(rank) for rank in range(ranks))
    if fault.kind.ends in ("killed", *MESSAGES):
        _die(fault, layout, writer, stamp, struck, step)
        return
    for second in range(int(struck) + 1, int(struck) + WATCHED_S):
        attrs = [
            {"state": "collective", "step": step} if rank != fault.rank else _state(fault, step)
            for rank in range(ranks)
        ]
        codes = np.array([writer.code(json.dumps(one, separators=(",", ":"), sort_keys=True)) for one in attrs])
        when = stamp(np.full(ranks, float(second)))
        writer.add(
            "events", ranks, kind="heartbeat", text="heartbeat", rank=np.arange(ranks), host=hosts, attrs=codes, t_ns=when,
        )  # fmt: skip


def _state(fault: Fault, step: int) -> dict[str, object]:
    """What the agent sees the rank do."""
    if fault.kind.ends == "skipped":
        return {"state": "collective", "step": step}
    if fault.kind.ends == "stopped":
        return {"state": "stopped", "step": step}
    return {"state": "running", "step": step, "stack": STACK}


def _die(
    fault: Fault, layout: Layout, writer: Writer, stamp: Callable[..., NDArray[np.int64]], struck: float, step: int
) -> None:
    """The process ends; the others fail as their connections break."""
    random = np.random.default_rng([fault.rank, fault.step])
    noticed = struck + NOTICED_S * (0.1 + random.random(layout.ranks))
    noticed[fault.rank] = struck
    when = stamp(noticed)
    for rank in range(layout.ranks):
        about: dict[str, Any] = {"rank": rank, "host": layout.host_name(rank)}
        told = MESSAGES.get(fault.kind.ends) if rank == fault.rank else BROKEN
        if told is None:
            writer.event("process.exit", int(when[rank]), ERROR, attrs={"signal": 9}, **about)
            continue
        name, message = told
        writer.event("process.error", int(when[rank]), ERROR, message, {"type": name, "message": message}, **about)
        writer.event("process.exit", int(when[rank]) + 50_000_000, ERROR, attrs={"exit_code": 1}, **about)
