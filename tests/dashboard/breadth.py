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


def experts(first: int, last: int) -> Iterator[dict[str, Any]]:
    """Tokens of four experts in two layers: the second sends most to expert 3 and drops some."""
    loads = {0: [32.0, 32.0, 32.0, 32.0], 1: [16.0, 16.0, 16.0, 80.0]}
    end = time.time_ns()
    for step in range(first, last):
        at = end - (last - step) * STEP_MS * 2 * MS
        for layer, values in loads.items():
            yield {
                "type": "vector", "t_ns": at, "metric": "moe.expert.tokens", "values": values, "rank": 0,
                "step": step, "layer": layer,
            }  # fmt: skip
            for name, amount in (("routed", 128.0), ("dropped", 32.0 * layer)):
                yield {
                    "type": "sample", "t_ns": at, "metric": f"moe.tokens.{name}", "value": amount * (step + 1),
                    "rank": 0, "step": step, "labels": {"layer": str(layer)},
                }  # fmt: skip


def cards(steps: int) -> Iterator[dict[str, Any]]:
    """What cards, hosts and processes report; card host1/gpu1 does not know its power."""
    end = time.time_ns()
    readings = {
        "hw.gpu.utilization": 0.5, "hw.power": 300.0, "gpu.clock.sm": 1500.0, "hw.gpu.memory.usage": LIMIT / 2,
        "hw.gpu.memory.limit": LIMIT, "gpu.power.limit": 600.0,
    }  # fmt: skip
    for step in range(steps):
        t_ns = end - (steps - step) * STEP_MS * 2 * MS + MS
        for rank in range(4):
            host = f"host{rank // 2}"
            where = {"type": "sample", "t_ns": t_ns, "rank": rank, "host": host}
            card = {**where, "device": f"{host}/gpu{rank % 2}", "labels": {"simulated": "true"}}
            for metric, value in readings.items():
                if not (rank == 3 and metric == "hw.power"):
                    yield {**card, "metric": metric, "value": value + rank}
            yield {**where, "metric": "process.memory.usage", "value": (100 + step) * 2.0**20}
    why = {"backend": "amd", "metric": "hw.power", "reason": "unsupported"}
    yield {**card, "metric": "lens.collector.supported", "value": 0.0, "labels": why}
