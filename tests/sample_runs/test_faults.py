"""Each fault of the sample run is felt where it was put, and nowhere else."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lens.collectors.simulated.cards import SimulatedCards
from sample_runs.moe import options
from sample_runs.moe.card import Card
from sample_runs.moe.faults import Fault, Faults, write_slowly
from sample_runs.moe.model import Experts, ModelSize
from sample_runs.moe.parallel import Layout
from sample_runs.moe.process_faults import Quota, Uplink
from tests.hooks.ringside import Recorded, read_rings
from tests.sample_runs.running import train

SECOND, MIB = 10**9, 1 << 20


@pytest.fixture
def no_library_stays() -> Iterator[None]:
    yield
    sys.modules.pop("amdsmi", None)
    if "pynvml" in sys.modules:
        sys.modules["pynvml"].nvmlLib = None
        sys.modules["pynvml"]._nvmlGetFunctionPointer_cache.clear()


def spent(recorded: Recorded, phase: str, first: int, last: int) -> list[int]:
    """Time in a phase in each of some steps that have it, ns, the shortest first: a machine that lets a rank stand for a
    while makes the last one longer than it was."""
    times: Counter[int] = Counter()
    for found in recorded.phases:
        if found["name"] == phase and found["step"] is not None and first <= found["step"] < last:
            times[found["step"]] += found["t1"] - found["t0"]
    return sorted(times.values())


def own_work(recorded: Recorded, first: int, last: int) -> float:
    """Time of forward and backward outside collectives, median of some steps, ns."""
    each = []
    for step in range(first, last):
        phases = [p for p in recorded.phases if p["step"] == step and p["name"] in ("forward", "backward")]
        calls = [c for c in recorded.collectives if c["step"] == step and c["phase"] in ("forward", "backward")]
        each.append(sum(p["t1"] - p["t0"] for p in phases) - sum(c["t1"] - c["t0"] for c in calls))
    return statistics.median(each)


def share_of(recorded: Recorded, experts: slice, first: int, last: int) -> float:
    """Share of this rank's tokens that its routers send to some experts."""
    counts = [v["values"] for v in recorded.vectors if v["step"] is not None and first <= v["step"] < last]
    return sum(sum(values[experts]) for values in counts) / sum(map(sum, counts))


@pytest.mark.processes
def test_a_nan_a_slow_loader_and_slow_computing_are_felt_on_their_rank(tmp_path: Path) -> None:
    faults = ["--fault", "nan@8:1", "--fault", "slow_loader@12:0x20", "--fault", "slow_compute@16:1x4"]
    train(tmp_path, 2, "--hosts", "2", "--checkpoint-every", "0", "--eval-every", "0", *faults, steps=24)
    zero, one = read_rings(tmp_path / "rings")

    not_finite = [[step for step, v in r.values("train.loss.local") if not math.isfinite(v)] for r in (zero, one)]
    assert not_finite == [[], [8]]
    assert [step for step, value in zero.values("train.loss") if not math.isfinite(value)] == [8]

    assert sum(spent(zero, "data", 13, 24)) > 3 * sum(spent(one, "data", 13, 24)[:-1])
    assert sum(spent(zero, "data", 13, 24)) > 11 * 30e6

    assert own_work(one, 16, 24) > 2 * own_work(one, 2, 12)
    assert own_work(one, 16, 24) > 2 * own_work(zero, 16, 24)
    assert not (tmp_path / "rings" / "sim" / "host0_gpu0.fault.json").exists()
    assert (tmp_path / "rings" / "sim" / "host1_gpu0.fault.json").read_text() == "{}"


@pytest.mark.processes
def test_hot_experts_garbage_and_a_slow_disk_are_felt_on_their_rank(tmp_path: Path) -> None:
    faults = ["--fault", "hot_expert@8:1", "--fault", "gc@12:0", "--fault", "checkpoint@10:1"]
    train(tmp_path, 2, "--checkpoint-every", "4", "--eval-every", "0", *faults, steps=24)
    zero, one = read_rings(tmp_path / "rings")

    for recorded in (zero, one):
        assert share_of(recorded, slice(4, 8), 0, 8) < 0.7
        assert share_of(recorded, slice(4, 8), 8, 24) > 0.8
        assert {value for _, value in recorded.values("moe.tokens.dropped")} == {0.0}
    assert own_work(one, 8, 24) > 1.3 * own_work(one, 2, 8)
    assert own_work(one, 8, 24) > 1.5 * own_work(zero, 8, 24)

    late, other, early = (
        sorted(step["gc_ns"] for step in recorded.steps if step["step"] in steps)
        for recorded, steps in ((zero, range(12, 24)), (one, range(12, 24)), (zero, range(12)))
    )
    assert sum(late) > 5 * max(sum(other[:-1]), sum(early[:-1]))

    slow, usual, before = (
        spent(one, "checkpoint", 8, 24),
        spent(zero, "checkpoint", 8, 24),
        spent(one, "checkpoint", 0, 8),
    )
    assert (len(slow), len(usual), len(before)) == (4, 4, 2)
    assert slow[0] > 3 * usual[0]
    assert slow[0] > 3 * before[0]


