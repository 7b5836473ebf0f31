"""Steps and phases: by hand, found automatically, and what they are to each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from torch import nn
from torch.utils.data import DataLoader

import lens
from lens.hooks import native
from tests.hooks.ringside import Recorded

Watch = Callable[..., None]
Read = Callable[[], Recorded]


@pytest.fixture(autouse=True, params=["native", "python"])
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who records: C or Python."""
    if request.param == "native":
        request.getfixturevalue("timeline_library")
    else:
        monkeypatch.setattr(native, "load", lambda name: None)


def names(recorded: Recorded, step: int | None) -> list[str]:
    return [phase["name"] for phase in recorded.phases if phase["step"] == step]


def inside(recorded: Recorded) -> bool:
    """Whether the phases of each step lie in it and one after the other."""
    for step in recorded.steps:
        at = step["t0"]
        for phase in (phase for phase in recorded.phases if phase["step"] == step["step"]):
            if phase["t0"] < at:
                return False
            at = phase["t1"]
        if at > step["t1"]:
            return False
    return True


def small_training() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[torch.Tensor], None]]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()

    return model, optimizer, train


def test_a_step_has_its_attributes_and_numbers_continue(watch: Watch, recorded: Read) -> None:
    watch()
    with lens.step(7, tokens=128, micro_batches=2, seq_sq=4096):
        pass
    with lens.step():
        pass
    first, second = recorded().steps
    assert (first["step"], first["tokens"], first["micro_batches"], first["seq_sq"]) == (7, 128, 2, 4096)
    assert (second["step"], second["tokens"]) == (8, None)
    assert first["t0"] < first["t1"] <= second["t0"]
    assert 0 < first["overhead_ns"] <= first["t1"] - first["t0"] + first["overhead_ns"]


def test_phases_lie_in_their_step_one_after_the_other(watch: Watch, recorded: Read) -> None:
    watch()
    for number in range(3):
        with lens.step(number):
            for micro_batch in range(2):
                with lens.phase("forward", micro_batch):
                    pass
                with lens.phase("backward", micro_batch):
                    pass
            with lens.phase("optimizer"):
                pass
    found = recorded()
    assert inside(found)
    assert names(found, 1) == ["forward", "backward", "forward", "backward", "optimizer"]
    assert [phase["micro_batch"] for phase in found.phases[:5]] == [0, 0, 1, 1, None]


def test_a_phase_inside_another_splits_it(watch: Watch, recorded: Read) -> None:
    watch()
    with lens.step(), lens.phase("forward"):
        time.sleep(0.001)
        with lens.phase("h2d"):
            time.sleep(0.001)
        time.sleep(0.001)
    found = recorded()
    assert inside(found)
    assert names(found, 0) == ["forward", "h2d", "forward"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=strategies.recursive(strategies.just([]), lambda children: strategies.lists(children, max_size=3)))
def test_phases_never_overlap_however_they_are_nested(tree: list[Any], tmp_path_factory: Any) -> None:
    from lens.settings import Settings
    from tests.hooks.ringside import read_rings

    def enter(branch: list[Any], depth: int) -> None:
        for child in branch:
            with lens.phase(f"level{depth}"):
                enter(child, depth + 1)

    rings = tmp_path_factory.mktemp("nested") / "rings"
    lens.watch(settings=Settings.load({}, rings=rings, ring_mib=1, agent=False))
    try:
        with lens.step():
            enter(tree, 0)
    finally:
        lens.detach()
    (found,) = read_rings(rings)
    assert inside(found)
    assert len(found.steps) == 1


def test_forward_backward_and_optimizer_are_found(watch: Watch, recorded: Read) -> None:
    model, optimizer, train = small_training()
    watch(model, optimizer)
    for _ in range(3):
        with lens.step():
            train(torch.ones(2, 4))
    found = recorded()
    assert inside(found)
    for step in range(3):
        assert names(found, step) == ["forward", "backward", "optimizer"]


