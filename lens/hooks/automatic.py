"""Phases found without being marked: the root's forward, backward, the optimizer's step, the loader's wait.

Where they can be kept unseen they do not ask whether torch compiles; where they must, it is the cheaper of torch's two
questions, ``is_dynamo_compiling``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lens.hooks.guard import StandIn
from lens.hooks.timeline import Timeline
from lens.hooks.unseen import unseen_hook
from lens.slots import NULL

if TYPE_CHECKING:
    from lens.hooks.learning import Learning


class RootForward(StandIn):
    """Stands in for ``model.forward`` on one instance, or for what ``model.compile()`` put in its place."""

    def __init__(self, model: Any, attribute: str, timeline: Timeline) -> None:
        import torch

        super().__init__(model, attribute)
        self._timeline = timeline
        self._forward, self._eval = timeline.phase_id("forward"), timeline.phase_id("eval")
        self._compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling
        self._training: Callable[[], bool] = torch.is_grad_enabled
        self.probe: Any = None
        """Takes the place of the original in steps that are measured: see `lens.hooks.work`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiling():
            return self._original(*args, **kwargs)
        timeline = self._timeline
        if not timeline.found(self._forward if self._training() else self._eval):
            return self._original(*args, **kwargs)
        result = self._original(*args, **kwargs)
        timeline.leave()
        return result


def watch_model(model: Any, timeline: Timeline) -> RootForward:
    """Time the calls of the root module."""
    # A module compiled in place is entered there; its `forward` only runs while it is traced.
    compiled = getattr(model, "_compiled_call_impl", None) is not None
    attribute = "_compiled_call_impl" if compiled else "forward"
    root = RootForward(model, attribute, timeline)
    timeline.part.at_end(root.put())
    return root


def watch_backward(timeline: Timeline, reading: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Time ``torch.autograd.backward``, which ``Tensor.backward`` calls too, and let `reading` see what it is given."""
    import torch

    original = torch.autograd.backward
    wrapper = functools.update_wrapper(timeline.around(reading(original), timeline.phase_id("backward")), original)
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


def watch_optimizer(
    optimizer: Any, timeline: Timeline, after_step: Callable[[Any], None], learning: Learning
) -> None:
    """Time the optimizer's step by its own hooks, and call `after_step` with it inside of a step, where that has anything
    to do: the step ends, or something was learned."""
    name = timeline.phase_id("optimizer")
    found, leave = timeline.found, timeline.leave
    began = False

    def before(*_: Any) -> None:
        nonlocal began
        began = found(name)

    def after(stepped: Any, *_: Any) -> None:
        if began:
            leave()
        if (learning.held or not timeline.steps_by_hand) and timeline.step != NULL and timeline.here():
            after_step(stepped)

    for hook in (before, after):
        unseen_hook(hook)
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
        return timeline.wait_for(original, self)

    timeline.part.patch(iterator, "__next__", wrapper)
