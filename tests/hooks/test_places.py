"""What frameworks do between steps, without any of them: a stand-in module with the methods that are looked for."""

from __future__ import annotations

import io
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lens
from lens.diagnosis import ledger
from lens.hooks.frameworks.names import LOGGED_BY_HAND, TRANSFORMERS, translated
from lens.ring_reader import RingReader
from lens.slots import Anchor, encode_batch
from lens.store.slots_decode import decode_slots
from tests.hooks.ringside import Recorded

Watch = Callable[..., None]
Read = Callable[[], Recorded]


class Training:
    """Steps of a small model."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(4, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def step(self) -> None:
        self.model(torch.ones(2, 4)).sum().backward()
        self.optimizer.step()

    def save(self) -> None:
        torch.save(self.model.state_dict(), io.BytesIO())

    @torch.no_grad()
    def score(self) -> None:
        self.model(torch.ones(2, 4))


@pytest.fixture(params=[True, False], ids=["compiled", "python"])
def training(request: pytest.FixtureRequest, watch: Watch) -> Training:
    made = Training()
    watch(made.model, made.optimizer, native=request.param)
    return made


def phases(recorded: Recorded) -> list[tuple[int | None, str]]:
    return [(phase["step"], phase["name"]) for phase in recorded.phases]


def test_a_save_is_a_checkpoint_of_the_step_that_follows(training: Training, recorded: Read) -> None:
    before = torch.save
    training.save()  # of no training yet
    training.step()
    training.save()
    training.step()
    with lens.phase("checkpoint"):
        training.save()
    found = recorded()
    assert torch.save is not before
    assert [place for place in phases(found) if place[1] == "checkpoint"] == [
        (1, "checkpoint"),
        (None, "checkpoint"),
    ]
    assert [step["step"] for step in found.steps] == [0, 1]


def test_what_follows_the_last_step_is_not_lost(training: Training, recorded: Read, rings: Path) -> None:
    for _ in range(2):
        training.step()
    training.score()
    training.save()
    found = recorded()
    parts = RingReader(next(rings.glob("*/*/main.ring"))).poll()
    assert parts is not None
    account = ledger({}, decode_slots(encode_batch("host", Anchor(0, 0), [parts])).tables)
    scored, saved = found.phases[-2:]
    assert (scored["name"], saved["name"], len(found.steps)) == ("eval", "checkpoint", 2)
    assert account["parts"]["checkpoint"] == pytest.approx((saved["t1"] - saved["t0"]) / 1e9, abs=1e-6)
    assert account["wall_s"] == pytest.approx((saved["t1"] - found.steps[0]["t0"]) / 1e9, abs=1e-6)


@pytest.fixture
def framework(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stands in for accelerate and for transformers' trainer."""
    fault = KeyError("mine")

    class Accelerator:
        def save_state(self, training: Training) -> None:
            training.save()

        def log(self, values: dict[str, Any], step: int | None = None) -> str:
            if "fault" in values:
                raise fault
            return "logged"

    class Trainer:
        def evaluate(self, training: Training) -> None:
            training.score()
            self.log({"eval_loss": 2.5})

        def log(self, logs: dict[str, Any]) -> None:
            logs["epoch"] = 0.5

    class CallbackHandler:
        def on_train_begin(self, args: Any, state: Any) -> None: ...

    held = {
        "accelerate.accelerator": Accelerator,
        "transformers.trainer": Trainer,
        "transformers.trainer_callback": CallbackHandler,
    }
    for name, kind in held.items():
        module = types.ModuleType(name)
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(
        Accelerator=Accelerator, Trainer=Trainer, CallbackHandler=CallbackHandler, fault=fault
    )


@pytest.mark.parametrize("native", [True, False], ids=["compiled", "python"])
def test_methods_of_a_framework_are_phases_and_what_they_are_told_is_recorded(
    native: bool, framework: types.SimpleNamespace, watch: Watch, recorded: Read
) -> None:
    training, plain = Training(), vars(framework.Accelerator)["log"]
    watch(training.model, training.optimizer, native=native)
    accelerator, trainer = framework.Accelerator(), framework.Trainer()
    framework.CallbackHandler().on_train_begin(None, types.SimpleNamespace(global_step=40))
    training.step()
    assert accelerator.log({"loss": 1.5, "note": "text", "of many": torch.ones(2)}, step=7) == "logged"
    accelerator.save_state(training)
    trainer.evaluate(training)
    with pytest.raises(KeyError) as caught:
        accelerator.log({"fault": 1})
    assert caught.value is framework.fault
    training.step()
    found = recorded()
    assert vars(framework.Accelerator)["log"] is plain
    assert [step["step"] for step in found.steps] == [40, 41]
    counted = Counter(phases(found))
    # An evaluation is one phase, that logging splits; a save inside one that saves belongs to it.
    assert (counted[41, "checkpoint"], counted[41, "eval"]) == (1, 2)
    assert {step for step, name in counted if name == "logging"} == {41}
    assert found.values("train.loss") == [(40, 1.5)]
    assert found.values("eval.loss") == [(40, 2.5)]
    assert found.values("train.epoch") == [(40, 0.5)]
    assert not found.values("note")


def test_names_are_those_of_the_catalogue_where_it_has_one() -> None:
    logged = {
        "loss": 1.0,
        "num_tokens": 3,
        "rewards/f/mean": 0.5,
        "my loss!": 2,
        "text": "x",
        "many": torch.ones(2),
    }
    assert translated(logged, TRANSFORMERS) == {
        "train.loss": 1.0, "train.tokens.seen": 3, "rewards/f/mean": 0.5, "my_loss_": 2,
    }  # fmt: skip
    assert translated({"train_loss": 1.0}, LOGGED_BY_HAND) == {"train.loss": 1.0}
    # What transformers calls so at the end is the mean over the whole training.
    assert translated({"train_loss": 1.0}, TRANSFORMERS) == {"train_loss": 1.0}


def test_everything_that_lens_names_can_be_imported_without_a_framework() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\nfrom lens import *\nimport lens\n"
        "try: lens.TransformersCallback\nexcept ImportError as error: print(type(error).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ModuleNotFoundError"]
