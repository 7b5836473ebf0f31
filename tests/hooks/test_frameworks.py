"""Trainings by real frameworks: recorded as the framework itself counts, with a callback and without, and left as they were."""

from __future__ import annotations

import collections
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hooks import framework_programs as programs
from tests.hooks.ringside import Recorded, read_rings, run_python
from tests.hooks.test_unprepared import TORCHRUN, count, under_lens, written

pytestmark = [pytest.mark.processes, pytest.mark.long]

NO_CALLBACK = {"transformers": "[]", "trl": "[]", "lightning": "[]", "accelerate": "None"}
CALLBACK = {
    "transformers": "[lens.TransformersCallback()]",
    "trl": "[lens.TransformersCallback()]",
    "lightning": "[lens.LightningCallback()]",
    "accelerate": "lens.AccelerateTracker()",
}


def needs(*packages: str) -> pytest.MarkDecorator:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(
        bool(absent), reason=f"not installed: {', '.join(absent)} (pip install 'mistrallens[prove]')"
    )


def plain(program: str, framework: str) -> str:
    """Without a line of lens in it."""
    return program.replace("CALLBACKS", NO_CALLBACK[framework])


def with_callback(program: str, framework: str) -> str:
    """With the one line."""
    return program.replace("# lens", "import lens").replace("CALLBACKS", CALLBACK[framework])


