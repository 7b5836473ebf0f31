"""A synthetic run with collectives, experts, cards and memory, for the pages that show them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

MS = 1_000_000
STEP_MS = 50
LATE_MS = 6
"""How much later than the others rank 2 enters each collective."""
BYTES = 4096
LIMIT = 8 * 2**30


def run_object(run: str, limited: bool = True) -> dict[str, Any]:
    """Four ranks on two hosts, of two vendors."""
    vendors = [("nvidia", "H200"), ("amd", "MI455X")]
    ranks = [
        {"rank": rank, "host": f"host{rank // 2}", "device": f"host{rank // 2}/gpu{rank % 2}",
         "vendor": vendors[rank // 2][0], "model": vendors[rank // 2][1], "simulated": True}
        for rank in range(4)
    ]  # fmt: skip
    return {
        "run": run, "name": run, "world_size": 4, "ranks": ranks, "groups": {"ep": [[0, 1], [2, 3]]},
        "experts": {"layers": 2, "experts": 4, "top_k": 2}, "simulated": True,
    }  # fmt: skip


def steps(first: int, last: int) -> Iterator[dict[str, Any]]:
    """Steps with phases, an all-reduce over all ranks and an all-to-all in each expert group."""
    end = time.time_ns()
    for step in range(first, last):
        begin = end - (last - step) * STEP_MS * 2 * MS
        for rank in range(4):
            late = LATE_MS if rank == 2 else 0
            where = {"rank": rank, "step": step}
            yield span(where, "step", "step", begin, 0, STEP_MS, {"tokens": 128})
            yield span(where, "phase", "forward", begin, 0, 20)
            yield span(where, "phase", "backward", begin, 20, 45)
            pair = {"group": f"ep/{rank // 2}", "seq": step, "bytes": BYTES, "phase": "forward"}
            yield span(where, "collective", "all_to_all", begin, 2 + late, 12, pair)
            everyone = {"group": "world/0", "seq": step, "bytes": BYTES, "phase": "backward"}
            yield span(where, "collective", "all_reduce", begin, 30 + late, 40, everyone)


def span(
    where: dict[str, int], kind: str, name: str, begin: int, start: int, stop: int, attrs: Any = None
) -> dict[str, Any]:
    """A span between two times in ms of its step."""
    times = {"t0_ns": begin + start * MS, "t1_ns": begin + stop * MS}
    return {"type": "span", "kind": kind, "name": name, **where, **times, **({"attrs": attrs} if attrs else {})}
