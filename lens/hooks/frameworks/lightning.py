"""``Trainer(..., callbacks=[lens.LightningCallback()])``."""

from __future__ import annotations

import sys
from typing import Any

from lens.hooks import api

if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
    from pytorch_lightning import Callback
else:
    from lightning.pytorch import Callback


class LightningCallback(Callback):
    """Begin to record with the training, as ``lens run`` would.

    Steps have the trainer's own numbers, also where it goes on from a checkpoint. Each has the loss of this rank (the
    mean of its micro-batches, as ``training_step`` returns it), the learning rate that it used and the epoch. What is
    logged with ``self.log`` is recorded as Lightning hands it to loggers; evaluations and checkpoints are phases.

    Args:
        run: run id; default LENS_RUN, else drawn by rank 0 and shared.
        name: a name for people.
    """

    def __init__(self, run: str | None = None, name: str | None = None) -> None:
        self._run = run
        self._name = name
        self._losses: list[Any] = []
        self._rate: float | None = None
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Before the first step."""
        config = {
            name: value
            for name in ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "precision")
            if isinstance(value := getattr(trainer, name, None), (bool, int, float, str))
        }
        self._steps = trainer.global_step
        api.watch_framework(self._steps, run=self._run, name=self._name, config=config)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The gradient is there: what the optimizer will use."""
        self._rate = optimizer.param_groups[0].get("lr")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A micro-batch is done, and with the last of them a step."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None and hasattr(loss, "detach"):
            self._losses.append(loss.detach())
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        values = {
            "train.loss.local": _sum(self._losses),
            "train.lr": self._rate,
            "train.epoch": trainer.current_epoch,
        }
        self._losses.clear()
        api.log({name: value for name, value in values.items() if value is not None}, step=self._steps - 1)
        api.number_steps(self._steps)


def _sum(losses: list[Any]) -> Any:
    """Lightning has divided each by the number of micro-batches. On their device: nobody waits for it."""
    return sum(losses[1:], losses[0]) if losses else None
