"""The live feed: what is published reaches every client, from any cursor, in bounded memory."""

from __future__ import annotations

import json
import struct
import threading
import time
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from lens.store.live import LiveFeed, router
from lens.tables import Tables, TablesBuilder
from tests.dashboard import synthetic

METRICS = {"step.duration", "phase.duration", "step.tokens", "train.loss", "comm.self"}


def still(**options: int) -> LiveFeed:
    """A feed whose clock stands still: what came a moment ago is recent, however slow the machine."""
    return LiveFeed(clock=lambda: 0.0, **options)


def tables_of(*records: dict[str, Any]) -> Tables:
    builder = TablesBuilder()
    for record in records:
        builder.add(record)
    return builder.build()


def step_record(step: int, rank: int = 0, seconds: float = 0.5) -> dict[str, Any]:
    begin = step * 10**9
    return {
        "type": "span", "kind": "step", "name": "step", "rank": rank, "step": step, "t0_ns": begin,
        "t1_ns": begin + int(seconds * 1e9),
    }  # fmt: skip


def phase_record(step: int, name: str, seconds: float, rank: int = 0, start: int = 0) -> dict[str, Any]:
    return {
        "type": "span", "kind": "phase", "name": name, "rank": rank, "step": step, "t0_ns": start,
        "t1_ns": start + int(seconds * 1e9),
    }  # fmt: skip


def decoded(frame: bytes) -> tuple[dict[str, Any], dict[tuple[Any, ...], float]]:
    """Header, and value of each (metric, phase, step, rank); later cells win."""
    (length,) = struct.unpack_from("<I", frame)
    header = json.loads(frame[4 : 4 + length])
    assert (4 + length) % 8 == 0
    offset, cells = 4 + length, {}
    for block in header["blocks"]:
        n = block["n"]
        steps = np.frombuffer(frame, "<i4", n, offset)
        ranks = np.frombuffer(frame, "<i4", n, offset + 4 * n)
        values = np.frombuffer(frame, "<f4", n, offset + 8 * n)
        offset += 12 * n
        phase = block.get("labels", {}).get("phase")
        for step, rank, value in zip(steps.tolist(), ranks.tolist(), values.tolist(), strict=True):
            cells[block["metric"], phase, step, rank] = value
    assert offset == len(frame)
    return header, cells


def test_steps_phases_samples_and_pre_reduced_vectors_become_cells() -> None:
    feed = still()
    feed.publish(
        "run",
        tables_of(
            step_record(3, rank=1, seconds=0.25),
            phase_record(3, "forward", 0.1, rank=1),
            {"type": "sample", "t_ns": 1, "metric": "train.loss", "value": 2.5, "step": 3},
            {"type": "sample", "t_ns": 1, "metric": "hw.power", "value": 300, "rank": 1},
            {"type": "vector", "t_ns": 1, "metric": "comm.self", "values": [0.5, 0.75], "step": 3},
            {"type": "vector", "t_ns": 1, "metric": "moe.expert.tokens", "values": [5, 6], "step": 3},
        ),
    )
    header, cells = decoded(feed.frame("run", None, METRICS, METRICS)[1])
    assert cells == {
        ("step.duration", None, 3, 1): 0.25,
        ("phase.duration", "forward", 3, 1): pytest.approx(0.1),
        ("train.loss", None, 3, -1): 2.5,
        ("comm.self", None, 3, 0): 0.5,
        ("comm.self", None, 3, 1): 0.75,
    }
    assert header["last_step"] == 3
    assert header["ranks_reporting"] == 1


def test_parts_of_a_phase_are_summed_within_a_batch_and_across_batches() -> None:
    feed = still()
    feed.publish("run", tables_of(phase_record(1, "forward", 0.25), phase_record(1, "forward", 0.25, start=5)))
    feed.publish("run", tables_of(phase_record(1, "forward", 0.5, start=9), phase_record(2, "forward", 1)))
    feed.publish("run", tables_of(phase_record(2, "forward", 2, start=7)))
    _, cells = decoded(feed.frame("run", None, METRICS, METRICS)[1])
    assert cells == {("phase.duration", "forward", 1, 0): 1.0, ("phase.duration", "forward", 2, 0): 3.0}