def test_a_phase_by_hand_wins_over_one_found(watch: Watch, recorded: Read) -> None:
    model, optimizer, train = small_training()
    watch(model, optimizer)
    with lens.step(), lens.phase("other"):
        train(torch.ones(2, 4))
    assert names(recorded(), 0) == ["other"]


def test_a_forward_without_gradients_is_evaluation(watch: Watch, recorded: Read) -> None:
    model, optimizer, train = small_training()
    watch(model, optimizer)
    with lens.step():
        train(torch.ones(2, 4))
        with torch.no_grad():
            model(torch.ones(2, 4))
    assert names(recorded(), 0) == ["forward", "backward", "optimizer", "eval"]


def test_without_marked_steps_each_optimizer_step_ends_one(watch: Watch, recorded: Read) -> None:
    model, optimizer, train = small_training()
    watch(model, optimizer)
    for batch in DataLoader(torch.ones(12, 4), batch_size=4):
        train(batch)
    found = recorded()
    assert [step["step"] for step in found.steps] == [0, 1, 2]
    assert inside(found)
    assert names(found, 1) == ["data", "forward", "backward", "optimizer"]
    assert found.steps[0]["t1"] == found.steps[1]["t0"]


def test_marked_steps_win_over_found_ones(watch: Watch, recorded: Read) -> None:
    model, optimizer, train = small_training()
    watch(model, optimizer)
    model(torch.ones(2, 4))  # a trial run before the loop
    for _ in range(2):
        with lens.step():
            train(torch.ones(2, 4))
            train(torch.ones(2, 4))
    found = recorded()
    assert len(found.steps) == 2
    assert names(found, found.steps[0]["step"]) == ["forward", "backward", "optimizer"] * 2


@pytest.mark.parametrize("marked", [True, False], ids=["lens.data", "DataLoader"])
def test_the_wait_for_a_batch_begins_the_step_that_uses_it(watch: Watch, recorded: Read, marked: bool) -> None:
    class Slow(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> int:
            time.sleep(0.005)
            return index

    model, optimizer, _ = small_training()
    watch(model, optimizer)
    loader = DataLoader(Slow(), batch_size=1)
    for _ in lens.data(loader) if marked else loader:
        with lens.step():
            time.sleep(0.001)
    found = recorded()
    assert [step["step"] for step in found.steps] == [0, 1, 2]
    assert inside(found)
    for step in found.steps:
        (wait,) = (phase for phase in found.phases if phase["step"] == step["step"])
        assert wait["name"] == "data"
        assert wait["t0"] == step["t0"]
        assert wait["t1"] - wait["t0"] >= 5_000_000


def test_data_gives_the_loader_back_unchanged(watch: Watch) -> None:
    watch()
    loader = DataLoader(torch.arange(6), batch_size=2)
    waiting = lens.data(loader)
    assert len(waiting) == 3  # type: ignore[arg-type]
    assert waiting.batch_size == 2  # type: ignore[attr-defined]
    assert [batch.tolist() for batch in waiting] == [[0, 1], [2, 3], [4, 5]]
    assert [batch.tolist() for batch in waiting] == [[0, 1], [2, 3], [4, 5]]


def test_a_step_left_by_an_exception_stays_open(watch: Watch, rings: Any) -> None:
    from tests.hooks.ringside import read_rings

    watch()
    with lens.step(0):
        pass
    with pytest.raises(ValueError, match="the user's own"), lens.step(1), lens.phase("forward"):
        raise ValueError("the user's own")
    (found,) = read_rings(rings)
    assert [step["step"] for step in found.steps] == [0]
    assert {span["kind"]: span["step"] for span in found.open} == {"step": 1, "phase": 1}
    with lens.step(2), lens.phase("forward"):
        pass
    (found,) = read_rings(rings)
    assert [step["step"] for step in found.steps] == [0, 2]
    assert found.open == []


def test_garbage_collection_is_timed(watch: Watch, recorded: Read) -> None:
    import gc

    watch()
    with lens.step():
        gc.collect()
    with lens.step():
        pass
    first, second = recorded().steps
    assert first["gc_ns"] > 0
    assert second["gc_ns"] <= first["gc_ns"]
