"""Phases found without being marked: the root's forward, backward, the optimizer's step, the loader's wait."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from lens.hooks.timeline import Timeline


class RootForward:
    """Stands in for ``model.forward`` on one instance, or for what ``model.compile()`` put in its place.

    An object, not a closure: a model that is pickled or deep-copied takes its own plain `forward` along.
    """

    def __init__(self, model: Any, timeline: Timeline, attribute: str = "forward") -> None:
        import torch

        self._model = model
        self._attribute = attribute
        self._original: Callable[..., Any] = getattr(model, attribute)
        self._timeline = timeline
        self._forward, self._eval = timeline.phase_id("forward"), timeline.phase_id("eval")
        self._compiling: Callable[[], bool] = torch.compiler.is_compiling
        self._training: Callable[[], bool] = torch.is_grad_enabled
        functools.update_wrapper(self, self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiling():
            return self._original(*args, **kwargs)
        timeline = self._timeline
        if not entered(timeline, self._forward if self._training() else self._eval):
            return self._original(*args, **kwargs)
        result = self._original(*args, **kwargs)
        left(timeline)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model, self._attribute)


def watch_model(model: Any, timeline: Timeline) -> None:
    """Time the calls of the root module."""
    # A module compiled in place is entered there; its `forward` only runs while it is traced.
    compiled = getattr(model, "_compiled_call_impl", None) is not None
    attribute = "_compiled_call_impl" if compiled else "forward"
    timeline.part.patch(model, attribute, RootForward(model, timeline, attribute))


def watch_backward(timeline: Timeline) -> None:
    """Time ``torch.autograd.backward``, which ``Tensor.backward`` calls too."""
    import torch

    compiling = torch.compiler.is_compiling
    backward = timeline.phase_id("backward")
    original = torch.autograd.backward

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if compiling() or not entered(timeline, backward):
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        left(timeline)
        return result

    timeline.part.patch(torch.autograd, "backward", wrapper)


def at_next_backward(action: Callable[[], None]) -> None:
    """Do something once, in the thread that trains, before its next backward pass.

    It is a place where hooks of optimizers may be added and removed: no optimizer is going through them.
    """
    import torch

    original = torch.autograd.backward

    @functools.wraps(original)
    def first(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.autograd.backward is not first:
            return original(*args, **kwargs)
        torch.autograd.backward = original
        action()
        return torch.autograd.backward(*args, **kwargs)

    torch.autograd.backward = first


def watch_optimizer(optimizer: Any, timeline: Timeline, after_step: Callable[[], None]) -> None:
    """Time the optimizer's step by its own hooks; it ends a step where steps are not marked by hand."""
    import torch

    compiling = torch.compiler.is_compiling
    name = timeline.phase_id("optimizer")
    began = False

    def before(*_: Any) -> None:
        nonlocal began
        if not compiling():
            began = entered(timeline, name)

    def after(*_: Any) -> None:
        if compiling():
            return
        if began:
            left(timeline)
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


def entered(timeline: Timeline, name: int) -> bool:
    """Begin a phase that was found; False when this time is not ours to name."""
    try:
        return timeline.here() and timeline.enter_found(name)
    except Exception as error:
        timeline.part.fail(error)
        return False


def left(timeline: Timeline) -> None:
    """End a phase that was found."""
    try:
        timeline.leave()
    except Exception as error:
        timeline.part.fail(error)
