"""Serving: each cause is named at its rank, its look-alikes are not, and traffic that is served is nobody's fault."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from helpers import built, shuffled

from lens.diagnosis import diagnose
from sample_runs.cluster.layout import Layout
from sample_runs.cluster.serving import Service, serve
from sample_runs.cluster.traffic import SERVED, TROUBLES, Trouble

SECOND = 1_000_000_000
START_NS = 1_700_000_000 * SECOND


def told(reply: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """Causes and ranks of all findings but those that are information."""
    return [(item["cause"], item["ranks"]) for item in reply["hypotheses"] if item["severity"] != "info"]


def troubled(name: str, has_steps: bool, seed: int = 1) -> Service:
    kind = TROUBLES[name]
    fault = Trouble(name, 0 if kind.always else 300, 3, (kind.weak + kind.strong) / 2)
    return Service(load=kind.load, faults=(fault,), seed=seed, told=has_steps)


@pytest.mark.parametrize(
    ("name", "has_steps"),
    [
        ("kv_cache_exhausted", False), ("kv_cache_everywhere", False), ("prefill_interference", True),
        ("prefill_interference", False), ("decode_expert_imbalance", True), ("queue_overload", False),
        ("cold_start", False), ("cold_rank", True),
    ],
)  # fmt: skip
def test_a_fault_of_a_service_is_named_at_its_ranks_and_nothing_else_is(name: str, has_steps: bool) -> None:
    service = troubled(name, has_steps)
    (fault,) = service.faults
    reply = diagnose(service.run(), serve(service).tables)
    assert told(reply) == [(fault.cause, fault.named(service.layout))]
    found = reply["hypotheses"][0]
    assert found["slowdown_pct"] > 5
    assert found["evidence"]
    assert found["against"]
    if has_steps and not fault.kind.always:
        assert abs(found["onset_step"] - fault.step) < 60
    else:
        assert found["onset_step"] in (None, 0)


def test_a_cold_rank_is_told_from_those_of_its_group_that_wait_for_it() -> None:
    cold = Trouble("cold_rank", 0, 1, 226.0)
    service = Service(Layout(8, ep=4), noise="mixed", load=0.5, faults=(cold,), seed=22)
    assert told(diagnose(service.run(), serve(service).tables)) == [("cold_start", [1])]


@pytest.mark.parametrize(("place", "noise"), list(enumerate(sorted(SERVED))))
def test_traffic_that_is_served_is_healthy(place: int, noise: str) -> None:
    service = Service(noise=noise, seed=5, told=place % 2 == 0)
    reply = diagnose(service.run(), serve(service).tables)
    assert told(reply) == []
    assert reply["status"] == "healthy"


@pytest.mark.parametrize(("name", "has_steps"), [("kv_cache_exhausted", False), ("decode_expert_imbalance", True)])
def test_the_order_of_records_and_their_repetition_change_nothing(name: str, has_steps: bool) -> None:
    service = troubled(name, has_steps)
    tables = serve(service).tables
    reply = diagnose(service.run(), tables)
    assert diagnose(service.run(), shuffled(tables, 3, twice=True)) == reply


def requests(
    arrivals: Iterable[float], places: int, work: Iterable[float], queue_told: bool = True
) -> list[dict[str, Any]]:
    """Records of a server that works on so many requests at once, first come, first served."""
    free, records = [0.0] * places, []
    for number, (arrived, lasts) in enumerate(zip(arrivals, work, strict=True)):
        begun = max(arrived, min(free))
        free[free.index(min(free))] = begun + lasts
        first = begun + 0.2 * lasts
        attrs: dict[str, Any] = {
            "number": number,
            "prompt_tokens": 100,
            "output_tokens": 21,
            "t_first_token_ns": START_NS + int(first * 1e9),
        }
        if queue_told:
            attrs["queue_ns"] = int((begun - arrived) * 1e9)
        records.append({
            "type": "span", "kind": "request", "name": "m", "rank": 0, "t0_ns": START_NS + int(begun * 1e9),
            "t1_ns": START_NS + int((begun + lasts) * 1e9), "attrs": attrs,
        })  # fmt: skip
    return records


def arriving(rate: float, count: int, since: float = 0.0, seed: int = 0) -> np.ndarray:
    return since + np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def causes(*records: dict[str, Any]) -> list[str]:
    return [cause for cause, _ in told(diagnose({"run": "service", "world_size": 1}, built(*records)))]


WORK = np.exp(0.2 * np.random.default_rng(9).standard_normal(600))


def test_more_requests_than_are_served_overload_a_queue_also_without_a_past() -> None:
    assert causes(*requests(arriving(6.0, 200), 4, WORK[:200])) == ["queue_overload"]


def test_a_batch_of_requests_that_all_come_at_once_overloads_nothing() -> None:
    assert causes(*requests(np.zeros(200), 4, WORK[:200])) == []


def test_the_same_requests_for_which_a_server_becomes_too_slow_are_not_too_many() -> None:
    work = np.concatenate([WORK[:100], 3 * WORK[100:250]])
    assert "queue_overload" not in causes(*requests(arriving(2.5, 250), 4, work))


def test_a_burst_that_has_drained_is_over() -> None:
    burst = arriving(8.0, 80, 40.0)
    came = np.concatenate([arriving(2.0, 80), burst, burst[-1] + 20 + arriving(2.0, 80)])
    assert causes(*requests(came, 4, WORK[: len(came)])) == []


def gauge(metric: str, values: Iterable[float], every: float = 0.5) -> list[dict[str, Any]]:
    return [
        {
            "type": "sample",
            "metric": metric,
            "value": float(value),
            "rank": 0,
            "t_ns": START_NS + int(place * every * 1e9),
        }
        for place, value in enumerate(values)
    ]


def test_a_full_cache_that_costs_nobody_anything_is_well_used() -> None:
    usage = gauge("infer.kv_cache.usage", [0.95] * 100)
    assert (
        causes(*requests(arriving(2.0, 100), 4, WORK[:100]), *usage, *gauge("infer.preemptions", [0] * 100)) == []
    )


def test_places_that_are_all_taken_are_no_full_cache_and_the_reverse() -> None:
    usage = gauge("infer.kv_cache.usage", [0.5] * 20 + [0.95] * 80)
    overload = requests(arriving(6.0, 200), 4, WORK[:200])
    assert causes(*overload, *usage) == ["queue_overload"]
    put_back = gauge("infer.preemptions", [0] * 20 + list(range(80)))
    assert causes(*overload, *usage, *put_back) == ["kv_cache_exhausted"]


def test_a_queue_told_by_its_depth_alone_is_less_sure_and_an_unknown_one_is_nothing() -> None:
    silent = requests(arriving(6.0, 200), 4, WORK[:200], queue_told=False)
    assert causes(*silent) == []
    reply = diagnose(
        {"run": "service", "world_size": 1}, built(*silent, *gauge("infer.queue.depth", range(0, 120, 2)))
    )
    assert told(reply) == [("queue_overload", [])]
    assert reply["hypotheses"][0]["confidence"] <= 0.7
