"""Collectives of every caller, seen in C++: what Python tells the native observer, and when.

It is there when `lens.hooks.native` has built it for this torch; `lens.hooks.collectives` does what it can otherwise.
One of the two records, never both.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

from lens.hooks import groups, native, topology
from lens.hooks.groups import Kinds, Numbering
from lens.hooks.guard import Part
from lens.hooks.timeline import Timeline
from lens.recorder import Recorder


class Observer:
    """The native observer of one watched process."""

    def __init__(self, recorder: Recorder, timeline: Timeline, kinds: Kinds) -> None:
        self.part = Part("collectives")
        self.records = False
        """Whether it was installed."""
        self.tells = False
        """Whether it tells the timeline by itself what it has spent, and is swept by it."""
        self.clean = True
        """Whether the process ends in order: what its rings will say."""
        self._recorder = recorder
        self._timeline = timeline
        self._given = kinds
        self._native: Any = None
        self._known: dict[str, weakref.ref[Any]] = {}
        """Process groups told of, by torch's name for them, which is this process's own."""

    def install(self) -> bool:
        """Load it and let it record, into one ring a thread; whether it does."""
        loaded = native.load("observer")
        if loaded is None:
            return False
        main = self._recorder.path
        self._native = loaded
        self.part.at_end(lambda: loaded.remove(self.clean))
        try:
            loaded.install(str(main.parent), str(main))
            self._watch_waits()
            self._watch_groups()
            topology.watch_meshes(self.part, self._tell_all)
        except Exception:
            # No room for another ring, or a torch that is not what it seemed: the other way needs neither.
            self.part.undo()
            return False
        self.records = True
        hear = getattr(self._timeline, "hear", None)
        if hear is not None:
            hear(loaded.tell_timeline())
            self.tells = True
        self._tell_all()
        return True

    def go_on(self, numbering: Numbering) -> None:
        """Number on from where `Collectives` has left each group."""
        for own_name, counted in numbering.items():
            self._native.resume_group(own_name, *counted)

    def know(self, kinds: Kinds) -> None:
        """The person has said which groups are of which kind."""
        self._given = kinds
        if self._native is not None:
            self._tell_all()

    def before_step_ends(self) -> None:
        """Let it write what has landed in this step, and count what it cost."""
        if not self.part.on:
            return
        try:
            spent, _, strangers = self._native.sweep()
            self._timeline.spent_on_collectives += spent
            if strangers:
                self._tell_all()
        except Exception as error:
            self.part.fail(error)

    def _watch_waits(self) -> None:
        import torch
        import torch.distributed as dist

        observed = self._native.observed_wait(dist.Work, vars(dist.Work)["wait"])
        self.part.patch(dist.Work, "wait", observed)
        compiling = torch.compiler.is_compiling
        begin, end, part = self._native.begin_scope, self._native.end_scope, self.part
        original = dist._broadcast_coalesced

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if compiling() or not part.on:
                return original(*args, **kwargs)
            # DDP's broadcast of buffers waits in C++ before it returns.
            begin()
            try:
                return original(*args, **kwargs)
            finally:
                end()

        self.part.patch(dist, "_broadcast_coalesced", wrapper)

    def _watch_groups(self) -> None:
        """Hear of a group when it is made, so that its first collective already has its name."""
        from torch.distributed import distributed_c10d

        original = getattr(distributed_c10d, "_new_process_group_helper", None)
        if original is None:
            return  # another torch: groups are told of at the end of the step that met them
        part = self.part

        @functools.wraps(original)
        def wrapper(size: Any, rank: Any, members: Any, *args: Any, **kwargs: Any) -> Any:
            made = original(size, rank, members, *args, **kwargs)
            if part.on:
                try:
                    if isinstance(made[0], distributed_c10d.ProcessGroup):
                        self._tell(made[0], list(members) or list(range(size)), not members)
                except Exception as error:
                    part.fail(error)
            return made

        part.patch(distributed_c10d, "_new_process_group_helper", wrapper)

    def _tell_all(self) -> None:
        """Tell of all groups, by the names that are known now."""
        if not self.part.on:
            return
        try:
            import torch.distributed as dist

            if not dist.is_initialized():
                return
            found = {**topology.kinds_found(), **self._given}
            if found and found != self._recorder.about.get("groups"):
                self._recorder.describe(groups=found)
            for group, ranks in dist.distributed_c10d._world.pg_group_ranks.items():
                if isinstance(group, dist.ProcessGroup):
                    self._tell(group, sorted(ranks, key=ranks.get), group is dist.group.WORLD)
        except Exception as error:
            self.part.fail(error)

    def _tell(self, group: Any, members: Sequence[int], is_world: bool) -> None:
        """Tell of a group of these global ranks, in the order of their ranks in it."""
        own_name = group.group_name
        kinds: Kinds = self._recorder.about.get("groups") or {}
        name = groups.WORLD if is_world else groups.name_of_members(group, sorted(members), kinds)
        self._native.tell_group(own_name, name, tuple(members))
        forget = self._native.forget_group
        known = self._known
        if own_name not in known or known[own_name]() is not group:

            def gone(reference: weakref.ref[Any]) -> None:
                if known.get(own_name) is reference:
                    del known[own_name]
                    forget(own_name)

            known[own_name] = weakref.ref(group, gone)
