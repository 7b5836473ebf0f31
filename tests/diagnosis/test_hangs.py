"""Runs in which nothing moves any more: whom the waiting leads to, and what is no hang."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import numpy as np
import pytest
from cluster import START_NS, Cluster, Writer
from helpers import before_step, built, collective, end_s, event, first, joined, step_span

from lens.diagnosis import diagnose
from lens.tables import Tables

RUN = Cluster(ranks=4, steps=60)
TABLES = RUN.tables()
END = end_s(TABLES)


def judged(*records: dict[str, Any], tables: Tables = TABLES) -> dict[str, Any]:
    return diagnose(RUN.run(), joined(tables, *records) if records else tables)


def hanging(seconds: float, states: dict[int, str], waiting: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Ranks in step 60: some wait in a collective, all send heartbeats for so many seconds."""
    records = [step_span(rank, 60, END + 0.001, None) for rank in states]
    records += [collective(rank, END + 0.01, None, step=60, **about) for rank, about in waiting.items()]
    for rank, second in itertools.product(states, range(int(seconds) + 1)):
        records.append(event("heartbeat", END + second, rank, state=states[rank], step=60))
    return records


WAITING = dict.fromkeys(range(4), "collective")


def test_a_rank_that_never_enters_is_stuck_and_those_that_wait_are_not_blamed() -> None:
    records = hanging(8, {**WAITING, 1: "running"}, {r: {"seq": 900, "group": "world/0"} for r in (0, 2, 3)})
    reply = judged(*records)
    assert reply["status"] == "hung"
    assert first(reply) == ("rank_stuck", [1])
    assert reply["hypotheses"][0]["groups"] == ["world/0"]


def test_waiting_for_less_than_the_limit_is_no_hang() -> None:
    records = hanging(4, {**WAITING, 1: "running"}, {r: {"seq": 900, "group": "world/0"} for r in (0, 2, 3)})
    assert judged(*records)["status"] == "healthy"


def test_a_hang_is_followed_through_groups_to_the_rank_nobody_waits_behind() -> None:
    waiting = {0: {"seq": 70, "group": "ep/0", "op": "all_to_all"}, 2: {"seq": 80, "group": "dp/0"}}
    waiting[3] = {"seq": 70, "group": "ep/1", "op": "all_to_all"}
    reply = judged(*hanging(9, {**WAITING, 1: "running"}, waiting))
    assert first(reply) == ("rank_stuck", [1])


def test_the_call_told_of_is_the_one_in_which_nobody_else_is_missing() -> None:
    waiting: dict[int, dict[str, Any]] = {r: {"seq": 900, "group": "world/0"} for r in (0, 1)}
    waiting[2] = {"seq": 70, "group": "ep/1", "op": "all_to_all"}
    reply = judged(*hanging(9, {**WAITING, 3: "running"}, waiting))
    assert first(reply) == ("rank_stuck", [3])
    assert "Rank 2 waits in all_to_all 70 of ep/1, ranks 0, 1 behind it" in told(reply)


def test_a_rank_that_calls_something_else_is_a_mismatch() -> None:
    waiting = {r: {"seq": 900, "group": "world/0"} for r in range(4)}
    waiting[2] = {"seq": 900, "group": "world/0", "op": "broadcast"}
    reply = judged(*hanging(9, WAITING, waiting))
    assert reply["status"] == "hung"
    assert first(reply) == ("collective_mismatch", [2])


def test_a_silent_rank_is_dead() -> None:
    records = hanging(12, {0: "collective", 1: "collective", 3: "collective"}, {
        r: {"seq": 900, "group": "world/0"} for r in (0, 1, 3)
    })  # fmt: skip
    reply = judged(*records, event("heartbeat", END, 2, state="running", step=59))
    assert reply["status"] == "hung"
    assert first(reply) == ("rank_dead", [2])


