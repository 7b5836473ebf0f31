"""Collectives of real gloo processes: names, bytes, groups, numbers, waits."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import lens
from lens.hooks import groups
from tests.hooks.ringside import Recorded, read_rings, run_script

pytestmark = pytest.mark.processes

SCRIPT = """
    import torch, torch.distributed as dist
    import lens
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pair = dist.new_group([0, 1])
    odd = dist.new_group([0, 2])
    lens.watch(groups={"tp": [[0, 1], [2]]})

    def tensor(count):
        return torch.ones(count)

    with lens.step(0):
        with lens.phase("forward"):
            dist.all_reduce(tensor(10))
            dist.broadcast(tensor(11), src=0)
            dist.reduce(tensor(12), 0)
            dist.all_gather([tensor(13) for _ in range(3)], tensor(13))
            dist.all_gather_into_tensor(tensor(3 * 14), tensor(14))
            dist.reduce_scatter(tensor(15), [tensor(15) for _ in range(3)])
            dist.reduce_scatter_tensor(tensor(16), tensor(3 * 16))
        with lens.phase("backward"):
            dist.all_to_all([tensor(17) for _ in range(3)], [tensor(17) for _ in range(3)])
            dist.all_to_all_single(output=tensor(18), input=tensor(18).double().float())
            dist.barrier()
    with lens.step(1):
        if rank in (0, 1):
            dist.all_reduce(tensor(20), group=pair)
        if rank == 0:
            for count in (21, 22):
                dist.send(tensor(count), 1)
        if rank == 1:
            dist.recv(tensor(21), src=0)
            dist.recv(tensor(22))
        dist.all_reduce(tensor(23).bfloat16())
        if rank in (0, 2):
            dist.all_reduce(tensor(24), group=odd)
    with lens.step(2):
        waited = dist.all_reduce(tensor(30), async_op=True)
        dropped = dist.all_reduce(tensor(31), async_op=True)
        dropped.get_future().wait()
        del dropped
        waited.wait()
        waited.wait()
        dist.all_reduce(tensor(32), group=pair) if rank == 2 else None
    print(lens.enabled())
    lens.detach()
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tier: str, tmp_path_factory: pytest.TempPathFactory) -> list[Recorded]:
    rings: Path = tmp_path_factory.mktemp("collectives") / "rings"
    done = run_script(SCRIPT, rings, world=3, LENS_NATIVE=str(int(tier == "native")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True") == 3, done.stderr  # all write to one pipe
    return read_rings(rings)


def of_step(recorded: Recorded, step: int) -> list[tuple[str, str, int]]:
    return [(call["name"], call["group"], call["bytes"]) for call in recorded.collectives if call["step"] == step]


def test_ranks_share_one_run(ranks: list[Recorded]) -> None:
    assert [recorded.about["rank"] for recorded in ranks] == [0, 1, 2]
    assert {recorded.about["world_size"] for recorded in ranks} == {3}
    assert len({recorded.about["run"] for recorded in ranks}) == 1
    assert all(recorded.closed for recorded in ranks)


def test_each_function_is_recorded_with_the_bytes_of_its_input(ranks: list[Recorded]) -> None:
    for recorded in ranks:
        assert of_step(recorded, 0) == [
            ("all_reduce", "world/0", 40),
            ("broadcast", "world/0", 44),
            ("reduce", "world/0", 48),
            ("all_gather", "world/0", 52),
            ("all_gather", "world/0", 56),
            ("reduce_scatter", "world/0", 3 * 60),
            ("reduce_scatter", "world/0", 3 * 64),
            ("all_to_all", "world/0", 3 * 68),
            ("all_to_all", "world/0", 72),
            ("barrier", "world/0", 0),
        ]
        phases = [call["phase"] for call in recorded.collectives if call["step"] == 0]
        assert phases == ["forward"] * 7 + ["backward"] * 3


def test_collectives_lie_in_time_where_they_happened(ranks: list[Recorded]) -> None:
    for recorded in ranks:
        step = recorded.steps[0]
        at = step["t0"]
        for call in recorded.collectives:
            if call["step"] == 0:
                assert at <= call["t0"] <= call["t1"] <= step["t1"]
                at = call["t1"]


def test_a_number_names_the_same_collective_on_every_rank(ranks: list[Recorded]) -> None:
    named = [
        {(call["group"], call["seq"]): (call["name"], call["bytes"]) for call in recorded.collectives}
        for recorded in ranks
    ]
    for one in named:
        for other in named:
            common = {key for key in one.keys() & other.keys() if ":" not in key[0]}
            assert {key: one[key] for key in common} == {key: other[key] for key in common}
    world = [sorted(seq for group, seq in one if group == "world/0") for one in named]
    assert world[0] == world[1] == world[2]
    assert len(world[0]) == 13


def test_a_number_is_the_groups_own(ranks: list[Recorded]) -> None:
    first = ranks[0].collectives[0]
    assert first["seq"] == 1


def test_messages_do_not_shift_the_numbers_of_collectives(ranks: list[Recorded]) -> None:
    # Ranks 0 and 1 exchanged two messages that rank 2 knows nothing of.
    seqs = {
        call["seq"]
        for recorded in ranks
        for call in recorded.collectives
        if call["step"] == 1 and call["group"] == "world/0"
    }
    assert len(seqs) == 1


def test_groups_are_named_by_kind_or_by_their_ranks(ranks: list[Recorded]) -> None:
    groups = [{group for _, group, _ in of_step(recorded, 1)} for recorded in ranks]
    assert groups[0] == {"tp/0", "world/0:0-1", "world/0", "ranks/0,2"}
    assert groups[1] == {"tp/0", "world/0:0-1", "world/0:any-1", "world/0"}
    assert groups[2] == {"world/0", "ranks/0,2"}


def test_messages_have_the_same_number_on_both_sides(ranks: list[Recorded]) -> None:
    sent = [call for call in ranks[0].collectives if call["name"] == "send"]
    received = [call for call in ranks[1].collectives if call["name"] == "recv"]
    assert [(call["group"], call["seq"], call["bytes"], call["peer"]) for call in sent] == [
        ("world/0:0-1", 1, 84, 1),
        ("world/0:0-1", 2, 88, 1),
    ]
    known, anyone = received
    assert (known["group"], known["seq"], known["bytes"], known["peer"]) == ("world/0:0-1", 1, 84, 0)
    assert (anyone["seq"], anyone["bytes"]) == (None, 88)


def test_dtype_is_told(ranks: list[Recorded]) -> None:
    dtypes = [call["dtype"] for call in ranks[2].collectives if call["step"] == 1]
    assert dtypes == ["bfloat16", "float32"]


def test_an_asynchronous_collective_ends_with_its_wait(ranks: list[Recorded]) -> None:
    for recorded in ranks:
        by_size = {call["bytes"]: call for call in recorded.collectives if call["step"] == 2}
        waited, never = by_size[120], by_size[124]
        assert waited["async"]
        assert waited["t0"] <= waited["t_wait"] <= waited["t1"]
        assert never["async"]
        assert never["t_wait"] is None
        assert never["t0"] <= never["t1"]
        assert set(by_size) == {120, 124}


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of one in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_another_threads_collectives_are_recorded_too(
    watch: Callable[..., None], recorded: Callable[[], Recorded]
) -> None:
    def elsewhere() -> None:
        dist.all_reduce(torch.ones(4))
        dist.all_reduce(torch.ones(5), async_op=True).wait()

    watch()
    with lens.step(3), lens.phase("backward"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        dist.all_reduce(torch.ones(6))
    calls = sorted(recorded().collectives, key=lambda call: call["seq"])
    assert [(call["bytes"], call["seq"], call["async"]) for call in calls] == [
        (16, 1, False),
        (20, 2, True),
        (24, 3, False),
    ]
    assert {(call["group"], call["phase"], call["step"]) for call in calls} == {("world/0", "backward", 3)}


def test_a_destroyed_group_is_not_kept_alive(watch: Callable[..., None], recorded: Callable[[], Recorded]) -> None:
    watch()
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        held = weakref.ref(dist.group.WORLD)
        dist.all_reduce(torch.ones(4))
        dist.destroy_process_group()
        gc.collect()
        assert held() is None
    assert [call["seq"] for call in recorded().collectives] == [1, 1]


@pytest.mark.usefixtures("alone")
def test_an_error_of_a_collective_reaches_the_training_unchanged(
    watch: Callable[..., None], recorded: Callable[[], Recorded]
) -> None:
    def error_of() -> tuple[str, BaseException | None]:
        with pytest.raises((TypeError, AttributeError, RuntimeError)) as raised:
            dist.all_reduce("no tensor")
        return repr(raised.value), raised.value.__context__

    plain = error_of()
    watch()
    assert error_of() == plain
    dist.all_reduce(torch.ones(3))
    assert [call["bytes"] for call in recorded().collectives] == [12]


@pytest.mark.usefixtures("alone")
def test_numbers_stay_the_groups_own_when_others_call_collectives_too(
    watch: Callable[..., None], recorded: Callable[[], Recorded]
) -> None:
    from torch.distributed import distributed_c10d

    def by_another_way() -> None:
        distributed_c10d.all_reduce(torch.ones(1))

    watch(native=False)
    expected, number = [], 0
    for call in range(3 * groups.ASKED_FIRST):
        number += 1
        expected.append(number)
        dist.all_reduce(torch.ones(1))
        if call % 10 == 0 and call < groups.ASKED_FIRST:
            by_another_way()
            number += 1
    found = [call["seq"] for call in recorded().collectives]
    assert found == expected


@pytest.mark.usefixtures("alone")
def test_a_rare_collective_that_passes_by_is_made_up_for(
    watch: Callable[..., None], recorded: Callable[[], Recorded]
) -> None:
    from torch.distributed import distributed_c10d

    watch(native=False)
    for _ in range(2 * groups.ASKED_FIRST):
        dist.all_reduce(torch.ones(1))
    distributed_c10d.all_reduce(torch.ones(1))
    for _ in range(groups.ASKED_EVERY + 1):
        dist.all_reduce(torch.ones(1))
    found = [call["seq"] for call in recorded().collectives]
    assert len(set(found)) == len(found)
    assert found[-1] == len(found) + 1


@pytest.mark.usefixtures("alone")
def test_collectives_inside_a_compiled_region_break_no_graph(watch: Callable[..., None]) -> None:
    def calls(batch: torch.Tensor) -> torch.Tensor:
        twice = batch * 2
        dist.all_reduce(twice)
        whole = torch.zeros(4)
        dist.all_gather_into_tensor(whole, twice)
        return whole + 1

    watch()
    compiled = torch.compile(calls, fullgraph=True, backend="eager")
    assert compiled(torch.ones(4)).tolist() == [3.0] * 4
