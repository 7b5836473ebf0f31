"""``lens run`` records a training that has no line of lens in it, and the training never notices."""

from __future__ import annotations

import collections
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lens.slots import ROW
from tests.hooks import programs
from tests.hooks.ringside import Recorded, read_rings, run_python, script_of

pytestmark = pytest.mark.processes
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
PHASES = {"forward", "backward", "optimizer"}


def under_lens(command: list[str], rings: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python(["-m", "lens", "run", "--", sys.executable, *command], rings, **environment)


def written(rings: Path, text: str) -> str:
    rings.parent.mkdir(exist_ok=True)
    path = rings.parent / "script.py"
    path.write_text(script_of(text))
    return str(path)


def same_with_and_without(command: list[str], rings: Path) -> list[Recorded]:
    """Run twice; what the command prints and returns is the same; returns what was recorded."""
    alone = run_python(command, rings)
    assert not rings.exists()
    watched = under_lens(command, rings)
    assert (watched.returncode, timeless(watched.stdout)) == (0, timeless(alone.stdout)), watched.stderr
    assert timeless(alone.stdout)
    assert alone.returncode == 0, alone.stderr
    return read_rings(rings)


def steps_and_layers(recorded: Recorded) -> list[tuple[int, int]]:
    return sorted((vector["step"], vector["layer"]) for vector in recorded.vectors)


def timeless(output: str) -> list[str]:
    """The lines that do not say how long something took."""
    return [line for line in output.splitlines() if "runtime" not in line]


def count(names: list[dict[str, Any]]) -> dict[str, int]:
    return dict(collections.Counter(record["name"] for record in names))


@pytest.mark.long
def test_the_sample_run_gives_the_same_as_with_the_embedded_hook(tmp_path: Path) -> None:
    common = ["sample_runs.moe", "--world", "2", "--steps", "12", "--eval-every", "5", "--checkpoint-every", "0"]
    embedded, found = tmp_path / "embedded" / "rings", tmp_path / "found" / "rings"
    for rings in (embedded, found):
        rings.parent.mkdir()
    losses = ["--losses", "losses"]
    assert run_python(["-m", *common, *losses], embedded).returncode == 0
    done = under_lens(["-m", *common, *losses, "--no-lens"], found)
    assert done.returncode == 0, done.stderr

    for rank, (one, other) in enumerate(zip(read_rings(embedded), read_rings(found), strict=True)):
        assert other.closed
        assert (other.about["rank"], other.about["world_size"]) == (rank, 2)
        assert [step["step"] for step in other.steps] == [step["step"] for step in one.steps] == list(range(12))
        # The embedded hook knows the groups' kinds; the ranks in them tell the names apart here.
        members = {"world/0": "world/0", "ep/0": "ranks/0,1", f"dp/{rank}": f"ranks/{rank}"}
        expected = [(members[c["group"]], c["name"], c["seq"], c["bytes"]) for c in one.collectives]
        assert [(c["group"], c["name"], c["seq"], c["bytes"]) for c in other.collectives] == expected
        assert {phase["name"] for phase in other.phases} == PHASES | {"data", "eval"}
        assert count(other.phases)["data"] == count(one.phases)["data"]
        tokens = [[(v["step"], v["layer"], v["values"]) for v in each.vectors] for each in (one, other)]
        assert sorted(tokens[0]) == sorted(tokens[1])
        assert (found.parent / f"losses.{rank}").read_text() == (embedded.parent / f"losses.{rank}").read_text()


TIMES = frozenset({"t0", "t1", "t_wait", "t_done", "gc_ns", "overhead_ns"})
OWN = frozenset({"pid", "start_ticks", "run"})


def timeless_records(recorded: Recorded) -> list[str]:
    """Every record without its times, in a fixed order; of the counters read each second only which they are, and none
    that only a training of more than a second has."""
    rows = {name for row in recorded.of(ROW) for name in row["values"]} - {"lens.overhead.ratio"}
    return sorted(
        repr(sorted((name, value) for name, value in record.items() if name not in TIMES))
        for record in recorded.records if record["type"] != ROW
    ) + sorted(rows)  # fmt: skip


@pytest.mark.usefixtures("observer_library", "timeline_library")
def test_every_field_is_as_the_embedded_hook_records_it(tmp_path: Path) -> None:
    hook = "import lens\nlens.watch(model, optimizer)\nstep = lens.step"
    found, embedded = tmp_path / "found" / "rings", tmp_path / "embedded" / "rings"
    prepared = written(embedded, programs.MIXTURE_LOOP.replace("# lens", hook))
    done = run_python([*TORCHRUN, prepared], embedded)
    assert done.returncode == 0, done.stderr
    without = same_with_and_without([*TORCHRUN, written(found, programs.MIXTURE_LOOP)], found)
    for one, other in zip(read_rings(embedded), without, strict=True):
        assert timeless_records(other) == timeless_records(one)
        assert {key: value for key, value in other.about.items() if key not in OWN} == {
            key: value for key, value in one.about.items() if key not in OWN
        }
        assert {phase["name"] for phase in other.phases} == PHASES | {"data", "eval"}
        assert {call["name"] for call in other.collectives} == {"all_reduce", "barrier"}
        assert steps_and_layers(other) == list(itertools.product(range(6), range(2)))
        assert other.closed


@pytest.mark.usefixtures("observer_library")
def test_a_ddp_loop_with_gradient_accumulation(rings: Path) -> None:
    for recorded in same_with_and_without([*TORCHRUN, written(rings, programs.DDP_LOOP)], rings):
        assert [step["step"] for step in recorded.steps] == list(range(6))
        assert count(recorded.phases) == {"data": 12, "forward": 12, "backward": 12, "optimizer": 6}
        sent = collections.Counter((call["name"], call["bytes"]) for call in recorded.collectives)
        # The reducer's bucket and the loss, each step; once, the reducer tells its order of buckets.
        assert sent["all_reduce", (8 * 8 + 8 + 8 + 1) * 4] == sent["all_reduce", 4] == 6
        assert count(recorded.collectives) == {"all_reduce": 12, "broadcast": 2}


@pytest.mark.long
@pytest.mark.usefixtures("observer_library")
def test_an_fsdp_loop_with_checkpointed_experts(rings: Path) -> None:
    for recorded in same_with_and_without([*TORCHRUN, written(rings, programs.FSDP_LOOP)], rings):
        assert [step["step"] for step in recorded.steps] == list(range(5))
        assert count(recorded.phases) == dict.fromkeys(PHASES, 5)
        # The norm of the sharded gradients is reduced too, once a step.
        assert count(recorded.collectives) == {"all_gather": 20, "reduce_scatter": 10, "all_reduce": 5}
        assert {sum(vector["values"]) for vector in recorded.vectors} == {12 * 2}
        assert sorted((v["step"], v["layer"]) for v in recorded.vectors) == [
            (s, n) for s in range(5) for n in (0, 1)
        ]


needs_transformers = pytest.mark.skipif(
    not (importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate")),
    reason="transformers and accelerate are not installed",
)


@needs_transformers
@pytest.mark.long
def test_the_trainer_of_transformers_on_a_mixture_of_experts(rings: Path) -> None:
    (recorded,) = same_with_and_without([written(rings, programs.TRAINER)], rings)
    assert [step["step"] for step in recorded.steps] == list(range(6))
    phases = count([phase for phase in recorded.phases if phase["step"] < 6])
    assert (phases["forward"], phases["backward"], phases["optimizer"]) == (12, 12, 6)
    assert phases["data"] >= 12
    assert phases["eval"] >= 1
    # Two micro-batches of two rows of 16 tokens, two experts each.
    assert {sum(vector["values"]) for vector in recorded.vectors} == {2 * 2 * 16 * 2}
    assert steps_and_layers(recorded) == list(itertools.product(range(6), range(2)))


@needs_transformers
@pytest.mark.long
def test_accelerate_launch(rings: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = under_lens([*launch, written(rings, programs.PLAIN_LOOP)], rings)
    assert done.returncode == 0, done.stderr
    (recorded,) = read_rings(rings)
    assert len(recorded.steps) == 3


@pytest.mark.long
def test_processes_that_a_script_spawns(rings: Path) -> None:
    done = under_lens([written(rings, programs.SPAWNED)], rings)
    assert done.returncode == 0, done.stderr
    ranks = read_rings(rings)
    assert [(r.about["rank"], r.about["world_size"]) for r in ranks] == [(0, 2), (1, 2)]
    assert len({r.about["run"] for r in ranks}) == 1
    for recorded in ranks:
        assert len(recorded.steps) == 3
        assert count(recorded.collectives) == {"all_reduce": 6}


@pytest.mark.long
def test_compiled_models_stay_whole(rings: Path) -> None:
    (recorded,) = same_with_and_without([written(rings, programs.COMPILED)], rings)
    assert len(recorded.steps) == 6
    assert count(recorded.phases)["forward"] >= 3


@pytest.mark.long
def test_steps_that_are_compiled_as_a_whole_are_recorded_and_broken_no_more_often(rings: Path) -> None:
    (recorded,) = same_with_and_without([written(rings, programs.COMPILED_STEP)], rings)
    assert [step["step"] for step in recorded.steps] == [0, 1, 2]


@pytest.mark.long
def test_a_script_that_watches_itself_is_recorded_once_and_as_it_says(rings: Path) -> None:
    script = programs.PLAIN_LOOP.replace(
        "for step", "import lens\nlens.watch(model, optimizer, run='own')\nfor step"
    )
    done = under_lens([written(rings, script)], rings)
    assert done.returncode == 0, done.stderr
    (recorded,) = read_rings(rings)
    assert recorded.about["run"] == "own"
    assert [step["step"] for step in recorded.steps] == [0, 1, 2]
    assert count(recorded.phases) == dict.fromkeys(PHASES, 3)


@pytest.mark.long
def test_counts_handed_over_replace_those_found(rings: Path) -> None:
    script = """
    import lens, torch
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.top_k = 1
            self.router = torch.nn.Linear(4, 3)
        def forward(self, tokens):
            return self.router(tokens)
    model = torch.nn.Sequential(Experts())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        model(torch.ones(2, 4)).sum().backward()
        lens.expert_tokens(0, [7, 8, 9])
        optimizer.step()
    """
    assert under_lens([written(rings, script)], rings).returncode == 0
    (recorded,) = read_rings(rings)
    assert [vector["values"] for vector in recorded.vectors] == [(7.0, 8.0, 9.0)] * 3


ENDS = {
    "an error in the first forward": "model(torch.ones(2, 3))",
    "an error later": programs.PLAIN_LOOP.split("\n", 6)[6] + "\nmodel(torch.ones(2, 3))",
    "an error caused by another": "try: model(torch.ones(1))\nexcept Exception as e: raise OSError('x') from e",
    "an optimizer that cannot be": "torch.optim.SGD([], lr=0.1)",
    "exit code 3": "sys.exit(3)",
    "exit code 1": "sys.exit('said so')",
}


@pytest.mark.long
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 keeps a traceback that is raised again")
@pytest.mark.parametrize("end", ENDS.values(), ids=list(ENDS))
def test_every_end_is_the_same(end: str, rings: Path) -> None:
    start = "import sys, torch\nmodel = torch.nn.Linear(4, 1)\n"
    if "SGD([]" not in end:
        start += "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
    script = written(rings, start + end)
    alone, watched = run_python([script], rings), under_lens([script], rings)
    ours, *rest = watched.stderr.splitlines()
    assert ours.startswith("lens: run")
    assert rest == alone.stderr.splitlines()
    assert (watched.returncode, watched.stdout) == (alone.returncode, alone.stdout)


@pytest.mark.long
def test_a_rank_that_fails_ends_torchrun_as_it_would_without_lens(rings: Path) -> None:
    script = """
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    if dist.get_rank() == 1:
        model(torch.ones(2, 3))
    dist.barrier()
    """
    command = [*TORCHRUN, written(rings, script)]

    def told(stderr: str) -> list[str]:
        return [line for line in stderr.splitlines() if line.startswith("[rank1]:")]

    alone, watched = run_python(command, rings), under_lens(command, rings)
    assert watched.returncode == alone.returncode == 1
    assert told(watched.stderr) == told(alone.stderr) != []
    recorded = {found.about["rank"]: found for found in read_rings(rings)}
    kinds = [event["kind"] for event in recorded[1].events]
    assert [kind for kind in kinds if kind.startswith("process.")] == ["process.error"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_training_ends_as_killed_and_keeps_its_record(number: signal.Signals, rings: Path) -> None:
    script = programs.PLAIN_LOOP + f"import os\nos.kill(os.getpid(), {int(number)})\n"
    assert under_lens([written(rings, script)], rings).returncode == -number
    (recorded,) = read_rings(rings)
    assert len(recorded.steps) == 3
    assert not recorded.closed


def test_what_trains_nothing_is_not_watched(rings: Path) -> None:
    script = """
    import sys
    before = [m for m in sys.modules if m.startswith("lens")]
    import torch
    torch.nn.Linear(4, 1)(torch.ones(1, 4)).sum().backward()
    print(before, [m for m in sys.modules if m.startswith("lens")], [p for p in sys.path if "autoload" in p])
    print([f for f in sys.meta_path if "Torch" in type(f).__name__], "sitecustomize" in sys.modules)
    """
    done = under_lens([written(rings, script)], rings)
    assert done.stdout == "[] [] []\n[] False\n"
    assert not rings.exists()


def test_the_users_own_sitecustomize_runs(rings: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "sitecustomize.py").write_text("import os\nos.environ['THEIRS'] = __file__\n")
    script = written(rings, "import os, sitecustomize; print(os.environ['THEIRS'] == sitecustomize.__file__)")
    path = os.pathsep.join([str(tmp_path / "theirs"), str(Path(__file__).resolve().parents[2])])
    assert under_lens([script], rings, PYTHONPATH=path).stdout == "True\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P came with 3.11")
def test_a_program_with_its_own_module_called_lens_is_left_alone(rings: Path) -> None:
    script = written(rings, programs.PLAIN_LOOP + "import lens\nprint(lens.mine)\n")
    Path(script).with_name("lens.py").write_text("mine = 1\n")
    inside = f"import runpy, sys; sys.path.insert(0, {str(rings.parent)!r}); runpy.run_path({script!r})"
    # From elsewhere, or `python -m lens` itself would meet the namesake.
    done = run_python(["-P", "-m", "lens", "run", "--", sys.executable, "-c", inside], rings)
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert "another module called lens" in done.stderr
    assert not rings.exists()