def test_own_time_is_the_step_less_what_held_its_rank_also_when_that_came_before() -> None:
    feed = still()

    def collective(start: float, stop: float, **attrs: Any) -> dict[str, Any]:
        return {**phase_record(1, "all_reduce", stop - start, start=int((1 + start) * 1e9)), "kind": "collective",
                "attrs": {"group": "dp/0", "seq": 1, **attrs}}  # fmt: skip

    feed.publish("run", tables_of(collective(0.0, 0.25), step_record(1, rank=3)))
    feed.publish("run", tables_of(collective(0.25, 0.5, **{"async": True}), step_record(1, seconds=1)))
    _, cells = decoded(feed.frame("run", None, {"step.self"}, {"step.self"})[1])
    assert cells == {("step.self", None, 1, 0): 0.75}, "rank 3 has recorded no collective: nothing is known of it"


def test_what_has_not_ended_is_no_cell() -> None:
    feed = still()
    open_step = {**step_record(1), "t1_ns": None}
    open_phase = {**phase_record(1, "forward", 1), "t1_ns": None}
    feed.publish("run", tables_of(open_step, open_phase))
    header, cells = decoded(feed.frame("run", None, METRICS, METRICS)[1])
    assert cells == {}
    assert header["last_step"] is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.data())
@settings(max_examples=40, deadline=None)
def test_a_client_that_resumes_anywhere_has_every_cell_once_it_is_up_to_date(sizes: list[int], data: Any) -> None:
    feed = still()
    expected: dict[tuple[Any, ...], float] = {}
    cursor, _ = feed.frame("run", None, METRICS)
    received: dict[tuple[Any, ...], float] = {}
    step = 0
    for size in sizes:
        records = []
        for _ in range(size):
            records.append(step_record(step, seconds=step + 1))
            expected["step.duration", None, step, 0] = step + 1
            step += 1
        feed.publish("run", tables_of(*records))
        if data.draw(st.booleans()):
            cursor, frame = feed.frame("run", cursor, METRICS)
            received.update(decoded(frame)[1])
    cursor, frame = feed.frame("run", cursor, METRICS)
    received.update(decoded(frame)[1])
    assert received == expected
    assert decoded(feed.frame("run", cursor, METRICS)[1])[1] == {}


def test_the_window_is_bounded_and_a_client_that_fell_behind_is_told_to_reload() -> None:
    feed = still(window_cells=50)
    old, _ = feed.frame("run", None, METRICS)
    for step in range(100):
        feed.publish("run", tables_of(step_record(step)))
    header, cells = decoded(feed.frame("run", old, METRICS)[1])
    assert header["reset"] is True
    assert cells == {}
    _, cells = decoded(feed.frame("run", None, METRICS, METRICS)[1])
    assert len(cells) == 50


def test_a_cursor_of_an_earlier_server_is_not_taken_for_one_of_this() -> None:
    feed = still()
    feed.publish("run", tables_of(step_record(0)))
    current, _ = feed.frame("run", None, METRICS)
    assert decoded(feed.frame("run", current - 10**6, METRICS)[1])[0]["reset"] is True
    assert decoded(feed.frame("run", current + 10**6, METRICS)[1])[0]["reset"] is True
    assert decoded(feed.frame("run", current, METRICS)[1])[0]["reset"] is False


def test_only_the_most_recent_runs_are_kept() -> None:
    feed = still(max_runs=3)
    for number in range(10):
        feed.publish(f"run{number}", tables_of(step_record(0)))
    assert decoded(feed.frame("run9", None, METRICS, METRICS)[1])[1]
    assert not decoded(feed.frame("run0", None, METRICS, METRICS)[1])[1]


