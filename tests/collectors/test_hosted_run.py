"""One run on this host, in this process: what happens when its spool cannot be written, or its rings stay."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lens.collectors import segments
from lens.collectors.hosted_run import HostedRun
from lens.collectors.shipper import decompress
from lens.collectors.tracked import TrackedProcess, read_about, ring_directories
from lens.ring_files import host_directory
from lens.settings import Settings
from lens.slots import RingPart, decode_batch, iter_records
from tests.collectors.agent_harness import ROOT, WRITER


@pytest.fixture
def place(tmp_path: Path) -> Settings:
    folders = {"rings": tmp_path / "rings", "data": tmp_path / "data", "spool": tmp_path / "spool"}
    return Settings.load(environ={}, host="host0", ring_mib=1, heartbeat_s=0.0, **folders)


@pytest.fixture
def rank(place: Settings) -> Iterator[subprocess.Popen[str]]:
    about = {"run": "r1", "rank": 0, "role": "trainer"}
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER.replace("{about}", repr(about)), "100", "0", "wait"],
        env={**os.environ, "LENS_RINGS": str(place.rings), "LENS_HOST": "host0", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    child.stdout.readline()
    yield child
    child.kill()
    child.communicate()


def hosted(place: Settings, said: list[str]) -> HostedRun:
    run = HostedRun(place, "r1", said.append)
    for directory in ring_directories(host_directory(place)):
        if directory.name not in run.processes:
            run.add(TrackedProcess(directory, read_about(directory), own=False))
    return run


def spooled(run: HostedRun, role: str = "trainer") -> list[RingPart]:
    found = []
    for entry in run.spool._pending:
        body = decompress(segments.read_body(entry), str(entry.head["encoding"]))
        found += [part for part in decode_batch(body).rings if part.about["role"] == role]
    return found


def test_a_full_disk_is_said_once_and_the_rings_keep_what_is_new(
    place: Settings, rank: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    run = hosted(place, said)

    def full(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    working = segments.append
    monkeypatch.setattr(segments, "append", full)
    for _ in range(3):
        run.gather()
        assert not run.commit()
        run.bury()
    assert len(said) == 1
    assert "No space left" in said[0]
    monkeypatch.setattr(segments, "append", working)
    run.gather()
    assert run.commit()
    assert [(part.first, part.count) for part in spooled(run)] == [(1, 100)]
    assert "again" in said[1]
    run.close()


def test_a_rank_whose_rings_cannot_be_archived_keeps_them(place: Settings, rank: subprocess.Popen[str]) -> None:
    said: list[str] = []
    run = hosted(place, said)
    place.data.write_text("a file where the folder should be")
    rank.kill()
    rank.wait()
    for _ in range(3):
        run.record_ends()
        run.gather()
        run.commit()
        run.bury()
    assert [line for line in said if "stay in" in line] == said[:1]
    assert len(ring_directories(host_directory(place))) == 2
    assert not run.busy()
    place.data.unlink()
    run.gather()
    run.bury()
    assert len(ring_directories(host_directory(place))) == 1
    run.close()


def test_a_rank_that_stands_still_is_told_of_twice_as_often(
    place: Settings, rank: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = hosted(replace(place, heartbeat_s=1.0), [])
    began, tenth, told = time.monotonic(), 0, list[int]()
    monkeypatch.setattr(
        run.ring, "event", lambda kind, *_, **__: told.append(tenth) if kind == "heartbeat" else None
    )
    for tenth in range(81):
        run.record_heartbeats(began + tenth / 10 + 0.01)
    assert told == [0, 10, 20, 30, *range(35, 81, 5)]
    run.close()


def test_a_stopped_rank_says_so_and_its_open_spans_are_told_once(
    place: Settings, rank: subprocess.Popen[str]
) -> None:
    run = hosted(place, [])
    os.kill(rank.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, rank.pid, os.WSTOPPED | os.WNOWAIT)
    run.record_heartbeats(time.monotonic())
    os.kill(rank.pid, signal.SIGCONT)
    for _ in range(3):
        run.gather()
        run.commit()
    events = [record for part in spooled(run, "agent") for record in iter_records(part) if "severity" in record]
    beats = [event for event in events if event["kind"] == "heartbeat"]
    assert [(beat["rank"], beat["attrs"]["state"]) for beat in beats] == [(0, "stopped")]
    assert beats[0]["attrs"]["step"] == 100
    run.close()
