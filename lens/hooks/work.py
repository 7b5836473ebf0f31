"""How much of what the device could compute is computed: operations, MFU, HFU and tokens a second.

The modules of a model are counted and watched in the first step only. After that one step a second is measured, in
which no more is noted than how many tokens each call of the model gets; the steps between cost nothing.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from lens.hooks.automatic import RootForward
from lens.hooks.flops import Calls, Model, UncountableError, count, work
from lens.hooks.guard import Part, StandIn
from lens.hooks.peaks import dense_peak
from lens.hooks.routers import is_compiled
from lens.hooks.timeline import Timeline
from lens.recorder import Recorder
from lens.slots import COLUMN_SEPARATOR, NULL, series_key

_clock = time.monotonic_ns
_COMPUTED_AGAIN = "what compiled modules compute once more cannot be seen"


class Probe:
    """Stands before a model's forward pass in a step that is measured."""

    def __init__(self, root: RootForward, model: Any) -> None:
        import torch

        self.root = root
        self.model = model
        self.forward = root._original
        self.batches: Counter[tuple[int, int]] = Counter()
        """(tokens, length of a sequence) -> calls of this step with so many."""
        self.counted: Model | None = None
        self.calls: dict[int, Calls] = {}
        self.sees_all = True
        """Whether no module is hidden in what was compiled."""
        self.dtype: Any = None
        self.on_device = False
        self.begin: Callable[[Probe, tuple[Any, ...], dict[str, Any]], None] = _nothing
        self._compiling: Callable[[], bool] = torch.compiler.is_compiling
        self._training: Callable[[], bool] = torch.is_grad_enabled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._compiling() and self._training():
            self.begin(self, args, kwargs)
        return self.forward(*args, **kwargs)


class _Called(StandIn):
    """Stands in for the forward of one module in the first step: how often does it run?"""

    def __init__(self, module: Any) -> None:
        import torch

        super().__init__(module, "forward")
        self.forward = self.again = 0
        self._compiling: Callable[[], bool] = torch.compiler.is_compiling
        self._pass: Callable[[], int] = torch._C._current_graph_task_id

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._compiling():
            if self._pass() == -1:
                self.forward += 1
            else:  # inside a backward pass: activation checkpointing
                self.again += 1
        return self._original(*args, **kwargs)