def told_by(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What the framework says, in the last line."""
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def both_ways(program: str, framework: str, rings: Path) -> tuple[dict[str, Any], Recorded, Recorded]:
    """What the framework says, what ``lens run`` records, and what the callback records; results are the same bits."""
    script, own = written(rings, plain(program, framework)), rings.parent / "callback" / "rings"
    told = told_by(run_python([script], rings))
    assert not rings.exists()
    assert told_by(under_lens([script], rings)) == told
    assert told_by(run_python([written(own, with_callback(program, framework))], own)) == told
    return told, *(read_rings(folder)[0] for folder in (rings, own))


def in_steps(recorded: Recorded) -> dict[str, int]:
    """How often each phase is there, in steps that ended."""
    ended = {step["step"] for step in recorded.steps}
    return count([phase for phase in recorded.phases if phase["step"] in ended])


def values(recorded: Recorded, metric: str) -> dict[int, float]:
    return {step: value for step, value in recorded.values(metric) if step is not None}


def of_steps(told: list[list[float]]) -> dict[int, float]:
    """Step -> value, as lens numbers them: the first step is 0."""
    return {int(step) - 1: value for step, value in told}


TRAINER = {
    "loss": "train.loss",
    "learning_rate": "train.lr",
    "grad_norm": "train.grad_norm",
    "eval_loss": "eval.loss",
}


def logged_alike(recorded: Recorded, told: dict[str, Any], names: dict[str, str]) -> None:
    for name, metric in names.items():
        assert told[name], name
        assert values(recorded, metric) == of_steps(told[name]), metric


@needs("transformers", "accelerate")
def test_transformers_trainer(rings: Path) -> None:
    told, *both = both_ways(programs.TRANSFORMERS, "transformers", rings)
    for recorded in both:
        assert [step["step"] for step in recorded.steps] == list(range(told["steps"])) == list(range(6))
        logged_alike(recorded, told, {**TRAINER, "epoch": "train.epoch"})
        phases = in_steps(recorded)
        assert (phases["forward"], phases["backward"], phases["optimizer"]) == (12, 12, 6)
        # After steps 2 and 4: after the last one there is no step for it to lie in.
        assert phases["checkpoint"] == 2
        assert {sum(vector["values"]) for vector in recorded.vectors} == {2 * 2 * 16 * 2}
    assert both[1].about["config"]["gradient_accumulation_steps"] == 2


@needs("transformers", "accelerate")
def test_transformers_trainer_that_goes_on_from_a_checkpoint(rings: Path) -> None:
    program = programs.RESUMED.replace("print(told", "train(4)\nprint(told")
    done = under_lens([written(rings, plain(program, "transformers"))], rings)
    assert told_by(done)["steps"] == 7
    (recorded,) = read_rings(rings)
    assert [step["step"] for step in recorded.steps] == [0, 1, 2, 3, 4, 5, 6]


@needs("trl", "datasets")
def test_trl_sft(rings: Path) -> None:
    told, *both = both_ways(programs.SFT, "trl", rings)
    for recorded in both:
        assert [step["step"] for step in recorded.steps] == list(range(told["steps"])) == list(range(4))
        logged_alike(recorded, told, {**TRAINER, "num_tokens": "train.tokens.seen"})
        phases = in_steps(recorded)
        assert (phases["forward"], phases["backward"], phases["optimizer"]) == (8, 8, 4)
        assert phases["checkpoint"] == 1


@needs("trl", "datasets")
def test_trl_grpo(rings: Path) -> None:
    told, *both = both_ways(programs.GRPO, "trl", rings)
    for recorded in both:
        assert [step["step"] for step in recorded.steps] == list(range(told["steps"])) == list(range(3))
        logged_alike(
            recorded, told, {"learning_rate": "train.lr", "grad_norm": "train.grad_norm", "reward": "reward"}
        )
        by_step: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for phase in recorded.phases:
            by_step[phase["step"]][phase["name"]] += 1
        for step in range(3):
            found = by_step[step]
            # The reward is inside the rollout, which it splits.
            assert (found["rollout"], found["reward"]) == (2, 1), step
            assert (found["forward"], found["backward"], found["optimizer"]) == (1, 1, 1), step
            assert found["update"] >= 1
            assert "eval" not in found
        # What is generated is no token of the step: one forward pass of it learns.
        assert len(recorded.vectors) == 3 * 2


@needs("lightning")
def test_lightning(rings: Path) -> None:
    told, found, called = both_ways(programs.LIGHTNING, "lightning", rings)
    for recorded in (found, called):
        assert [step["step"] for step in recorded.steps] == list(range(told["steps"])) == list(range(6))
        phases = in_steps(recorded)
        assert (phases["forward"], phases["backward"]) == (12, 12)
        assert phases["checkpoint"] == 1
        assert phases["eval"] >= 1
    losses = told["losses"]
    means = {step: (losses[2 * step] + losses[2 * step + 1]) / 2 for step in range(6)}
    assert values(called, "train.loss.local") == pytest.approx(means)
    assert values(called, "train.lr") == dict(enumerate(told["rates"]))


@needs("accelerate")
def test_accelerate(rings: Path) -> None:
    told, *both = both_ways(programs.ACCELERATE, "accelerate", rings)
    for recorded in both:
        assert [step["step"] for step in recorded.steps] == list(range(told["steps"])) == list(range(6))
        assert values(recorded, "train.loss") == dict(enumerate(told["losses"]))
        assert values(recorded, "train.lr") == dict(enumerate(told["rates"]))
        phases = in_steps(recorded)
        assert (phases["forward"], phases["backward"], phases["optimizer"]) == (12, 12, 6)
        assert phases["checkpoint"] == 1
    assert both[1].about["config"] == {"lr": 0.01}


@needs("megatron")
@pytest.mark.usefixtures("observer_library")
def test_megatron_core(rings: Path) -> None:
    command = [*TORCHRUN[:-1], "--nproc-per-node=4", written(rings, programs.MEGATRON)]
    told = told_by(run_python(command, rings))
    assert told_by(under_lens(command, rings)) == told
    for recorded in read_rings(rings):
        assert [step["step"] for step in recorded.steps] == [0, 1, 2]
        # The timer's phase, once: what else is found in it belongs to it.
        assert in_steps(recorded) == {"data": 3, "forward": 3, "backward": 3, "optimizer": 3, "checkpoint": 2}
        groups = recorded.about["groups"]
        assert groups == {
            "dp": [[0, 2], [1, 3]], "tp": [[0, 1], [2, 3]], "ep": [[0, 1], [2, 3]], "edp": [[0, 2], [1, 3]],
        }  # fmt: skip
        own = {
            kind: f"{kind}/{[recorded.about['rank'] in ranks for ranks in groups[kind]].index(True)}"
            for kind in groups
        }
        # Megatron makes several groups of the same ranks: each call has the name of its own.
        called = collections.Counter(call["group"] for call in recorded.collectives)
        assert called == dict.fromkeys(own.values(), 3)


def test_importing_lens_imports_no_framework(tmp_path: Path) -> None:
    program = "import sys, lens\nprint([m for m in ('torch', 'transformers', 'lightning', 'accelerate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "[]\n"
