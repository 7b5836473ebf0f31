"""The agent as a process of its own: everything arrives once, whatever happens to it or to the others."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lens import catalogue
from lens.ring_reader import RingReader
from lens.slots import SLOT_BYTES, STEP, iter_records
from tests.collectors.agent_harness import BREAK, LOSE_REPLY, ROOT, Host, Request, StubServer
from tests.waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.processes


def written(host: Host, run: str = "r1") -> dict[int, bytes]:
    """What the writer wrote, from the copy of its ring."""
    (path,) = (host.folder / "data/rings" / run).glob("*/main.ring")
    reader = RingReader(path)
    slots = {}
    while (part := reader.poll()) is not None:
        for place in range(part.count):
            slots[part.first + place] = part.slots[place * SLOT_BYTES : (place + 1) * SLOT_BYTES]
    assert reader.lost == 0
    return slots


def test_every_slot_arrives_once_and_the_ring_is_archived_and_removed(host: Host, server: StubServer) -> None:
    writer, agent = host.writer(3000), host.agent()
    assert writer.wait(PATIENCE_S) == 0
    host.all_shipped_by(agent)
    (stored,) = server.slots().values()
    assert stored == written(host)
    assert sorted(stored) == list(range(1, 3001))
    assert [p.name for p in (host.folder / "rings/host0").iterdir()] == ["agent.lock"]
    assert not list(host.folder.glob("spool/*/*.segment"))
    assert not {metric for metric, *_ in server.samples() if not catalogue.is_known(metric)}


def test_an_agent_killed_again_and_again_loses_and_doubles_nothing(host: Host, server: StubServer) -> None:
    """Kills at random moments, while replies get lost, connections break and the server is busy."""
    chance = random.Random(20)

    def plan(request: Request) -> int:
        return chance.choices([200, LOSE_REPLY, BREAK, 503], [70, 12, 10, 8])[0]

    server.plan = plan
    host.more["LENS_RING_MIB"] = "16"  # what a busy machine takes for all this must not lap it
    writer = host.writer(200_000, 0.002, "wait")
    number = 0
    while number < 10 or (not server.repeats and number < 50):  # twenty: make prove-delivery
        number += 1
        seen = len(server.requests)
        agent = host.agent(LENS_SHIP_S="0.005")
        if number % 2:  # however long a busy machine takes to start it
            wait_for(lambda seen=seen: len(server.requests) > seen + 3)
        time.sleep(chance.uniform(0.2, 0.7))
        agent.kill()
        agent.wait()
    writer.send_signal(signal.SIGKILL)
    server.plan = lambda request: 200
    last = host.agent()
    assert writer.wait() == -signal.SIGKILL
    host.all_shipped_by(last)
    assert server.repeats > 0, "the test wants batches that were sent twice"
    (stored,) = server.slots().values()
    assert stored == written(host)
    assert sorted(stored) == list(range(1, len(stored) + 1))
    for sequences in server.slots("agent").values():
        assert sorted(sequences) == list(range(1, len(sequences) + 1))
    assert len(server.events("process.exit")) == 1
    (source,) = {source for source, _ in server.kept}
    assert source.startswith("agent:host0:")


def test_an_agent_killed_around_the_end_of_a_rank_tells_of_it_once(host: Host, server: StubServer) -> None:
    chance = random.Random(7)
    for number in range(8):
        writer = host.writer(50, 0.0, "wait", rank=number)
        agent = host.agent(LENS_SHIP_S="0.005")
        wait_for(lambda number=number: any(p.about["rank"] == number for p in server.parts("trainer")))
        writer.kill()
        time.sleep(chance.uniform(0.0, 0.05))
        agent.kill()
        agent.wait()
        writer.wait()
    host.all_shipped_by(host.agent())
    assert sorted(event["rank"] for event in server.events("process.exit")) == list(range(8))


def test_a_killed_rank_shows_its_signal_its_last_record_and_what_it_was_in(host: Host, server: StubServer) -> None:
    code = """
