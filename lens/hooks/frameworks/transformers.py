"""``Trainer(..., callbacks=[lens.TransformersCallback()])``, for transformers' own trainer and those of TRL."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from lens.hooks import api

COMPARED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "learning_rate",
    "weight_decay", "warmup_steps", "seed", "bf16", "fp16", "gradient_checkpointing", "num_generations", "beta",
)  # fmt: skip
"""Arguments of the training to show and compare; TRL has more of them than transformers."""


class TransformersCallback(TrainerCallback):
    """Begin to record with the training, as ``lens run`` would.

    Steps have the trainer's own numbers, also where it goes on from a checkpoint. Losses, norms, learning rates, epochs
    and whatever else the trainer logs are recorded as it logs them; evaluations and checkpoints are phases, in TRL's
    GRPO also rollouts, rewards and updates.

    Args:
        run: run id; default LENS_RUN, else drawn by rank 0 and shared.
        name: a name for people.
    """

    def __init__(self, run: str | None = None, name: str | None = None) -> None:
        self._run = run
        self._name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first step."""
        found = {name: getattr(args, name, None) for name in COMPARED}
        config = {name: value for name, value in found.items() if isinstance(value, (bool, int, float, str))}
        api.watch_framework(state.global_step, run=self._run, name=self._name, config=config)
