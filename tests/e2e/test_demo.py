"""The whole way with real processes: training, rings, agents, server, verdict."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lens.ring_reader import RingReader
from lens.slots import COLLECTIVE, PHASE, STEP, iter_records
from lens.store.query import Query
from lens.tables import Tables
from tests.e2e.harness import Demo

pytestmark = [pytest.mark.processes, pytest.mark.timeout(400), pytest.mark.xdist_group("demo")]
Start = Callable[..., Demo]


def stored(data: Path, run: str) -> Tables:
    query = Query.open_folder(data)
    try:
        return query.tables(run)[1]
    finally:
        query.close()


def recorded(data: Path, run: str) -> dict[tuple[int, int], int]:
    """How many records of each (type, rank) the copied rings hold."""
    counts: dict[tuple[int, int], int] = {}
    for path in (data / "rings" / run).rglob("*.ring"):
        reader = RingReader(path)
        rank = reader.about.get("rank")
        while rank is not None and (part := reader.poll()) is not None:
            for record in iter_records(part):
                counts[record["type"], rank] = counts.get((record["type"], rank), 0) + 1
        assert reader.lost == 0
    return counts


def test_a_run_is_seen_live_and_ctrl_c_leaves_nothing(start_demo: Start) -> None:
    demo = start_demo("--steps", "100000")
    run = demo.wait_for_step(30)
    assert (run["world_size"], run["ranks_reporting"], run["state"]) == (4, 4, "live")
    assert run["simulated"] is True
    name = run["run"]

    def losses() -> list[float]:
        of_rank_0 = demo.get(f"/api/v1/runs/{name}/series?metric=train.loss&rank=0")["series"][0]
        return of_rank_0["mean"] if of_rank_0["x"][-1] >= 30 else []

    # Two agents send, each at its own time: a step is stored as soon as one host has told of it.
    loss = demo.wait_for(losses, "the loss of step 30")
    assert loss[-1] < loss[0]
    cards = {"host0/gpu0", "host0/gpu1", "host1/gpu0", "host1/gpu1"}

    def powered() -> set[str]:
        found = demo.get(f"/api/v1/runs/{name}/series?metric=hw.power&axis=time")["series"]
        return {series["device"] for series in found}

    demo.wait_for(lambda: powered() >= cards, "power of the cards")
    assert powered() == cards
    assert len(demo.family()) >= 8
    demo.process.send_signal(signal.SIGINT)
    demo.process.communicate(timeout=200)
    assert demo.process.returncode == 130
    assert demo.family() == {}
    left = [*Path("/dev/shm").glob(f"lens-*/demo-{demo.process.pid}*"), *demo.scratch.rglob("*")]
    assert left == []


def test_a_closed_terminal_leaves_nothing_either(start_demo: Start) -> None:
    demo = start_demo("--steps", "100000")
    demo.wait_for_step(1)
    demo.process.send_signal(signal.SIGHUP)
    demo.process.communicate(timeout=200)
    assert demo.family() == {}


def test_everything_a_killed_rank_had_written_is_stored_and_it_is_named(start_demo: Start) -> None:
    demo = start_demo("--steps", "100000", "--exit", "--json")
    demo.wait_for_step(40)
    os.kill(demo.rank_pid(2), signal.SIGKILL)
    reply = demo.finish()
    verdict = reply["diagnosis"]
    assert verdict["status"] == "failed"
    assert (verdict["hypotheses"][0]["cause"], verdict["hypotheses"][0]["ranks"]) == ("rank_dead", [2])
    assert demo.process.returncode == 1
    tables, rings = stored(demo.data, reply["run"]), recorded(demo.data, reply["run"])
    for rank in range(4):
        steps = int((tables.steps["rank"] == rank).sum())
        phases = int(((tables.spans["kind"] == tables.code("phase")) & (tables.spans["rank"] == rank)).sum())
        closed = int((tables.collectives["rank"] == rank).sum())
        # A span that was open when the rank died is stored too: at most one more of each kind.
        assert 0 <= steps - rings[STEP, rank] <= 1
        assert 0 <= phases - rings[PHASE, rank] <= 1
        assert 0 <= closed - rings[COLLECTIVE, rank] <= 1


def test_a_slow_device_is_named_with_its_cost(start_demo: Start) -> None:
    demo = start_demo("--steps", "120", "--fault", "slow_compute@40:1", "--exit", "--json")
    reply = demo.finish()
    first = reply["diagnosis"]["hypotheses"][0]
    assert (first["cause"], first["ranks"]) == ("slow_device", [1])
    assert 30 <= first["onset_step"] <= 60
    assert first["slowdown_pct"] > 5
    assert first["evidence"]
    assert first["recommendation"]
    assert reply["trainer_exit_code"] == 0


def test_a_server_that_stands_still_for_a_while_loses_and_doubles_nothing(start_demo: Start) -> None:
    demo = start_demo("--steps", "300", "--exit", "--json")
    run = demo.wait_for_step(5)
    server = json.loads((demo.data / "server.json").read_text())["pid"]
    # Stopped and continued, a server is only slow: the agents keep and send again what was not answered.
    os.kill(server, signal.SIGSTOP)
    time.sleep(3)
    os.kill(server, signal.SIGCONT)
    reply = demo.finish()
    tables = stored(demo.data, reply["run"])
    assert run["run"] == reply["run"]
    for rank in range(4):
        steps = sorted(tables.steps["step"][tables.steps["rank"] == rank].tolist())
        assert steps == list(range(steps[0], steps[0] + 300))


def test_a_nan_is_traced_to_its_rank(start_demo: Start) -> None:
    demo = start_demo("--steps", "80", "--fault", "nan@40:3", "--exit", "--json")
    reply = demo.finish()
    first = reply["diagnosis"]["hypotheses"][0]
    assert (reply["diagnosis"]["status"], first["cause"], first["ranks"]) == ("failed", "nan_origin", [3])
    assert first["onset_step"] == 40
    tables = stored(demo.data, reply["run"])
    local = tables.samples["metric"] == tables.code("train.loss.local")
    assert any(math.isnan(value) for value in tables.samples["value"][local].tolist())
