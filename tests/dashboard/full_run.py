"""A synthetic run with everything a page shows: steps, collectives, experts, cards, ports, memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

MS = 1_000_000
STEP_MS = 50
LATE_MS = 6
"""How much later than the others rank 2 enters each collective."""
BYTES = 4096
LIMIT = 8 * 2**30


def run_object(run: str) -> dict[str, Any]:
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


def records(first: int, last: int) -> Iterator[dict[str, Any]]:
    """Everything of steps [first, last)."""
    end = time.time_ns()
    for step in range(first, last):
        begin = end - (last - step) * STEP_MS * 2 * MS
        yield from step_of(step, begin)
        yield from experts_of(step, begin)
        yield from cards_of(step, begin + MS)


def step_of(step: int, begin: int) -> Iterator[dict[str, Any]]:
    """A step with phases, an all-reduce over all ranks and an all-to-all in each expert group."""
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
    yield {"type": "sample", "t_ns": begin, "metric": "train.loss", "value": 5 - math.log1p(step), "rank": 0,
           "step": step}  # fmt: skip


def span(
    where: dict[str, int], kind: str, name: str, begin: int, start: float, stop: float, attrs: Any = None
) -> dict[str, Any]:
    """A span between two times in ms of its step."""
    times = {"t0_ns": begin + int(start * MS), "t1_ns": begin + int(stop * MS)}
    return {"type": "span", "kind": kind, "name": name, **where, **times, **({"attrs": attrs} if attrs else {})}


def experts_of(step: int, t_ns: int) -> Iterator[dict[str, Any]]:
    """Tokens of four experts in two layers: the second sends most to expert 3 and drops some."""
    loads = {0: [32.0, 32.0, 32.0, 32.0], 1: [16.0, 16.0, 16.0, 80.0]}
    for layer, values in loads.items():
        yield {
            "type": "vector", "t_ns": t_ns, "metric": "moe.expert.tokens", "values": values, "rank": 0,
            "step": step, "layer": layer,
        }  # fmt: skip
        for name, amount in (("routed", 128.0), ("dropped", 32.0 * layer)):
            yield {
                "type": "sample", "t_ns": t_ns, "metric": f"moe.tokens.{name}", "value": amount * (step + 1),
                "rank": 0, "step": step, "labels": {"layer": str(layer)},
            }  # fmt: skip


def cards_of(step: int, t_ns: int) -> Iterator[dict[str, Any]]:
    """What cards, ports, hosts and processes report; card host1/gpu1 does not know its power."""
    readings = {
        "hw.gpu.utilization": 0.5, "hw.power": 300.0 + step, "gpu.clock.sm": 1500.0, "gpu.power.limit": 600.0,
        "hw.gpu.memory.usage": LIMIT / 2,
    }  # fmt: skip
    for rank in range(4):
        host = f"host{rank // 2}"
        where = {"type": "sample", "t_ns": t_ns, "rank": rank, "host": host}
        card = {**where, "device": f"{host}/gpu{rank % 2}", "labels": {"simulated": "true"}}
        limit = LIMIT * (1 + rank // 2)
        for metric, value in {**readings, "hw.gpu.memory.limit": limit}.items():
            if not (rank == 3 and metric == "hw.power"):
                yield {**card, "metric": metric, "value": value}
        yield {**where, "metric": "process.memory.usage", "value": (100 + step + rank) * 2.0**20}
    why = {"backend": "amd", "metric": "hw.power", "reason": "unsupported"}
    yield {**card, "metric": "lens.collector.supported", "value": 0.0, "labels": why}
    for host in ("host0", "host1"):
        at = {"type": "sample", "t_ns": t_ns, "host": host}
        port = {**at, "device": f"{host}/mlx5_0"}
        one = {"port": "1", "simulated": "true"}
        yield {**port, "metric": "hw.network.up", "value": 1.0, "labels": one}
        yield {**port, "metric": "hw.network.bandwidth.limit", "value": 50e9, "labels": one}
        for direction, share in (("transmit", 0.01), ("receive", 0.02)):
            labels = {**one, "network.io.direction": direction}
            yield {**port, "metric": "hw.network.bandwidth.utilization", "value": share, "labels": labels}
        used = {"system.memory.state": "used"}
        yield {**at, "metric": "system.memory.usage", "value": (1000 + step) * 2.0**20, "labels": used}
