"""What the training itself says of its learning, read where it passes by: loss, the gradient's norm, learning rate.

A loss is the number that ``backward`` begins from, as it was before a GradScaler scaled it; those of one step are added
up, as their gradients are. The norm is what ``clip_grad_norm_`` returns. What the training logs itself under one of
these names is not read. Nothing here waits for a device: what is on one is read when it has arrived.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from lens.hooks.guard import Part
from lens.hooks.later import is_on_device
from lens.hooks.timeline import Timeline
from lens.hooks.unseen import leave_alone, unseen
from lens.hooks.values import Values
from lens.recorder import Recorder
from lens.slots import COLUMN_SEPARATOR, NULL

LOSS, NORM, RATE = "train.loss.local", "train.grad_norm", "train.lr"
_BY_HAND = {LOSS, "train.loss"}
"""A training that logs one of these tells of its losses itself."""


class Learning:
    """Keeps what passes by in the thread that trains, and records it when the optimizer has stepped."""

    def __init__(self, recorder: Recorder, timeline: Timeline, values: Values) -> None:
        self.part = Part("learning")
        self.held = False
        """Whether there is something to record."""
        self._recorder, self._timeline, self._values = recorder, timeline, values
        self._listens = True
        """Whether losses are kept."""
        self._losses: list[Any] = []
        """Of this step: numbers, and what is still on a device."""
        self._norm: Any = None
        self._step = self._recorded = NULL
        """The step of the losses, and the one recorded last."""
        self._knows = False
        """Whether a first step has shown what the training logs itself."""
        self._scaled: tuple[Any, Any] | None = None
        """What a GradScaler made, and of what."""
        self._columns: dict[tuple[str, ...], int] = {}
        self._write_row = getattr(timeline, "row", None)
        """Writes a row in C, where the timeline is compiled."""

    def install(self) -> None:
        """Let the norm and the scaling of losses pass by here."""
        import torch
        from torch.nn.utils import clip_grad

        leave_alone(*vars(Learning).values())
        clip = clip_grad.clip_grad_norm_

        @functools.wraps(clip)
        def clipping(*args: Any, **kwargs: Any) -> Any:
            norm = clip(*args, **kwargs)
            if self.part.on and type(norm) is torch.Tensor and self._timeline.here():
                self._norm, self.held = norm, True
            return norm

        unseen(clipping, clip)
        for place in (clip_grad, torch.nn.utils):
            self.part.patch(place, "clip_grad_norm_", clipping)
        scale = torch.amp.GradScaler.scale

        @functools.wraps(scale)
        def scaling(scaler: Any, outputs: Any) -> Any:
            scaled = scale(scaler, outputs)
            if self.part.on and type(outputs) is torch.Tensor:
                self._scaled = scaled, outputs
            return scaled

        unseen(scaling, scale)
        self.part.patch(torch.amp.GradScaler, "scale", scaling)

    def reading(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """``torch.autograd.backward``, whose losses are kept."""
        import torch

        plain, here = torch.Tensor, self._timeline.here

        # One function: each more that is met with cold caches costs microseconds.
        def passing(*args: Any, **kwargs: Any) -> Any:
            if self._listens and self.part.on and args:
                loss = args[0]
                if type(loss) is plain and loss.numel() == 1 and (len(args) == 1 or args[1] is None) and here():
                    self._keep(loss)
            return backward(*args, **kwargs)

        unseen(passing, backward)
        return passing

    def record(self, optimizer: Any) -> None:
        """The optimizer has stepped: record what was kept of this step."""
        t, timeline = time.monotonic_ns(), self._timeline
        losses, norm = self._losses, self._norm
        self._losses, self._norm, self.held = [], None, False
        try:
            if self._recorded == timeline.step:
                # Each optimizer of this training has losses of its own, and one number cannot tell of them.
                self._listens = False
                return
            self._recorded = timeline.step
            if not self._knows:
                # It may log what it has after its optimizer has stepped.
                self._knows = True
                return
            numbers, away = {}, {}
            if losses and self._step == timeline.step:
                if float is type(losses[0]):
                    numbers[LOSS] = sum(losses)
                else:
                    away[LOSS] = losses
            if norm is not None:
                if norm.is_cpu:
                    numbers[NORM] = norm.item()
                elif is_on_device(norm):
                    away[NORM] = [norm.detach()]
            rate = optimizer.param_groups[0].get("lr")
            if type(rate) is float:
                numbers[RATE] = rate
            self._write(numbers, away, t)
        except Exception as error:
            self._listens = False
            self.part.fail(error)
        finally:
            timeline.spent += time.monotonic_ns() - t

    def _keep(self, loss: Any) -> None:
        step = self._timeline.step
        if self._step != step:
            self._step = step
            self._losses = []
        try:
            if self._scaled is not None:
                (scaled, plain), self._scaled = self._scaled, None
                loss = plain if scaled is loss else loss
            if loss.is_cpu:
                self._losses.append(float(loss.item()))
            elif is_on_device(loss):
                self._losses.append(loss.detach())
            self.held = True
        except Exception as error:
            self._listens = False
            self.part.fail(error)

    def _write(self, numbers: dict[str, float], away: dict[str, list[Any]], t: int) -> None:
        logged = self._values.logged
        if logged:
            self._listens = self._listens and logged.isdisjoint(_BY_HAND)
            numbers = {name: number for name, number in numbers.items() if name not in logged}
        for name in away.keys() - logged:
            self._timeline.errands = True
            step = self._timeline.step
            use = functools.partial(self._arrived, name, t, step)
            self._values.later.read(away[name], use)
        names = tuple(numbers)
        if not names:
            return
        columns = self._columns.get(names)
        if columns is None:
            columns = self._columns[names] = self._recorder.intern(COLUMN_SEPARATOR.join(names))
        if self._write_row is None or not self._write_row(columns, names, numbers, None):
            self._recorder.row(columns, tuple(numbers.values()), t, self._timeline.step)

    def _arrived(self, name: str, t: int, step: int, numbers: list[float]) -> None:
        self._recorder.row(self._recorder.intern(name), (sum(numbers),), t, step)
