"""The server as a process: one owner a folder, private files, a quiet end, and nothing lost to ``kill -9``."""

from __future__ import annotations

import json
import random
import signal
import stat
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lens.settings import Settings
from lens.store.decode import NDJSON
from lens.store.errors import FolderOwnedError, StoreError
from lens.store.ownership import living_server
from lens.store.query import Query
from lens.store.server import serve

from .conftest import TOKEN
from .helpers import SECOND, START, ndjson, sample, step_span
from .processes import Server, unasked_port

pytestmark = pytest.mark.processes
KILLS = 8  # twenty of each: make prove-delivery
SENDERS = 3
ROWS = 40


def test_it_announces_itself_keeps_its_files_private_and_leaves_none_behind(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Server(data) as server:
        said = json.loads((data / "server.json").read_text())
        assert said["pid"] == server.process.pid
        assert living_server(data) == said
        token = Path(said["token_file"])
        assert token.read_text().strip() == TOKEN
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert stat.S_IMODE(data.stat().st_mode) == 0o700
        assert server.client().get("/api/v1/runs").json() == {"runs": []}
        assert server.stop() == 0
    assert not (data / "server.json").exists()
    assert living_server(data) is None


def test_a_second_server_or_reader_is_told_who_owns_the_folder(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        with pytest.raises(FolderOwnedError, match=f"http://127.0.0.1:{server.port}") as refused:
            serve(Settings.load({}, data=tmp_path), port=0)
        assert refused.value.url == f"http://127.0.0.1:{server.port}"
        with pytest.raises(FolderOwnedError):
            Query.open_folder(tmp_path)
        server.kill()
    # Its announcement is stale now; the folder is free.
    assert living_server(tmp_path) is None
    Query.open_folder(tmp_path).close()


def test_other_addresses_than_loopback_need_to_be_asked_for(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", ""):
        with pytest.raises(StoreError, match="other machines"):
            serve(Settings.load({}, data=tmp_path), host, 0)


def test_a_port_that_is_taken_is_an_os_error_and_leaves_the_folder_free(tmp_path: Path) -> None:
    with Server(tmp_path / "a") as server, pytest.raises(OSError, match="in use"):
        serve(Settings.load({}, data=tmp_path / "b"), port=server.port)


def test_the_diagnosis_process_does_not_outlive_a_killed_server(tmp_path: Path) -> None:
    with Server(tmp_path) as server, server.client() as client:
        client.post("/api/v1/runs", json={"run": "r"})
        body = ndjson([step_span(rank, step) for rank in (0, 1) for step in range(5)])
        client.post("/api/v1/runs/r/records", content=body, headers={"content-type": NDJSON})
        assert client.get("/api/v1/runs/r/diagnosis").status_code == 200
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(server.process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        assert children
        server.kill()
    deadline = time.monotonic() + 120
    while any(map(runs, children)):
        assert time.monotonic() < deadline, "a child of the killed server still lives"
        time.sleep(0.1)


def runs(pid: str) -> bool:
    """Whether a process has not ended yet, whoever is to take notice of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Sender(threading.Thread):
    """Sends numbered batches, each again and again until it is acknowledged, as an agent does."""

    def __init__(self, port: int, number: int) -> None:
        super().__init__(daemon=True)
        self.number, self.acknowledged, self.retries = number, 0, 0
        self.stopping = threading.Event()
        self._url = f"http://127.0.0.1:{port}/api/v1/runs/r/records"
        self._headers = {
            "authorization": f"Bearer {TOKEN}",
            "content-type": NDJSON,
            "lens-source": f"agent:{number}",
        }

    def run(self) -> None:
        """Send until told to stop, then until the last batch is acknowledged."""
        with httpx.Client(timeout=20) as client:
            while not self.stopping.is_set():
                body = ndjson(batch(self.number, self.acknowledged))
                headers = {**self._headers, "lens-sequence": str(self.acknowledged)}
                while not self._sent(client, body, headers):
                    self.retries += 1
                    time.sleep(0.02)
                self.acknowledged += 1

    def _sent(self, client: httpx.Client, body: bytes, headers: dict[str, str]) -> bool:
        try:
            response = client.post(self._url, content=body, headers=headers)
        except httpx.HTTPError:
            return False
        return response.status_code == 200 and response.json() == {"accepted": ROWS + 4, "rejected": []}


def time_of(sequence: int, index: int) -> int:
    """When a sample was taken: every third one later than the others of its step."""
    return START + sequence * SECOND + sequence * 7919 % 1000 + (index % 3 == 2) * (index + 1)


def batch(sender: int, sequence: int) -> list[dict[str, Any]]:
    """Records that say which batch they are of."""
    t_ns, group = START + sequence * SECOND, f"g{sender}"
    span = {"type": "span", "rank": sender, "step": sequence, "t0_ns": t_ns, "t1_ns": t_ns + 5}
    return [
        *(
            sample(
                f"m{index % 4}",
                sender * 1e6 + sequence + index / 100,
                sequence,
                rank=sender,
                t_ns=time_of(sequence, index),
            )
            for index in range(ROWS)
        ),
        step_span(sender, sequence),
        {**span, "kind": "collective", "name": "all_reduce", "attrs": {"group": group, "seq": sequence}},
        {
            "type": "vector",
            "t_ns": t_ns,
            "metric": "v",
            "values": [sequence, 1.0],
            "rank": sender,
            "step": sequence,
        },
        {"type": "event", "t_ns": t_ns, "kind": "k", "text": str(sequence), "rank": sender},
    ]


@pytest.mark.timeout(600)
def test_nothing_acknowledged_is_lost_and_nothing_doubled_by_kill_9_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(20)
    port = unasked_port()
    server = Server(tmp_path, port)
    server.wait_ready()
    with server.client() as client:
        assert client.post("/api/v1/runs", json={"run": "r", "world_size": SENDERS}).status_code == 201
    senders = [Sender(port, number) for number in range(SENDERS)]
    for sender in senders:
        sender.start()
    for kill in range(KILLS):
        # Every fourth time already while it starts and takes its log again.
        if kill % 4 == 3:
            time.sleep(rng.uniform(0.5, 2.5))
        else:
            server.wait_ready() if kill else None
            time.sleep(rng.uniform(0.0, 1.5))
        server.kill()
        server = Server(tmp_path, port)
    server.wait_ready()
    for sender in senders:
        sender.stopping.set()
    for sender in senders:
        sender.join(120)
        assert not sender.is_alive()
    with server.client() as client:
        shown = client.get("/api/v1/runs/r").json()
        assert shown["last_step"] == max(sender.acknowledged for sender in senders) - 1
    server.kill()

    sent = {sender.number: sender.acknowledged for sender in senders}
    assert sum(sender.retries for sender in senders) > 0
    query = Query.open_folder(tmp_path)
    _, tables = query.tables("r")
    everything = [(number, sequence) for number, count in sent.items() for sequence in range(count)]
    for name, times in (("samples", ROWS), ("steps", 1), ("collectives", 1), ("vectors", 1)):
        table = tables.table(name)
        found = Counter(zip(table["rank"].tolist(), table["step"].tolist(), strict=True))
        assert found == Counter(dict.fromkeys(everything, times)), name
    events = Counter(
        zip(tables.events["rank"].tolist(), map(int, tables.texts(tables.events["text"])), strict=True)
    )
    assert events == Counter(everything)
    timed = [
        (number * 1e6 + sequence + index / 100, time_of(sequence, index))
        for number, sequence in everything for index in range(ROWS)
    ]  # fmt: skip
    found = Counter(zip(tables.samples["value"].tolist(), tables.samples["t_ns"].tolist(), strict=True))
    assert found == Counter(timed)
    expected = np.array([value for value, _ in timed])
    database = query._folder.store
    assert database.scalar("SELECT count() FROM lens.moments") == len(everything)
    assert database.scalar("SELECT sum(count) FROM lens.rollup") == len(expected)
    assert database.scalar("SELECT sum(sum) FROM lens.rollup") == pytest.approx(expected.sum())
    assert database.scalar("SELECT count() FROM lens.batches") == len(everything)
    assert database.scalar("SELECT count() FROM lens.latest FINAL") == SENDERS * 4
    query.close()


def test_ctrl_c_ends_it_with_everything_applied(tmp_path: Path) -> None:
    with Server(tmp_path) as server, server.client() as client:
        client.post("/api/v1/runs", json={"run": "r"})
        client.post("/api/v1/runs/r/records", content=ndjson([step_span(0, 1)]), headers={"content-type": NDJSON})
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(120) == 0
    query = Query.open_folder(tmp_path)
    assert query._folder.applier.applied > 0
    assert query.runs()[0]["last_step"] == 1
    query.close()
