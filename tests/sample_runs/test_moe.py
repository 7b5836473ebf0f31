"""The sample run: it learns, it sends what the formula says, lens changes nothing, faults do what they say."""

from __future__ import annotations

import itertools
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sample_runs.moe import options
from sample_runs.moe.data import Windows, read_corpus
from sample_runs.moe.faults import Fault
from sample_runs.moe.model import ModelSize, MoeModel
from sample_runs.moe.parallel import Layout
from sample_runs.moe.volume import Sent, expected_bytes
from tests.hooks.ringside import ROOT, Recorded, read_rings, run_python

pytestmark = pytest.mark.processes
STEPS = 30


def train(folder: Path, world: int, *more: str, steps: int = STEPS) -> subprocess.CompletedProcess[str]:
    arguments = ["--world", str(world), "--steps", str(steps), "--out", str(folder / "out"), "--print-every", "10"]
    done = run_python(["-m", "sample_runs.moe", *arguments, *more], folder / "rings", timeout=200)
    assert done.returncode == 0, done.stderr
    return done


def losses(folder: Path, world: int) -> list[str]:
    return [(folder / f"losses.{rank}").read_text() for rank in range(world)]


def sent(recorded: Recorded, step: int) -> list[Sent]:
    return [
        Sent(call["name"], call["group"], call["bytes"]) for call in recorded.collectives if call["step"] == step
    ]


def counts_of(recorded: Recorded, step: int) -> list[list[int]]:
    vectors = sorted((v for v in recorded.vectors if v["step"] == step), key=lambda vector: vector["layer"])
    return [[int(value) for value in vector["values"]] for vector in vectors]


def expected(ranks: list[Recorded], rank: int, step: int, size: ModelSize) -> list[Sent]:
    layout = Layout(len(ranks), min(2, len(ranks)), size.experts)
    place: Any = SimpleNamespace(layout=layout, expert_position=rank % layout.expert_parallel)
    counts = [counts_of(recorded, step) for recorded in ranks]
    return expected_bytes(size, layout, rank, counts, MoeModel(size, place, seed=0))


@pytest.fixture(scope="module", params=[2, 4], ids=["world 2", "world 4"])
def healthy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("healthy")
    more = ["--losses", str(folder / "losses"), "--checkpoint-every", "20", "--eval-every", "20", "--hosts", "2"]
    done = train(folder, request.param, *more)
    return SimpleNamespace(folder=folder, world=request.param, done=done, ranks=read_rings(folder / "rings"))


def test_every_collective_has_the_bytes_of_the_formula(healthy: Any) -> None:
    compared = 0
    for rank, recorded in enumerate(healthy.ranks):
        for step in range(STEPS):
            if step != 19:  # evaluation sends as well
                assert sent(recorded, step) == expected(healthy.ranks, rank, step, ModelSize())
                compared += 1
    assert compared == healthy.world * (STEPS - 1)


def test_the_loss_falls(healthy: Any) -> None:
    for rank in range(healthy.world):
        local = [float.fromhex(line) for line in losses(healthy.folder, healthy.world)[rank].split()]
        assert sum(local[-5:]) / 5 < sum(local[:5]) / 5 - 1


def test_lens_changes_no_bit_of_the_loss(healthy: Any, tmp_path: Path) -> None:
    train(tmp_path, healthy.world, "--no-lens", "--losses", str(tmp_path / "losses"))
    assert losses(tmp_path, healthy.world) == losses(healthy.folder, healthy.world)
    assert not (tmp_path / "rings").exists()


def test_everything_of_interest_is_recorded(healthy: Any) -> None:
    for rank, recorded in enumerate(healthy.ranks):
        steps = list(range(STEPS))
        assert [step["step"] for step in recorded.steps] == steps
        assert {step["tokens"] for step in recorded.steps} == {ModelSize().tokens}
        for metric in ("train.loss.local", "train.grad_norm.local", "train.flops"):
            assert [step for step, _ in recorded.values(metric)] == steps
        phases = {phase["name"] for phase in recorded.phases}
        assert phases == {"data", "forward", "backward", "optimizer", "logging", "eval", "checkpoint"}
        flops = [value for _, value in recorded.values("train.flops")]
        assert all(later > earlier for earlier, later in itertools.pairwise(flops))
        assert bool(recorded.values("train.loss")) == (rank == 0)
        half = healthy.world // 2
        assert recorded.about["device"] == f"host{rank // half}/gpu{rank % half}"
        assert recorded.about["model"] == "H200"
        assert recorded.about["groups"] == Layout(healthy.world, 2, 8).groups()


def test_some_tokens_are_dropped_and_all_are_accounted_for(healthy: Any) -> None:
    size = ModelSize()
    for recorded in healthy.ranks:
        routed, kept, dropped = (
            [value for _, value in recorded.values(f"moe.tokens.{name}")] for name in ("routed", "kept", "dropped")
        )
        assert [r - k - d for r, k, d in zip(routed, kept, dropped, strict=True)] == [0] * len(routed)
        assert dropped[-1] > 0
        assert max(routed) == STEPS * size.tokens * size.top_k
        for vector in recorded.vectors:
            assert sum(vector["values"]) == size.tokens * size.top_k


