"""The native observer comes late, is killed, or never comes: nothing is lost, doubled or disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lens.hooks.native import cache
from lens.hooks.native.libraries import LIBRARIES
from lens.ring_reader import RingError, RingReader
from tests.hooks.ringside import Recorded, read_rings, run_script
from tests.waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.processes

STEPS, CHANGES = 60, (12, 31)
"""Each rank meets the library at a step of its own."""
LATE = """
    import os, shutil, sys
    from pathlib import Path
    import torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    folder = Path(f"cache.{rank}").absolute()
    os.environ["XDG_CACHE_HOME"] = str(folder)
    (folder / "lens/native").mkdir(parents=True, mode=0o700, exist_ok=True)
    import lens
    from lens.hooks import session
    session._COUNTERS_NS = 0  # looks at every step
    pair = dist.new_group([0, 1])
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(8, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flying = None
    lens.watch(model, optimizer)
    for step in range(STEPS):
        with lens.step():
            if step == CHANGES[rank]:
                shutil.copy(os.environ["BUILT"], folder / "lens/native/new")
                os.rename(folder / "lens/native/new", folder / "lens/native" / Path(os.environ["BUILT"]).name)
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if flying is not None:
                flying.wait()
                flying = None
            total = loss.detach()
            dist.all_reduce(total)
            dist.all_gather_into_tensor(torch.ones(6), torch.ones(3), group=pair)
            (dist.send if rank == 0 else dist.recv)(torch.ones(7), 1 - rank)
            if step % 2:
                flying = dist.all_reduce(torch.ones(9), async_op=True)
            if rank == 0:
                print(step, total.item().hex())
    lens.detach()
    assert dist.all_reduce(torch.ones(1)) is None
    dist.destroy_process_group()
"""


def late(**names: object) -> str:
    text = LATE
    for name, value in names.items():
        text = text.replace(name, str(value))
    return text


@pytest.fixture(scope="module")
def changed(observer_library: None, tmp_path_factory: pytest.TempPathFactory) -> list[Recorded]:
    rings: Path = tmp_path_factory.mktemp("late") / "rings"
    name = LIBRARIES["observer"].file_name()
    assert name is not None
    script = late(STEPS=STEPS, CHANGES=CHANGES)
    done = run_script(script, rings, world=2, BUILT=str(cache.find(name)))
    assert done.returncode == 0, done.stderr
    without = run_script(script, rings, world=2, BUILT=str(cache.find(name)), LENS_DISABLED="1")
    assert done.stdout == without.stdout
    return read_rings(rings)


def test_a_run_changes_over_by_itself_and_says_so(changed: list[Recorded]) -> None:
    for recorded, step in zip(changed, CHANGES, strict=True):
        assert recorded.about["collectives"] == "native"
        assert recorded.about["lacks_native"] is None
        (told,) = (event for event in recorded.events if event["kind"] == "run.config")
        assert (told["attrs"]["old"], told["attrs"]["new"]) == ("python", "native")
        # Not at the end of a step that leaves something in flight.
        assert told["step"] == step + step % 2


def test_no_collective_is_lost_or_doubled_by_the_change(changed: list[Recorded]) -> None:
    for rank, (recorded, change) in enumerate(zip(changed, CHANGES, strict=True)):
        native_from = change + change % 2 + 1
        for step in range(STEPS):
            sent = {("all_reduce", 4): 1, ("all_gather", 12): 1, ("send" if rank == 0 else "recv", 28): 1}
            sent |= {("all_reduce", 36): 1} if step % 2 else {}
            sent |= {("all_reduce", (8 * 5 + 5) * 4): 1} if step >= native_from else {}
            seen = Counter((call["name"], call["bytes"]) for call in recorded.collectives if call["step"] == step)
            assert seen == sent, (rank, step)


def test_numbers_go_on_though_the_ranks_change_at_different_steps(changed: list[Recorded]) -> None:
    named: dict[tuple[str, int], list[tuple[str, int, int]]] = {}
    for recorded in changed:
        for call in recorded.collectives:
            what = (call["name"].replace("recv", "send"), call["bytes"], call["step"])
            named.setdefault((call["group"], call["seq"]), []).append(what)
    assert all(len(found) <= 2 and len(set(found)) == 1 for found in named.values())
    pairs = sorted(number for group, number in named if ":" in group)
    assert pairs == list(range(1, STEPS + 1))
    both = [key for key, found in named.items() if len(found) == 2]
    assert len(both) > STEPS * 3


KILLED = """
    import os, time
    import torch, torch.distributed as dist
    import lens

    meeting = f"file://{os.environ['MEETING']}"
    dist.init_process_group("gloo", init_method=meeting, rank=int(os.environ["RANK"]), world_size=2)
    lens.watch()
    with lens.step(5):
        dist.all_reduce(torch.ones(2))
        if dist.get_rank() == 1:
            time.sleep(1000)
        started = dist.all_gather_into_tensor(torch.ones(6), torch.ones(3), async_op=True)
        dist.all_reduce(torch.ones(4))
"""


@pytest.fixture
def killed(observer_library: None, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """What the ring of a rank says that was killed in a collective the other one never entered."""
    script = tmp_path / "script.py"
    script.write_text("\n".join(line.removeprefix("    ") for line in KILLED.splitlines()))
    rings = tmp_path / "rings"
    environment = {
        **os.environ, "LENS_RINGS": str(rings), "LENS_AGENT": "0", "LENS_RING_MIB": "1", "OMP_NUM_THREADS": "1",
        "MEETING": str(tmp_path / "meeting"), "WORLD_SIZE": "2",
    }  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, str(script)], env={**environment, "RANK": str(rank)}) for rank in range(2)
    ]
    try:
        wait_for(lambda: [span["bytes"] for span in in_flight(rings)] == [12, 16])
        ranks[0].send_signal(signal.SIGKILL)
        ranks[0].wait(PATIENCE_S)
        yield in_flight(rings)
    finally:
        for process in ranks:
            process.kill()
            process.wait(PATIENCE_S)


def in_flight(rings: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in rings.glob("*/*/native-*.ring"):
        with contextlib.suppress(RingError):  # not written yet
            found += [span for span in RingReader(path).open_spans() if span["kind"] == "collective"]
    return found


def test_what_was_in_flight_is_told_after_a_kill(killed: list[dict[str, Any]]) -> None:
    started, entered = killed
    assert (started["name"], started["bytes"], started["async"], started["t_wait"]) == (
        "all_gather",
        12,
        True,
        None,
    )
    assert (entered["name"], entered["bytes"], entered.get("async", False)) == ("all_reduce", 16, False)
    assert started["group"] == entered["group"] == "world/0"
    assert entered["seq"] == started["seq"] + 1
    assert started["step"] == entered["step"] == 5


ALONE = """
    import json, sys
    import torch, torch.distributed as dist
    import lens

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    lens.watch()
    for _ in range(3):
        with lens.step():
            dist.all_reduce(torch.ones(3))
    print(json.dumps(lens.enabled()))
"""


@pytest.mark.parametrize("home", ["empty", "not allowed", "broken"])
def test_without_the_library_python_records_and_says_what_is_lacking(home: str, tmp_path: Path) -> None:
    rings, folder = tmp_path / "rings", tmp_path / "cache"
    name = LIBRARIES["observer"].file_name()
    assert name is not None
    native = folder / "lens" / "native"
    native.mkdir(parents=True, mode=0o700)
    if home != "empty":
        (native / name).write_bytes(b"\x7fELF cut short")
        (native / name).chmod(0o600 if home == "broken" else 0o666)
    before = sorted(native.iterdir())
    done = run_script(ALONE, rings, XDG_CACHE_HOME=str(folder), CXX="no-such-compiler")
    assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, True, "")
    (recorded,) = read_rings(rings)
    assert (recorded.about["collectives"], recorded.about["lacks_native"]) == ("python", sys.executable)
    assert [(call["name"], call["bytes"]) for call in recorded.collectives] == [("all_reduce", 12)] * 3
    assert sorted(native.iterdir()) == before  # a training process compiles nothing