class WorkDone:
    """Operations and tokens of the watched models, measured in one step a second."""

    def __init__(self, recorder: Recorder, timeline: Timeline) -> None:
        self.part = Part("operations and MFU")
        self.measured: list[Probe] = []
        """Models that have run in the step under way."""
        self._recorder = recorder
        self._timeline = timeline
        self._probes: weakref.WeakSet[Probe] = weakref.WeakSet()
        """They are kept by their models, which nothing here keeps alive."""
        self._first: list[tuple[Probe, Any, _Called]] = []
        self._given_back: list[Callable[[], None]] = []
        self._graphs: int | None = None
        """Graphs compiled when the model was last seen to run uncompiled; None when it may not be touched."""
        self._step = NULL
        self.part.at_end(self._leave_modules)
        self._absent: dict[str, str] = {}
        """Metric -> why it is not recorded."""

    def watch(self, model: Any, root: RootForward) -> None:
        """Measure the first step in which this model is trained."""
        if not self.part.on:
            return
        probe = root.probe = Probe(root, model)
        probe.begin = self._begin
        self._probes.add(probe)
        known = weakref.ref(probe)
        self.part.at_end(lambda: _disarm(known()))
        _arm(probe)

    def arm(self) -> None:
        """Measure the next step."""
        if not self.part.on or self._graphs is None or self.measured:
            return
        if _graphs_compiled() != self._graphs:
            # What was traced with one function in its place would be traced again with another.
            self._graphs = None
            self._leave_out("train.flops.rate", "torch.compile has compiled since: the model is not touched again")
            return
        for probe in self._probes:
            if probe.counted is not None:
                _arm(probe)

    def after_step(self, now: int) -> None:
        """A step in which models have run is over at this time, ns."""
        probes, self.measured, self._step = self.measured, [], NULL
        try:
            for module_probe, module, called in self._first:
                runs = sum(module_probe.batches.values())
                if called.forward and runs:
                    module_probe.calls[id(module)] = Calls(called.forward / runs, called.again / runs)
            first = bool(self._first)
            self._leave_modules()
            for probe in probes:
                _disarm(probe)
            if first:
                self._graphs = _graphs_compiled()
            self._record(probes, now, first)
        except Exception as error:
            self.part.fail(error)
        for probe in probes:
            probe.batches.clear()

    def _begin(self, probe: Probe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timeline = self._timeline
        if not self.part.on or not timeline.here() or timeline.step == NULL:
            return
        began = _clock()
        try:
            if timeline.step != self._step:
                self._restart(timeline.step)
            if probe not in self.measured:
                timeline.errands = True
                if probe.counted is None:
                    self._count(probe)
                self.measured.append(probe)
            size = batch_size(args, kwargs)
            if size is None:
                raise UncountableError("what the model is given does not tell how many tokens it has")
            probe.batches[size] += 1
        except UncountableError as reason:
            self._give_up(probe, str(reason))
        except Exception as error:
            self.part.fail(error)
        timeline.spent += _clock() - began

    def _restart(self, step: int) -> None:
        """Another step begins; the one before may have ended in an exception."""
        self._step = step
        for probe in self.measured:
            probe.batches.clear()
        for _, _, called in self._first:
            called.forward = called.again = 0
        self.measured.clear()

    def _count(self, probe: Probe) -> None:
        """Count the model and watch its modules, in the first step that trains it."""
        import torch

        try:
            probe.counted = counted = count(probe.model)
        except UncountableError:
            raise
        except Exception as error:  # a model that is like none before is no fault of the hook
            raise UncountableError(f"the model cannot be read ({type(error).__name__}: {error})") from error
        hidden = {
            id(inner) for module in probe.model.modules() if is_compiled(module) for inner in module.modules()
        }
        largest = max(counted.weights, key=lambda part: part.met).module
        parameter = next(iter(largest.parameters()))
        kind = parameter.device.type
        autocast = torch.is_autocast_enabled(kind)
        probe.dtype = torch.get_autocast_dtype(kind) if autocast else _mixed(probe.model) or parameter.dtype
        probe.on_device = kind == "cuda"
        probe.sees_all = not hidden
        modules = [part.module for part in counted.weights] + [part.module for part in counted.attentions]
        for module in dict.fromkeys(modules):
            if id(module) not in hidden:
                called = _Called(module)
                self._given_back.append(called.put())
                self._first.append((probe, module, called))

    def _leave_modules(self) -> None:
        """Nothing stands in for the modules of a model any more."""
        self._first = []
        while self._given_back:
            self._given_back.pop()()

    def _give_up(self, probe: Probe, reason: str) -> None:
        _disarm(probe)
        self._leave_modules()
        self._probes.discard(probe)
        self.measured = [other for other in self.measured if other is not probe]
        self._leave_out("train.flops.rate", reason)
        self._recorder.event("train.flops", f"operations are not counted: {reason}", step=self._timeline.step)

    def _record(self, probes: list[Probe], now: int, first: bool) -> None:
        timeline = self._timeline
        seconds = (now - timeline.step_t0) / 1e9
        if not probes or seconds <= 0:
            return
        done = [work(probe.counted, probe.batches, probe.calls) for probe in probes if probe.counted is not None]
        own = sum(each.model for each in done)
        hardware = own + sum(each.again for each in done)
        tokens = max(sum(n * times for (n, _), times in probe.batches.items()) for probe in probes)
        values = {"train.tokens.rate": tokens / seconds, "train.flops.rate": own / seconds}
        whole = all(probe.sees_all for probe in probes)
        if whole:
            values["train.flops.hardware_rate"] = hardware / seconds
        else:
            self._leave_out("train.hfu", _COMPUTED_AGAIN)
        peak = self._peak(probes)
        if peak is not None:
            values["train.mfu"] = own / seconds / peak
            if whole:
                values["train.hfu"] = hardware / seconds / peak
        columns = self._recorder.intern(COLUMN_SEPARATOR.join(values))
        self._recorder.row(columns, tuple(values.values()), now, timeline.last_step)
        if first:
            self._tell(probes, own, hardware if whole else None, tokens)

    def _peak(self, probes: list[Probe]) -> float | None:
        """Dense peak of this device in the number format that the models compute in, FLOP/s."""
        dtypes = {str(probe.dtype).removeprefix("torch.") for probe in probes}
        card = self._recorder.about.get("model") if all(probe.on_device for probe in probes) else None
        if card is None:
            self._leave_out("train.mfu", "a processor has no dense peak that is known")
            return None
        peak = dense_peak(card, dtypes.pop()) if len(dtypes) == 1 else None
        if peak is None:
            formats = ", ".join(sorted({str(probe.dtype).removeprefix("torch.") for probe in probes}))
            self._leave_out("train.mfu", f"no dense peak of {card} is known for {formats}")
        return peak

    def _leave_out(self, metric: str, reason: str) -> None:
        """Say once why something is absent."""
        if metric in self._absent:
            return
        self._absent[metric] = reason
        labels = {"backend": "torch", "metric": metric, "reason": reason}
        key = self._recorder.intern(series_key("lens.collector.supported", labels))
        timeline = self._timeline
        self._recorder.row(key, (0.0,), timeline.last_end or timeline.step_t0)

    def _tell(self, probes: list[Probe], own: float, hardware: float | None, tokens: int) -> None:
        total = active = 0.0
        for probe in probes:
            if probe.counted is not None:
                all_of_it, met = probe.counted.parameters
                total, active = total + all_of_it, active + met
        text = f"{own / 1e9:.4g} GFLOP a step, {own / tokens / 1e6:.4g} MFLOP a token; a token meets {active / 1e6:.4g} M "
        text += f"of {total / 1e6:.4g} M weights in matrices"
        if hardware is not None and hardware > own:
            text += f"; {100 * (hardware / own - 1):.3g} % is computed once more to save memory"
        text += "".join(f"; {metric} is absent: {reason}" for metric, reason in self._absent.items())
        attributes = {"flops": own, "flops_hardware": hardware, "tokens": tokens, "active": active, "total": total}
        self._recorder.event("train.flops", text, step=self._timeline.last_step, attrs=attributes)


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(tokens, length of a sequence) of what a model is called with; None where that cannot be told.

    Whole numbers are ids of tokens (.., sequence); other numbers are vectors (.., sequence, features).
    """
    import torch

    if "decoder_input_ids" in kwargs or any(key.startswith("cu_seq") for key in kwargs):
        return None
    given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values()]
    first = next((value for value in given if isinstance(value, torch.Tensor) and value.dim()), None)
    if first is None:
        return None
    shape = tuple(first.shape)
    if not first.is_floating_point():
        return first.numel(), shape[-1]
    if len(shape) < 2:
        return None
    return first.numel() // max(1, shape[-1]), shape[-2] if len(shape) > 2 else 1


def _mixed(model: Any) -> Any:
    """The number format that FSDP2 computes this model in, where it is told one."""
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        if state is not None:
            return state()._mp_policy.param_dtype
    return None


def _arm(probe: Probe) -> None:
    probe.root._original = probe


def _disarm(probe: Probe | None) -> None:
    if probe is not None and probe.root._original is probe:
        probe.root._original = probe.forward


def _graphs_compiled() -> int:
    """Graphs that torch.compile has made in this process so far."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return int(counters["stats"]["unique_graphs"]) if counters else 0


def _nothing(*_: Any) -> None:
    """Not armed."""
