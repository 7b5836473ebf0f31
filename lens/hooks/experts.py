"""Tokens of each expert, counted from what routers return; counts that the training hands over go before."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

from lens.hooks.compiled import CompiledRouter, nothing_compiled
from lens.hooks.guard import Part, StandIn
from lens.hooks.later import is_on_device
from lens.hooks.routers import Router, classify, find_routers
from lens.hooks.timeline import Timeline
from lens.hooks.values import Values
from lens.slots import NULL

_clock = time.monotonic_ns
_MOST_LENGTHS = 16
"""Numbers of tokens that something is kept for: they may differ with each batch."""
_MOST_FORMS = 16
"""Forms of a router's output whose meaning is kept: one dimension of tokens is a form of its own for each length."""
_PASSED_OVER = ("backward", "eval", "rollout", "reward", "checkpoint", "logging")
"""Phases in which no tokens of a step are routed: what is computed once more, and what is not learned from."""


class RouterForward(StandIn):
    """Stands in for a router's ``forward``."""

    def __init__(self, router: Router, row: int, experts: Experts) -> None:
        import torch

        super().__init__(router.module, "forward")
        self._router = router
        self._row = row
        self._experts = experts
        self._meanings: dict[Any, tuple[str, int, int] | None] = {}
        """What was found in outputs of this form: kind, place among the outputs (-1: it is the output), experts."""
        self._compiling: Callable[[], bool] = torch.compiler.is_compiling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._original(*args, **kwargs)
        if not self._compiling():
            self._experts.count(self._router, self._row, output, self._meanings)
        return output


class _Table:
    """Counts of this step, one row a router, on the device where its routers are."""

    def __init__(self, rows: int, experts: int, device: Any) -> None:
        import torch

        self.counts = torch.zeros(rows, experts, dtype=torch.int64, device=device)
        self.rows = self.counts.unbind()
        self.layers: dict[int, int] = {}
        """Row -> layer, of the routers that ran in this step."""
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._ones: dict[int, Any] = {}

    def ones(self, count: int) -> Any:
        """So many ones, which take no memory."""
        found = self._ones.get(count)
        if found is None:
            if len(self._ones) >= _MOST_LENGTHS:
                self._ones.clear()
            found = self._ones[count] = self._one.expand(count)
        return found


