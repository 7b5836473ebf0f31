"""What the shipper does about each answer of a server."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lens.collectors.registration import RunDescription
from lens.collectors.shipper import Shipper, compress
from lens.collectors.spool import RunSpool
from lens.settings import Settings
from lens.slots import Anchor, encode_batch
from tests.collectors.agent_harness import BREAK, LOSE_REPLY, Request, StubServer, unpack
from tests.collectors.test_spool import part
from tests.waiting import PATIENCE_S, wait_for


class Sender:
    """A shipper with one run's spool."""

    def __init__(self, folder: Path, stub: StubServer, run: str = "r1", **overrides: object) -> None:
        self.said: list[str] = []
        chosen = {"server": stub.url, "host": "host0", "data": folder / "data", **overrides}
        self.settings = Settings.load(environ={}, **{k: v for k, v in chosen.items() if v is not None})
        self.shipper = Shipper(self.settings, self.said.append)
        self.spool = RunSpool(folder / run, run, "host0")
        self.description = RunDescription(folder / run / "run.json", run)
        self.shipper.add(self.spool, self.description)
        self.next = 1
        self.shipper.start()

    def put(self, records: int = 1) -> None:
        body, encoding = compress(encode_batch("host0", Anchor(1, 2, 3), [part([0] * records, self.next)]))
        self.next += records
        self.spool.append(body, {"ring": self.next}, records, encoding)
        self.shipper.notify()


@pytest.fixture
def sender(tmp_path: Path, server: StubServer) -> Iterator[Sender]:
    made = Sender(tmp_path, server)
    yield made
    made.shipper.stop(0)


def stored(server: StubServer) -> list[int]:
    return sorted(sequence for ring in server.slots(None).values() for sequence in ring)


def posts(server: StubServer) -> list[Request]:
    return [request for request in server.requests if request.path.endswith("/records")]


def test_batches_arrive_in_order_after_the_run_is_registered(sender: Sender, server: StubServer) -> None:
    for _ in range(5):
        sender.put()
    wait_for(lambda: not sender.spool.waiting)
    assert server.requests[0].path == "/api/v1/runs"
    assert [int(request.headers["Lens-Sequence"]) for request in posts(server)] == [1, 2, 3, 4, 5]
    assert {request.headers["Content-Type"] for request in posts(server)} == {"application/vnd.lens.slots"}
    assert {request.headers["Lens-Source"] for request in posts(server)} == {sender.spool.source}


@pytest.mark.parametrize("answer", [LOSE_REPLY, BREAK, 500, 503, 429])
def test_a_failure_of_the_moment_is_retried_with_the_same_number_until_it_works(
    sender: Sender, server: StubServer, answer: int
) -> None:
    answers = [answer, answer, answer]
    server.plan = lambda request: answers.pop() if request.path.endswith("records") and answers else 200
    sender.put()
    sender.put()
    wait_for(lambda: not sender.spool.waiting)
    numbers = [int(request.headers["Lens-Sequence"]) for request in posts(server)]
    assert numbers == [1, 1, 1, 1, 2]
    assert len(server.kept) == 2
    assert server.repeats == (3 if answer == LOSE_REPLY else 0)


def test_retry_after_is_obeyed(sender: Sender, server: StubServer) -> None:
    server.retry_after = "0.6"
    answers = [503]
    server.plan = lambda request: answers.pop() if request.path.endswith("records") and answers else 200
    started = time.monotonic()
    sender.put()
    wait_for(lambda: not sender.spool.waiting)
    assert time.monotonic() - started > 0.5


def test_waits_grow_while_the_server_is_away(sender: Sender, server: StubServer) -> None:
    server.plan = lambda request: BREAK
    sender.put()
    wait_for(lambda: len(server.requests) >= 6)
    (lane,) = sender.shipper._lanes.values()
    assert lane.wait_s >= 1.6
    assert any("does not answer" in text for text in sender.said)
    assert len(sender.said) == 1, "said once, not at each try"


def test_an_unknown_run_is_registered_again(sender: Sender, server: StubServer) -> None:
    sender.put()
    wait_for(lambda: not sender.spool.waiting)
    server.runs.clear()
    sender.put()
    wait_for(lambda: not sender.spool.waiting)
    assert stored(server) == [1, 2]
    assert [request.path for request in server.requests].count("/api/v1/runs") == 2


