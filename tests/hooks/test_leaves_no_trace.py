"""The hook changes nothing of the training: not its objects, its results, its errors, nor its children."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import os
import pickle
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import lens
from lens.hooks import collectives
from lens.ring_reader import write_control
from lens.settings import Settings
from tests.hooks.ringside import Recorded, read_rings, run_script

Watch = Callable[..., None]
Read = Callable[[], Recorded]

PATCHED: dict[str, Callable[[], Any]] = {
    "torch.autograd.backward": lambda: torch.autograd.backward,
    "DataLoader": lambda: vars(torch.utils.data.dataloader._BaseDataLoaderIter)["__next__"],
    "excepthook": lambda: sys.excepthook,
    "gc": lambda: list(gc.callbacks),
}
PATCHED_BY_TIER: dict[str, dict[str, Callable[[], Any]]] = {
    "python": {
        f"torch.distributed.{name}": lambda name=name: vars(dist)[name]  # type: ignore[misc]
        for name in (*collectives.FUNCTIONS, *collectives.POINT_TO_POINT)
        if hasattr(dist, name)
    },
    "native": {
        "Work.wait": lambda: vars(dist.Work)["wait"],
        "_broadcast_coalesced": lambda: dist._broadcast_coalesced,
        "new groups": lambda: dist.distributed_c10d._new_process_group_helper,
        "DeviceMesh": lambda: vars(dist.device_mesh.DeviceMesh)["__init__"],
        "kernels": lambda: [torch._C._dispatch_dump(f"c10d::{name}") for name in ("allreduce_", "send", "barrier")],
        "wait_tensor": lambda: torch._C._dispatch_dump("_c10d_functional::wait_tensor"),
    },
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.inner(batch).sum()


@pytest.mark.parametrize("tier", PATCHED_BY_TIER)
def test_every_patch_is_undone(tier: str, watch: Watch, request: pytest.FixtureRequest) -> None:
    if tier == "native":
        request.getfixturevalue("observer_library")
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    whole = {name: read for patched in (PATCHED, *PATCHED_BY_TIER.values()) for name, read in patched.items()}

    def train() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4))
        loss.backward()
        optimizer.step()
        return loss.item()

    before = {name: read() for name, read in whole.items()}
    for _ in range(2):
        watch(model, optimizer, native=tier == "native")
        changed = {name for name, read in whole.items() if read() is not before[name] and read() != before[name]}
        assert changed == {*PATCHED, *PATCHED_BY_TIER[tier]}
        assert "forward" in vars(model)
        train()
        lens.detach()
        for name, read in whole.items():
            assert read() is before[name] or read() == before[name], name
        assert "forward" not in vars(model)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        train()
    watch(model, optimizer, native=tier == "native")
    train()


def test_a_function_with_a_phase_around_it_still_looks_like_itself(
    watch: Watch, timeline_library: None, recorded: Read
) -> None:
    original = torch.autograd.backward
    watch(Net())
    ours = torch.autograd.backward
    assert ours is not original
    assert (ours.__name__, ours.__module__, ours.__doc__) == (
        original.__name__,
        original.__module__,
        original.__doc__,
    )
    assert inspect.signature(ours) == inspect.signature(original)
    assert pickle.loads(pickle.dumps(ours)) is ours
    assert copy.deepcopy(ours) is ours
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError), lens.step():
        ours(tensors=weight.detach())
    with lens.step():
        ours(tensors=[weight * 2], retain_graph=False)
    assert [phase["name"] for phase in recorded().phases] == ["backward"]


def test_a_wrapper_kept_by_somebody_falls_through_afterwards(watch: Watch) -> None:
    watch()
    kept = torch.autograd.backward
    lens.detach()
    weight = torch.ones(1, requires_grad=True)
    kept((weight * 2).sum())
    assert weight.grad is not None
    assert weight.grad.item() == 2


def test_somebody_who_wrapped_ours_keeps_their_wrapper(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.autograd.backward
    watch(Net())
    ours = torch.autograd.backward
    calls = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ours(*args, **kwargs)

    torch.autograd.backward = theirs
    try:
        lens.detach()
        assert torch.autograd.backward is theirs
        torch.ones(1, requires_grad=True).sum().backward()
        assert calls == [1]
    finally:
        torch.autograd.backward = original


def test_a_watched_model_can_be_copied_and_saved(watch: Watch) -> None:
    model = Net()
    watch(model)
    twin = copy.deepcopy(model)
    assert float(twin(torch.ones(2, 4))) == float(model(torch.ones(2, 4)))
    again = pickle.loads(pickle.dumps(model))
    assert float(again(torch.ones(2, 4))) == float(model(torch.ones(2, 4)))
    torch.save(model, io.BytesIO())
    assert list(model.state_dict()) == ["inner.weight", "inner.bias"]


def test_compiled_without_graph_breaks(watch: Watch) -> None:
    model = Net()
    watch(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert float(compiled(torch.ones(2, 4))) == pytest.approx(float(model(torch.ones(2, 4))))


def test_collectives_are_observed_without_boxing_their_arguments(watch: Watch, observer_library: None) -> None:
    """Boxes cost more than all else that is done for a collective; a torch with other operators has to be learnt."""
    watch()
    for name in (
        "allreduce_",
        "_allgather_base_",
        "_reduce_scatter_base_",
        "alltoall_base_",
        "broadcast_",
        "barrier",
    ):
        dump = torch._C._dispatch_dump(f"c10d::{name}").splitlines()
        (ours,) = [line for line in dump if line.startswith("CPU: lens")]
        assert "unboxed" in ours, name


@pytest.mark.parametrize("native", [True, False])
def test_a_compiled_step_breaks_no_more_often(watch: Watch, native: bool, request: pytest.FixtureRequest) -> None:
    if native:
        request.getfixturevalue("timeline_library")
    counters = torch._dynamo.utils.counters

    def breaks(watched: bool) -> tuple[int, list[str]]:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if watched:
            watch(model, optimizer, native=native)

        def train(batch: torch.Tensor) -> torch.Tensor:
            loss = model(batch)
            loss.backward()
            optimizer.step()
            return loss.detach()

        compiled = torch.compile(train, backend="eager")
        losses = [compiled(torch.ones(2, 4)).item().hex() for _ in range(2)]
        lens.detach()
        return sum(counters["graph_break"].values()), losses

    assert breaks(True) == breaks(False)


def test_a_watched_model_that_is_let_go_of_is_collected(watch: Watch) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch(model, optimizer)
    model(torch.ones(2, 4)).backward()
    optimizer.step()
    gone = [weakref.ref(thing) for thing in (model, optimizer, model.inner.weight)]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


@pytest.mark.parametrize("times", [50, pytest.param(1000, marks=pytest.mark.long)])
def test_what_watching_takes_is_given_back_each_time(watch: Watch, rings: Path, times: int) -> None:
    def once() -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch(model, optimizer)
        with lens.step():
            model(torch.ones(2, 4)).backward()
            optimizer.step()
            lens.log({"n": 1.0})
        lens.detach()
        shutil.rmtree(rings)

    def held() -> tuple[int, int, int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count(".ring")
        descriptors, threads = (len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("fd", "task"))
        return len(gc.get_objects()), descriptors, maps, threads

    def grown() -> list[int]:
        """By how much all that is held has changed over so many times; ours alone would be the same each time."""
        before = held()
        for _ in range(times):
            once()
        return [now - then for now, then in zip(held(), before, strict=True)]

    for _ in range(20):
        once()
    for _ in range(4):
        objects, *rest = grown()
        if objects < times / 10 and not any(rest):
            break  # else threads of tests before this one may have ended meanwhile: what leaks leaks again
    assert rest == [0, 0, 0]
    assert objects < times / 10


IN_USE = """
import ctypes, gc, os, shutil, sys
import torch, lens
from lens.settings import Settings

