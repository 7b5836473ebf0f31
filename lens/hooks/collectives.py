"""Collectives: the functions of ``torch.distributed``, each with entry, exit, bytes, group and number.

Only the names in ``torch.distributed`` itself are replaced, and neither `isend` nor `irecv`: torch compares those
by identity, and its own modules keep the originals.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from lens.hooks import groups
from lens.hooks.groups import Group, Kinds
from lens.hooks.guard import Part
from lens.hooks.timeline import Timeline
from lens.recorder import Recorder
from lens.slots import NULL

_clock = time.monotonic_ns
_this_thread = threading.get_ident
_ASYNC = 1
_LISTS = (list, tuple)


class _Kind(NamedTuple):
    """How a function of torch.distributed is recorded."""

    op: str
    """Name in records."""
    input: str | None
    """Its parameter that holds this rank's input: a tensor, a list of tensors, or nothing."""


FUNCTIONS: dict[str, _Kind] = {
    "all_reduce": _Kind("all_reduce", "tensor"),
    "broadcast": _Kind("broadcast", "tensor"),
    "reduce": _Kind("reduce", "tensor"),
    "all_gather": _Kind("all_gather", "tensor"),
    "all_gather_into_tensor": _Kind("all_gather", "input_tensor"),
    "all_gather_single": _Kind("all_gather", "input_tensor"),
    "reduce_scatter": _Kind("reduce_scatter", "input_list"),
    "reduce_scatter_tensor": _Kind("reduce_scatter", "input"),
    "reduce_scatter_single": _Kind("reduce_scatter", "input"),
    "all_to_all": _Kind("all_to_all", "input_tensor_list"),
    "all_to_all_single": _Kind("all_to_all", "input"),
    "barrier": _Kind("barrier", None),
}
POINT_TO_POINT = {"send": "dst", "recv": "src"}
"""Function and the parameter that names its peer by global rank; ``group_`` before it, by rank in the group."""


class _Flight(NamedTuple):
    """A collective that was entered, in words: any thread can write it into its own ring."""

    op: str
    group: str
    dtype: Any
    phase: str
    step: int
    number: int
    size: int
    """Bytes."""
    t0: int


class _Writer:
    """One thread's ring, and string ids there."""

    __slots__ = ("_recorder", "dtypes", "note", "record")

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.dtypes: dict[Any, int] = {None: 0}
        self.note = recorder.note_collective
        self.record = recorder.collective

    def ids(self, op: str, group: str) -> int:
        """Op id | group id << 32."""
        return self._recorder.intern(op) | self._recorder.intern(group) << 32

    def dtype(self, dtype: Any) -> int:
        """String id of a dtype, without its ``torch.``."""
        found = self.dtypes.get(dtype)
        if found is None:
            found = self.dtypes[dtype] = self._recorder.intern(str(dtype).removeprefix("torch."))
        return found

    def enter(self, flight: _Flight) -> None:
        """Note in the ring's header that this thread is in the collective."""
        self.note(flight.t0, self.ids(flight.op, flight.group), flight.number, flight.size, flight.step)

    def leave(self, flight: _Flight, t1: int, waited_from: int, flags: int, peer: int | None = None) -> None:
        """Record the collective."""
        self.record(
            self.ids(flight.op, flight.group),
            flight.t0,
            t1,
            flight.step,
            flight.number,
            flight.size,
            waited_from,
            NULL,
            self.dtype(flight.dtype) | self._recorder.intern(flight.phase) << 32,
            0,
            (0 if peer is None else peer + 1) | flags << 32,
        )