def test_a_batch_too_large_is_halved_until_it_fits_and_nothing_comes_twice(
    sender: Sender, server: StubServer
) -> None:
    losing = [True, True]

    def plan(request: Request) -> int:
        if not request.path.endswith("records"):
            return 200
        if len(unpack(request)) > 1200:
            return 413
        return LOSE_REPLY if losing and losing.pop() else 200

    server.plan = plan
    sender.put(40)
    sender.put(1)
    wait_for(lambda: not sender.spool.waiting)
    assert stored(server) == list(range(1, 42))
    assert server.repeats == 2


def test_pieces_go_on_after_a_restart_in_the_middle(tmp_path: Path, server: StubServer) -> None:
    taken: list[int] = []

    def plan(request: Request) -> int:
        if not request.path.endswith("records"):
            return 200
        if len(unpack(request)) > 1200:
            return 413
        taken.append(1)
        return 200 if len(taken) <= 3 else 503

    server.plan = plan
    first = Sender(tmp_path, server)
    first.put(40)
    wait_for(lambda: len(taken) > 3)
    first.shipper.stop(0)
    first.shipper._thread.join(PATIENCE_S)  # two of them never share a spool
    assert not first.shipper._thread.is_alive()
    server.plan = lambda request: 200 if len(request.body) < 10**6 else 413
    second = Sender(tmp_path, server)
    wait_for(lambda: not second.spool.waiting)
    second.shipper.stop(0)
    assert stored(server) == list(range(1, 41))


def test_a_batch_that_is_refused_for_good_is_put_aside_and_the_next_ones_go_on(
    sender: Sender, server: StubServer
) -> None:
    server.plan = lambda request: 400 if request.headers.get("Lens-Sequence") == "2" else 200
    for _ in range(4):
        sender.put()
    wait_for(lambda: not sender.spool.waiting)
    assert stored(server) == [1, 3, 4]
    assert sender.spool.counts.quarantined == 1
    assert any("put aside" in text for text in sender.said)


def test_batches_that_the_disk_has_damaged_or_lost_hold_up_nobody_and_are_counted(
    sender: Sender, server: StubServer
) -> None:
    server.plan = lambda request: 503 if request.path.endswith("/records") else 200
    for number in range(4):
        sender.put(number + 1)
    wait_for(lambda: posts(server))
    (path,) = sender.spool.directory.glob("*.segment")
    # In place: the shipper reads the file all the while, and must find the first batches as they are.
    with path.open("r+b", buffering=0) as file:
        file.seek(list(sender.spool._pending)[2].offset + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
        file.truncate(path.stat().st_size - 3)
    server.plan = lambda request: 200
    wait_for(lambda: not sender.spool.waiting)
    assert stored(server) == [1, 2, 3]
    assert sender.spool.counts.damaged == 2
    assert sender.spool.counts.dropped_slots == 3 + 4


def test_an_encoding_the_server_does_not_take_is_replaced_by_gzip(sender: Sender, server: StubServer) -> None:
    server.plan = lambda request: 415 if request.headers.get("Content-Encoding") == "zstd" else 200
    sender.put()
    wait_for(lambda: not sender.spool.waiting)
    assert stored(server) == [1]


def test_the_token_is_read_again_after_it_was_refused(tmp_path: Path, server: StubServer) -> None:
    server.token = "right"
    (tmp_path / "data").mkdir()
    (tmp_path / "data/token").write_text("wrong\n")
    sender = Sender(tmp_path, server)
    sender.put()
    wait_for(lambda: sender.said)
    assert not server.kept
    (tmp_path / "data/token").write_text("right\n")
    wait_for(lambda: not sender.spool.waiting)
    assert sender.spool.counts.quarantined == 0
    sender.shipper.stop(0)


def test_the_server_of_the_data_folder_is_found_when_it_starts_later(tmp_path: Path, server: StubServer) -> None:
    sender = Sender(tmp_path, server, server=None)
    sender.put()
    assert not sender.shipper.reachable()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/server.json").write_text(json.dumps({"url": server.url, "pid": 1}))
    wait_for(lambda: not sender.spool.waiting)
    assert stored(server) == [1]
    sender.shipper.stop(0)


def test_one_run_s_trouble_does_not_hold_up_another(tmp_path: Path, server: StubServer) -> None:
    server.plan = lambda request: 500 if "/bad/" in request.path else 200
    sender = Sender(tmp_path, server, "bad")
    sender.put()
    other = RunSpool(tmp_path / "good", "good", "host0")
    sender.shipper.add(other, RunDescription(tmp_path / "good/run.json", "good"))
    body, encoding = compress(encode_batch("host0", Anchor(1, 2, 3), [part([0], 1)]))
    other.append(body, {}, 1, encoding)
    sender.shipper.notify()
    wait_for(lambda: not other.waiting)
    assert sender.spool.waiting == 1
    sender.shipper.stop(0)