def test_each_rank_saves_its_part(healthy: Any) -> None:
    import torch

    for rank in range(healthy.world):
        state = torch.load(healthy.folder / "out" / "checkpoint" / f"rank{rank}.pt", weights_only=True)
        assert state["step"] == 19
        assert state["model"]["blocks.0.experts.up"].shape[0] == 4


def test_the_local_loss_averages_to_the_global_one(healthy: Any) -> None:
    local = [dict(recorded.values("train.loss.local")) for recorded in healthy.ranks]
    for step, loss in healthy.ranks[0].values("train.loss"):
        assert loss == pytest.approx(sum(of_rank[step] for of_rank in local) / healthy.world, rel=1e-6)


def test_dropless_drops_nothing_in_a_world_of_one(tmp_path: Path) -> None:
    train(tmp_path, 1, "--dropless", steps=10)
    (recorded,) = read_rings(tmp_path / "rings")
    assert {value for _, value in recorded.values("moe.tokens.dropped")} == {0.0}
    assert sent(recorded, 5) == expected([recorded], 0, 5, ModelSize(capacity_factor=None))


def test_eight_ranks_train(tmp_path: Path) -> None:
    done = train(tmp_path, 8, "--data-workers", "0", "--no-lens", steps=4)
    assert "step     4/4" in done.stdout


def test_faults_do_what_they_say(tmp_path: Path) -> None:
    faults = ["--fault", "nan@8:1", "--fault", "slow_loader@12:0x20", "--fault", "slow_compute@16:1x4"]
    train(tmp_path, 2, "--hosts", "2", "--checkpoint-every", "0", "--eval-every", "0", *faults, steps=24)
    zero, one = read_rings(tmp_path / "rings")

    not_finite = [[step for step, v in r.values("train.loss.local") if not math.isfinite(v)] for r in (zero, one)]
    assert not_finite == [[], [8]]
    assert [step for step, value in zero.values("train.loss") if not math.isfinite(value)] == [8]

    def waits(recorded: Recorded, first: int, last: int) -> float:
        return sum(
            phase["t1"] - phase["t0"]
            for phase in recorded.phases
            if phase["name"] == "data" and phase["step"] is not None and first <= phase["step"] < last
        )

    assert waits(zero, 13, 24) > 3 * waits(one, 13, 24)
    assert waits(zero, 13, 24) > 11 * 30e6

    def own_work(recorded: Recorded, first: int, last: int) -> list[int]:
        """Time of forward and backward outside collectives, ns a step."""
        spent = []
        for step in range(first, last):
            phases = [p for p in recorded.phases if p["step"] == step and p["name"] in ("forward", "backward")]
            calls = [c for c in recorded.collectives if c["step"] == step and c["phase"] in ("forward", "backward")]
            spent.append(sum(p["t1"] - p["t0"] for p in phases) - sum(c["t1"] - c["t0"] for c in calls))
        return sorted(spent)

    def median(values: list[int]) -> int:
        return values[len(values) // 2]

    assert median(own_work(one, 16, 24)) > 2 * median(own_work(one, 2, 12))
    assert median(own_work(one, 16, 24)) > 2 * median(own_work(zero, 16, 24))
    assert not (tmp_path / "rings" / "sim" / "host0_gpu0.fault.json").exists()
    assert (tmp_path / "rings" / "sim" / "host1_gpu0.fault.json").read_text() == '{"clock_factor": 1}'


def test_asked_to_stop_it_ends_cleanly(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "sample_runs.moe", "--steps", "100000", "--no-lens", "--out", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert "step" in run.stdout.readline()
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    rest, _ = run.communicate(timeout=30)
    assert run.returncode == 0
    assert "asked to stop" in rest
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("text", ["slow_compute", "slow_compute@4", "unheard_of@4:1", "nan@x:1"])
def test_a_fault_that_cannot_be_is_refused_with_the_way_to_write_it(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        options.parse(["--fault", text])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "NAME@STEP:RANK" in message or "known: slow_compute" in message


def test_a_fault_is_read_as_written() -> None:
    assert Fault.parse("slow_compute@40:2") == Fault("slow_compute", 40, 2, 2.0)
    assert Fault.parse("slow_loader@7:0x2.5") == Fault("slow_loader", 7, 0, 2.5)


def test_ranks_and_seeds_read_different_text_and_repeat_it() -> None:
    corpus = read_corpus(1 << 20)

    def first(seed: int, rank: int) -> list[bytes]:
        windows = Windows(corpus, length=32, count=8, seed=seed, rank=rank)
        return [bytes(windows[index].tolist()) for index in range(8)]

    assert first(0, 0) == first(0, 0)
    assert len({window for seed in range(3) for rank in range(4) for window in first(seed, rank)}) > 90


@pytest.mark.parametrize(("world", "expert_parallel", "experts"), [(4, 3, 9), (4, 2, 7)])
def test_a_layout_that_does_not_fit_is_refused(world: int, expert_parallel: int, experts: int) -> None:
    with pytest.raises(ValueError):
        Layout(world, expert_parallel, experts)