class Collectives:
    """The patches of one watched process, its groups, and its asynchronous collectives in flight."""

    def __init__(self, recorder: Recorder, timeline: Timeline, kinds: Kinds) -> None:
        self.part = Part("collectives")
        self.kinds = kinds
        self._timeline = timeline
        self._recorder = recorder
        self._thread = _this_thread()
        self._main = _Writer(recorder)
        self._writers: dict[int, _Writer] = {}
        self._groups: dict[int, Group] = {}
        self._flights: dict[int, tuple[weakref.ref[Any], _Flight]] = {}
        self._waits_patched = False

    def install(self) -> None:
        """Replace the functions that this torch has."""
        import torch
        import torch.distributed as dist

        # The cheaper of the two questions: what matters is that dynamo, tracing a wrapper, takes this for true.
        compiling = torch.compiler.is_dynamo_compiling
        for name, kind in FUNCTIONS.items():
            original = getattr(dist, name, None)
            if original is not None:
                self.part.patch(dist, name, self._wrapped(original, kind, compiling))
        for name, peer in POINT_TO_POINT.items():
            original = getattr(dist, name)
            self.part.patch(dist, name, self._wrapped_pair(original, name, peer, compiling))

    def _wrapped(self, original: Any, kind: _Kind, compiling: Callable[[], bool]) -> Any:
        """The function with a note before and after it.

        The hot path: all it needs is local, and it calls as few Python functions as it can, since in a real step
        each of them is met with cold caches.
        """
        part, timeline, main, main_thread, known = (
            self.part,
            self._timeline,
            self._main,
            self._thread,
            self._groups,
        )
        note, record, dtypes = main.note, main.record, main.dtypes
        clock, this_thread, sequence_number = _clock, _this_thread, groups.sequence_number()
        op, input_name = kind.op, kind.input or ""
        input_at = _position(original, input_name)
        group_at = _position(original, "group")

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if compiling() or not part.on:
                return original(*args, **kwargs)
            t0 = clock()
            failed = None
            try:
                group = args[group_at] if len(args) > group_at else kwargs.get("group")
                entry = known.get(id(group)) or self._meet(group)
                if entry is not None:
                    given = args[input_at] if len(args) > input_at else kwargs.get(input_name)
                    if given is None or given.__class__ in _LISTS:
                        size, dtype = _measure(given)
                    else:
                        size, dtype = given.nbytes, given.dtype
                    if entry.numbered:
                        number = sequence_number(entry.reference()) + entry.offset
                    else:
                        number = entry.count()
                    here = this_thread() == main_thread
                    if here:
                        note(t0, entry.ids[op], number, size, timeline.step)
                    else:
                        self._writer().enter(self._flight(op, entry, dtype, number, size, t0))
            except Exception as error:
                failed = error
                entry = None
            if entry is None:
                return _unrecorded(part, failed, original, args, kwargs)
            before = clock()
            result = original(*args, **kwargs)
            t1 = clock()
            try:
                if result is None and here:
                    words = (dtypes.get(dtype) or main.dtype(dtype)) | timeline.phase << 32
                    record(entry.ids[op], t0, t1, timeline.step, number, size, NULL, NULL, words)
                    timeline.spent += before - t0 + clock() - t1
                else:
                    flight = self._flight(op, entry, dtype, number, size, t0)
                    if result is None:
                        self._writer().leave(flight, t1, NULL, 0)
                    else:
                        self._take_off(result, flight, t1)
            except Exception as error:
                part.fail(error)
            return result

        return wrapper

    def _wrapped_pair(self, original: Any, op: str, peer_name: str, compiling: Callable[[], bool]) -> Any:
        """``send`` or ``recv``: the group is the pair, the number counts its messages."""
        part = self.part
        peer_at, group_at = _position(original, peer_name), _position(original, "group")

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if compiling() or not part.on:
                return original(*args, **kwargs)
            t0 = _clock()
            failed = entry = None
            try:
                group = args[group_at] if len(args) > group_at else kwargs.get("group")
                entry = self._groups.get(id(group)) or self._meet(group)
                if entry is not None:
                    peer = args[peer_at] if len(args) > peer_at else kwargs.get(peer_name)
                    if peer is None:
                        peer = entry.global_rank(kwargs.get(f"group_{peer_name}"))
                    flight = self._pair(entry, op, peer, args[0] if args else kwargs.get("tensor"), t0)
                    self._writer().enter(flight)
                    before = entry.own_number()
            except Exception as error:
                failed = error
                entry = None
            if entry is None:
                return _unrecorded(part, failed, original, args, kwargs)
            result = original(*args, **kwargs)
            t1 = _clock()
            try:
                # Where the backend numbers messages too, they must not shift the numbers of collectives.
                entry.offset -= entry.own_number() - before
                self._writer().leave(flight, t1, NULL, 0, peer)
            except Exception as error:
                part.fail(error)
            return result

        return wrapper

    def _pair(self, entry: Group, op: str, peer: int | None, tensor: Any, t0: int) -> _Flight:
        size, dtype = _measure(tensor)
        own = entry.own_rank()
        if peer is None:  # recv from anyone: the sender is not known before
            name, number = f"{entry.name}:any-{own}", NULL
        else:
            pair = (own, peer) if op == "send" else (peer, own)
            name, number = f"{entry.name}:{pair[0]}-{pair[1]}", entry.next_of_pair(pair)
        timeline = self._timeline
        return _Flight(op, name, dtype, timeline.phase_name(), timeline.step, number, size, t0)

    def _flight(self, op: str, entry: Group, dtype: Any, number: int, size: int, t0: int) -> _Flight:
        timeline = self._timeline
        return _Flight(op, entry.name, dtype, timeline.phase_name(), timeline.step, number, size, t0)

    def _meet(self, group: Any) -> Group | None:
        """The entry of a group not met before; None when this rank is not in it."""
        import torch.distributed as dist

        actual = dist.group.WORLD if group is None else group
        if actual is None or actual is dist.GroupMember.NON_GROUP_MEMBER:
            return None
        entry = self._groups.get(id(actual))
        if entry is None:
            keys = {id(actual), id(None)} if actual is dist.group.WORLD else {id(actual)}
            entry = Group(groups.name_of(actual, self.kinds), actual, lambda _: self._forget(keys))
            entry.ids = {kind.op: self._main.ids(kind.op, entry.name) for kind in FUNCTIONS.values()}
            self._groups.update(dict.fromkeys(keys, entry))
        return entry

    def _forget(self, keys: set[int]) -> None:
        for key in keys:
            self._groups.pop(key, None)

    def _writer(self) -> _Writer:
        thread = _this_thread()
        if thread == self._thread:
            return self._main
        writer = self._writers.get(thread)
        if writer is None:
            writer = self._writers[thread] = _Writer(self._recorder.for_thread())
        return writer

    # --- asynchronous collectives ------------------------------------------------------------------------------

    def _take_off(self, work: Any, flight: _Flight, t1: int) -> None:
        """Remember a collective whose end is seen when somebody waits for it, or lets go of it."""
        if not self._waits_patched:
            self._waits_patched = True
            self._patch_waits()
        key = id(work)
        self._flights[key] = weakref.ref(work, lambda _: self._land(key, t1, NULL)), flight

    def _patch_waits(self) -> None:
        """Time ``Work.wait``. Only done once something is asynchronous: blocking collectives call it too."""
        import torch.distributed as dist

        part, flights = self.part, self._flights
        original = vars(dist.Work)["wait"]
        call = dist.Work.wait

        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            found = flights.get(id(work))
            if found is None or not part.on:
                return call(work, *args, **kwargs)
            began = _clock()
            try:
                self._writer().enter(found[1])
            except Exception as error:
                part.fail(error)
            result = call(work, *args, **kwargs)
            self._land(id(work), _clock(), began)
            return result

        functools.update_wrapper(wait, original)
        part.patch(dist.Work, "wait", wait)

    def _land(self, key: int, t1: int, waited_from: int) -> None:
        """The wait for a collective is over, or its `Work` is gone and nobody ever waited."""
        found = self._flights.pop(key, None)
        if found is None or not self.part.on:
            return
        try:
            self._writer().leave(found[1], t1, waited_from, _ASYNC)
        except Exception as error:
            self.part.fail(error)


def _unrecorded(part: Part, failed: Exception | None, original: Any, args: Any, kwargs: Any) -> Any:
    """The original alone; if it accepts what we could not read, the fault was ours."""
    result = original(*args, **kwargs)
    if failed is not None:
        part.fail(failed)
    return result


def _position(function: Any, parameter: str) -> int:
    """Where a parameter stands when given by position; past every argument list if it does not exist."""
    names = list(inspect.signature(function).parameters)
    return names.index(parameter) if parameter in names else len(names)


def _measure(given: Any) -> tuple[int, Any]:
    """Bytes and dtype of an input: a tensor, a list of tensors, or none."""
    if given is None:
        return 0, None
    if isinstance(given, _LISTS):
        return sum(tensor.nbytes for tensor in given), given[0].dtype if given else None
    return given.nbytes, given.dtype