class Held(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

try:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
except AttributeError:
    sys.exit("no mallinfo2")
mallinfo2.restype = Held
settings = Settings.load({**os.environ}, ring_mib=1)
in_use = {}
for cycle in range(251):
    lens.watch(settings=settings)
    lens.detach()
    shutil.rmtree(settings.rings)
    if cycle in (50, 250):
        gc.collect()
        held = mallinfo2()
        in_use[cycle] = held.uordblks + held.hblkhd
print(in_use[250] - in_use[50])
"""
"""Bytes that 200 beginnings and ends add to what malloc has given out."""


def test_two_hundred_beginnings_keep_no_memory(tier: str, rings: Path) -> None:
    done = run_script(IN_USE, rings, LENS_NATIVE="1" if tier == "native" else "0")
    if done.stderr.endswith("no mallinfo2\n"):
        pytest.skip("this libc does not tell what is in use")
    assert int(done.stdout) < 200 * 100, done.stderr


def test_watching_twice_is_watching_once(watch: Watch, recorded: Read) -> None:
    model = Net()
    watch(model)
    wrapped = model.forward
    watch(model, groups={"dp": [[0]]})
    assert model.forward is wrapped
    assert recorded().about["groups"] == {"dp": [[0]]}


def test_the_kill_switch_leaves_everything_alone(monkeypatch: pytest.MonkeyPatch, rings: Path) -> None:
    monkeypatch.setenv("LENS_DISABLED", "1")
    monkeypatch.setenv("LENS_RINGS", str(rings))
    before = torch.autograd.backward
    model = Net()
    lens.watch(model)
    assert not lens.enabled()
    assert torch.autograd.backward is before
    assert "forward" not in vars(model)
    with lens.step(), lens.phase("forward"):
        lens.log({"train.loss": 1.0})
    lens.expert_tokens(0, [1, 2])
    assert list(lens.data([1, 2])) == [1, 2]
    assert not rings.exists()


def test_leaving_between_an_optimizers_hooks_does_not_disturb_the_users_own(watch: Watch, rings: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    watch(model, optimizer)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append("after ours"))
    (ring,) = rings.glob("*/*/main.ring")
    for _ in range(4):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        write_control(ring, detach=1)
    assert not lens.enabled()
    assert len(called) == 4
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_the_control_page_detaches_at_the_next_step(watch: Watch, rings: Path) -> None:
    before = torch.autograd.backward
    watch(Net())
    with lens.step():
        pass
    (ring,) = rings.glob("*/*/main.ring")
    write_control(ring, detach=1)
    with lens.step():
        pass
    assert not lens.enabled()
    assert torch.autograd.backward is before
    (found,) = read_rings(rings)
    assert found.closed
    assert len(found.steps) == 2


def test_a_part_that_fails_switches_itself_off_with_one_line(
    watch: Watch, recorded: Read, capfd: pytest.CaptureFixture[str]
) -> None:
    watch()
    for _ in range(3):
        with lens.step():
            lens.expert_tokens(0, object())
    lens.log({"train.loss": 1.0})
    found = recorded()
    assert len(found.steps) == 3
    assert found.values("train.loss") == []
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "training goes on" in lines[0]


def test_a_loader_worker_that_logs_does_no_harm(watch: Watch, recorded: Read) -> None:
    class Talkative(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> int:
            lens.log({"from.worker": float(index)})
            lens.expert_tokens(0, [1, 2, 3])
            with lens.step(index), lens.phase("forward"):
                return index

    watch()
    for step, batch in enumerate(lens.data(DataLoader(Talkative(), batch_size=4, num_workers=2))):
        with lens.step(step):
            lens.log({"sum": float(batch.sum())})
    found = recorded()
    assert [step["step"] for step in found.steps] == list(range(16))
    assert [value for _, value in found.values("sum")] == [sum(range(4 * n, 4 * n + 4)) for n in range(16)]
    assert found.values("from.worker") == []
    assert found.vectors == []


def test_a_forked_child_neither_records_nor_closes_its_parents_ring(watch: Watch, rings: Path) -> None:
    watch()
    child = os.fork()
    if child == 0:
        lens.log({"child": 1.0})
        lens.detach()
        os._exit(0 if not lens.enabled() else 1)
    assert os.waitpid(child, 0)[1] == 0
    (found,) = read_rings(rings)
    assert not found.closed
    lens.log({"parent": 1.0})
    (found,) = read_rings(rings)
    assert found.values("child") == []
    assert found.values("parent") == [(None, 1.0)]


TRAINING = """
    import sys, torch
    WATCH = {watch}
    torch.manual_seed(1)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if WATCH:
        import lens
        lens.watch(model, optimizer)
    for step in range(5):
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        print(loss.item().hex())
        if step == 3 and {fail}:
            raise ValueError("the user's own")
"""


@pytest.mark.processes
def test_an_error_ends_the_process_as_it_would_without_lens(rings: Path) -> None:
    plain = run_script(TRAINING.format(watch=False, fail=True), rings)
    watched = run_script(TRAINING.format(watch=True, fail=True), rings)
    assert watched.returncode == plain.returncode == 1
    assert watched.stdout == plain.stdout
    assert watched.stderr == plain.stderr
    (found,) = read_rings(rings)
    assert not found.closed
    (event,) = [event for event in found.events if event["kind"] == "process.error"]
    assert event["kind"] == "process.error"
    assert event["severity"] == "error"
    assert event["attrs"] == {"type": "ValueError", "message": "the user's own"}


def test_an_error_caused_by_one_that_was_never_raised_is_still_shown(
    watch: Watch, capfd: pytest.CaptureFixture[str]
) -> None:
    watch()
    try:
        raise ValueError("the user's own") from KeyError("never raised")
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    shown = capfd.readouterr().err
    assert "never raised" in shown
    assert "the user's own" in shown


@pytest.mark.processes
@pytest.mark.parametrize("where", ["no room", "not a directory"])
def test_without_room_for_a_ring_training_goes_on_with_one_line(rings: Path, where: str) -> None:
    if where == "not a directory":
        rings.write_text("in the way")
    limit = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    """
    script = (limit if where == "no room" else "") + TRAINING.format(watch=True, fail=False)
    plain = run_script(TRAINING.format(watch=False, fail=False), rings)
    watched = run_script(script, rings)
    assert watched.returncode == 0
    assert watched.stdout == plain.stdout
    (line,) = watched.stderr.splitlines()
    assert line.startswith("lens: ")
    assert "LENS_RINGS" in line


@pytest.mark.processes
def test_a_killed_process_leaves_what_it_recorded_and_where_it_was(rings: Path) -> None:
    run_script(
        """
        import os, signal
        import lens
        lens.watch()
        for step in range(100):
            with lens.step(step), lens.phase("forward"):
                lens.log({"n": step})
                if step == 60:
                    os.kill(os.getpid(), signal.SIGKILL)
        """,
        rings,
    )
    (found,) = read_rings(rings)
    assert not found.closed
    assert [value for _, value in found.values("n")] == list(range(61))
    assert {span["kind"]: span["step"] for span in found.open} == {"step": 60, "phase": 60}


@pytest.mark.processes
def test_watching_brings_in_neither_threads_nor_torch(rings: Path) -> None:
    done = run_script(
        """
        import sys, threading, json
        before = threading.active_count()
        import lens
        lens.watch()
        with lens.step():
            lens.log({"n": 1})
        foreign = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "psutil", "fastapi"})
        print(json.dumps([threading.active_count() - before, foreign]))
        """,
        rings,
    )
    assert json.loads(done.stdout) == [0, []], done.stderr


def test_about_says_who_records(rings: Path) -> None:
    settings = Settings.load({}, rings=rings, ring_mib=1, agent=False, host="host7", device="host7/gpu2")
    lens.watch(settings=settings, run="r1", name="a name", config={"lr": 1}, vendor="amd", card="MI400")
    lens.detach()
    (found,) = read_rings(rings)
    about = found.about
    assert (about["run"], about["name"], about["host"], about["device"]) == ("r1", "a name", "host7", "host7/gpu2")
    assert (about["vendor"], about["model"], about["config"]) == ("amd", "MI400", {"lr": 1})
    assert (about["rank"], about["world_size"]) == (0, 1)
