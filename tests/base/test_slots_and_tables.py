"""Records keep their meaning from JSON to columns, in any order and any cut."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lens.records import Event, Sample, Span, Vector, from_json, to_json
from lens.slots import NULL, Anchor, RingPart, SlotError, decode_batch, encode_batch
from lens.tables import SCHEMA, Tables, TablesBuilder

TIMES = st.integers(1, 2**62)
RANKS = st.none() | st.integers(0, 20_000)
TEXTS = st.none() | st.text(max_size=20)
VALUES = st.floats(allow_nan=True, allow_infinity=True)
NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_./-]{0,30}", fullmatch=True)
LABELS = st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=3)
SAMPLES = st.builds(Sample, TIMES, NAMES, VALUES, RANKS, TEXTS, TEXTS, RANKS, LABELS)
VECTORS = st.builds(Vector, TIMES, NAMES, st.lists(VALUES, max_size=5).map(tuple), RANKS, RANKS, RANKS, LABELS)
EVENTS = st.builds(
    Event, TIMES, NAMES, st.sampled_from(["info", "warning", "error"]), st.text(max_size=20), RANKS, TEXTS, TEXTS
)
SPANS = st.builds(
    lambda t0, length, kind, rank, step: Span(t0, None if length is None else t0 + length, kind, "x", rank, step),
    TIMES, st.none() | st.integers(0, 10**9), st.sampled_from(["step", "phase", "collective", "request"]), RANKS,
    st.integers(0, 10**6),
)  # fmt: skip
RECORDS = st.one_of(SAMPLES, VECTORS, EVENTS, SPANS)


@given(RECORDS)
def test_a_record_survives_its_json_form(record: Any) -> None:
    again = from_json(to_json(record))
    assert to_json(again) == to_json(record)


def rows(tables: Tables) -> list[str]:
    """Every row as text, with codes replaced by what they stand for: order and pools do not matter."""
    result = []
    for name, schema in SCHEMA.items():
        for index in range(tables.count(name)):
            row: list[Any] = [name]
            for column, kind in schema.items():
                value = tables.table(name)[column][index].item()
                if column == "offset":
                    value = tables.values_of(index).tolist()
                row.append(tables.string(value) if kind == "s" else value)
            result.append(repr(row))
    return sorted(result)


def built(records: list[Any]) -> Tables:
    builder = TablesBuilder()
    for record in records:
        builder.add(json.loads(to_json(record)))
    return builder.build()


@given(st.lists(RECORDS, max_size=20), st.integers(0, 20), st.randoms())
def test_columns_do_not_depend_on_order_or_cut(records: list[Any], cut: int, random: Any) -> None:
    whole = rows(built(records))
    shuffled = random.sample(records, len(records))
    assert rows(built(shuffled)) == whole
    assert rows(Tables.concat([built(records[:cut]), built(records[cut:])])) == whole


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "object"),
        ({}, "type"),
        ({"type": []}, "type"),
        ({"type": "sample", "t_ns": 1, "metric": "a", "value": 10**400}, "too large"),
        ({"type": "sample", "metric": "a", "value": 1}, "t_ns"),
        ({"type": "sample", "t_ns": 1, "metric": "1a", "value": 1}, "metric"),
        ({"type": "sample", "t_ns": 1, "metric": "a"}, "value"),
        ({"type": "sample", "t_ns": 1, "metric": "a", "value": "much"}, "not a number"),
        ({"type": "sample", "t_ns": 1, "metric": "a", "value": 1, "rank": -1}, "rank"),
        ({"type": "sample", "t_ns": 2**64, "metric": "a", "value": 1}, "t_ns"),
        ({"type": "sample", "t_ns": 1, "metric": "a", "value": 1, "labels": {"x": 1}}, "labels"),
        ({"type": "span", "t0_ns": 5, "t1_ns": 4, "kind": "phase", "name": "x"}, "before it begins"),
        ({"type": "span", "t0_ns": 5, "t1_ns": 6, "kind": "step", "name": "step"}, "step"),
        ({"type": "vector", "t_ns": 1, "metric": "a", "values": 3}, "values"),
        ({"type": "event", "t_ns": 1, "kind": "k", "severity": "bad", "text": ""}, "severity"),
    ],
)
def test_what_is_not_a_record_is_refused_with_its_field(record: Any, reason: str) -> None:
    builder = TablesBuilder()
    with pytest.raises(ValueError, match=reason):
        builder.add(record)
    assert builder.build().total == 0


def test_a_file_keeps_its_good_lines_and_names_the_bad(tmp_path: Path) -> None:
    lines = [
        '{"type":"run","run":"r","world_size":2}',
        '{"type":"sample","t_ns":5,"metric":"train.loss","value":NaN,"rank":1,"step":3}',
        "not json",
        '{"type":"span","t0_ns":1,"t1_ns":null,"kind":"collective","name":"all_reduce","rank":0,'
        '"attrs":{"group":"dp/0","seq":4,"bytes":10,"new_key":[1]}}',
    ]
    path = tmp_path / "records.ndjson.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    run, tables, rejected = Tables.read_ndjson(path)
    assert run == {"run": "r", "world_size": 2}
    assert [entry["line"] for entry in rejected] == [3]
    assert math.isnan(tables.samples["value"][0])
    assert tables.collectives["t1_ns"][0] == NULL
    assert tables.string(tables.collectives["attrs"][0]) == '{"new_key":[1]}'
    (tmp_path / "bad").write_text("nothing\nhere")
    with pytest.raises(ValueError, match="holds no record"):
        Tables.read_ndjson(tmp_path / "bad")


PART = RingPart({"rank": 1}, ["", "forward", "né"], bytes(range(128)) * 2, 7, 3, [{"kind": "phase", "t0": 5}])


def test_a_batch_survives_its_frame() -> None:
    batch = decode_batch(encode_batch("host0", Anchor(1, 2, 3), [PART, PART]))
    assert (batch.host, batch.anchor) == ("host0", Anchor(1, 2, 3))
    assert batch.rings == [PART, PART]


@given(st.integers(0, 400), st.binary(max_size=40))
def test_a_damaged_batch_is_refused_never_misread(cut: int, noise: bytes) -> None:
    whole = encode_batch("host0", Anchor(1, 2, 3), [PART])
    damaged = whole[: min(cut, len(whole) - 1)]
    with pytest.raises(SlotError):
        decode_batch(damaged)
    with pytest.raises(SlotError):
        decode_batch(noise)


def test_codes_of_absent_texts_equal_no_row() -> None:
    tables = built([Sample(1, "a", 1.0)])
    assert not np.any(tables.samples["host"] == tables.code("nowhere"))
