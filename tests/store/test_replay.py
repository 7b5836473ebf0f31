"""The same records sent to a real server in other ways: in order, in disorder, all at once, again and again."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lens.diagnosis import diagnose
from sample_runs.cluster import emit
from sample_runs.cluster.faults import Fault
from sample_runs.cluster.layout import Layout
from sample_runs.cluster.simulation import Cluster, simulate

from .processes import Server

FAULTS = (Fault("slow_device", 20, 3, 1.8), Fault("ecc_remap", 35, 2, 1.4))
CLUSTER = Cluster(Layout(4, ep=2), steps=60, noise="spiky", faults=FAULTS, seed=3, name="recorded")
"""Its steps take twenty seconds by their own clock: through a server they go in a second, or in however long it takes."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("replay") / "data") as started:
        yield started


class Sender:
    """Sends lines of records to a run; a batch is told by its sequence number."""

    def __init__(self, client: httpx.Client, run: str) -> None:
        self.client, self.run = client, run
        assert client.post("/api/v1/runs", json={**CLUSTER.run(), "run": run}).status_code == 201

    def send(self, lines: list[str], source: str, sequence: int) -> None:
        reply = self.client.post(
            f"/api/v1/runs/{self.run}/records",
            content="\n".join(lines),
            headers={"content-type": "application/x-ndjson", "lens-source": source, "lens-sequence": str(sequence)},
        )  # fmt: skip
        assert reply.json()["rejected"] == []

    def verdict(self) -> dict[str, Any]:
        reply: dict[str, Any] = self.client.get(f"/api/v1/runs/{self.run}/diagnosis").json()
        return {**reply, "run": CLUSTER.name}


@pytest.mark.processes
def test_however_the_records_come_the_verdict_is_that_of_the_file(server: Server, tmp_path: Path) -> None:
    tables = simulate(CLUSTER).tables
    lines = [json.dumps(record) for record in emit.records(tables)]
    expected = diagnose(CLUSTER.run(), tables)
    assert [(item["cause"], item["ranks"]) for item in expected["hypotheses"][:2]] == [
        ("slow_device", [3]),
        ("ecc_remap", [2]),
    ]
    mixed = random.Random(5).sample(lines, len(lines))
    with server.client() as client:
        at_once = Sender(client, "at-once")
        at_once.send(lines, "file", 1)
        assert at_once.verdict() == expected

        # As agents that lost the reply send: each batch again, and by another agent too.
        again = Sender(client, "again")
        size = -(-len(mixed) // 4)
        for sequence, start in enumerate(range(0, len(mixed), size), 1):
            for source in ("first", "first", "second"):
                again.send(mixed[start : start + size], source, sequence)
            if sequence == 2:
                again.verdict()  # what was asked meanwhile does not change what is answered later
        assert again.verdict() == expected
