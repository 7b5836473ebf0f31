"""Where time goes: self, wait and transfer add up to the step; clocks of hosts may differ; the ledger is complete."""

from __future__ import annotations

import numpy as np
import pytest
from cluster import NOISE, START_NS, Cluster, Fault
from helpers import built, collective, step_span
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.diagnosis import diagnose, ledger
from lens.diagnosis.decompose import Frame
from lens.diagnosis.select import Timeline
from lens.diagnosis.topology import Topology
from lens.tables import Tables


def frame_of(tables: Tables, run: dict | None = None) -> Frame:
    timeline = Timeline.of(tables)
    return Frame.of(tables, timeline, Topology.of(run or {}, tables))


def total(parts: dict[str, np.ndarray]) -> np.ndarray:
    return np.sum([np.nan_to_num(part) for part in parts.values()], axis=0)


@pytest.mark.parametrize("noise", sorted(NOISE))
def test_self_wait_and_transfer_are_the_step(noise: str) -> None:
    cluster = Cluster(ranks=8, steps=30, noise=noise, offsets_s=0.005)
    frame = frame_of(cluster.tables(), cluster.run())
    np.testing.assert_allclose(
        frame.self_time + total(frame.wait) + total(frame.transfer), frame.duration, atol=1e-6
    )


def test_phases_without_their_collectives_are_the_self_time() -> None:
    cluster = Cluster(ranks=8, steps=30)
    frame = frame_of(cluster.tables(), cluster.run())
    inside = sum(np.nan_to_num(own) for own in frame.own.values())
    np.testing.assert_allclose(inside, frame.self_time, atol=1e-4)