import time
from lens.recorder import Recorder
from lens.settings import Settings
r = Recorder.create(Settings.load(), {"run": "r1", "rank": 2, "world_size": 4, "role": "trainer"})
ids = r.intern("all_reduce") | r.intern("dp/0") << 32
r.enter_step(9, time.monotonic_ns()); r.enter_phase(r.intern("backward"), time.monotonic_ns(), 9)
r.enter_collective(ids, time.monotonic_ns(), 41, 4096, 9)
r.step(8, 1, 2); r.enter_step(9, 3)
print("ready", flush=True); time.sleep(600)
"""
    began_ns = time.time_ns()
    rank = host.script(code)
    assert rank.stdout is not None
    rank.stdout.readline()
    host.agent(LENS_HEARTBEAT_S="0.1")
    beat = wait_for(lambda: server.events("heartbeat"))[0]
    assert beat["rank"] == 2
    assert {"state": "collective", "op": "all_reduce", "group": "dp/0", "seq": 41, "step": 9}.items() <= beat[
        "attrs"
    ].items()
    assert began_ns - 1e9 < beat["attrs"]["since_ns"] < time.time_ns() + 1e9
    os.kill(rank.pid, signal.SIGKILL)
    # Not waited for before it is told: older kernels show how a process ended for as long as its parent has not asked.
    (end,) = wait_for(lambda: server.events("process.exit"))
    assert (end["rank"], end["severity"]) == (2, "error")
    assert end["attrs"]["signal"] == signal.SIGKILL
    assert end["attrs"]["exit_code"] == -signal.SIGKILL
    assert end["attrs"]["clean"] is False
    assert "SIGKILL" in end["text"]
    spans = wait_for(lambda: [span for part in server.parts("trainer") for span in part.open])
    assert {(span["kind"], span["name"]) for span in spans} == {
        ("step", "step"),
        ("phase", "backward"),
        ("collective", "all_reduce"),
    }
    steps = [r for part in server.parts("trainer") for r in iter_records(part) if r["type"] == STEP]
    assert [step["step"] for step in steps] == [8]


def test_an_exit_code_is_told_even_when_the_parent_reaps_at_once(host: Host, server: StubServer) -> None:
    writer = host.writer(5, 0.0, "crash")
    agent = host.agent()
    assert writer.wait(PATIENCE_S) == 3
    host.all_shipped_by(agent)
    (end,) = server.events("process.exit")
    # A process that ended before the agent saw it alive has a code nobody can read any more: unknown, not 0.
    assert end["attrs"]["exit_code"] in (3, None)
    assert end["attrs"]["clean"] is False
    assert end["severity"] == "error"


def test_a_watched_process_tells_its_exit_code(host: Host, server: StubServer) -> None:
    writer = host.recording(
        "import sys;from lens.recorder import Recorder;from lens.settings import Settings\n"
        "r=Recorder.create(Settings.load(),{'run':'r1','rank':1,'role':'trainer'});r.step(1,1,2)\n"
        "sys.stdin.readline();sys.exit(7)"
    )
    host.agent()
    wait_for(lambda: server.parts("trainer"))
    assert writer.stdin is not None
    writer.stdin.write("\n")
    writer.stdin.flush()
    (end,) = wait_for(lambda: server.events("process.exit"))
    assert writer.wait(PATIENCE_S) == end["attrs"]["exit_code"] == 7
    assert end["severity"] == "error"


def test_the_error_of_a_rank_is_taken_from_the_launcher_s_error_file(
    host: Host, server: StubServer, tmp_path: Path
) -> None:
    file = tmp_path / "error.json"
    host.more["TORCHELASTIC_ERROR_FILE"] = str(file)
    writer = host.writer(3, 0.0, "wait")
    host.agent()
    wait_for(lambda: server.parts("trainer"))
    file.write_text(json.dumps({"message": {"message": "ValueError: expected 8 experts", "extraInfo": {}}}))
    writer.kill()
    writer.wait()
    (error,) = wait_for(lambda: server.events("process.error"))
    assert error["attrs"] == {"type": "ValueError", "message": "expected 8 experts"}


def test_the_run_is_registered_with_its_ranks_and_again_when_a_server_forgot_it(
    host: Host, server: StubServer
) -> None:
    writer = host.writer(20, 0.0, "wait", groups={"dp": [[0]]}, device="host0/gpu1", config={"lr": 1})
    host.agent(LENS_SIMULATE="H200:2")
    run = wait_for(lambda: server.runs.get("r1", {}).get("ranks") and server.runs["r1"])
    assert run["groups"] == {"dp": [[0]]}
    assert run["config"] == {"lr": 1}
    (rank,) = run["ranks"]
    assert (rank["device"], rank["vendor"], rank["model"]) == ("host0/gpu1", "nvidia", "NVIDIA H200")
    assert rank["simulated"] is True
    server.runs.clear()
    wait_for(lambda: "r1" in server.runs)
    before = len(server.kept)
    wait_for(lambda: len(server.kept) > before)
    writer.kill()


def test_records_wait_in_the_spool_while_the_server_is_away_and_arrive_when_it_is_back(
    host: Host, server: StubServer
) -> None:
    server.plan = lambda request: BREAK
    writer = host.writer(500, 0.0, "wait")
    agent = host.agent()
    wait_for(lambda: list(host.folder.glob("spool/r1/*.segment")))
    time.sleep(0.3)
    assert not server.kept
    assert agent.poll() is None
    server.plan = lambda request: 200
    wait_for(lambda: server.slots() and len(next(iter(server.slots().values()))) == 500)
    writer.kill()


def test_an_anchor_stays_the_same_through_agents_and_dates_the_records(host: Host, server: StubServer) -> None:
    writer = host.writer(10, 0.0, "wait")
    for _ in range(3):
        agent = host.agent()
        before = len(server.batches())
        wait_for(lambda before=before: len(server.batches()) > before + 1)
        agent.kill()
        agent.wait()
    writer.kill()
    anchors = {batch.anchor for batch in server.batches()}
    assert len(anchors) == 1
    (anchor,) = anchors
    # Of many looks the best: we may be made to stand between one clock and the other.
    assert min(abs(anchor.unix(time.monotonic_ns()) - time.time_ns()) for _ in range(1000)) < 50e6
    assert min(abs(event["attrs"]["offset_ns"]) for event in server.events("clock.anchor")) < 50e6


def test_a_second_agent_of_the_same_host_says_so_and_ends(host: Host, server: StubServer) -> None:
    writer = host.writer(10, 0.0, "wait")
    first = host.agent()
    wait_for(lambda: server.parts("agent"))
    second = host.agent()
    _, said = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0
    assert "another agent already serves host host0" in said
    assert first.poll() is None
    other_host = host.agent(LENS_HOST="host1", LENS_AGENT_LINGER="0.1")
    _, said = other_host.communicate(timeout=PATIENCE_S)
    assert "another agent" not in said
    writer.kill()


def test_starting_an_agent_from_many_ranks_at_once_starts_one(host: Host, server: StubServer) -> None:
    host.more["LENS_AGENT_LINGER"] = "100"  # the rank starts after its agent here, on a busy machine long after
    code = (
        "from lens.collectors.agent import ensure_agent\nfrom lens.settings import Settings\n"
        "print(ensure_agent(Settings.load()))"
    )
    starters = [host.script(code) for _ in range(3)]
    answers = [starter.communicate(timeout=PATIENCE_S)[0].strip() for starter in starters]
    assert sorted(answers) == ["False", "False", "True"]
    writer = host.writer(10)
    writer.wait(PATIENCE_S)
    wait_for(lambda: server.events("process.exit"))
    os.kill(json.loads((host.folder / "rings/host0/agent.lock").read_text())["pid"], signal.SIGTERM)
    check = "from lens.collectors.launch import agent_running\nfrom lens.settings import Settings\n"
    check += "import sys; sys.exit(agent_running(Settings.load()))"
    wait_for(lambda: host.script(check).wait() == 0)
    assert (host.folder / "spool/agent.log").exists()


def test_sigterm_ships_what_there_is_and_leaves_living_ranks_to_the_next_agent(
    host: Host, server: StubServer
) -> None:
    writer = host.writer(200, 0.0, "wait")
    agent = host.agent(LENS_SHIP_S="5")
    wait_for(lambda: server.parts("trainer"))
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(PATIENCE_S) == 0
    stored = server.slots("agent")
    assert stored
    assert writer.poll() is None
    assert [p.name for p in (host.folder / "rings/host0").iterdir() if p.name.startswith("agent-")] == []
    next_agent = host.agent()
    writer.communicate("\n", timeout=PATIENCE_S)
    host.all_shipped_by(next_agent)
    assert sorted(next(iter(server.slots().values()))) == list(range(1, 201))


def test_two_runs_on_one_host_stay_apart(host: Host, server: StubServer) -> None:
    first = host.writer(100, 0.0, "wait", run="one", rank=0)
    second = host.writer(150, 0.0, "wait", run="two", rank=0)
    host.agent()
    wait_for(lambda: {part.about["run"] for part in server.parts("agent")} == {"one", "two"})

    def arrived() -> dict[str, int]:
        return {key.rpartition("-")[2]: len(slots) for key, slots in server.slots().items()}

    wait_for(lambda: arrived() == {"one": 100, "two": 150})
    for batch in server.batches():
        assert len({part.about["run"] for part in batch.rings}) == 1
    first.kill()
    second.kill()


def test_slots_overwritten_before_they_were_read_are_counted(host: Host, server: StubServer) -> None:
    host.more["LENS_RING_MIB"] = "1"
    writer = host.writer(20_000, 0.0, "wait")
    assert writer.stdout is not None
    writer.stdout.readline()
    host.agent()
    wait_for(lambda: any(20_000 in slots for slots in server.slots().values()))  # the last one, in the last batch
    lost = sum(part.lost for part in server.parts("trainer"))
    samples = wait_for(lambda: [s for s in server.samples() if s[0] == "lens.recorder.overwritten"])
    assert samples[-1][1] == lost
    assert samples[-1][3]["rank"] == 0
    stored = next(iter(server.slots().values()))
    assert lost + len(stored) == 20_000
    assert max(stored) == 20_000
    writer.kill()


def test_the_agent_loads_neither_numpy_nor_torch_nor_pyarrow() -> None:
    code = (
        "import sys, lens.collectors.agent, lens.collectors.nvidia as n;"
        "n.NvidiaCollector('h').probe();"
        "print([m for m in ('numpy', 'torch', 'pyarrow', 'chdb', 'lens.hooks') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"