def test_a_long_checkpoint_is_no_hang() -> None:
    saving = [
        {
            "type": "span", "kind": "phase", "name": "checkpoint", "rank": 1, "step": 60, "t0_ns": record["t0_ns"],
            "t1_ns": None,
        }
        for record in [collective(1, END + 0.01, None, 1)]
    ]  # fmt: skip
    records = hanging(8, {**WAITING, 1: "running"}, {r: {"seq": 900, "group": "world/0"} for r in (0, 2, 3)})
    assert judged(*records, *saving)["status"] == "healthy"


def test_a_rank_that_stopped_sending_while_others_wait_in_a_collective_is_found_without_events() -> None:
    tables = before_step(TABLES, 3, 50)
    kept = tables.select("steps", (tables.steps["step"] < 50))
    tables.steps = kept
    tables.collectives = tables.select("collectives", tables.collectives["step"] < 50)
    tables.spans = tables.select("spans", tables.spans["step"] < 50)
    cut = end_s(tables)
    records = [collective(r, cut + 0.01, None, 5000, step=50) for r in range(3)]
    records += [event("heartbeat", cut + s, r, state="collective", step=50) for r in range(3) for s in range(12)]
    reply = diagnose(RUN.run(), joined(tables, *records))
    assert reply["status"] == "hung"
    assert reply["hypotheses"][0]["ranks"] == [3]


STUCK = {**WAITING, 1: "running"}
IN_WORLD = {rank: {"seq": 900, "group": "world/0"} for rank in (0, 2, 3)}


@pytest.mark.parametrize(
    "stack",
    [
        'File "/usr/lib/threading.py", line 320, in wait\nFile "/home/me/train.py", line 41, in load',
        ["/usr/lib/threading.py:320 in wait", "/home/me/train.py:41 in load"],
        [{"file": "/home/me/train.py", "line": 41, "name": "load"}],
    ],
)
def test_the_line_of_source_is_named_when_a_heartbeat_carries_the_stack(stack: Any) -> None:
    reply = judged(*hanging(8, STUCK, IN_WORLD), event("heartbeat", END + 8.1, 1, state="running", stack=stack))
    assert "train.py:41 in load" in reply["hypotheses"][0]["recommendation"]


def test_the_collective_and_both_numbers_are_told() -> None:
    found = judged(*hanging(8, STUCK, IN_WORLD))["hypotheses"][0]
    assert "all_reduce 900 of world/0" in found["recommendation"]
    number = next(item for item in found["evidence"] if item["metric"] == "comm.sequence")
    assert (number["ranks"], number["baseline"], number["observed"]) == ([1], 900, 59)


def test_another_size_is_a_mismatch_but_not_in_operations_of_uneven_sizes() -> None:
    sizes = {rank: {"seq": 900, "group": "world/0", "bytes": 28 if rank == 2 else 4096} for rank in range(4)}
    reply = judged(*hanging(9, WAITING, sizes))
    assert first(reply) == ("collective_mismatch", [2])
    assert "28 bytes" in reply["hypotheses"][0]["recommendation"]
    uneven = {rank: {**about, "op": "all_to_all"} for rank, about in sizes.items()}
    assert first(judged(*hanging(9, WAITING, uneven))) == ("unexplained", [])


def test_a_skipped_call_is_found_though_everybody_waits() -> None:
    waiting: dict[int, dict[str, Any]] = {r: {"seq": 900, "group": "world/0"} for r in (1, 2, 3)}
    waiting[0] = {"seq": 900, "group": "ep/0", "op": "all_to_all"}
    done = [
        collective(rank, END + 0.004, END + 0.006, 900, "ep/1", 60, "all_to_all") for rank in (2, 3)
    ]  # fmt: skip
    reply = judged(*done, *hanging(9, WAITING, waiting))
    assert first(reply) == ("collective_mismatch", [1])
    assert reply["hypotheses"][0]["groups"] == ["ep/0"]