class Experts:
    """The routers of the watched models."""

    def __init__(self, timeline: Timeline, values: Values, compiled_too: bool) -> None:
        self.part = Part("tokens of experts")
        self._timeline = timeline
        self._values = values
        self._passed_over = frozenset(map(timeline.phase_id, _PASSED_OVER))
        self.counted: dict[tuple[int, Any], _Table] = {}
        """Number of experts and device -> counts of this step."""
        self.diverted: dict[tuple[int, Any], _Table] | None = None
        """Counts of what routers return outside the forward pass of a step, while a request is worked on."""
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._rows = 0
        self._compiled_too = compiled_too
        self.in_graphs: list[weakref.ref[CompiledRouter]] = []
        """Routers in compiled modules that count for themselves."""

    def watch(self, model: Any) -> None:
        """Count the tokens of this model's routers."""
        if not self.part.on:
            return
        try:
            new = [router for router in find_routers(model) if router.module not in self._known]
            for router in new:
                self._known.add(router.module)
                self.part.at_end(RouterForward(router, self._rows, self).put())
                self._rows += 1
            if self._compiled_too and nothing_compiled():
                self._watch_compiled(model)
        except Exception as error:
            self.part.fail(error)

    def count(self, router: Router, row: int, output: Any, meanings: dict[Any, Any]) -> None:
        """Add one call of a router in the forward pass of a step; what is computed once more does not count.

        Args:
            meanings: what was found in outputs of this router, by their form; bounded here.
        """
        timeline = self._timeline
        tables = self.counted
        if not self.part.on or not timeline.here() or timeline.step == NULL or timeline.phase in self._passed_over:
            diverted = self.diverted
            if diverted is None or not self.part.on:
                return
            tables = diverted
        began = _clock()
        try:
            form = _form(output)
            try:
                meaning = meanings[form]
            except KeyError:
                if len(meanings) >= _MOST_FORMS:
                    meanings.clear()
                meaning = meanings[form] = _meaning(output, router)
            if meaning is not None:
                kind, place, experts = meaning
                self._add(tables, router, row, kind, output if place < 0 else output[place], experts)
        except Exception as error:
            self.part.fail(error)
        timeline.spent_on_experts += _clock() - began

    def before_step_ends(self) -> None:
        """Record the counts of the step that ends now."""
        if not self.part.on:
            return
        try:
            for table in self.counted.values():
                if table.layers:
                    self._record(table)
            for reference in self.in_graphs:
                router = reference()
                if router is not None:
                    self._record_compiled(router)
        except Exception as error:
            self.part.fail(error)

    def given_by_hand(self) -> None:
        """The training hands over its own counts: these are the ones to keep."""
        if not self.part.gone:
            self.part.switch_off()

    def _watch_compiled(self, model: Any) -> None:
        for router in find_routers(model, compiled_too=True):
            parameter = next(router.module.parameters(), None)
            if router.module in self._known or not router.experts or parameter is None:
                continue
            self._known.add(router.module)
            counting = CompiledRouter(router, parameter.device)
            self.part.at_end(counting.put())
            self.in_graphs.append(weakref.ref(counting))
            self._timeline.errands = True

    def _record_compiled(self, router: CompiledRouter) -> None:
        t, step, layer = _clock(), self._timeline.step, router.layer

        def write(numbers: list[float]) -> None:
            if any(numbers):
                self._values.record_experts(layer, numbers, None, t, step)

        if is_on_device(router.counts):
            self._values.later.read([router.counts], write)
        else:
            write(router.counts.tolist())
        router.counts.zero_()

    def _add(
        self, tables: dict[tuple[int, Any], _Table], router: Router, row: int, kind: str, tensor: Any, experts: int
    ) -> None:
        key = (experts, tensor.device)
        table = tables.get(key)
        if table is None or row >= len(table.rows):
            table = tables[key] = _Table(self._rows, experts, tensor.device)
            self._timeline.errands = True
        table.layers[row] = router.layer
        counts = table.rows[row]
        if tensor.requires_grad:
            tensor = tensor.detach()
        if kind == "counts":
            counts += tensor
        elif kind == "map":
            counts += (tensor.reshape(-1, experts) != 0).sum(0)
        else:
            chosen = tensor.topk(router.top_k, -1, True, False).indices if kind == "logits" else tensor.long()
            # Not bincount, which would wait for a device.
            counts.scatter_add_(0, chosen.reshape(-1), table.ones(chosen.numel()))

    def _record(self, table: _Table) -> None:
        layers, table.layers = table.layers, {}
        t, step, values = _clock(), self._timeline.step, self._values

        def write(numbers: list[float]) -> None:
            width = table.counts.shape[1]
            for row, layer in layers.items():
                values.record_experts(layer, numbers[row * width : (row + 1) * width], None, t, step)

        if is_on_device(table.counts):
            values.later.read([table.counts], write)
        else:
            write(table.counts.reshape(-1).tolist())
        table.counts.zero_()


def _form(output: Any) -> Any:
    """All that the meaning of an output depends on, but for its router: dtype, dimensions and last size of tensors."""
    import torch

    if isinstance(output, (tuple, list)):
        return tuple(map(_form, output))
    if type(output) is not torch.Tensor:
        return None
    shape = output.shape
    return output.dtype, output.device, len(shape), shape[-1] if shape else 0


def _meaning(output: Any, router: Router) -> tuple[str, int, int] | None:
    """What `classify` finds in an output, with the place of the tensor instead of the tensor itself."""
    found = classify(output, router.experts, router.top_k)
    if found is None:
        return None
    kind, tensor, experts = found
    several = isinstance(output, (tuple, list))
    place = next(index for index, each in enumerate(output) if each is tensor) if several else -1
    return kind, place, experts
