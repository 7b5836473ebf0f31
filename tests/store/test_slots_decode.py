"""Recorder slots to columns: the same records as the plain Python reader gives, whatever is in the ring."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.recorder import Recorder
from lens.ring_reader import RingReader
from lens.settings import Settings
from lens.slots import NULL, SLOT_BYTES, Anchor, RingPart, encode_batch, iter_records, rank_field, series_key
from lens.store.decode import SLOTS, decode
from lens.tables import Tables, TablesBuilder

from . import helpers

ANCHOR = Anchor(monotonic_ns=1_000, unix_ns=helpers.START, error_ns=10)
Write = Callable[[Recorder], None]


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder.create(Settings.load({}, rings=tmp_path / "rings", ring_mib=1, host="host7"), {"rank": 3})


def part_of(recorder: Recorder) -> RingPart:
    part = RingReader(recorder.path).poll(100_000)
    assert part is not None
    return part


def through_the_wire(*parts: RingPart) -> Any:
    return decode(encode_batch("host7", ANCHOR, parts), SLOTS)


def expected(part: RingPart) -> Tables:
    """What the plain reader says, as records of the NDJSON kind."""
    builder = TablesBuilder()
    for found in iter_records(part):
        for record in as_records(found):
            builder.add(record)
    return builder.build()


def as_records(found: dict[str, Any]) -> list[dict[str, Any]]:
    kind = found["type"]
    common = {"rank": found["rank"], "step": found["step"]}
    t0 = ANCHOR.unix(found["t0"])
    ends = {key: None if found.get(key) is None else ANCHOR.unix(found[key]) for key in ("t1", "t_wait", "t_done")}
    span = {"type": "span", "t0_ns": t0, "t1_ns": ends["t1"], **common}
    if kind == 1:
        names = ("tokens", "micro_batches", "seq_sq", "recompiles", "gc_ns", "log_ns")
        step = {**span, "kind": "step", "name": "step", "attrs": {name: found[name] for name in names}}
        overhead = {"type": "sample", "t_ns": ends["t1"], "metric": "lens.overhead.time", "host": "host7", **common}
        measured = found["overhead_ns"] is not None
        return [step, {**overhead, "value": found["overhead_ns"] / 1e9}] if measured else [step]
    if kind == 2:
        return [{**span, "kind": "phase", "name": found["name"], "attrs": {"micro_batch": found["micro_batch"]}}]
    if kind == 3:
        keys = ("group", "seq", "bytes", "dtype", "phase", "layer", "micro_batch", "peer", "async")
        times = {"t_wait_ns": ends["t_wait"], "t_done_ns": ends["t_done"]}
        attrs = {key: found[key] for key in keys} | times
        return [{**span, "kind": "collective", "name": found["name"], "attrs": attrs}]
    if kind == 4:
        return [{**span, "kind": found["kind"], "name": found["name"], "attrs": found["attrs"]}]
    if kind == 5:
        return [row_sample(key, value, found, t0, common) for key, value in found["values"].items()]
    if kind == 6:
        labels = json.loads(found["labels"]) if found["labels"] else None
        vector = {"type": "vector", "t_ns": t0, "metric": found["metric"], "values": list(found["values"])}
        return [{**vector, "layer": found["layer"], "labels": labels, **common}]
    event = {key: found[key] for key in ("kind", "severity", "text", "device", "attrs")}
    return [{"type": "event", "t_ns": t0, "host": "host7", **event, **common}]


def row_sample(key: str, value: float, found: dict[str, Any], t0: int, common: dict[str, Any]) -> dict[str, Any]:
    metric, _, labels = key.partition("\x1e")
    names = json.loads(labels) if labels else None
    sample = {"type": "sample", "t_ns": t0, "metric": metric, "value": value, "labels": names, "host": "host7"}
    return {**sample, "device": found["device"], **common}


moments = st.integers(0, 2**50)
steps = st.just(NULL) | st.integers(0, 1000)
ranks = st.sampled_from([0, rank_field(None), rank_field(0), rank_field(11)])
numbers = st.lists(st.floats(allow_nan=False), max_size=60)
objects = st.dictionaries(helpers.names, helpers.texts | st.integers(-5, 5), max_size=6)


@st.composite
def writes(draw: st.DrawFn) -> Write:
    t0, length, step = draw(moments), draw(st.integers(0, 10**9)), draw(steps)
    t1 = t0 + length
    kind = draw(st.sampled_from(["step", "phase", "collective", "row", "vector", "event", "span"]))
    if kind == "step":
        words = draw(st.lists(st.just(NULL) | st.integers(0, 10**6), min_size=7, max_size=7))
        return lambda r: r.step(max(step, 0), t0, t1, *words)
    if kind == "phase":
        name, micro_batch = draw(helpers.names), draw(st.just(NULL) | st.integers(0, 9))
        return lambda r: r.phase(r.intern(name), t0, t1, step, micro_batch)
    if kind == "collective":
        op, group, dtype, phase = (draw(helpers.names) for _ in range(4))
        seq, size = draw(st.integers(0, 10**6)), draw(st.just(NULL) | st.integers(0, 2**40))
        wait, done = draw(st.just(NULL) | moments), draw(st.just(NULL) | moments)
        packed, flags = draw(st.integers(0, 9)) | draw(st.integers(0, 9)) << 32, draw(st.integers(0, 1)) << 32
        peer = draw(st.integers(0, 9))
        return lambda r: r.collective(
            r.intern(op) | r.intern(group) << 32, t0, t1, step, seq, size, wait, done,
            r.intern(dtype) | r.intern(phase) << 32, packed, peer | flags,
        )  # fmt: skip
    values, rank = draw(numbers), draw(ranks)
    if kind == "row":
        values = values or [0.5]
        names = [f"metric{index}" for index in range(len(values))]
        labelled = [series_key(name, {"layer": str(i)}) if i % 3 == 0 else name for i, name in enumerate(names)]
        device = draw(st.none() | helpers.names)
        return lambda r: r.row(
            r.intern("\x1f".join(labelled)), values, t0, step, r.intern(device) if device else 0, rank
        )
    if kind == "vector":
        layer, labels = draw(st.none() | st.integers(0, 5)), draw(st.sampled_from(["", '{"phase":"x"}']))
        return lambda r: r.vector(r.intern("a.vector"), values, t0, step, layer, r.intern(labels), rank)
    name, attrs, text = draw(helpers.names), draw(objects), draw(st.text(max_size=200))
    if kind == "event":
        severity = draw(st.sampled_from(["info", "warning", "error"]))
        return lambda r: r.event(name, text, severity, t0, step, attrs, rank=rank)
    return lambda r: r.span("checkpoint", name, t0, t1, step, attrs)


@given(st.lists(writes(), min_size=1, max_size=25))
@settings(max_examples=80, deadline=None)
def test_columns_hold_what_the_plain_reader_reads(
    tmp_path_factory: pytest.TempPathFactory, written: list[Write]
) -> None:
    rings = Settings.load({}, rings=tmp_path_factory.mktemp("ring") / "rings", ring_mib=1, host="host7")
    recorder = Recorder.create(rings, {"rank": 3})
    for write in written:
        write(recorder)
    part = part_of(recorder)
    found = through_the_wire(part)
    assert found.rejected.listed == []
    assert helpers.rows_of(found.tables) == helpers.rows_of(expected(part))


def test_a_record_cut_off_at_either_end_is_reported_and_costs_no_other(recorder: Recorder) -> None:
    recorder.vector(recorder.intern("a"), [1.0] * 30, 5)
    recorder.step(1, 10, 20)
    recorder.vector(recorder.intern("a"), [2.0] * 30, 5)
    part = part_of(recorder)
    cut = RingPart(part.about, part.strings, part.slots[SLOT_BYTES:-SLOT_BYTES], part.first + 1)
    found = through_the_wire(cut)
    assert found.tables.steps["step"].tolist() == [1]
    assert found.tables.count("vectors") == 0
    assert found.rejected.count == 2 + 1  # two continuations without their beginning, one record without its end


def test_slots_that_make_no_sense_are_refused_one_by_one(recorder: Recorder) -> None:
    recorder.step(1, 10, 20)
    recorder.step(NULL, 10, 20)
    recorder.phase(recorder.intern("backwards"), 20, 10, 1)
    recorder.phase(0, 10, 20, 1)
    recorder.row(recorder.intern("a\x1fb"), [1.0, 2.0, 3.0], 5)
    recorder.row(recorder.intern("no name\x1fb"), [1.0, 2.0], 5)
    recorder.vector(0, [1.0], 5)
    recorder.vector(recorder.intern("no name"), [1.0], 5)
    part = part_of(recorder)
    unknown = bytearray(part.slots[:SLOT_BYTES])
    struct.pack_into("<q", unknown, 8, 99)
    found = through_the_wire(RingPart(part.about, part.strings, part.slots + bytes(unknown), part.first))
    assert found.tables.steps["step"].tolist() == [1]
    assert found.tables.count("spans") == 0
    assert sorted(found.tables.samples["value"].tolist()) == [1.0, 2.0, 2.0]
    assert found.rejected.count == 8


def test_open_spans_and_lost_slots_come_along(recorder: Recorder) -> None:
    recorder.step(1, 10, 20)
    part = part_of(recorder)
    open_spans = [
        {"kind": "collective", "t0": 500, "name": "all_reduce", "step": 2, "group": "dp/0", "seq": 9, "bytes": 64},
        {"kind": "phase", "t0": 400, "name": "backward", "step": 2},
        {"kind": "step", "t0": 300, "name": "step", "step": 2},
        {"kind": "step", "t0": 300, "name": "step", "step": None},
        "rubbish",
    ]
    found = through_the_wire(RingPart(part.about, part.strings, part.slots, part.first, 17, open_spans))
    tables = found.tables
    assert found.lost == 17
    assert found.rejected.count == 2
    collective = tables.collectives
    assert collective["t1_ns"].tolist() == [NULL]
    assert collective["t0_ns"].tolist() == [ANCHOR.unix(500)]
    assert (collective["seq"].tolist(), collective["bytes"].tolist(), collective["rank"].tolist()) == (
        [9],
        [64],
        [3],
    )
    assert tables.texts(tables.spans["name"]) == ["backward"]
    assert sorted(tables.steps["step"].tolist()) == [1, 2]


def test_rings_of_several_ranks_share_one_batch(tmp_path: Path) -> None:
    parts = []
    for rank in (0, 1, None):
        settings_of = Settings.load({}, rings=tmp_path / f"rings{rank}", ring_mib=1, host="host7")
        recorder = Recorder.create(settings_of, {"rank": rank, "host": f"host{rank}"})
        recorder.row(recorder.intern(f"metric{rank}"), [1.5], 5)
        parts.append(part_of(recorder))
    tables = through_the_wire(*parts).tables
    assert tables.samples["rank"].tolist() == [0, 1, -1]
    assert tables.texts(tables.samples["host"]) == ["host0", "host1", "hostNone"]
    assert tables.texts(tables.samples["metric"]) == ["metric0", "metric1", "metricNone"]