def test_a_rank_that_ran_ahead_is_a_mismatch() -> None:
    waiting = {r: {"seq": 905 if r == 3 else 900, "group": "world/0"} for r in range(4)}
    assert first(judged(*hanging(9, WAITING, waiting))) == ("collective_mismatch", [3])


def test_point_to_point_is_followed_to_the_stage_that_does_not_send() -> None:
    cluster = Cluster(ranks=8, stages=4, ep=2, steps=40, pipe=True)
    tables = cluster.tables()
    end = end_s(tables)
    records = [step_span(rank, 40, end + 0.001, None) for rank in range(8)]
    for source, target in ((2, 4), (4, 6)):
        group = f"pp/0:{source}-{target}"
        records.append(collective(target, end + 0.01, None, 40, group, 40, "recv", peer=source))
    for rank, second in itertools.product(range(8), range(9)):
        state = "collective" if rank in (4, 6) else "running"
        records.append(event("heartbeat", end + second, rank, state=state, step=40))
    assert first(diagnose(cluster.run(), joined(tables, *records))) == ("rank_stuck", [2])


def test_a_rank_that_ended_its_program_early_is_named() -> None:
    records = hanging(9, dict.fromkeys((0, 2, 3), "collective"), IN_WORLD)
    reply = judged(*records, event("process.exit", END + 0.3, 1, exit_code=0, clean=True))
    assert first(reply) == ("collective_mismatch", [1])
    assert reply["status"] == "hung"


def test_an_abort_over_other_bytes_than_expected_is_a_mismatch_of_the_rank_that_brought_them() -> None:
    sizes = {rank: {"seq": 900, "group": "world/0", "bytes": 28 if rank == 2 else 4096} for rank in range(4)}
    records = [collective(rank, END + 0.01, None, step=60, **about) for rank, about in sizes.items()]
    reply = judged(*records, event("process.exit", END + 0.2, 0, exit_code=-6, signal=6, clean=False))
    assert (reply["status"], first(reply)) == ("failed", ("collective_mismatch", [2]))
    killed = judged(*records, event("process.exit", END + 0.2, 0, exit_code=-9, signal=9, clean=False))
    assert first(killed) == ("rank_dead", [0])


def test_a_rank_without_heartbeats_among_ranks_with_them_is_dead() -> None:
    tables = joined(TABLES)
    tables.events = tables.select("events", tables.events["rank"] < 0)
    records = [r for r in hanging(12, WAITING, IN_WORLD) if r.get("kind") != "heartbeat" or r["rank"] != 1]
    assert first(judged(*records, tables=tables)) == ("rank_dead", [1])


def test_who_never_reported_is_not_blamed_before_who_did() -> None:
    described = {**RUN.run(), "world_size": 6, "groups": {"world": [[0, 1, 2, 3, 4, 5]]}}
    records = hanging(8, STUCK, IN_WORLD)
    assert first(diagnose(described, joined(TABLES, *records))) == ("rank_stuck", [1])


@pytest.mark.parametrize("phase", ["checkpoint", "eval", "compile"])
def test_slow_phases_are_waited_for_twice_as_long_and_longer_where_they_took_longer_before(phase: str) -> None:
    span = {
        "type": "span", "kind": "phase", "name": phase, "rank": 1, "step": 60, "t0_ns": START_NS + int((END + 0.01) * 1e9),
        "t1_ns": None,
    }  # fmt: skip
    before = {**span, "step": 20, "t0_ns": START_NS + 10**9, "t1_ns": START_NS + 7 * 10**9}
    assert judged(*hanging(9, STUCK, IN_WORLD), span)["status"] == "healthy"
    assert first(judged(*hanging(12, STUCK, IN_WORLD), span)) == ("rank_stuck", [1])
    assert judged(*hanging(16, STUCK, IN_WORLD), span, before)["status"] == "healthy"