def test_a_rank_that_ended_no_longer_reports() -> None:
    feed = still()
    feed.publish("run", tables_of(*(step_record(0, rank) for rank in range(4))))
    assert decoded(feed.frame("run", None, METRICS)[1])[0]["ranks_reporting"] == 4
    ended = {"type": "event", "t_ns": 5, "kind": "process.exit", "text": "killed", "rank": 2}
    feed.publish("run", tables_of(ended))
    assert decoded(feed.frame("run", None, METRICS)[1])[0]["ranks_reporting"] == 3


def test_a_diagnosis_comes_once_to_each_client_and_to_every_new_one() -> None:
    feed = still()
    early, _ = feed.frame("run", None, METRICS)
    feed.publish_diagnosis("run", synthetic.healthy("run", 5), synthetic.ledger(5))
    cursor, frame = feed.frame("run", early, METRICS)
    assert decoded(frame)[0]["diagnosis"]["status"] == "healthy"
    assert decoded(frame)[0]["ledger"]["to_step"] == 5
    assert "diagnosis" not in decoded(feed.frame("run", cursor, METRICS)[1])[0]
    assert decoded(feed.frame("run", None, METRICS)[1])[0]["diagnosis"]["upto_step"] == 5


def test_publishing_from_many_threads_loses_nothing() -> None:
    feed = still()
    start, _ = feed.frame("run", None, METRICS)

    def publish(rank: int) -> None:
        for step in range(100):
            feed.publish("run", tables_of(step_record(step, rank)))

    threads = [threading.Thread(target=publish, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded(feed.frame("run", start, METRICS)[1])[1]) == 400


def application(feed: LiveFeed) -> FastAPI:
    class Query:
        @staticmethod
        def run(run: str) -> dict[str, Any]:
            if run != "run":
                raise LookupError(run)
            return {"world_size": 4}

    app = FastAPI()
    app.include_router(router)
    app.state.live, app.state.query = feed, Query()
    return app


def frames_until(websocket: Any, count: int) -> dict[tuple[Any, ...], float]:
    received: dict[tuple[Any, ...], float] = {}
    deadline = time.monotonic() + 90
    while len(received) < count and time.monotonic() < deadline:
        received.update(decoded(websocket.receive_bytes())[1])
    return received


def test_a_websocket_gets_what_it_subscribed_to_and_nothing_else() -> None:
    feed = still()
    with TestClient(application(feed)) as client, client.websocket_connect("/api/v1/runs/run/live") as websocket:
        websocket.send_json({"subscribe": ["train.loss"]})
        header, _ = decoded(websocket.receive_bytes())
        assert header["world_size"] == 4
        loss = {"type": "sample", "t_ns": 1, "metric": "train.loss", "value": 2, "step": 1}
        feed.publish("run", tables_of(step_record(1), loss))
        assert frames_until(websocket, 1) == {("train.loss", None, 1, -1): 2.0}
        websocket.send_json({"subscribe": ["train.loss", "step.duration"]})
        assert ("step.duration", None, 1, 0) in frames_until(websocket, 1)


def test_a_websocket_resumes_from_its_cursor() -> None:
    feed = still()
    feed.publish("run", tables_of(step_record(1)))
    cursor, _ = feed.frame("run", None, METRICS)
    feed.publish("run", tables_of(step_record(2)))
    address = f"/api/v1/runs/run/live?cursor={cursor}"
    with TestClient(application(feed)) as client, client.websocket_connect(address) as websocket:
        websocket.send_json({"subscribe": ["step.duration"]})
        assert frames_until(websocket, 1) == {("step.duration", None, 2, 0): 0.5}


def test_nonsense_from_a_client_is_answered_and_harms_nobody() -> None:
    feed = still()
    with TestClient(application(feed)) as client, client.websocket_connect("/api/v1/runs/none/live") as websocket:
        for text in ("no json", "[1]", '{"subscribe": 3}'):
            websocket.send_text(text)
        answers = 0
        while answers < 3:
            message = websocket.receive()
            if message.get("text"):
                assert json.loads(message["text"])["error"]
                answers += 1
        websocket.send_json({"subscribe": ["step.duration"]})
        feed.publish("none", tables_of(step_record(1)))
        assert frames_until(websocket, 1)
