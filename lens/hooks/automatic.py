"""Phases found without being marked: the root's forward, backward, the optimizer's step, the loader's wait."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from lens.hooks.timeline import Timeline


class RootForward:
    """Stands in for ``model.forward`` on one instance.

    An object, not a closure: a model that is pickled or deep-copied takes its own plain `forward` along.
    """

    def __init__(self, model: Any, timeline: Timeline) -> None:
        import torch

        self._model = model
        self._original: Callable[..., Any] = model.forward
        self._timeline = timeline
        self._forward, self._eval = timeline.phase_id("forward"), timeline.phase_id("eval")
        self._compiling: Callable[[], bool] = torch.compiler.is_compiling
        self._training: Callable[[], bool] = torch.is_grad_enabled
        functools.update_wrapper(self, self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiling():
            return self._original(*args, **kwargs)
        timeline = self._timeline
        if not _entered(timeline, self._forward if self._training() else self._eval):
            return self._original(*args, **kwargs)
        result = self._original(*args, **kwargs)
        _left(timeline)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model, "forward")


def watch_model(model: Any, timeline: Timeline) -> None:
    """Time the calls of the root module."""
    timeline.part.patch(model, "forward", RootForward(model, timeline))


def watch_backward(timeline: Timeline) -> None:
    """Time ``torch.autograd.backward``, which ``Tensor.backward`` calls too."""
    import torch

    compiling = torch.compiler.is_compiling
    backward = timeline.phase_id("backward")
    original = torch.autograd.backward

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if compiling() or not _entered(timeline, backward):
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        _left(timeline)
        return result

    timeline.part.patch(torch.autograd, "backward", wrapper)


def watch_optimizer(optimizer: Any, timeline: Timeline, after_step: Callable[[], None]) -> None:
    """Time the optimizer's step by its own hooks; it ends a step where steps are not marked by hand."""
    name = timeline.phase_id("optimizer")
    entered = False

    def before(*_: Any) -> None:
        nonlocal entered
        entered = _entered(timeline, name)

    def after(*_: Any) -> None:
        if entered:
            _left(timeline)
        if timeline.here():
            after_step()

    for handle in (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)):
        timeline.part.at_end(handle.remove)


def watch_loaders(timeline: Timeline) -> None:
    """Time the wait for each batch of any DataLoader of this process."""
    if "torch" not in sys.modules:
        return
    from torch.utils.data import dataloader

    iterator = dataloader._BaseDataLoaderIter
    original = iterator.__next__

    @functools.wraps(original)
    def wrapper(self: Any) -> Any:
        return timed_next(timeline, original, self)

    timeline.part.patch(iterator, "__next__", wrapper)


def timed_next(timeline: Timeline, fetch: Callable[[Any], Any], source: Any) -> Any:
    """``fetch(source)``, with the wait recorded as phase data."""
    waiting = False
    try:
        waiting = timeline.here() and timeline.begin_wait()
    except Exception as error:
        timeline.part.fail(error)
    if not waiting:
        return fetch(source)
    arrived = False
    try:
        batch = fetch(source)
        arrived = True
        return batch
    finally:
        try:
            timeline.end_wait(arrived)
        except Exception as error:
            timeline.part.fail(error)


def _entered(timeline: Timeline, name: int) -> bool:
    try:
        return timeline.here() and timeline.enter_found(name)
    except Exception as error:
        timeline.part.fail(error)
        return False


def _left(timeline: Timeline) -> None:
    try:
        timeline.leave()
    except Exception as error:
        timeline.part.fail(error)