def test_a_phase_that_a_later_record_closed_is_over() -> None:
    span = {
        "type": "span", "kind": "phase", "name": "checkpoint", "rank": 1, "step": 59, "t1_ns": None,
        "t0_ns": START_NS + int((END - 0.02) * 1e9),
    }  # fmt: skip
    closed = {**span, "t1_ns": START_NS + int((END - 0.01) * 1e9)}
    assert first(judged(*hanging(8, STUCK, IN_WORLD), span, closed)) == ("rank_stuck", [1])


def test_a_run_that_ended_while_its_host_is_still_watched_does_not_hang() -> None:
    last = [event("heartbeat", END - 0.01, r, state="collective", group="world/0", seq=59) for r in range(4)]
    host = [
        {"type": "sample", "metric": "system.cpu.utilization", "host": "host0", "value": 0.1, "t_ns": START_NS + int(t * 1e9)}
        for t in (END + 1, END + 40)
    ]  # fmt: skip
    assert judged(*last, *host)["status"] == "healthy"


def test_the_first_step_may_take_long() -> None:
    records = [step_span(rank, 0, 0.0, None) for rank in range(4)]
    records += [collective(rank, 0.5, None, 1) for rank in (0, 2, 3)]
    records += [event("heartbeat", float(s), r, state="running") for r in range(4) for s in range(20)]
    assert diagnose(RUN.run(), built(*records))["status"] == "insufficient"


def test_after_a_restart_the_ends_of_the_attempt_before_do_not_hide_a_hang() -> None:
    before = [event("process.exit", END - 2.0, r, exit_code=-15, signal=15, clean=False) for r in range(4)]
    again = event("run.restart", END - 1.0, None, attempt=1, from_step=40)
    assert ("rank_stuck", [1]) in [
        (item["cause"], item["ranks"])
        for item in judged(*before, again, *hanging(8, STUCK, IN_WORLD))["hypotheses"]
    ]


def test_a_hang_of_sixteen_thousand_ranks_costs_little_more_than_their_records() -> None:
    def cost(ranks: int) -> float:
        writer, everybody = Writer(), np.arange(ranks)
        writer.add("steps", rank=everybody, step=0, t0_ns=START_NS, t1_ns=START_NS + 10**8)
        waiting = everybody[everybody != 7]
        writer.add(
            "collectives", rank=waiting, step=1, op="all_reduce", group="world/0", seq=5, t0_ns=START_NS + 2 * 10**8
        )
        for second in range(0, 40, 8):
            attrs = json.dumps({"state": "running"})
            writer.add("events", kind="heartbeat", rank=everybody, t_ns=START_NS + second * 10**9, attrs=attrs)
        tables, begun = writer.tables(), time.process_time()
        reply = diagnose({"run": "big", "world_size": ranks}, tables)
        assert first(reply) == ("rank_stuck", [7])
        return time.process_time() - begun

    small = max(cost(2048), cost(2048))
    assert cost(16_384) < 24 * small


def test_the_line_to_look_at_is_the_innermost_of_the_users_own_code() -> None:
    records = hanging(8, {**WAITING, 1: "running"}, {r: {"seq": 900, "group": "world/0"} for r in (0, 2, 3)})
    frames = [
        ("train.py", 12, "main"),
        ("/job/data.py", 41, "fetch"),
        ("/usr/lib/python3.11/socket.py", 706, "recv"),
    ]
    stack = [{"file": file, "line": line, "name": name} for file, line, name in frames]
    standing = event("heartbeat", END + 8.5, 1, state="running", step=60, stack=stack)
    assert "It is at data.py:41 in fetch. Look at that line." in told(judged(*records, standing))
    only = event("heartbeat", END + 8.5, 1, state="running", step=60, stack=stack[2:])
    assert "It is at socket.py:706 in recv." in told(judged(*records, only))


def told(reply: dict[str, Any]) -> str:
    recommendation: str = reply["hypotheses"][0]["recommendation"]
    return recommendation
