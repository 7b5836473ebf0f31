"""A real server for the verbs that read, with a small run in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.store.processes import Server

Post = Callable[..., None]
Record = dict[str, Any]
MS = 1_000_000


def step_of(rank: int, number: int, t0: int, own_ms: int, step_ms: int = 100) -> list[Record]:
    """A step of one rank whose all-reduce begins after `own_ms`; all ranks leave it together."""
    span = {"type": "span", "rank": rank, "step": number}
    begin, end = t0 + own_ms * MS, t0 + (step_ms - 2) * MS
    call = {"group": "dp/0", "seq": number, "bytes": 4096}
    return [
        {**span, "kind": "step", "name": "step", "t0_ns": t0, "t1_ns": t0 + step_ms * MS},
        {**span, "kind": "phase", "name": "forward", "t0_ns": t0, "t1_ns": begin},
        {**span, "kind": "collective", "name": "all_reduce", "t0_ns": begin, "t1_ns": end, "attrs": call},
    ]


def heartbeat(rank: int, t_ns: int, **attrs: Any) -> Record:
    """What an agent says of a rank once a second."""
    event = {"type": "event", "t_ns": t_ns, "kind": "heartbeat", "severity": "info", "text": "", "rank": rank}
    return {**event, "attrs": attrs}


def sample(metric: str, value: float, t_ns: int, **whose: Any) -> Record:
    """One number of a card, process or host."""
    return {"type": "sample", "t_ns": t_ns, "metric": metric, "value": value, **whose}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server process with an empty data folder."""
    with Server(tmp_path_factory.mktemp("served") / "data") as started:
        yield started


@pytest.fixture
def post(server: Server) -> Post:
    """Sends records to a run of the server, describing it the first time."""

    def send(run: str, records: list[Record], **described: Any) -> None:
        with server.client() as client:
            if described:
                assert client.post("/api/v1/runs", json={"run": run, **described}).status_code in (200, 201)
            body = "".join(json.dumps(record) + "\n" for record in records)
            reply = client.post(
                f"/api/v1/runs/{run}/records", content=body, headers={"content-type": "application/x-ndjson"}
            )
            assert reply.json()["rejected"] == []

    return send


@pytest.fixture
def run(post: Post) -> tuple[str, int]:
    """Four ranks on two hosts, five steps; rank 2 computes longest, rank 3 is in a collective. Its id, its end."""
    now = time.time_ns()
    start = now - 600 * MS
    ranks = [
        {"rank": rank, "host": f"host{rank // 2}", "device": f"host{rank // 2}/gpu{rank % 2}", "vendor": "nvidia",
         "model": "H200", "pid": 4711 + rank}
        for rank in range(4)
    ]  # fmt: skip
    records = [
        record
        for number in range(5)
        for rank in range(4)
        for record in step_of(rank, number, start + number * 100 * MS, 90 if rank == 2 else 40)
    ]
    for rank in range(3):
        records.append(heartbeat(rank, now, state="running", phase="backward", step=5))
    waiting = {"group": "dp/0", "seq": 5, "op": "all_reduce", "since_ns": now - 7000 * MS}
    records.append(heartbeat(3, now, state="collective", phase="backward", step=5, **waiting))
    card = {"rank": 0, "host": "host0", "device": "host0/gpu0"}
    records += [
        sample("hw.gpu.utilization", 0.96, now, **card),
        sample("gpu.clock.sm", 1980.0, now, **card),
        sample("hw.power", 612.4, now, labels={"hw.type": "gpu"}, **card),
        sample("hw.gpu.memory.usage", 20.0 * 2**30, now, **card),
        sample("hw.gpu.memory.limit", 140.0 * 2**30, now, **card),
    ]
    # Read a minute ago: what the card does now is not known.
    old = now - 60_000 * MS
    records.append(sample("hw.gpu.utilization", 0.5, old, rank=1, host="host0", device="host0/gpu1"))
    records.append(sample("process.memory.usage", 3.0 * 2**30, now, rank=0, host="host0"))
    for state, size in (("used", 8.0), ("free", 100.0)):
        labels = {"system.memory.state": state}
        records.append(sample("system.memory.usage", size * 2**30, now, host="host0", labels=labels))
    records.append(sample("system.memory.limit", 64.0 * 2**30, now, host="host0"))
    name = f"top-{now}"
    post(name, records, world_size=4, ranks=ranks, groups={"dp": [[0, 1, 2, 3]]}, name="small")
    return name, now
