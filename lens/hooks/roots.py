"""Training without a line of lens in it: its optimizers, and the modules it calls from outside any other."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from lens.hooks.guard import Part
from lens.hooks.timeline import Timeline
from lens.hooks.unseen import unseen_hook
from lens.slots import NULL

_MOST_STEPS = 3
"""Steps after which a training that calls no module is believed."""


class RootSearch:
    """Finds the root modules in the first step: what is called with gradients on and has something to learn.

    ``Module.__call__`` is only replaced between such calls: what runs or is compiled inside a root never meets it.
    """

    def __init__(self, timeline: Timeline, watch: Callable[[Any], None]) -> None:
        import torch

        self.part = Part("root modules")
        self._timeline = timeline
        self._watch = watch
        self._backward = timeline.phase_id("backward")
        self._modules = torch.nn.Module
        self._compiling: Callable[[], bool] = torch.compiler.is_compiling
        self._training: Callable[[], bool] = torch.is_grad_enabled
        self._steps = 0
        self._found = 0

    def begin(self) -> None:
        """Look at every call of a module from outside."""
        original = self._modules.__call__
        compiling = self._compiling

        def __call__(module: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if compiling() or not self.part.on or not self._is_root(module):
                return original(module, *args, **kwargs)
            self.part.undo()
            result = original(module, *args, **kwargs)
            if self.part.on:
                self.begin()
            return result

        self.part.patch(self._modules, "__call__", __call__)

    def after_step(self) -> bool:
        """Returns whether the search is over."""
        self._steps += 1
        if self._found or self._steps >= _MOST_STEPS:
            self.part.switch_off()
        return not self.part.on

    def _is_root(self, module: Any) -> bool:
        timeline = self._timeline
        # A module that is called in the backward pass is computed once more by activation checkpointing.
        if not self._training() or not timeline.here() or timeline.phase == self._backward:
            return False
        try:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                return False
            self._watch(module)
            self._found += 1
        except Exception as error:
            self.part.fail(error)
            return False
        return True


def _has_compiled() -> bool:
    """Whether torch.compile has made graphs in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    # Another thread may be importing it at this moment.
    return bool(getattr(dynamo, "counters", {}).get("stats"))


def watch_every_optimizer(
    timeline: Timeline, after_step: Callable[[Any], None], arrive: Callable[[], None] | None = None
) -> None:
    """Time the step of any optimizer. The one that steps first ends the steps, or another once that one is gone.

    Wrappers that step only now and then (gradient accumulation) call the optimizer inside them, which counts.

    Args:
        arrive: called once, when the first optimizer has stepped: from there on whole steps are seen.
    """
    from torch.optim import optimizer as optimizers

    name = timeline.phase_id("optimizer")
    ending: Callable[[], Any] = lambda: None  # noqa: E731
    began = False

    def before(*_: Any) -> None:
        nonlocal began
        began = timeline.found(name)

    def after(optimizer: Any, *_: Any) -> None:
        nonlocal began, ending, arrive
        if arrive is not None:
            arrived, arrive = arrive, None
            arrived()
            return
        if not timeline.here():
            return
        if began:
            began = False
            timeline.leave()
        if ending() is None:
            ending = weakref.ref(optimizer)
        if ending() is optimizer and timeline.step != NULL:
            after_step(optimizer)

    if _has_compiled():
        # A compiled step that is traced anew for our hooks would count its own breaks once more: it ends at them instead.
        import torch

        before, after = torch.compiler.disable(before), torch.compiler.disable(after)
    else:
        for hook in (before, after):
            unseen_hook(hook)
    for handle in (
        optimizers.register_optimizer_step_pre_hook(before),
        optimizers.register_optimizer_step_post_hook(after),
    ):
        timeline.part.at_end(handle.remove)
