"""Runs that died, hang, or lost their numbers: the first cause is named, not its victims."""

from __future__ import annotations

from typing import Any

import pytest
from cluster import Cluster, Fault
from helpers import end_s, event, first, joined, verdict

from lens.diagnosis import diagnose
from lens.tables import Tables

RUN = Cluster(ranks=4, steps=60)
TABLES = RUN.tables()
END = end_s(TABLES)


def judged(*records: dict[str, Any], tables: Tables = TABLES) -> dict[str, Any]:
    return diagnose(RUN.run(), joined(tables, *records) if records else tables)


@pytest.mark.parametrize("dead", range(4))
def test_the_killed_rank_is_named_not_those_the_launcher_ended(dead: int) -> None:
    others = [r for r in range(4) if r != dead]
    ends = [event("process.exit", END + 0.4 + 0.01 * r, r, exit_code=None, signal=15, clean=False) for r in others]
    reply = judged(event("process.exit", END + 0.1, dead, exit_code=None, signal=9, clean=False), *ends)
    assert reply["status"] == "failed"
    assert first(reply) == ("rank_dead", [dead])
    assert [item["cause"] for item in reply["hypotheses"]].count("rank_dead") == 1
    assert "SIGKILL" in reply["hypotheses"][0]["recommendation"]


def test_broken_connections_noticed_before_the_exit_do_not_mislead() -> None:
    lost = {"type": "RuntimeError", "message": "[gloo] Connection closed by peer [127.0.0.1]:1234"}
    reply = judged(
        event("process.error", END + 0.01, 0, **lost), event("process.error", END + 0.02, 3, **lost),
        event("process.exit", END + 0.2, 2, exit_code=None, signal=9, clean=False),
        event("process.exit", END + 0.3, 0, exit_code=1, clean=False),
        event("process.exit", END + 0.3, 3, exit_code=1, clean=False),
    )  # fmt: skip
    assert first(reply) == ("rank_dead", [2])


def test_an_exception_is_the_cause_when_it_came_first() -> None:
    reply = judged(
        event("process.error", END + 0.01, 1, type="ValueError", message="bad batch"),
        event("process.exit", END + 0.1, 1, exit_code=1, clean=False),
        event("process.exit", END + 0.5, 0, exit_code=None, signal=15, clean=False),
    )  # fmt: skip
    assert first(reply) == ("rank_dead", [1])
    assert "ValueError" in reply["hypotheses"][0]["recommendation"]


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "out_of_memory"),
        ("DataLoader worker (pid 77) is killed by signal: Killed.", "dataloader_worker_death"),
    ],
)
def test_known_errors_win_over_rank_dead(message: str, cause: str) -> None:
    reply = judged(
        event("process.error", END + 0.01, 2, type="RuntimeError", message=message),
        event("process.exit", END + 0.1, 2, exit_code=1, clean=False),
    )
    assert first(reply) == (cause, [2])


@pytest.mark.parametrize("attrs", [{"exit_code": 0, "clean": True}, {"exit_code": None, "clean": True}])
def test_clean_ends_are_healthy(attrs: dict[str, Any]) -> None:
    reply = judged(*(event("process.exit", END + 0.1 * r, r, **attrs) for r in range(4)))
    assert (reply["status"], reply["hypotheses"]) == ("healthy", [])


def test_a_failure_that_was_restarted_is_over() -> None:
    tables = RUN.tables()
    half = float(tables.steps["t1_ns"][tables.steps["step"] == 29].max() - tables.steps["t0_ns"].min()) * 1e-9
    reply = judged(
        event("process.exit", half + 0.001, 1, exit_code=None, signal=9, clean=False),
        event("run.restart", half + 0.002, None, attempt=1, from_step=30), tables=tables,
    )  # fmt: skip
    assert reply["status"] == "degraded"
    assert first(reply) == ("rank_dead", [1])
    assert reply["hypotheses"][0]["end_step"] is not None


@pytest.mark.parametrize("rank", range(4))
def test_the_first_rank_whose_own_loss_is_lost_is_the_origin(rank: int) -> None:
    reply = verdict(Cluster(ranks=4, steps=60, faults=(Fault("nan", (rank,), 40),)))
    assert reply["status"] == "failed"
    assert first(reply) == ("nan_origin", [rank])
    found = reply["hypotheses"][0]
    assert (found["onset_step"], found["detected_step"], found["slowdown_pct"]) == (40, 40, None)
    assert found["evidence"][0]["observed"] == "NaN"


def test_a_loss_scaler_that_skips_steps_is_healthy() -> None:
    spikes = [
        {
            "type": "sample", "metric": "train.grad_norm.local", "value": "Infinity", "rank": rank, "step": 40,
            "t_ns": int(TABLES.steps["t1_ns"][TABLES.steps["step"] == 40].max()) + 1,
        }
        for rank in range(4)
    ]  # fmt: skip
    assert judged(*spikes)["status"] == "healthy"
