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
from typing import Any, NamedTuple

from lens.hooks import groups
from lens.hooks.groups import Group, Kinds, Numbering
from lens.hooks.guard import Part
from lens.hooks.stand_in import stand_in
from lens.hooks.timeline import Timeline
from lens.hooks.unseen import unseen
from lens.recorder import Recorder
from lens.slots import NULL

_clock = time.monotonic_ns
_this_thread = threading.get_ident
_ASYNC = 1
_LIST_PARAMETERS = ("input_list", "input_tensor_list")


class _Kind(NamedTuple):
    """How a function of torch.distributed is recorded."""

    op: str
    """Name in records."""
    input: str | None
    """Its parameter that holds this rank's input: a tensor, or a list of tensors, or nothing."""

    @property
    def measure(self) -> str:
        """The statement that reads bytes and dtype of the input."""
        if self.input is None:
            return "size, dtype = 0, None"
        if self.input in _LIST_PARAMETERS:
            return f"size, dtype = measure({self.input})"
        return f"size, dtype = {self.input}.nbytes, {self.input}.dtype"


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
OPERATIONS = tuple(dict.fromkeys(kind.op for kind in FUNCTIONS.values()))
"""Names in records; the place of each is its place in `Group.ids`."""
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

    __slots__ = ("_recorder", "dtypes")

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.dtypes: dict[Any, int] = {None: 0}

    def ids(self, op: str, group: str) -> int:
        """Op id | group id << 32."""
        return self._recorder.intern(op) | self._recorder.intern(group) << 32

    def dtype(self, dtype: Any) -> int:
        """String id of a dtype, without its ``torch.``; 0 for none."""
        found = self.dtypes.get(dtype)
        if found is None:
            found = self.dtypes[dtype] = self._recorder.intern(str(dtype).removeprefix("torch."))
        return found

    def enter(self, flight: _Flight) -> None:
        """Note in the ring's header that this thread is in the collective."""
        self._recorder.enter_collective(
            self.ids(flight.op, flight.group), flight.t0, flight.number, flight.size, flight.step
        )

    def leave(self, flight: _Flight, t1: int, waited_from: int, flags: int, peer: int | None = None) -> None:
        """Record the collective."""
        self._recorder.collective(
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
        self._groups: dict[int | None, Group] = {}
        self._flights: dict[int, tuple[weakref.ref[Any], _Flight]] = {}
        self._waits_patched = False

    def install(self) -> None:
        """Replace the functions that this torch has."""
        self._waits_patched = False
        import torch.distributed as dist

        names = {
            "part": self.part,
            "timeline": self._timeline,
            "recorder": self._recorder,
            "known": self._groups,
            "meet": self._meet,
            "measure": _measure,
            "dtypes": self._main.dtypes,
            "new_dtype": self._main.dtype,
            "main_thread": self._thread,
            "this_thread": _this_thread,
            "clock": _clock,
            "enter_elsewhere": self._enter_elsewhere,
            "leave_elsewhere": self._leave_elsewhere,
        }
        for name, kind in FUNCTIONS.items():
            original = getattr(dist, name, None)
            if original is not None:
                place = OPERATIONS.index(kind.op)
                self.part.patch(dist, name, stand_in(original, name, place, kind.measure, names))
        for name, peer in POINT_TO_POINT.items():
            original = getattr(dist, name)
            self.part.patch(dist, name, self._wrapped_pair(original, name, peer))

    def hand_over(self) -> Numbering | None:
        """Take the patches out, and tell what was counted of each group, by torch's name for it.

        None while that cannot be: something asynchronous is in flight, which only its beginner sees land, or a group
        has no numbers of its own, so that ranks which change hands at different steps would count differently.
        """
        if self._flights or self.part.gone or not self.can_rest():
            return None
        self.part.undo()
        found = ((entry, entry.reference()) for entry in self._groups.values())
        return {group.group_name: entry.numbering() for entry, group in found if group is not None}

    def _wrapped_pair(self, original: Any, op: str, peer_name: str) -> Any:
        """``send`` or ``recv``: the group is the pair, the number counts its messages."""
        part = self.part
        peer_at, group_at = _position(original, peer_name), _position(original, "group")

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not part.on:
                return original(*args, **kwargs)
            t0 = _clock()
            failed = entry = None
            try:
                group = args[group_at] if len(args) > group_at else kwargs.get("group")
                entry = self._groups.get(None if group is None else id(group)) or self._meet(group)
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
                entry.pass_over(entry.own_number() - before)
                self._writer().leave(flight, t1, NULL, 0, peer)
            except Exception as error:
                part.fail(error)
            return result

        unseen(wrapper, original)
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

    def _flight(self, place: int, entry: Group, dtype: Any, number: int, size: int, t0: int) -> _Flight:
        timeline = self._timeline
        phase, step = timeline.phase_name(), timeline.step
        return _Flight(OPERATIONS[place], entry.name, dtype, phase, step, number, size, t0)

    def _enter_elsewhere(self, place: int, entry: Group, dtype: Any, number: int, size: int, t0: int) -> None:
        """A thread that does not train enters a collective."""
        self._writer().enter(self._flight(place, entry, dtype, number, size, t0))

    def _leave_elsewhere(
        self, place: int, entry: Group, dtype: Any, number: int, size: int, t0: int, t1: int, work: Any
    ) -> None:
        """A collective has returned in a thread that does not train, or it is asynchronous."""
        flight = self._flight(place, entry, dtype, number, size, t0)
        if work is None:
            self._writer().leave(flight, t1, NULL, 0)
        else:
            self._take_off(work, flight, t1)

    def _meet(self, group: Any) -> Group | None:
        """The entry of a group not met before; None when this rank is not in it."""
        import torch.distributed as dist

        actual = dist.group.WORLD if group is None else group
        if actual is None or actual is dist.GroupMember.NON_GROUP_MEMBER:
            return None
        entry = self._groups.get(id(actual))
        if entry is None:
            keys: set[int | None] = {id(actual), None} if actual is dist.group.WORLD else {id(actual)}
            entry = Group(groups.name_of(actual, self.kinds), actual, lambda _: self._forget(keys))
            entry.ids = [self._main.ids(operation, entry.name) for operation in OPERATIONS]
            self._groups.update(dict.fromkeys(keys, entry))
        return entry

    def can_rest(self) -> bool:
        """Whether collectives may pass by unrecorded: each group can tell its number afterwards."""
        return all(entry.numbered for entry in self._groups.values())

    def catch_up(self) -> None:
        """Collectives have passed by unrecorded: their groups know the numbers."""
        for entry in self._groups.values():
            entry.lose_count()

    def _forget(self, keys: set[int | None]) -> None:
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
            if found is None or part.gone:
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
        if found is None or self.part.gone:
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
    if isinstance(given, (list, tuple)):
        return sum(tensor.nbytes for tensor in given), given[0].dtype if given else None
    return given.nbytes, given.dtype
