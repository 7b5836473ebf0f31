"""A window of torch's profiler over the next steps: its trace, its refusals, and that nothing of it stays."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lens
from lens.hooks.profiling import DONE, REFUSED
from lens.ring_reader import write_control
from lens.settings import Settings
from tests.hooks.ringside import Recorded, read_rings


class Training:
    """A small training, and what it has computed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.losses: list[str] = []

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(4, 8)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item().hex())


@pytest.fixture
def watched(tmp_path: Path) -> Callable[[Training], None]:
    def watch(training: Training) -> None:
        settings = Settings.load(
            {}, rings=tmp_path / "rings", data=tmp_path / "data", agent=False, max_overhead_pct=100
        )
        lens.watch(training.model, training.optimizer, run="r", settings=settings)

    return watch


@pytest.fixture(autouse=True)
def _leave() -> Any:
    yield
    lens.detach()


def recorded(tmp_path: Path) -> Recorded:
    (found,) = read_rings(tmp_path / "rings")
    return found


def windows(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in recorded(tmp_path).events if event["kind"] == kind]


def steps_in(trace: Path) -> list[int]:
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::addmm", "autograd::engine::evaluate_function: AddmmBackward0"} <= names
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"ProfilerStep#(\d+)", name)))


def test_a_window_covers_its_steps_changes_no_loss_and_leaves_nothing(
    watched: Callable[[Training], None], tmp_path: Path
) -> None:
    plain = Training()
    for _ in range(12):
        plain.step()
    training = Training()
    watched(training)
    for _ in range(3):
        training.step()
    environment, callbacks = dict(os.environ), list(gc.callbacks)
    lens.profile(2)
    lens.profile(2)  # one at a time
    for _ in range(5):
        training.step()
    assert not torch.autograd._profiler_enabled()
    assert not [thing for thing in gc.get_objects() if type(thing) is torch.profiler.profile]
    assert (dict(os.environ), list(gc.callbacks)) == (environment, callbacks)
    lens.profile(1)  # again, later
    for _ in range(4):
        training.step()
    assert training.losses == plain.losses
    first, second = windows(tmp_path, DONE)
    assert [(one["attrs"]["first"], one["attrs"]["last"]) for one in (first, second)] == [(3, 4), (8, 8)]
    trace = Path(first["attrs"]["path"])
    assert trace == tmp_path / "data/traces/r/rank0-steps3-4.json"
    assert trace.parent.stat().st_mode & 0o077 == 0
    assert steps_in(trace) == [3, 4]
    assert steps_in(Path(second["attrs"]["path"])) == [8]
    assert [one["severity"] for one in windows(tmp_path, REFUSED)] == ["warning"]
    # Beginning, ending and writing belong to no step.
    steps = recorded(tmp_path).steps
    assert [step["step"] for step in steps] == list(range(12))
    assert steps[5]["t0"] - steps[4]["t1"] > 0
    assert steps[7]["t0"] == steps[6]["t1"]


def test_steps_marked_by_hand_are_profiled_from_the_next_one_on(
    watched: Callable[[Training], None], tmp_path: Path
) -> None:
    training = Training()
    watched(training)
    for number in range(10, 16):
        with lens.step(number):
            training.step()
            if number == 11:
                lens.profile(2)
    (window,) = windows(tmp_path, DONE)
    assert steps_in(Path(window["attrs"]["path"])) == [12, 13]


def test_the_control_page_asks_for_a_window_at_a_step(watched: Callable[[Training], None], tmp_path: Path) -> None:
    training = Training()
    watched(training)
    training.step()
    (ring,) = (tmp_path / "rings").glob("*/*/main.ring")

    def ask(step: int) -> None:
        write_control(ring, profile_step=step, profile_steps=2)
        lens.hooks.api._session.timeline.look_at = 0  # as a second later

    ask(4)
    for _ in range(6):
        training.step()
    (window,) = windows(tmp_path, DONE)
    assert (window["attrs"]["first"], window["attrs"]["last"]) == (4, 5)
    ask(3)  # it is over
    training.step()
    (refused,) = windows(tmp_path, REFUSED)
    assert "step 3 was over" in refused["text"]
    assert len(windows(tmp_path, DONE)) == 1


def test_a_training_that_profiles_itself_is_left_alone(watched: Callable[[Training], None], tmp_path: Path) -> None:
    training = Training()
    watched(training)
    training.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as own:
        lens.profile()
        training.step()
        training.step()
    assert any(event.key == "aten::addmm" for event in own.key_averages())
    (refused,) = windows(tmp_path, REFUSED)
    assert "profiler of its own" in refused["text"]
    assert not windows(tmp_path, DONE)


def test_what_cannot_be_written_costs_the_window_alone(watched: Callable[[Training], None], tmp_path: Path) -> None:
    (tmp_path / "data").write_text("no folder")
    training = Training()
    watched(training)
    for _ in range(2):
        training.step()
    lens.profile(1)
    for _ in range(3):
        training.step()
    assert not torch.autograd._profiler_enabled()
    (refused,) = windows(tmp_path, REFUSED)
    assert "cannot be written" in refused["text"]
    assert len(recorded(tmp_path).steps) == 5


def test_a_window_that_detach_cuts_short_is_kept(watched: Callable[[Training], None], tmp_path: Path) -> None:
    training = Training()
    watched(training)
    training.step()
    lens.profile(100)
    training.step()
    lens.detach()
    assert not torch.autograd._profiler_enabled()
    assert steps_in(tmp_path / "data/traces/r/rank0-steps1-1.json") == [1, 2]  # the second was cut short


def test_nothing_happens_where_nothing_is_watched(tmp_path: Path) -> None:
    lens.profile()
    assert not torch.autograd._profiler_enabled()