LEAK = """
import os
from lens.collectors.process import resident_bytes
from sample_runs.moe.faults import Fault, Faults
leaky, sound = (Faults([Fault.parse("leak@3:0x8")], rank=rank, batch=4, workers=1) for rank in (0, 1))
before = resident_bytes(os.getpid())
for step in range(11):
    leaky.begin_step(step)
    sound.begin_step(step)
print(resident_bytes(os.getpid()) - before)
"""


def test_a_leak_keeps_the_memory_of_each_step() -> None:
    # In a process of its own: what other tests let go would count against it.
    grown = int(subprocess.run([sys.executable, "-c", LEAK], capture_output=True, text=True, check=True).stdout)
    assert 7 * 8 * MIB < grown < 12 * 8 * MIB


def test_garbage_makes_python_collect_all_generations_again_and_again() -> None:
    def collections() -> int:
        return int(gc.get_stats()[2]["collections"])

    gc.collect()
    littering, before = Faults([Fault.parse("gc@0:0x4")], rank=0, batch=4, workers=1), collections()
    for step in range(40):
        littering.begin_step(step)
    assert collections() >= before + 2


def test_a_slow_disk_takes_its_time_and_keeps_every_byte(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    began = time.monotonic()
    write_slowly(tmp_path / "file", memoryview(content), 0.2)
    assert time.monotonic() - began >= 0.2
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.usefixtures("no_library_stays")
@pytest.mark.parametrize("text", ["H200:1", "MI400:1"])
def test_a_hot_card_throttles_and_its_rank_computes_as_slowly_as_it_says(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_RINGS", str(tmp_path))
    monkeypatch.setenv("LENS_DEVICE", "host1/gpu0")
    monkeypatch.setattr("sample_runs.moe.card.STALE_S", 600.0)  # the test's seconds are not those of its machine
    cards = SimulatedCards(text, "host1", tmp_path / "sim")
    collector, card = cards.collector(), cards.cards["host1/gpu0"]
    collector.probe()
    faults = Faults([Fault.parse("thermal@1:0")], rank=0, batch=4, workers=1)

    def seen(second: int) -> dict[str, float]:
        card.work("compute", 0.9)
        cards.advance(second * SECOND, {})
        return {reading.metric: reading.value for reading in collector.read("fast")}

    faults.begin_step(0)
    seen(1)
    healthy = seen(2)
    assert faults.pace.factor == 1
    faults.begin_step(1)
    seen(3)
    hot = seen(4)
    faults.begin_step(2)
    assert int(hot["gpu.throttle.reasons"]) & 0x60
    assert not int(healthy["gpu.throttle.reasons"]) & 0x60
    # The step takes longer by what the clock has lost, which is what the card's sensors show.
    assert faults.pace.factor == pytest.approx(healthy["gpu.clock.sm"] / hot["gpu.clock.sm"], rel=0.02)
    assert faults.pace.factor > 1.5
    faults.end()
    for second in range(5, 40):
        seen(second)
    assert Card.of_this_rank().speed() == 1


def test_what_a_card_said_long_ago_is_passed_over(tmp_path: Path) -> None:
    card, state = Card("host1.example.org/gpu0", tmp_path), tmp_path / "host1.example.org_gpu0.state.json"
    state.write_text('{"speed_factor": 0.5}')
    os.utime(state, (time.time() + 600,) * 2)  # said just now, however slow the machine is
    assert card.speed() == 0.5
    os.utime(state, (0, 0))
    assert card.speed() == 1
    assert Card(None, tmp_path).speed() == 1


@pytest.mark.parametrize("text", ["slow_compute", "slow_compute@4", "leak@4x3", "unheard_of@4:1", "nan@x:1"])
def test_a_fault_that_cannot_be_is_refused_with_the_way_to_write_it(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        options.parse(["--world", "2", "--fault", text])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "NAME@STEP:RANK" in message or "known: slow_compute" in message


@pytest.mark.parametrize("words", [["--world", "2", "--fault", "nan@4:2"], ["--fault", "hot_expert@4:0"]])
def test_a_fault_that_would_have_no_effect_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        options.parse(words)
    assert refused.value.code == 2


def test_a_fault_is_read_as_written() -> None:
    assert Fault.parse("slow_compute@40:2") == Fault("slow_compute", 40, 2, 2.0)
    assert Fault.parse("slow_loader@7:0x2.5") == Fault("slow_loader", 7, 0, 2.5)
    assert Fault.parse("checkpoint@7x9") == Fault("checkpoint", 7, None, 9.0)


def test_a_hot_expert_s_cause_sits_on_all_its_owners() -> None:
    assert Fault.parse("hot_expert@4:3").ranks(world=8, expert_parallel=4) == [3, 7]
    assert Fault.parse("gc@4:3").ranks(world=8, expert_parallel=4) == [3]
    assert Fault.parse("checkpoint@4").ranks(world=2, expert_parallel=2) == [0, 1]


def test_a_stopped_process_stands_still_and_goes_on() -> None:
    code = "from sample_runs.moe import process_faults as pf; pf.stop_for(0.5).wait(); print('on', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    # The kernel keeps it for whoever asks late: that a process goes on is told of none that did not stand still.
    told = os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WCONTINUED | os.WEXITED | os.WNOWAIT)
    assert told is not None
    assert told.si_code in (os.CLD_STOPPED, os.CLD_CONTINUED)
    assert child.stdout.readline() == "on\n"
    child.communicate("end\n", timeout=60)
    assert child.returncode == 0


def test_a_killed_process_and_a_killed_loader_worker_end_by_the_signal() -> None:
    faults = Faults([Fault.parse("worker_death@3:0")], rank=0, batch=4, workers=1)
    worker = multiprocessing.get_context("fork").Process(target=signal.pause)
    worker.start()
    faults.begin_step(3)
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    code = "from sample_runs.moe.faults import *; Faults([Fault.parse('killed@0:0')], 0, 4, 1).begin_step(0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL


def test_a_rank_out_of_line_hands_in_nothing_or_too_little_at_its_step_alone() -> None:
    totals = torch.arange(3.0)
    for name, handed in (("skip", None), ("shape", [0.0, 1.0])):
        faults = Faults([Fault.parse(f"{name}@5:1")], rank=1, batch=4, workers=1)
        assert faults.out_of_line(4, totals) is totals
        said = faults.out_of_line(5, totals)
        assert (None if said is None else said.tolist()) == handed
        assert Faults([Fault.parse(f"{name}@5:1")], rank=0, batch=4, workers=1).out_of_line(5, totals) is totals


def test_what_the_system_does_not_let_be_done_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="control groups"):
        Quota(tmp_path)
    assert list(tmp_path.rglob("lens-quota-*")) == []
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    with pytest.raises(ValueError, match="namespaces of their own"):
        Uplink()


def test_collapsed_routers_send_every_token_to_one_expert_of_each_owner() -> None:
    size = ModelSize(experts=8, top_k=2)
    alone = SimpleNamespace(
        layout=Layout(1, 1, 8), expert_position=0, exchange_counts=lambda kept: kept,
        all_to_all=lambda rows, leave, arrive: rows, on_card=lambda rows: rows,
    )  # fmt: skip
    experts = Experts(size, alone, seed=0)  # type: ignore[arg-type]
    experts.collapse(20.0)
    experts(torch.randn(size.tokens, size.width))
    assert experts.routing.counts == [size.tokens, 0, 0, 0, size.tokens, 0, 0, 0]


@pytest.mark.parametrize(("autogroup", "ranks"), [("1\n", [3]), ("0\n", [2, 3])])
def test_who_is_crowded_out_hangs_on_how_the_kernel_shares_a_core_out(
    autogroup: str, ranks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(Path, "read_text", lambda path: autogroup)
    assert Fault.parse("hog@9:3").ranks(4, 2) == ranks
    assert Fault.parse("collapse@9").ranks(4, 2) == []
