"""The write-ahead log: what was synced is there afterwards, what was torn is cut, what is damaged is reported."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.store.errors import StoreError, StoreFullError
from lens.store.log import Log


def payloads(log: Log, offset: int = 0) -> list[bytes]:
    return [entry.payload for entry in log.read(offset)]


def newest_segment(folder: Path) -> Path:
    return max(folder.glob("*.log"))


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300)), max_size=30), st.integers(1, 2000))
@settings(max_examples=40, deadline=None)
def test_entries_come_back_in_order_whatever_the_segment_size(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[int, bytes]], segment: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = Log(folder, segment)
    ends = [log.append(kind, payload) for kind, payload in entries]
    log.close()
    again = Log(folder, segment)
    found = list(again.read())
    assert [(entry.kind, entry.payload, entry.end) for entry in found] == [
        (kind, payload, end) for (kind, payload), end in zip(entries, ends, strict=True)
    ]
    assert again.end == (ends[-1] if ends else 0)
    assert again.torn_bytes == 0
    again.close()


@given(st.lists(st.binary(max_size=100), min_size=1, max_size=10), st.data())
@settings(max_examples=40, deadline=None)
def test_a_log_cut_anywhere_keeps_every_whole_entry(
    tmp_path_factory: pytest.TempPathFactory, entries: list[bytes], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = Log(folder)
    ends = [log.append(1, payload) for payload in entries]
    log.close()
    length = data.draw(st.integers(0, ends[-1]))
    os.truncate(newest_segment(folder), length)
    again = Log(folder)
    whole = [payload for payload, end in zip(entries, ends, strict=True) if end <= length]
    assert payloads(again) == whole
    end = again.append(1, b"after")
    again.close()
    assert payloads(Log(folder)) == [*whole, b"after"]
    assert end == again.end


def test_one_damaged_entry_costs_no_other_and_is_kept_aside(tmp_path: Path) -> None:
    log = Log(tmp_path)
    ends = [log.append(1, bytes([65 + index]) * 100) for index in range(5)]
    log.close()
    data = bytearray(newest_segment(tmp_path).read_bytes())
    data[ends[1] + 40] ^= 0xFF
    newest_segment(tmp_path).write_bytes(data)
    again = Log(tmp_path)
    assert [payload[:1] for payload in payloads(again)] == [b"A", b"B", b"D", b"E"]
    assert [(damage.start, damage.end) for damage in again.damage] == [(ends[1], ends[2])]
    assert len(list(tmp_path.glob("*.damaged"))) == 1
    again.close()


def test_forgetting_deletes_whole_segments_only(tmp_path: Path) -> None:
    log = Log(tmp_path, segment_bytes=200)
    ends = [log.append(1, bytes(150)) for _ in range(10)]
    log.forget(ends[4])
    assert [entry.end for entry in log.read(ends[4])] == ends[5:]
    assert log.start <= ends[4]
    assert len(list(tmp_path.glob("*.log"))) < 10
    log.close()
    assert [entry.end for entry in Log(tmp_path).read(ends[4])] == ends[5:]


def test_a_full_disk_refuses_the_entry_and_keeps_the_log_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(tmp_path)
    log.append(1, b"before")
    writev = os.writev

    def half(file: int, parts: list[memoryview]) -> int:
        writev(file, [parts[0]])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "writev", half)
    with pytest.raises(StoreFullError, match="No space left"):
        log.append(1, b"lost")
    monkeypatch.undo()
    log.append(1, b"after")
    log.close()
    again = Log(tmp_path)
    assert payloads(again) == [b"before", b"after"]
    assert again.torn_bytes == 0


def test_a_disk_that_cannot_sync_ends_all_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path)
    end = log.append(1, b"x")

    def refuse(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreError, match="fsync"):
        log.sync(end)
    monkeypatch.undo()
    with pytest.raises(StoreError, match="fsync"):
        log.append(1, b"y")
    log.close()


def test_many_threads_append_and_sync_at_once(tmp_path: Path) -> None:
    log = Log(tmp_path, segment_bytes=4096)

    def work(thread: int) -> None:
        for index in range(50):
            log.sync(log.append(1, f"{thread}:{index}".encode()))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = payloads(log)
    assert sorted(found) == sorted(f"{thread}:{index}".encode() for thread in range(6) for index in range(50))
    for thread in range(6):
        own = [payload for payload in found if payload.startswith(f"{thread}:".encode())]
        assert own == [f"{thread}:{index}".encode() for index in range(50)]
    log.close()
