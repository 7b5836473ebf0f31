"""The sample run: it learns, it sends what the formula says, lens changes nothing, faults do what they say."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sample_runs.moe.data import Windows, read_corpus
from sample_runs.moe.model import ModelSize, MoeModel
from sample_runs.moe.parallel import Layout
from sample_runs.moe.volume import Sent, expected_bytes
from tests.hooks.ringside import ROOT, Recorded, read_rings, run_python
from tests.sample_runs.running import STEPS, train

pytestmark = pytest.mark.processes


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


ENDING = """
import sys, time
from pathlib import Path
from sample_runs.moe import options, train

def name(task):
    try:
        return (task / "comm").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it ended since it was listed
        return ""

def threads():
    return [task for task in Path("/proc/self/task").iterdir() if "gloo" in name(task)]

close = train.Ranks.close
def watched(ranks):
    before = len(threads())
    close(ranks)
    end = time.monotonic() + 60
    while threads() and time.monotonic() < end:  # one that was joined may be listed a moment longer
        time.sleep(0.01)
    print(f"threads {before} -> {len(threads())}", flush=True)
train.Ranks.close = watched
sys.exit(train.main(options.parse()))
"""


@pytest.mark.parametrize("words", [[], ["--no-lens"]], ids=["with lens", "without"])
def test_no_thread_of_a_process_group_is_left_for_the_interpreter_s_end(words: list[str], tmp_path: Path) -> None:
    run = ["-c", ENDING, "--steps", "2", "--out", str(tmp_path / "out"), *words]
    done = run_python(run, tmp_path / "rings")
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("threads ")[1].split(" -> ")
    assert int(before) > 0
    assert int(after) == 0


def test_asked_to_stop_it_ends_cleanly(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "sample_runs.moe", "--steps", "100000", "--no-lens", "--out", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert "step" in run.stdout.readline()
    run.send_signal(signal.SIGTERM)
    rest, _ = run.communicate(timeout=100)  # all its steps would take many times as long
    assert run.returncode == 0
    assert "asked to stop" in rest


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
