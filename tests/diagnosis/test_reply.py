"""The frozen reply: its shape, that it hangs on the records alone, and what "up to step N" means."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from cluster import START_NS, Cluster, Fault
from helpers import HYPOTHESIS_KEYS, REPLY_KEYS, built, collective, joined, shuffled, step_span, verdict
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.diagnosis import diagnose, ledger
from lens.tables import Tables

FAULTY = Cluster(
    ranks=4, noise="collected", steps=90, offsets_s=0.004,
    faults=(Fault("compute", (2,), 40, 1.5), Fault("data", (1,), 60, 0.03)),
)  # fmt: skip
TABLES = FAULTY.tables()
REPLY = diagnose(FAULTY.run(), TABLES)


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def test_reply_has_exactly_the_frozen_keys() -> None:
    assert set(REPLY) == REPLY_KEYS
    assert set(REPLY["coverage"]) == {"ranks_reporting", "world_size", "signals_missing"}
    assert REPLY["hypotheses"]
    for item in REPLY["hypotheses"]:
        assert set(item) == HYPOTHESIS_KEYS
        assert set(item["what_if"]) == {"step_seconds_now", "step_seconds_if_fixed"}
        assert all(set(e) == {"metric", "ranks", "baseline", "observed", "effect"} for e in item["evidence"])
        assert all(set(a) == {"cause", "because"} for a in item["against"])
        assert item["severity"] in ("info", "warning", "error")
        assert item["ranks"] == sorted(item["ranks"])
        assert 0 <= item["confidence"] <= 1


def test_reply_is_json_without_numbers_that_are_not_finite() -> None:
    assert finite(REPLY)
    assert json.loads(json.dumps(REPLY, allow_nan=False)) == REPLY


@given(seed=st.integers(0, 2**32), twice=st.booleans())
@settings(max_examples=5, deadline=None)
def test_order_of_arrival_and_repetition_change_nothing(seed: int, twice: bool) -> None:
    again = shuffled(TABLES, seed, twice)
    assert diagnose(FAULTY.run(), again) == REPLY
    assert ledger(FAULTY.run(), again) == ledger(FAULTY.run(), TABLES)


def test_detected_step_is_the_first_reply_that_holds_the_hypothesis() -> None:
    wanted = {(h["cause"], tuple(h["ranks"])): h["detected_step"] for h in REPLY["hypotheses"]}
    seen: dict[tuple[str, tuple[int, ...]], int] = {}
    for step in range(FAULTY.steps):
        reply = diagnose(FAULTY.run(), TABLES, upto_step=step)
        assert all(h["detected_step"] <= step for h in reply["hypotheses"])
        for item in reply["hypotheses"]:
            seen.setdefault((item["cause"], tuple(item["ranks"])), step)
    assert {key: seen[key] for key in wanted} == wanted


def test_up_to_a_step_equals_the_records_up_to_that_step() -> None:
    shorter = Cluster(**{**FAULTY.__dict__, "steps": 70})
    assert diagnose(FAULTY.run(), TABLES, upto_step=69)["hypotheses"] == verdict(shorter)["hypotheses"]


def test_up_to_the_last_step_or_beyond_is_everything() -> None:
    assert diagnose(FAULTY.run(), TABLES, upto_step=89) == REPLY
    assert diagnose(FAULTY.run(), TABLES, upto_step=10_000) == REPLY


def test_before_the_first_step_nothing_is_known() -> None:
    reply = diagnose(FAULTY.run(), TABLES, upto_step=-1)
    assert (reply["status"], reply["hypotheses"]) == ("insufficient", [])


def test_a_sample_without_step_is_seen_when_a_step_ended_no_earlier() -> None:
    nan = {"type": "event", "kind": "process.exit", "t_ns": 0, "rank": 3, "attrs": {"signal": 9}, "text": "killed"}
    end_of_50 = int(TABLES.steps["t1_ns"][TABLES.steps["step"] == 50].max())
    tables = joined(TABLES, {**nan, "t_ns": end_of_50 - 1_000_000})
    assert diagnose(FAULTY.run(), tables, upto_step=50)["status"] == "failed"
    assert diagnose(FAULTY.run(), tables, upto_step=49)["status"] != "failed"


@pytest.mark.parametrize(
    "records",
    [
        [],
        [step_span(0, 0, 0, 1)],
        [step_span(0, n, n, n + 0.5) for n in range(40)],
        [step_span(r, n, n, n + 0.5) for n in range(0, 400, 10) for r in (0, 5)],
        [collective(0, 0.1, None, 1), step_span(0, 0, 0, None)],
        [{"type": "sample", "t_ns": START_NS, "metric": "train.loss", "value": "NaN", "rank": 0, "step": 3}],
        [{"type": "sample", "t_ns": START_NS, "metric": "gpu.clock.sm", "value": "NaN", "device": "a/gpu0"}],
        [{"type": "vector", "t_ns": START_NS, "metric": "step.duration", "values": [], "step": 1}],
        [{"type": "event", "t_ns": START_NS, "kind": "heartbeat", "text": "", "rank": 2}],
        [{"type": "span", "kind": "phase", "name": "forward", "t0_ns": 1, "t1_ns": 1, "rank": 0, "step": 0}],
    ],
    ids=[
        "nothing", "one step", "one rank", "gaps", "open spans", "loss only", "NaN gauge", "empty vector", "heartbeat",
        "phase only",
    ],
)  # fmt: skip
def test_poor_input_gives_a_reply(records: list[dict[str, Any]]) -> None:
    tables = built(*records) if records else Tables()
    reply = diagnose({}, tables)
    assert set(reply) == REPLY_KEYS
    assert json.dumps(reply, allow_nan=False)
    assert set(ledger({}, tables)) == {"from_step", "to_step", "wall_s", "pipeline", "parts"}
    assert reply["status"] in ("healthy", "insufficient", "failed")


def test_only_some_ranks_reporting_is_said_and_judged() -> None:
    cluster = Cluster(ranks=8, faults=(Fault("compute", (2,), 40, 1.6),))
    tables = cluster.tables()
    known = Tables(strings=tables.strings, vector_values=tables.vector_values)
    for name in ("samples", "steps", "spans", "collectives", "vectors", "events"):
        setattr(known, name, tables.select(name, tables.table(name)["rank"] < 5))
    reply = diagnose(cluster.run(), known)
    assert (reply["coverage"]["ranks_reporting"], reply["coverage"]["world_size"]) == (5, 8)
    assert (reply["hypotheses"][0]["cause"], reply["hypotheses"][0]["ranks"]) == ("slow_device", [2])
