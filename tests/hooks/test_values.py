"""Numbers that the training code hands over."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies

import lens
from lens.hooks import later
from tests.hooks.ringside import Recorded, read_rings

Watch = Callable[..., None]
Read = Callable[[], Recorded]


def test_logged_numbers_carry_their_step(watch: Watch, recorded: Read) -> None:
    watch()
    with lens.step(3):
        lens.log({"train.loss": 2.5}, my_metric=1)
    lens.log({"train.loss": 2.25}, step=9)
    lens.log({"train.loss": 2.0})
    found = recorded()
    assert found.values("train.loss") == [(3, 2.5), (9, 2.25), (None, 2.0)]
    assert found.values("my_metric") == [(3, 1.0)]


def test_numbers_may_be_tensors_arrays_or_not_finite(watch: Watch, recorded: Read) -> None:
    watch()
    lens.log({"a": torch.tensor(1.5), "b": numpy.float32(2.5), "c": math.nan, "d": -math.inf, "e": True})
    found = recorded()
    assert [found.values(name)[0][1] for name in "abde"] == [1.5, 2.5, -math.inf, 1.0]
    assert math.isnan(found.values("c")[0][1])


def test_what_is_no_number_is_left_out_with_one_line(
    watch: Watch, recorded: Read, capfd: pytest.CaptureFixture[str]
) -> None:
    watch()
    for _ in range(3):
        lens.log({"good": 1.0, "bad": None, "no name!": 2.0})  # type: ignore[dict-item]
    found = recorded()
    assert len(found.values("good")) == 3
    assert found.values("bad") == []
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("lens: ") for line in lines)


def test_hundreds_of_numbers_at_once_are_all_kept(watch: Watch, recorded: Read) -> None:
    watch()
    lens.log({f"m{number}": float(number) for number in range(300)})
    found = recorded()
    assert [found.values(f"m{number}")[0][1] for number in range(300)] == list(range(300))


def test_ever_new_sets_of_names_do_not_fill_the_ring_with_names(watch: Watch, recorded: Read) -> None:
    watch()
    for number in range(400):
        lens.log({"always": 1.0, f"sometimes{number % 20}": 2.0, f"seldom{number // 20}": 3.0})
    found = recorded()
    assert len(found.values("always")) == 400
    assert len(found.values("sometimes7")) == 20


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=strategies.lists(
        strategies.lists(strategies.integers(0, 10**6), min_size=8, max_size=8).flatmap(
            lambda counts: strategies.tuples(strategies.just(counts), strategies.integers(0, sum(counts)))
        ),
        min_size=1,
        max_size=5,
    )
)
def test_routed_tokens_are_kept_or_dropped(
    steps: list[tuple[list[int], int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from lens.settings import Settings

    rings = tmp_path_factory.mktemp("experts") / "rings"
    lens.watch(settings=Settings.load({}, rings=rings, ring_mib=1, agent=False))
    try:
        for counts, dropped in steps:
            with lens.step():
                lens.expert_tokens(1, torch.tensor(counts), dropped)
    finally:
        lens.detach()
    (found,) = read_rings(rings)
    assert [list(vector["values"]) for vector in found.vectors] == [counts for counts, _ in steps]
    assert {vector["layer"] for vector in found.vectors} == {1}
    routed, kept, lost = (found.values(f"moe.tokens.{name}") for name in ("routed", "kept", "dropped"))
    assert [value for _, value in routed] == [k + d for (_, k), (_, d) in zip(kept, lost, strict=True)]
    assert lost[-1][1] == sum(dropped for _, dropped in steps)


def test_unknown_drops_are_not_zero_drops(watch: Watch, recorded: Read) -> None:
    watch()
    lens.expert_tokens(0, [3, 4])
    found = recorded()
    assert found.values("moe.tokens.routed") == [(None, 7.0)]
    assert found.values("moe.tokens.dropped") == []


def test_another_thread_records_into_a_ring_of_its_own(watch: Watch, recorded: Read) -> None:
    import threading

    watch()
    thread = threading.Thread(target=lambda: lens.log({"elsewhere": 5.0}))
    thread.start()
    thread.join()
    lens.log({"here": 6.0})
    found = recorded()
    assert found.values("elsewhere") == [(None, 5.0)]
    assert found.values("here") == [(None, 6.0)]


class FarAway(torch.Tensor):
    """A number on a device that answers late; whoever reads it at once is caught."""

    @property
    def is_cuda(self) -> bool:
        return True

    def __float__(self) -> float:
        raise AssertionError("read at once: the training would have waited for the device")

    def tolist(self) -> list[float]:
        raise AssertionError("read at once: the training would have waited for the device")


class Arrival:
    def __init__(self) -> None:
        self.here = False

    def query(self) -> bool:
        return self.here

    def synchronize(self) -> None:
        self.here = True


def test_numbers_on_a_device_are_recorded_when_they_have_arrived(
    watch: Watch, recorded: Read, monkeypatch: pytest.MonkeyPatch, rings: Path
) -> None:
    arrivals: list[Arrival] = []

    def copy_to_host(numbers: torch.Tensor) -> tuple[torch.Tensor, Arrival]:
        arrivals.append(Arrival())
        return numbers.as_subclass(torch.Tensor), arrivals[-1]

    monkeypatch.setattr(later, "copy_to_host", copy_to_host)
    watch()
    with lens.step(0):
        lens.log({"now": 1.0, "late": torch.tensor(2.0).as_subclass(FarAway)})
        lens.expert_tokens(0, torch.tensor([3, 4]).as_subclass(FarAway), 1)
    (found,) = read_rings(rings)
    assert found.values("now") == [(0, 1.0)]
    assert found.values("late") == []
    arrivals[0].here = True
    with lens.step(1):
        pass
    (found,) = read_rings(rings)
    assert found.values("late") == [(0, 2.0)]
    assert found.vectors == []
    found = recorded()
    assert [(vector["step"], vector["values"]) for vector in found.vectors] == [(0, (3.0, 4.0))]
    assert found.values("moe.tokens.kept") == [(0, 6.0)]