@given(st.lists(st.tuples(st.floats(0, 0.9), st.floats(0.001, 0.6)), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_overlapping_collectives_count_once(spans: list[tuple[float, float]]) -> None:
    records = [collective(0, begin, min(1.0, begin + length), seq) for seq, (begin, length) in enumerate(spans)]
    frame = frame_of(built(step_span(0, 0, 0.0, 1.0), *records))
    grid = np.zeros(100_000, bool)
    for begin, length in spans:
        grid[round(begin * 1e5) : round(min(1.0, begin + length) * 1e5)] = True
    assert frame.blocked[0, 0] == pytest.approx(grid.mean(), abs=1e-3)
    assert frame.self_time[0, 0] + frame.blocked[0, 0] == pytest.approx(1.0)


def test_the_late_rank_waits_for_nobody_and_the_others_for_it() -> None:
    records = [step_span(r, 0, 0.0, 1.0) for r in range(3)]
    records += [collective(r, 0.8 if r == 2 else 0.2, 0.9, 7) for r in range(3)]
    frame = frame_of(built(*records))
    assert frame.wait["world"][0].tolist() == pytest.approx([0.6, 0.6, 0.0], abs=1e-6)
    assert frame.transfer["world"][0].tolist() == pytest.approx([0.1, 0.1, 0.1], abs=1e-6)


def test_an_asynchronous_collective_blocks_only_from_its_wait_on() -> None:
    records = [step_span(r, 0, 0.0, 1.0) for r in range(2)]
    waited = START_NS + 700_000_000
    records += [collective(r, 0.1, 0.9, 1, **{"async": True, "t_wait_ns": waited}) for r in range(2)]
    records += [collective(r, 0.2, 0.95, 2, **{"async": True}) for r in range(2)]
    frame = frame_of(built(*records))
    assert frame.blocked[0].tolist() == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("offset", [0.005, 0.05])
def test_clock_offsets_between_hosts_change_no_verdict_and_little_waiting(offset: float) -> None:
    fault = (Fault("compute", (5,), 40, 1.5),)
    plain = Cluster(ranks=8, hosts=4, faults=fault)
    skewed = Cluster(ranks=8, hosts=4, faults=fault, offsets_s=offset)
    a, b = diagnose(plain.run(), plain.tables()), diagnose(skewed.run(), skewed.tables())
    assert [(h["cause"], h["ranks"]) for h in a["hypotheses"]] == [
        (h["cause"], h["ranks"]) for h in b["hypotheses"]
    ]
    waits = [total(frame_of(c.tables(), c.run()).wait) for c in (plain, skewed)]
    np.testing.assert_allclose(waits[1].mean(axis=0), waits[0].mean(axis=0), atol=0.0005)


@pytest.mark.parametrize("noise", ["quiet", "shared", "collected"])
def test_the_ledger_adds_up_to_wall_time(noise: str) -> None:
    cluster = Cluster(ranks=8, steps=60, noise=noise, checkpoint_every=20, eval_every=30)
    account = ledger(cluster.run(), cluster.tables())
    parts = [value for value in account["parts"].values() if value is not None]
    assert sum(parts) == pytest.approx(account["wall_s"], rel=0.01)
    assert list(account["parts"]) == [
        "compute", "exposed_communication", "straggler_wait", "data", "checkpoint", "gc", "bubble", "restart", "other",
    ]  # fmt: skip
    assert account["parts"]["other"] < 0.15 * account["wall_s"]
    assert account["parts"]["bubble"] is None
    assert (account["from_step"], account["to_step"]) == (0, 59)


def test_a_straggler_shows_as_waiting_of_the_others() -> None:
    plain, slow = Cluster(ranks=8), Cluster(ranks=8, faults=(Fault("compute", (3,), 0, 1.5),))
    before, after = (ledger(c.run(), c.tables())["parts"] for c in (plain, slow))
    assert after["straggler_wait"] > before["straggler_wait"] + 0.5
    assert after["exposed_communication"] == pytest.approx(before["exposed_communication"], rel=0.05)


def test_time_lost_to_a_restart_is_its_own_part() -> None:
    records = [step_span(0, n, n, n + 1) for n in range(10)]
    records += [step_span(0, n, 20 + n, 21 + n) for n in range(5, 15)]
    account = ledger({}, built(*records))
    assert account["wall_s"] == pytest.approx(35)
    assert account["parts"]["restart"] == pytest.approx(20, abs=0.01)
    assert sum(v for v in account["parts"].values() if v is not None) == pytest.approx(35, rel=0.01)


def test_a_checkpoint_outside_of_steps_is_no_other_time() -> None:
    records = [step_span(rank, n, n, n + 0.8) for n in range(4) for rank in (0, 1)]
    for rank, later in ((0, 0.0), (1, 1.0)):
        records += [
            phase(rank, "checkpoint", 0, 0.1, 0.2),
            phase(rank, "checkpoint", None, 1.8, 2.0),
            phase(rank, "eval", 4, 3.8, 5.0),
            phase(rank, "checkpoint", 4, 5.0, 6.0 + later),  # of a step that never ends
        ]
    tables = built(*records, *records)
    account = ledger({}, tables)
    assert (account["wall_s"], account["to_step"]) == (pytest.approx(6.5), 3)
    assert account["parts"]["checkpoint"] == pytest.approx(0.1 + 0.2 + 1.5)
    assert sum(v for v in account["parts"].values() if v is not None) == pytest.approx(6.5)
    early = ledger({}, tables, 2)
    assert (early["wall_s"], early["parts"]["checkpoint"]) == (pytest.approx(2.8), pytest.approx(0.3))


def phase(rank: int, name: str, step: int | None, t0_s: float, t1_s: float) -> dict:
    return {**step_span(rank, 0, t0_s, t1_s), "kind": "phase", "name": name, "step": step}


def test_pre_reduced_vectors_stand_for_spans() -> None:
    random = np.random.default_rng(3)
    records, ranks = [], 64
    for step in range(60):
        compute = 0.05 * (1 + 0.02 * random.standard_normal(ranks))
        if step >= 30:
            compute[17] *= 1.5
        wait, t_ns = compute.max() - compute, START_NS + step * 10**8
        vectors = {
            ("step.duration", ""): compute + wait + 0.01, ("comm.self", "backward"): compute,
            ("comm.wait", "backward"): wait, ("comm.transfer", "backward"): np.full(ranks, 0.01),
        }  # fmt: skip
        for (metric, phase), values in vectors.items():
            labels = {"phase": phase, "kind": "dp", "op": "all_reduce"} if phase else None
            records.append({
                "type": "vector", "metric": metric, "values": values.tolist(), "step": step, "t_ns": t_ns,
                "labels": labels,
            })  # fmt: skip
    reply = diagnose({"run": "big", "world_size": ranks}, built(*records))
    assert (reply["hypotheses"][0]["cause"], reply["hypotheses"][0]["ranks"]) == ("slow_device", [17])
    assert reply["coverage"]["ranks_reporting"] == ranks
    assert reply["hypotheses"][0]["slowdown_pct"] == pytest.approx(37, abs=6)
