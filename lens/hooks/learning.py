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


class Learning:
    """Keeps what passes by in the thread that trains, and records it when the optimizer has stepped."""

    def __init__(self, recorder: Recorder, timeline: Timeline, values: Values) -> None:
        self.part = Part("learning")
        self.held = False
        """Whether there is something to record."""
        self._recorder, self._timeline, self._values = recorder, timeline, values
        self._losses: list[Any] = []
        self._norm: Any = None
        self._step = timeline.step
        """Of what is kept."""
        self._recorded = NULL
        self._several = False
        """Whether several optimizers step in one step."""
        self._scaled: tuple[Any, Any] = (None, None)
        """What a GradScaler made, and of what."""
        self._columns: dict[tuple[str, ...], int] = {}

    def install(self) -> None:
        """Let the norm and the scaling of losses pass by here."""
        import torch
        from torch.nn.utils import clip_grad

        leave_alone(*vars(Learning).values(), is_on_device)
        clip = clip_grad.clip_grad_norm_

        @functools.wraps(clip)
        def clipping(*args: Any, **kwargs: Any) -> Any:
            norm = clip(*args, **kwargs)
            if self.part.on and type(norm) is torch.Tensor and self._asked():
                self._norm = norm
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

        plain = torch.Tensor

        def passing(*args: Any, **kwargs: Any) -> Any:
            if len(args) and type(args[0]) is plain and self.part.on and args[0].numel() == 1:
                self._keep(args[0], *args[1:2])
            return backward(*args, **kwargs)

        unseen(passing, backward)
        return passing

    def record(self, optimizer: Any) -> None:
        """The optimizer has stepped: record what was kept of this step."""
        t, timeline = time.monotonic_ns(), self._timeline
        try:
            if self._recorded == timeline.step:
                # Each optimizer of this training has losses of its own, and one number cannot tell of them.
                self._several = True
            elif self._step == timeline.step:
                self._recorded = timeline.step
                self._record(optimizer, t)
        except Exception as error:
            self.part.fail(error)
        finally:
            self._losses, self._norm, self.held = [], None, False
            timeline.spent += time.monotonic_ns() - t

    def _asked(self) -> bool:
        """Whether this belongs to a step; what was kept of an earlier one is forgotten."""
        timeline = self._timeline
        if not timeline.here():
            return False
        if self._step != timeline.step:
            self._step, self._losses, self._norm = timeline.step, [], None
        self.held = True
        return True

    def _keep(self, loss: Any, gradient: Any = None) -> None:
        if gradient is not None or self._several or LOSS in self._values.logged or not self._asked():
            return
        t = time.monotonic_ns()
        try:
            scaled, self._scaled = self._scaled, (None, None)
            if scaled[0] is loss:
                loss = scaled[1]
            loss = loss.detach()
            if loss.is_cpu:
                self._losses.append(float(loss))
            elif is_on_device(loss):
                self._losses.append(loss)
        except Exception as error:
            self.part.fail(error)
        self._timeline.spent += time.monotonic_ns() - t

    def _record(self, optimizer: Any, t: int) -> None:
        found: dict[str, list[Any]] = {LOSS: self._losses} if self._losses else {}
        if self._norm is not None and (self._norm.is_cpu or is_on_device(self._norm)):
            found[NORM] = [self._norm.detach()]
        rate = optimizer.param_groups[0].get("lr")
        if isinstance(rate, float):
            found[RATE] = [rate]
        logged = self._values.logged
        found = {name: parts for name, parts in found.items() if name not in logged}
        away = {name: parts for name, parts in found.items() if any(map(is_on_device, parts))}
        step = self._timeline.step
        self._write({name: float(sum(parts)) for name, parts in found.items() if name not in away}, t, step)
        for name, parts in away.items():
            self._timeline.errands = True
            self._values.later.read(parts, functools.partial(self._arrived, name, t, step))

    def _arrived(self, name: str, t: int, step: int, numbers: list[float]) -> None:
        self._write({name: sum(numbers)}, t, step)

    def _write(self, values: dict[str, float], t: int, step: int) -> None:
        names = tuple(values)
        if not names:
            return
        columns = self._columns.get(names)
        if columns is None:
            columns = self._columns[names] = self._recorder.intern(COLUMN_SEPARATOR.join(names))
        self._recorder.row(columns, tuple(values.values()), t, step)
