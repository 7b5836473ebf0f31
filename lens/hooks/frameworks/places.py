"""Methods of frameworks that are timed as a phase, or read for what they are told; of those that are loaded.

A row of a table for each: nothing is imported, and a place that another release does not have is passed over.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

from lens.hooks.frameworks.marks import Marks
from lens.hooks.frameworks.names import COMMON, LOGGED_BY_HAND, TRANSFORMERS, Names, translated
from lens.hooks.frameworks.timers import watch_timers
from lens.hooks.guard import Part
from lens.hooks.timeline import Timeline
from lens.hooks.values import Values
from lens.slots import NULL

CHECKPOINT, EVALUATION, LOGGING = "checkpoint", "eval", "logging"
ROLLOUT, REWARD, UPDATE = "rollout", "reward", "update"
"""Of reinforcement learning: generating and scoring, the reward itself, and what of the update is outside forward and
backward."""


class Place(NamedTuple):
    """A function or method: where it is, what it does, what can be read from its arguments."""

    module: str
    path: str
    phase: str | None = None
    whole: bool = True
    """Whether forward and backward inside are part of the phase, instead of phases of their own."""
    logged: tuple[int, str] | None = None
    """Place and name of the argument that has numbers by name."""
    names: Names = COMMON
    steps_done: Callable[[Sequence[Any]], Any] | None = None
    """Steps that the framework has made so far, from the arguments."""
    after_step: bool = True
    """Whether it logs of the step that has ended, though an evaluation may have begun the next one since."""


_LIGHTNING = [
    Place(f"{package}.{module}", path, phase, *more)
    for package in ("lightning.pytorch", "pytorch_lightning")
    for module, path, phase, *more in (
        ("loops.evaluation_loop", "_EvaluationLoop.run", EVALUATION),
        ("trainer.trainer", "Trainer.save_checkpoint", CHECKPOINT),
        ("trainer.connectors.logger_connector.logger_connector", "_LoggerConnector.log_metrics", LOGGING,
         True, (1, "metrics"), LOGGED_BY_HAND),
        ("loops.fit_loop", "_FitLoop.on_run_start", None, True, None, COMMON, lambda given: given[0].trainer.global_step),
    )
]  # fmt: skip

PLACES: tuple[Place, ...] = (
    Place("torch", "save", CHECKPOINT),
    Place("torch.distributed.checkpoint", "save", CHECKPOINT),
    Place("torch.distributed.checkpoint.state_dict_saver", "save", CHECKPOINT),
    Place("safetensors.torch", "save_file", CHECKPOINT),
    Place("transformers.modeling_utils", "PreTrainedModel.save_pretrained", CHECKPOINT),
    Place("transformers.trainer", "Trainer._save_checkpoint", CHECKPOINT),
    Place("transformers.trainer", "Trainer.evaluate", EVALUATION),
    Place("transformers.trainer", "Trainer.predict", EVALUATION),
    Place("transformers.trainer", "Trainer.log", LOGGING, logged=(1, "logs"), names=TRANSFORMERS),
    Place("transformers.trainer_callback", "CallbackHandler.on_train_begin",
          steps_done=lambda given: given[2].global_step),
    Place("transformers.trainer_callback", "CallbackHandler.on_step_end",
          steps_done=lambda given: given[2].global_step),
    Place("accelerate.accelerator", "Accelerator.save_state", CHECKPOINT),
    Place("accelerate.accelerator", "Accelerator.save_model", CHECKPOINT),
    Place("accelerate.accelerator", "Accelerator.log", LOGGING, logged=(1, "values"), names=LOGGED_BY_HAND,
          after_step=False),
    Place("trl.trainer.grpo_trainer", "GRPOTrainer._generate_and_score_completions", ROLLOUT),
    Place("trl.trainer.grpo_trainer", "GRPOTrainer._calculate_rewards", REWARD),
    Place("trl.trainer.grpo_trainer", "GRPOTrainer.compute_loss", UPDATE, whole=False),
    *_LIGHTNING,
)  # fmt: skip


class Places:
    """The places of this process's frameworks."""

    def __init__(self, timeline: Timeline, values: Values) -> None:
        self.part = Part("phases and numbers of frameworks")
        self.marks = Marks(timeline)
        self._timeline = timeline
        self._values = values

    def install(self) -> None:
        """Watch the places of what has been imported."""
        for place in PLACES:
            owner = _owner(place)
            name = place.path.rpartition(".")[2]
            original = vars(owner).get(name) if owner is not None else None
            if isinstance(original, FunctionType):
                self.part.patch(owner, name, self._stand_in(original, place))
        watch_timers(self.part, self.marks)

    def number(self, steps_done: Any) -> None:
        """Let the next step have the number that the framework gives it; one that is open keeps its own."""
        timeline = self._timeline
        if type(steps_done) is int and timeline.here() and timeline.step == NULL:
            timeline.next_number = steps_done

    def _stand_in(self, original: Callable[..., Any], place: Place) -> Callable[..., Any]:
        import torch

        part, compiling = self.part, torch.compiler.is_compiling

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if compiling() or not part.on or not self._timeline.here():
                return original(*args, **kwargs)
            step = self._step_told_of(place)
            began = self._begin(place)
            try:
                result = original(*args, **kwargs)
            except BaseException:
                if began:
                    self._leave(place, self.marks.abandon, self._timeline.abandon)
                raise
            if began:
                self._leave(place, self.marks.end, self._timeline.leave)
            self._read(place, args, kwargs, step)
            return result

        return wrapper

    def _begin(self, place: Place) -> bool:
        try:
            if place.phase is None:
                return False
            if place.whole:
                return self.marks.begin(place.phase)
            return self._timeline.enter(self._timeline.phase_id(place.phase), NULL, True)
        except Exception as error:
            self.part.fail(error)
            return False

    def _leave(self, place: Place, whole: Callable[[], None], part: Callable[[], None]) -> None:
        try:
            whole() if place.whole else part()
        except Exception as error:
            self.part.fail(error)

    def _step_told_of(self, place: Place) -> int | None:
        """The number of the step that this logs of; None for the one under way."""
        timeline = self._timeline
        if timeline.step != NULL and (timeline.steps_by_hand or not place.after_step):
            return None
        return None if timeline.last_step == NULL else timeline.last_step

    def _read(self, place: Place, args: Sequence[Any], kwargs: Mapping[str, Any], step: int | None) -> None:
        try:
            if place.logged is not None:
                at, name = place.logged
                logged = args[at] if len(args) > at else kwargs.get(name)
                if isinstance(logged, Mapping) and self._values.part.on:
                    self._values.log_found(translated(logged, place.names), step)
            if place.steps_done is not None:
                self.number(place.steps_done(args))
        except Exception as error:
            self.part.fail(error)


def _owner(place: Place) -> Any:
    """The module or class that has it; None where it is not loaded."""
    found: Any = sys.modules.get(place.module)
    for name in place.path.split(".")[:-1]:
        found = getattr(found, name, None)
    return found
