"""Bodies to columns: bad records never cost good ones, encodings are bounded, order does not matter."""

from __future__ import annotations

import gzip
import json
import math
import random
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.store.decode import ARROW, MOST_REASONS, NDJSON, SLOTS, decode
from lens.store.encodings import unpack
from lens.store.errors import TooLargeError, UndecodableError

from . import helpers


@given(helpers.record_lists, st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_order_of_lines_does_not_matter(records: list[dict[str, Any]], rng: random.Random) -> None:
    shuffled = records[:]
    rng.shuffle(shuffled)
    first, second = helpers.decoded(records), helpers.decoded(shuffled)
    assert first.rejected.count == second.rejected.count == 0
    assert first.accepted == len(records)
    assert helpers.rows_of(first.tables) == helpers.rows_of(second.tables)


@given(
    helpers.record_lists,
    st.lists(st.binary(min_size=1, max_size=40).filter(lambda b: b"\n" not in b and b.strip() != b"")),
)
@settings(max_examples=60, deadline=None)
def test_garbage_between_the_lines_costs_no_record(records: list[dict[str, Any]], garbage: list[bytes]) -> None:
    lines = [json.dumps(record).encode() for record in records]
    mixed = (
        [line for pair in zip(garbage, lines, strict=False) for line in pair]
        + lines[len(garbage) :]
        + garbage[len(lines) :]
    )
    found = decode(b"\n".join(mixed), NDJSON)
    assert helpers.rows_of(found.tables) == helpers.rows_of(helpers.decoded(records).tables)
    assert found.rejected.count == len(garbage)


def test_every_bad_line_is_named_with_its_reason() -> None:
    body = b"\n".join(
        [
            b'{"type":"sample","t_ns":1,"metric":"a","value":1}',
            b"not json",
            b'{"type":"unheard"}',
            b"",
            b'{"type":"sample","t_ns":1,"metric":"a b","value":1}',
            b'{"type":["sample"]}',
            b'{"type":"sample","t_ns":1,"metric":"a","value":1' + b"0" * 400 + b"}",
            b"[" * 100_000,
            b'{"type":"sample","t_ns":2,"metric":"a","value":2}',
        ]
    )
    found = decode(body, NDJSON)
    assert [entry["line"] for entry in found.rejected.listed] == [2, 3, 5, 6, 7, 8]
    assert all(entry["reason"] for entry in found.rejected.listed)
    assert found.tables.samples["t_ns"].tolist() == [1, 2]


def test_a_long_body_is_read_as_one_and_its_lines_are_numbered_through() -> None:
    lines = [
        b'{"type":"sample","t_ns":%d,"metric":"a.%d","value":1}' % (index, index % 7) for index in range(30_000)
    ]
    lines[20_000] = b"bad"
    body = b"\n".join(lines)
    assert len(body) > 1 << 20
    for ending in (b"", b"\n"):
        found = decode(body + ending, NDJSON)
        assert [entry["line"] for entry in found.rejected.listed] == [20_001]
        assert found.tables.samples["t_ns"].tolist() == [index for index in range(30_000) if index != 20_000]
        assert found.tables.texts(found.tables.samples["metric"])[-1] == f"a.{29_999 % 7}"


def test_values_that_are_no_finite_numbers_come_as_words_and_as_bare_tokens() -> None:
    lines = ['"NaN"', "NaN", '"Infinity"', "Infinity", '"-Infinity"', "-Infinity"]
    body = "\n".join(f'{{"type":"sample","t_ns":1,"metric":"a","value":{value}}}' for value in lines)
    values = decode(body.encode(), NDJSON).tables.samples["value"].tolist()
    assert math.isnan(values[0])
    assert math.isnan(values[1])
    assert values[2:] == [math.inf, math.inf, -math.inf, -math.inf]


def test_only_the_first_reasons_are_listed_but_all_are_counted() -> None:
    found = decode(b"x\n" * (MOST_REASONS + 5), NDJSON)
    assert len(found.rejected.listed) == MOST_REASONS
    assert found.rejected.count == MOST_REASONS + 5


def test_unpaired_surrogates_do_not_reach_the_database() -> None:
    body = b'{"type":"event","t_ns":1,"kind":"k","text":"a\\ud800b"}'
    found = decode(body, NDJSON)
    text = found.tables.strings[int(found.tables.events["text"][0])] if found.accepted else ""
    text.encode()


@given(st.binary(max_size=5000), st.sampled_from(["gzip", "zstd", "identity", ""]))
@settings(deadline=None)
def test_encodings_are_undone(body: bytes, encoding: str) -> None:
    packers = {"gzip": gzip.compress, "zstd": zstandard.compress}
    packed = packers.get(encoding, bytes)(body)
    assert unpack(packed, encoding, 5000) == body


def test_bodies_of_several_members_are_one_body() -> None:
    assert unpack(gzip.compress(b"ab") + gzip.compress(b"cd"), "gzip", 100) == b"abcd"
    assert unpack(zstandard.compress(b"ab") + zstandard.compress(b"cd"), "zstd", 100) == b"abcd"


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_small_body_that_unpacks_to_very_much_is_refused(encoding: str) -> None:
    zeros = bytes(64 << 20)
    packed = gzip.compress(zeros) if encoding == "gzip" else zstandard.compress(zeros)
    with pytest.raises(TooLargeError):
        unpack(packed, encoding, 1 << 20)


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br"])
def test_bytes_that_are_not_of_the_encoding_are_refused(encoding: str) -> None:
    with pytest.raises(UndecodableError):
        unpack(b"plainly not packed", encoding, 1000)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_body_cut_short_is_refused(encoding: str) -> None:
    packed = (gzip.compress if encoding == "gzip" else zstandard.compress)(random.Random(1).randbytes(3000))
    with pytest.raises(UndecodableError):
        unpack(packed[:-20], encoding, 10_000)


@given(st.binary(max_size=300), st.sampled_from([ARROW, SLOTS]))
@settings(max_examples=60, deadline=None)
def test_garbage_in_a_binary_type_is_refused_as_a_whole(body: bytes, content_type: str) -> None:
    with pytest.raises(UndecodableError):
        decode(body, content_type)


def stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue().to_pybytes()


def arrow_table(records: list[dict[str, Any]], kind: str) -> pa.Table:
    keys = dict.fromkeys(key for record in records for key in record if key != "type")

    def cell(record: dict[str, Any], key: str) -> Any:
        value = record.get(key)
        if key in ("labels", "attrs"):
            return json.dumps(value) if value is not None else None
        if key == "values":
            return [float(v) for v in value]
        return float(value) if key == "value" else value

    columns = {key: [cell(record, key) for record in records] for key in keys}
    return pa.table(columns).replace_schema_metadata({"lens.type": kind})


@pytest.mark.parametrize("kind", ["sample", "vector", "event", "span"])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_arrow_and_ndjson_say_the_same(kind: str, data: st.DataObject) -> None:
    strategy = {
        "sample": helpers.samples,
        "vector": helpers.vectors,
        "event": helpers.events,
        "span": helpers.collectives,
    }[kind]
    records = data.draw(st.lists(strategy, min_size=1, max_size=20))
    found = decode(stream(arrow_table(records, kind)), ARROW)
    assert found.rejected.count == 0
    assert helpers.rows_of(found.tables) == helpers.rows_of(helpers.decoded(records).tables)


def test_arrow_rows_that_are_no_records_are_named() -> None:
    table = pa.table(
        {"t_ns": [1, None, 3, 4], "metric": ["a", "a", "no name", None], "value": [1.0, 2.0, 3.0, 4.0]}
    )
    found = decode(stream(table), ARROW)
    assert sorted(entry["line"] for entry in found.rejected.listed) == [1, 2, 3]
    assert found.tables.samples["value"].tolist() == [1.0]


def test_arrow_dictionaries_and_maps_are_read() -> None:
    table = pa.table(
        {
            "t_ns": pa.array([1, 2], pa.uint64()),
            "metric": pa.array(["a", "b"]).dictionary_encode(),
            "value": pa.array([1, 2], pa.float32()),
            "labels": pa.array([[("k", "v")], None], pa.map_(pa.string(), pa.string())),
        }
    )
    found = decode(stream(table), ARROW).tables
    assert found.texts(found.samples["metric"]) == ["a", "b"]
    assert found.texts(found.samples["labels"]) == ['{"k":"v"}', None]


def test_arrow_of_no_record_type_is_refused() -> None:
    with pytest.raises(UndecodableError, match="no record type"):
        decode(stream(pa.table({"a": [1]})), ARROW)


SPOILED: dict[str, tuple[str, pa.Array]] = {
    "a rank of which 32 bits are another's": ("rank", pa.array([2**32 + 1, 1])),
    "a half rank": ("rank", pa.array([1.5, 1.0])),
    "a step over 64 bits": ("step", pa.array([2**63, 1], pa.uint64())),
    "labels that are no JSON": ("labels", pa.array(['{"a":', '{"a": "b"}'])),
    "labels that are no text": ("labels", pa.array(['{"a": 1}', '{"a": "b"}'])),
    "labels nested beyond reading": ("labels", pa.array(["[" * 100_000, '{"a": "b"}'])),
    "a time beyond the calendar": ("extra", pa.array([2**62, None], pa.timestamp("us"))),
}


@pytest.mark.parametrize("column", SPOILED)
def test_an_arrow_value_without_a_place_costs_its_own_row_alone(column: str) -> None:
    name, values = SPOILED[column]
    base = {"t_ns": [1, 2], "kind": ["x", "y"], "severity": ["info", "info"]}
    if name != "extra":
        base = {"t_ns": [1, 2], "metric": ["a", "b"], "value": [1.0, 2.0]}
    found = decode(stream(pa.table({**base, name: values})), ARROW)
    assert [each["line"] for each in found.rejected.listed] == [0]
    (kept,) = (
        found.tables.table(table)["t_ns"].tolist() for table in ("samples", "events") if found.tables.count(table)
    )
    assert kept == [2]
