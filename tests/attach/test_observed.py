"""A process that lens does not enter is measured from outside, and nothing is claimed of its steps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lens.attach.facts import look
from lens.slots import COLLECTIVE, PHASE, STEP
from tests.collectors.agent_harness import Host, StubServer
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

BUSY = "print('here', flush=True)\nwhile True: sum(range(1000))"


@pytest.fixture
def server() -> Iterator[StubServer]:
    stub = StubServer()
    yield stub
    stub.close()


@pytest.fixture
def host(tmp_path: Path, server: StubServer) -> Iterator[Host]:
    made = Host(tmp_path, server)
    yield made
    made.close()


def attach(host: Host, *words: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "lens", "attach", *words, "--json"], capture_output=True, text=True, timeout=100,
        env=host.environment(LENS_AGENT="0"),
    )  # fmt: skip
    assert done.stdout, done.stderr
    reply: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return reply


def test_an_observed_process_is_measured_to_its_end_and_has_no_steps(host: Host, server: StubServer) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, env=host.environment(RANK="3", WORLD_SIZE="4")
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        reply = attach(host, "--observe", str(child.pid), "--run", "r1")
        (found,) = reply["processes"]  # type: ignore[misc]
        assert (found["state"], found["rank"], found["stopped_ms"]) == ("observed", 3, None)
        agent = host.agent()
        wait_for(
            lambda: {metric for metric, *_ in server.samples()} >= {"process.memory.usage", "process.cpu.time"}
        )
        assert look(child.pid).tracer == 0
        child.kill()
    host.all_shipped_by(agent)
    about = server.runs["r1"]
    assert about["config"] == {"observed": "from outside"}
    assert (about["world_size"], [rank["rank"] for rank in about["ranks"]]) == (4, [3])
    resident = [value for metric, value, _, _ in server.samples() if metric == "process.memory.usage"]
    assert min(resident) > 1_000_000
    assert not [record for record in server.records() if record["type"] in (STEP, PHASE, COLLECTIVE)]
    assert all("step" not in beat["attrs"] for beat in server.events("heartbeat"))
    (end,) = server.events("process.exit")
    assert end["rank"] == 3


def test_a_refusal_offers_what_can_be_had_from_outside(host: Host) -> None:
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        try:
            refused = attach(host, str(sleeper.pid))
            assert f"lens attach --observe {sleeper.pid}" in str(refused["hint"])
        finally:
            sleeper.kill()
    gone = attach(host, "--observe", str(sleeper.pid))
    assert "no living process" in str(gone["error"])
    assert "--observe" not in str(gone["hint"])
