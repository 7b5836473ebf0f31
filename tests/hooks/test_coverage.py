"""Who calls a collective, and is it seen: caller × collective × tier, bytes exact, entry and completion present.

Each caller has a step of its own in one real program, which says what it must have sent.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lens.slots import VECTOR
from tests.hooks.ringside import Recorded, read_rings, run_script

pytestmark = pytest.mark.processes

SCRIPT = """
    import contextlib, json, os
    import torch, torch.distributed as dist
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.nn.parallel import DistributedDataParallel
    import lens

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    expected = {}

    def tensor(count):
        return torch.ones(count)

    @contextlib.contextmanager
    def caller(name, *sent):
        with lens.step(len(expected)):
            yield
        expected[name] = list(sent)

    mesh = init_device_mesh("cpu", (world,))
    ddp = DistributedDataParallel(
        torch.nn.Sequential(
            torch.nn.Linear(16, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 512), torch.nn.Linear(512, 1024)
        ),
        bucket_cap_mb=1,
    )
    sharded = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=False), torch.nn.Linear(24, 8, bias=False))
    shapes = [weight.numel() * 4 for weight in sharded.parameters()]
    for part in (*sharded, sharded):
        fully_shard(part, mesh=mesh)
    # The first rounds make groups, hooks and buckets: they are not what is asked about.
    for _ in range(3):
        ddp(torch.ones(4, 16)).sum().backward()
        sharded(torch.ones(4, 16)).sum().backward()
    lens.watch()

    with caller("torch.distributed", ("all_reduce", 40), ("broadcast", 44), ("reduce", 48), ("all_gather", 52),
                ("all_gather", 56), ("reduce_scatter", 60 * world), ("reduce_scatter", 64 * world),
                ("all_to_all", 68 * world), ("all_to_all", 72 * world), ("barrier", 0)):
        dist.all_reduce(tensor(10))
        dist.broadcast(tensor(11), src=0)
        dist.reduce(tensor(12), 0)
        dist.all_gather([tensor(13) for _ in range(world)], tensor(13))
        dist.all_gather_into_tensor(tensor(14 * world), tensor(14))
        dist.reduce_scatter(tensor(15), [tensor(15) for _ in range(world)])
        dist.reduce_scatter_tensor(tensor(16), tensor(16 * world))
        dist.all_to_all([tensor(17) for _ in range(world)], [tensor(17) for _ in range(world)])
        dist.all_to_all_single(tensor(18 * world), tensor(18 * world))
        dist.barrier()

    with caller("gather, scatter", ("gather", 40), ("scatter", 44 * world if rank == 0 else 0)):
        dist.gather(tensor(10), [tensor(10) for _ in range(world)] if rank == 0 else None, dst=0)
        dist.scatter(tensor(11), [tensor(11) for _ in range(world)] if rank == 0 else None, src=0)

    cuts = [to + 1 for to in range(world)]
    with caller("uneven", ("all_to_all", 4 * sum(cuts))):
        dist.all_to_all_single(tensor((rank + 1) * world), tensor(sum(cuts)), [rank + 1] * world, cuts)

    ahead, behind = (rank + 1) % world, (rank - 1) % world
    with caller("send, recv", ("send", 40), ("recv", 40)):
        for turn in range(2):
            if rank % 2 == turn:
                dist.send(tensor(10), ahead)
            else:
                dist.recv(tensor(10), behind)

    with caller("isend, irecv", ("send", 44), ("recv", 44)):
        works = [dist.isend(tensor(11), ahead), dist.irecv(tensor(11), behind)]
        for work in works:
            work.wait()

    said = {"rank": "one and the same"}
    size = dist.distributed_c10d._object_to_tensor(said, torch.device("cpu"), None)[0].nbytes
    with caller("objects", ("all_gather", 8), ("all_gather", size), ("broadcast", 8), ("broadcast", size)):
        dist.all_gather_object([None] * world, said)
        dist.broadcast_object_list([said], src=0)

    with caller("functional", ("all_reduce", 40), ("all_gather", 44), ("reduce_scatter", 48 * world),
                ("all_to_all", 52 * world), ("broadcast", 56)):
        group = dist.group.WORLD
        for result in (
            functional.all_reduce(tensor(10), "sum", group),
            functional.all_gather_tensor(tensor(11), 0, group),
            functional.reduce_scatter_tensor(tensor(12 * world), "sum", 0, group),
            functional.all_to_all_single(tensor(13 * world), None, None, group),
            functional.broadcast(tensor(14), 0, group),
        ):
            functional.wait_tensor(result)

    with caller("DTensor", ("all_gather", 40), ("all_reduce", 44), ("reduce_scatter", 48 * world),
                ("all_gather", 16 * world * world)):
        DTensor.from_local(tensor(10), mesh, [Shard(0)]).redistribute(mesh, [Replicate()]).to_local().sum()
        DTensor.from_local(tensor(11), mesh, [Partial()]).redistribute(mesh, [Replicate()]).to_local().sum()
        DTensor.from_local(tensor(12 * world), mesh, [Partial()]).redistribute(mesh, [Shard(0)]).to_local().sum()
        rows = torch.ones(4, world * world)  # between CPUs torch gathers and cuts
        DTensor.from_local(rows, mesh, [Shard(0)]).redistribute(mesh, [Shard(1)]).to_local().sum()

    buckets = [int(size) for size in ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")]
    assert sum(buckets) == sum(weight.nbytes for weight in ddp.parameters()) and len(buckets) > 1
    buffers = {}
    for buffer in ddp.buffers():
        buffers[buffer.dtype] = buffers.get(buffer.dtype, 0) + buffer.nbytes
    with caller("DDP", *[("all_reduce", size) for size in buckets],
                *[("broadcast", size) for size in buffers.values()]):
        with lens.phase("forward"):
            loss = ddp(torch.ones(4, 16)).sum()
        with lens.phase("backward"):
            loss.backward()

    gathered = [("all_gather", size // world) for size in shapes]
    with caller("FSDP2", *gathered, *gathered, *[("reduce_scatter", size) for size in shapes]):
        sharded(torch.ones(4, 16)).sum().backward()

    with caller("asynchronous", ("all_reduce", 40), ("all_gather", 44)):
        works = [dist.all_reduce(tensor(10), async_op=True),
                 dist.all_gather_into_tensor(tensor(11 * world), tensor(11), async_op=True)]
        for work in works:
            work.wait()

    lens.detach()
    with open(f"expected.{rank}", "w") as file:
        json.dump(expected, file)
    dist.barrier()
    dist.destroy_process_group()
"""

SEEN = {
    "native": {
        "torch.distributed", "uneven", "gather, scatter", "send, recv", "isend, irecv", "objects", "functional", "DTensor",
        "DDP", "FSDP2", "asynchronous",
    },
    "python": {"torch.distributed", "uneven", "send, recv", "FSDP2", "asynchronous"},
}  # fmt: skip
UNTOLD = {"send", "recv", "reduce_scatter"}
"""What gloo does not tell the completion of."""


@dataclass
class Covered:
    tier: str
    world: int
    ranks: list[Recorded]
    expected: list[dict[str, list[tuple[str, int]]]]

    def of(self, rank: int, caller: str) -> list[dict[str, Any]]:
        step = list(self.expected[rank]).index(caller)
        return [call for call in self.ranks[rank].collectives if call["step"] == step]


class Line(NamedTuple):
    """One collective of one caller, of all ranks together."""

    caller: str
    op: str
    made: int
    seen: int
    """With exactly their bytes."""
    entered: int
    completed: int
    """Whose completion is told apart from the return to their caller."""


def cover(tier: str, world: int, rings: Path) -> Covered:
    """Run the program as `world` ranks, recorded by this tier below `rings`."""
    done = run_script(SCRIPT, rings, world=world, LENS_NATIVE=str(int(tier == "native")))
    assert done.returncode == 0, done.stderr
    said = [json.loads((rings.parent / f"expected.{rank}").read_text()) for rank in range(world)]
    expected = [{caller: [(op, size) for op, size in sent] for caller, sent in of_rank.items()} for of_rank in said]
    return Covered(tier, world, read_rings(rings), expected)


def lines(covered: Covered) -> Iterator[Line]:
    """Caller × collective: how many were made, how many seen with exactly their bytes, and with both ends."""
    for caller, of_first in covered.expected[0].items():
        for op in dict.fromkeys(op for op, _ in of_first):
            made = seen = entered = completed = 0
            for rank, expected in enumerate(covered.expected):
                sizes = Counter(size for name, size in expected[caller] if name == op)
                calls = [call for call in covered.of(rank, caller) if call["name"] == op]
                made += sizes.total()
                seen += (sizes & Counter(call["bytes"] for call in calls)).total()
                entered += sum(call["t0"] > 0 for call in calls)
                completed += sum(call["t_done"] is not None for call in calls)
            yield Line(caller, op, made, seen, entered, completed)


@pytest.fixture(scope="module", params=[2, 4], ids=["world 2", "world 4"])
def covered(tier: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Covered:
    return cover(tier, request.param, tmp_path_factory.mktemp("coverage") / "rings")


def test_the_tier_says_who_it_is(covered: Covered) -> None:
    assert {recorded.about["collectives"] for recorded in covered.ranks} == {covered.tier}


def test_each_caller_is_seen_once_with_exactly_its_bytes(covered: Covered) -> None:
    for rank, expected in enumerate(covered.expected):
        for caller, sent in expected.items():
            seen = [(call["name"], call["bytes"]) for call in covered.of(rank, caller)]
            assert Counter(seen) == Counter(sent if caller in SEEN[covered.tier] else []), (rank, caller)


def test_every_record_has_its_entry_and_its_end(covered: Covered) -> None:
    for recorded in covered.ranks:
        for call in recorded.collectives:
            assert recorded.steps[0]["t0"] <= call["t0"] <= call["t1"]
            if call["t_wait"] is not None:
                assert call["async"]
                assert call["t0"] <= call["t_wait"] <= call["t1"]
            if covered.tier == "native" and call["name"] not in UNTOLD:
                assert call["t0"] <= call["t_done"] <= call["t1"], call


def test_all_to_alls_tell_what_each_rank_was_given(covered: Covered) -> None:
    for rank, recorded in enumerate(covered.ranks):
        told = [record for record in recorded.of(VECTOR) if record["metric"] == "comm.given.bytes"]
        found = {list(covered.expected[rank])[vector["step"]]: list(vector["values"]) for vector in told}
        # A list of tensors and one cut evenly; one cut by hand, the further the rank the more; one of another module.
        given = {
            "torch.distributed": [68 + 72] * covered.world,
            "uneven": [(to + 1) * 4 for to in range(covered.world)],
            "functional": [52] * covered.world,
        }
        assert found == (given if covered.tier == "native" else {})


def test_a_number_names_the_same_collective_on_every_rank(covered: Covered) -> None:
    named: dict[tuple[str, int], set[str]] = {}
    for recorded in covered.ranks:
        for call in recorded.collectives:
            named.setdefault((call["group"], call["seq"]), set()).add(call["name"].replace("recv", "send"))
    assert all(len(names) == 1 for names in named.values())


def test_what_is_waited_for_tells_when(covered: Covered) -> None:
    if covered.tier != "native":
        pytest.skip("only the native tier sees these")
    for rank in range(covered.world):
        for caller in ("asynchronous", "functional", "DTensor", "isend, irecv"):
            assert all(call["t_wait"] is not None for call in covered.of(rank, caller)), caller
        buckets = [call for call in covered.of(rank, "DDP") if call["name"] == "all_reduce"]
        # The reducer waits in C++ once the pass has computed, for one after the other.
        assert all(call["async"] and call["t_wait"] is not None for call in buckets)
        waits = sorted((call["t_wait"], call["t1"]) for call in buckets)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(waits))
        broadcasts = [call for call in covered.of(rank, "DDP") if call["name"] == "broadcast"]
        assert not any(call["async"] for call in broadcasts)
        assert {call["phase"] for call in buckets} == {"backward"}
        assert {call["phase"] for call in broadcasts} == {"forward"}
