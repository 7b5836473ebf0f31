"""The laws of the simulated cluster, whatever the layout, the noise, the fault and the seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lens.diagnosis import diagnose
from lens.slots import NULL
from lens.tables import SCHEMA, Tables
from sample_runs.cluster import FAULTS, NOISE, Cluster, Fault, Layout, emit, simulate
from sample_runs.cluster.simulation import GRADIENT_BYTES, HALF, HIDDEN, TOP_K

LAYOUTS = [Layout(8, ep=4), Layout(16, ep=8), Layout(16, ep=4, tp=2), Layout(16, ep=4, pp=2), Layout(16, ep=16)]
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def clusters(draw: st.DrawFn, ending: bool = True) -> Cluster:
    layout = draw(st.sampled_from(LAYOUTS))
    names = [n for n, kind in FAULTS.items() if ending or not kind.ends]
    fault = Fault(draw(st.sampled_from(names)), draw(st.integers(2, 5)), draw(st.integers(0, layout.ranks - 1)))
    noise = draw(st.sampled_from(sorted(NOISE)))
    return Cluster(layout, 8, noise, (fault,), draw(st.integers(0, 1000)), save_every=3)


@FEW
@given(clusters())
def test_nobody_leaves_a_collective_before_the_last_has_entered(cluster: Cluster) -> None:
    tables = simulate(cluster).tables
    table = tables.collectives
    both = table["op"] != tables.code("send")
    keys = np.stack([table["group"], table["seq"]], axis=1)[both]
    # Clocks of hosts differ by up to a millisecond either way.
    entered, left = table["t0_ns"][both], table["t1_ns"][both]
    _, place = np.unique(keys, axis=0, return_inverse=True)
    last = np.full(place.max() + 1, NULL)
    np.maximum.at(last, place.reshape(-1), entered)
    assert (left[left != NULL] >= last[place.reshape(-1)][left != NULL] - 2_000_000).all()


@FEW
@given(clusters())
def test_a_rank_is_in_one_blocking_collective_at_a_time(cluster: Cluster) -> None:
    table = simulate(cluster).tables.collectives
    blocking = table["is_async"] == 0
    rank, t0, t1 = (table[name][blocking] for name in ("rank", "t0_ns", "t1_ns"))
    order = np.lexsort((t0, rank))
    same = np.diff(rank[order]) == 0
    # Whoever is still in one has entered no other; all others were over before the next began.
    ends = t1[order][:-1][same]
    assert (ends != NULL).all()
    assert (ends <= t0[order][1:][same]).all()


@FEW
@given(clusters(ending=False))
def test_the_bytes_of_a_collective_are_those_of_its_tensors(cluster: Cluster) -> None:
    tables = simulate(cluster).tables
    table = tables.collectives

    def sizes(op: str, group: str) -> np.ndarray:
        kinds = np.array([(text or "").split("/")[0] == group for text in tables.strings])
        return table["bytes"][(table["op"] == tables.code(op)) & kinds[table["group"]]]

    pp = cluster.layout.pp
    assert set(sizes("all_reduce", "dp").tolist()) <= {round(GRADIENT_BYTES / pp)}
    assert set(sizes("all_reduce", "tp").tolist()) <= {round(cluster.tokens * HIDDEN * HALF / pp)}
    # What all ranks of all groups dispatch is what the routers sent, and it is what they combine.
    given_away = float(sizes("all_to_all", "ep").sum())
    routed = tables.vector_values.sum() * HIDDEN * HALF * 2 * 2
    assert given_away == pytest.approx(routed, rel=1e-6)
    assert routed == pytest.approx(
        cluster.steps * cluster.layout.ranks * cluster.layers * cluster.tokens * TOP_K * HIDDEN * HALF * 4, rel=0.02
    )


def rows(tables: Tables, name: str, until: int) -> list[tuple[Any, ...]]:
    """Rows of a table that bear a step below this one, with their texts, in order."""
    table = tables.select(name, (tables.table(name)["step"] < until) & (tables.table(name)["step"] != NULL))
    columns = [
        tables.texts(values) if SCHEMA[name][column] == "s" else np.nan_to_num(values).tolist()
        for column, values in table.items()
        if column != "offset"
    ]
    return list(zip(*columns, strict=True))


@FEW
@given(clusters())
def test_a_fault_changes_nothing_before_its_step(cluster: Cluster) -> None:
    faulty, healthy = simulate(cluster).tables, simulate(cluster.healthy()).tables
    for name in ("steps", "spans", "collectives", "vectors", "samples"):
        step = cluster.faults[0].step
        assert rows(faulty, name, step) == rows(healthy, name, step)


@FEW
@given(clusters())
def test_the_same_seed_gives_the_same_records(cluster: Cluster) -> None:
    assert list(map(str, emit.records(simulate(cluster).tables))) == list(
        map(str, emit.records(simulate(cluster).tables))
    )


@pytest.mark.parametrize("name", sorted(n for n, kind in FAULTS.items() if not kind.free and kind.needs != "makes"))
def test_every_fault_that_costs_time_makes_steps_longer(name: str) -> None:
    needs = FAULTS[name].needs
    layout = Layout(32, ep=8 if needs == "inside" else 16, pp=2 if needs == "pp" else 1, hosts_per_switch=2)
    cluster = Cluster(layout, 60, faults=(Fault(name, 20, 5),), save_every=10)
    slow, usual = simulate(cluster).durations[20:].mean(), simulate(cluster.healthy()).durations[20:].mean()
    assert slow > 1.03 * usual


@pytest.mark.parametrize("name", sorted(n for n, kind in FAULTS.items() if kind.ends))
def test_a_run_that_ends_leaves_its_collectives_open_or_its_processes_gone(name: str) -> None:
    layout = Layout(16, ep=8)
    outcome = simulate(Cluster(layout, 30, faults=(Fault(name, 20, 5),)))
    assert np.isfinite(outcome.durations[:20]).all()
    assert not np.isfinite(outcome.durations[20:]).any()
    assert (outcome.tables.collectives["t1_ns"] == NULL).sum() >= layout.ranks - 1


def test_a_file_of_the_run_is_diagnosed_like_its_columns(tmp_path: Path) -> None:
    cluster = Cluster(Layout(16), 60, faults=(Fault("thermal_throttle", 30, 3),), seed=7)
    tables = simulate(cluster).tables
    run, read, refused = Tables.read_ndjson(emit.write(cluster.run(), tables, tmp_path))
    assert not refused
    assert read.total == tables.total
    reply = diagnose(run, read)
    assert reply == diagnose(cluster.run(), tables)
    assert (reply["hypotheses"][0]["cause"], reply["hypotheses"][0]["ranks"]) == ("thermal_throttle", [3])


def test_large_clusters_send_vectors_over_ranks_that_name_the_same_rank() -> None:
    cluster = Cluster(Layout(1032, ep=8), 60, faults=(Fault("slow_device", 25, 77),))
    tables = simulate(cluster).tables
    assert not tables.count("spans")
    assert not tables.count("collectives")
    assert diagnose(cluster.run(), tables)["hypotheses"][0]["ranks"] == [77]


def test_the_command_says_what_is_wrong_with_its_words(tmp_path: Path) -> None:
    def said(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "sample_runs.cluster", *words, "--steps", "12", "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, text = said("--fault", "slow_link@4:3", "--run", "mine")
    assert (code, (tmp_path / "mine.ndjson.gz").is_file()) == (0, True)
    assert "slow_link on ranks [3]" in text
    assert said("--fault", "nonsense@4:3")[0] == 2
    assert said("--ranks", "12", "--ep", "8")[0] == 2
    assert said("--fault", "slow_link@4:99")[0] == 2
