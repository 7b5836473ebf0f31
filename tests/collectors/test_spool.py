"""The spool: a batch and its cursors are kept together, whatever happens to process or disk."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.collectors import segments
from lens.collectors.splitting import halve, piece_of
from lens.collectors.spool import RunSpool, SpoolFullError, directory_name, enforce_bound, run_of_spool
from lens.slots import SLOT_BYTES, Anchor, RingPart, decode_batch, encode_batch


def spool(folder: Path, run: str = "r1") -> RunSpool:
    return RunSpool(folder / run, run, "host0")


def fill(target: RunSpool, count: int, size: int = 100) -> None:
    for _ in range(count):
        number = target._next
        target.append(bytes([number % 256]) * size, {"ring": number * 10}, 10, "gzip")


def waiting(target: RunSpool) -> list[tuple[int, bytes]]:
    return [(entry.sequence, segments.read_body(entry)) for entry in target._pending]


def test_another_agent_finds_batches_cursors_source_and_anchor_as_they_were(tmp_path: Path) -> None:
    first = spool(tmp_path)
    first.ended.add("1-2")
    fill(first, 3)
    first.acknowledge(1)
    again = spool(tmp_path)
    assert [sequence for sequence, _ in waiting(again)] == [2, 3]
    assert waiting(again) == waiting(first)
    assert again.cursors == {"ring": 30}
    assert again.ended == {"1-2"}
    assert (again.source, again.anchor) == (first.source, first.anchor)
    fill(again, 1)
    assert [sequence for sequence, _ in waiting(again)] == [2, 3, 4]


def test_everything_acknowledged_leaves_no_segment_and_never_reuses_a_number(tmp_path: Path) -> None:
    first = spool(tmp_path)
    fill(first, 5)
    first.acknowledge(5)
    first.close()
    assert not list(tmp_path.glob("r1/*.segment"))
    again = spool(tmp_path)
    assert again.cursors == {"ring": 50}
    fill(again, 1)
    assert waiting(again)[0][0] == 6


@given(st.integers(min_value=0, max_value=1200))
@settings(deadline=None, max_examples=60)
def test_a_write_that_stopped_at_any_byte_leaves_the_state_before_it(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    first = spool(folder)
    fill(first, 6)
    (path,) = folder.glob("r1/*.segment")
    data = path.read_bytes()
    ends = [entry.offset + entry.length for entry in segments.scan(path).entries]
    cut = min(cut, len(data))
    path.write_bytes(data[:cut])
    again = spool(folder)
    whole = sum(end <= cut for end in ends)
    assert [sequence for sequence, _ in waiting(again)] == list(range(1, whole + 1))
    assert again.cursors == ({"ring": whole * 10} if whole else {})
    assert again.counts.damaged == 0
    fill(again, 1)
    assert waiting(again)[-1][0] == whole + 1


def test_a_damaged_batch_is_passed_over_and_counted_and_the_rest_survives(tmp_path: Path) -> None:
    first = spool(tmp_path)
    fill(first, 4, 1000)
    (path,) = tmp_path.glob("r1/*.segment")
    data = bytearray(path.read_bytes())
    second = segments.scan(path).entries[1]
    data[second.offset + 500] ^= 1
    path.write_bytes(data)
    again = spool(tmp_path)
    assert [sequence for sequence, _ in waiting(again)] == [1, 3, 4]
    assert again.counts.damaged == 1
    assert again.cursors == {"ring": 40}
    assert again.counts.dropped_slots == 10
    assert spool(tmp_path).counts == again.counts, "an agent that starts once more tells of it no second time"


@given(st.sets(st.integers(1, 8)), st.integers(0, 8), st.integers(0, 8))
@settings(deadline=None, max_examples=60)
def test_slots_of_damaged_batches_are_counted_unless_the_rings_give_them_again(
    tmp_path_factory: pytest.TempPathFactory, hit: set[int], acknowledged: int, saved_at: int
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    first = spool(folder)
    fill(first, saved_at)
    first._save()
    fill(first, 8 - saved_at)
    first.acknowledge(acknowledged)
    known_to_state = 8 if acknowledged else saved_at
    for path in folder.glob("r1/*.segment"):
        data = bytearray(path.read_bytes())
        for entry in segments.scan(path).entries:
            if entry.sequence in hit:
                data[entry.offset] ^= 1
        path.write_bytes(data)
    again = spool(folder)
    arrived = [
        *range(1, acknowledged + 1),
        *(sequence for sequence, _ in waiting(again) if sequence > acknowledged),
    ]
    resumed = again.cursors.get("ring", 0) // 10
    assert again.counts.dropped_slots == 10 * (resumed - len(arrived))
    assert resumed >= known_to_state
    assert spool(folder).counts == again.counts


@given(st.binary(max_size=400))
@settings(deadline=None, max_examples=60)
def test_a_file_of_anything_is_never_fatal(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    folder = tmp_path_factory.mktemp("spool")
    first = spool(folder)
    fill(first, 2)
    (folder / "r1/000000000000.segment").write_bytes(junk)
    (folder / "r1/state.json").write_bytes(junk)
    again = spool(folder)
    assert [sequence for sequence, _ in waiting(again)] == [1, 2]
    assert again.source == first.source, "what is sent again must be known again"
    assert again.cursors == {"ring": 20}


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_one_damaged_state_costs_nothing(tmp_path: Path, damage: bytes | None) -> None:
    first = spool(tmp_path)
    fill(first, 5)
    first.acknowledge(5)
    first.close()
    path = tmp_path / "r1/state.json"
    written = path.read_bytes()
    path.write_bytes(written.replace(b'"acknowledged": 5', b'"acknowledged": 1') if damage is None else damage)
    again = spool(tmp_path)
    assert (again.source, again.cursors, again.waiting) == (first.source, {"ring": 50}, 0)
    assert run_of_spool(tmp_path / "r1") == "r1"


@pytest.mark.parametrize("state", ['{"cursors": 5}', '{"acknowledged": "x"}', "[]", '{"counts": []}'])
def test_a_state_that_is_none_is_made_anew_from_the_segments(tmp_path: Path, state: str) -> None:
    first = spool(tmp_path)
    fill(first, 2)
    (tmp_path / "r1/state.json").write_text(state)
    again = spool(tmp_path)
    assert (again.source, again.cursors) == (first.source, {"ring": 20})
    assert [sequence for sequence, _ in waiting(again)] == [1, 2]


def test_a_full_disk_spools_nothing_keeps_the_cursors_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = spool(tmp_path)
    fill(target, 2)
    real_write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 200:
            return real_write(descriptor, data[:150])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SpoolFullError):
        fill(target, 1, 5000)
    assert target.cursors == {"ring": 20}
    monkeypatch.setattr(os, "write", real_write)
    fill(target, 1)
    again = spool(tmp_path)
    assert [sequence for sequence, _ in waiting(again)] == [1, 2, 3]
    assert again.counts.damaged == 0


def test_beyond_its_bound_the_oldest_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lens.collectors.spool.SEGMENT_BYTES", 4000)
    one, two = spool(tmp_path, "one"), spool(tmp_path, "two")
    fill(one, 20, 1000)
    fill(two, 20, 1000)
    given_up = enforce_bound([one, two], 24_000)
    assert one.size + two.size <= 24_000
    assert given_up == one.counts.dropped_batches + two.counts.dropped_batches > 0
    assert one.counts.dropped_slots == 10 * one.counts.dropped_batches
    assert [sequence for sequence, _ in waiting(one)] == list(range(one.counts.dropped_batches + 1, 21))
    assert spool(tmp_path, "one").counts == one.counts


def test_what_the_server_refuses_for_good_is_put_aside(tmp_path: Path) -> None:
    target = spool(tmp_path)
    fill(target, 2)
    entry = target.oldest()
    assert entry is not None
    target.quarantine(entry, b"body", "bad magic")
    assert (tmp_path / "r1/quarantine/000000000001.batch").read_bytes() == b"body"
    assert [sequence for sequence, _ in waiting(target)] == [2]
    assert spool(tmp_path).counts.quarantined == 1


def test_run_ids_of_any_form_become_folders_of_their_own(tmp_path: Path) -> None:
    names = {directory_name(run) for run in ("a/b", "a b", "..", ".", "ü", "a%2Fb")}
    assert len(names) == 6
    assert all("/" not in name and not name.startswith(".") for name in names)


def part(records: list[int], start: int, **more: object) -> RingPart:
    """Records of so many continuation slots each."""
    slots, sequence = b"", start
    for continuation_count in records:
        words = [sequence, 7 | continuation_count << 8, *[0] * 13, sequence]
        slots += b"".join(word.to_bytes(8, "little", signed=True) for word in words)
        for _ in range(continuation_count):
            sequence += 1
            slots += sequence.to_bytes(8, "little") + bytes(112) + (-sequence).to_bytes(8, "little", signed=True)
        sequence += 1
    return RingPart({"pid": start}, ["", "x"], slots, start, **more)  # type: ignore[arg-type]


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=4))
def test_halves_hold_every_record_once_and_whole(rings: list[list[int]]) -> None:
    parts = [part(records, 1000 * number + 1, lost=2) for number, records in enumerate(rings)]
    body = encode_batch("h", Anchor(1, 2, 3), parts)
    pieces, todo = [], [body]
    while todo:
        piece = todo.pop()
        halves = halve(piece)
        if halves is None:
            pieces.append(piece)
        else:
            todo += halves
    assert len(pieces) == sum(len(records) for records in rings)
    slots, lost = {}, 0
    for piece in pieces:
        for ring in decode_batch(piece).rings:
            lost += ring.lost
            for place in range(ring.count):
                assert ring.first + place not in slots
                slots[ring.first + place] = ring.slots[place * SLOT_BYTES : (place + 1) * SLOT_BYTES]
    assert lost == 2 * len(rings)
    assert b"".join(slots[sequence] for sequence in sorted(slots)) == b"".join(p.slots for p in parts)


def test_a_piece_is_the_same_bytes_whenever_it_is_made() -> None:
    body = encode_batch("h", Anchor(1, 2, 3), [part([0] * 9, 1)])
    assert piece_of(body, "01") == piece_of(body, "01")
    random.seed(0)
    assert sum(ring.count for ring in decode_batch(piece_of(body, "01")).rings) in (2, 3)
    with pytest.raises(ValueError):
        piece_of(body, "0" * 9)
