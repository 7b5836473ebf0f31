"""The hook measures what it costs, says so, and leaves out what its budget has no room for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lens
from lens.hooks import groups, session
from lens.hooks.budget import periods_within
from lens.ring_reader import write_control
from tests.hooks.ringside import Recorded

Watch = Callable[..., None]
Read = Callable[[], Recorded]
times = st.integers(0, 10**9)


@given(allowed=times, fixed=times, whole=st.lists(times, min_size=1, max_size=3), data=st.data())
def test_periods_fit_the_budget_or_nothing_more_can_be_left_out(
    allowed: int, fixed: int, whole: list[int], data: st.DataObject
) -> None:
    now = [data.draw(st.sampled_from([1, 2, 8, 64])) for _ in whole]
    parts = [spent / period for spent, period in zip(whole, now, strict=True)]
    found = periods_within(allowed, fixed, parts, now)
    needed = fixed + sum(spent / period for spent, period in zip(whole, found, strict=True))
    fits = needed <= allowed * (1 + 1e-9)
    assert fits or all(period == 64 for spent, period in zip(whole, found, strict=True) if spent > 0)
    for earlier, later in zip(range(len(found)), range(1, len(found)), strict=False):
        assert found[later] == 1 or found[earlier] == 64 or whole[earlier] == 0


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.top_k = 1
        self.router = nn.Linear(4, 3)
        self.experts = nn.Identity()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.router(tokens)


def train(steps: int) -> None:
    for _ in range(steps):
        with lens.step():
            MODEL(torch.ones(2, 4)).sum().backward()
            dist.all_reduce(torch.ones(1))


MODEL = nn.Sequential(Routed())
NO_ROOM_PCT = 1e-7
"""So little that it stays too little for a hook in a process that a busy machine makes stand for seconds."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(session, "_COUNTERS_NS", 0)
    monkeypatch.setattr(groups, "ASKED_FIRST", 4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_share_of_time_is_recorded_and_adds_up(watch: Watch, recorded: Read) -> None:
    watch(MODEL)
    train(20)
    found = recorded()
    shares = [share for _, share in found.values("lens.overhead.ratio")]
    assert len(shares) == 19
    assert all(0 < share < 1 for share in shares)
    assert all(step["overhead_ns"] > 0 for step in found.steps)


def test_without_room_experts_give_way_first_and_steps_stay(watch: Watch, recorded: Read, rings: Path) -> None:
    watch(MODEL, native=False)
    (ring,) = rings.glob("*/*/main.ring")
    session_ = lens.hooks.api._session
    assert session_ is not None
    session_._limit = NO_ROOM_PCT
    write_control(ring, backoff_pct=100)
    train(20)
    assert session_.budget.periods == [1, 1]
    write_control(ring, backoff_pct=0)
    train(400)
    assert session_.budget.periods == [64, 64]
    found = recorded()
    assert len(found.steps) == 420
    assert [phase["name"] for phase in found.phases].count("forward") == 420
    late = [step for step in range(128, 420) if step % 64 == 0]
    assert [vector["step"] for vector in found.vectors if vector["step"] >= 128] == late
    calls = {call["step"]: call["seq"] for call in found.collectives}
    assert [step for step in calls if step >= 128] == late
    assert all(number == step + 1 for step, number in calls.items())
    told = [event for event in found.events if event["kind"] == "lens.backoff"]
    assert "tokens of experts: recorded in one step of" in told[0]["text"]
    assert f"may take {NO_ROOM_PCT:g} %" in told[0]["text"]


def test_what_was_left_out_comes_back_when_there_is_room(watch: Watch, recorded: Read) -> None:
    watch(MODEL, native=False, ring_mib=16)
    session_ = lens.hooks.api._session
    assert session_ is not None
    session_._limit = NO_ROOM_PCT
    train(20)
    assert session_.budget.thins
    session_._limit = 100.0
    for _ in range(
        10
    ):  # as a rule once: a hook that lost its processor while it recorded is not trusted for a while
        train(64 * 2 * 12)
        if session_.budget.periods == [1, 1]:
            break
    assert session_.budget.periods == [1, 1]
    train(2)
    found = recorded()
    last = found.steps[-1]["step"]
    assert {call["step"] for call in found.collectives} >= {last, last - 1}
    assert [call["seq"] for call in found.collectives][-1] == last + 1


def test_a_part_that_fails_says_so_in_the_record_too(
    watch: Watch, recorded: Read, capfd: pytest.CaptureFixture[str]
) -> None:
    watch()
    with lens.step():
        lens.expert_tokens(0, object())
    (event,) = (event for event in recorded().events if event["kind"] == "lens.part_failed")
    assert event["severity"] == "warning"
    assert event["text"] in capfd.readouterr().err
