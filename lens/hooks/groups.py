"""Process groups by name: ``kind/index``, the same on every rank, and each group's own collective number.

A backend numbers its collectives, but asking it costs more than all else that is done for one. So it is asked about
the first ones, and once it is clear that nobody else calls collectives of this group past us, only now and then, to
see that this is still so. Every rank asks at the same collectives, so that what they count in between agrees.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lens.hooks import topology

WORLD = "world/0"
ASKED_FIRST = 64
"""Collectives in a row that the backend must have numbered as expected before it is asked less often."""
ASKED_EVERY = 64
"""After that it is asked about one in so many."""
_NEVER = 2**63 - 1
Kinds = Mapping[str, Sequence[Sequence[int]]]
Counted = tuple[int, int, tuple[tuple[int, int, int], ...]]
"""See `Group.numbering`."""
Numbering = Mapping[str, Counted]
"""What was counted of each group, by torch's name for it."""


class Group:
    """One process group as collectives see it.

    Refers to the group weakly: holding it would keep a destroyed backend alive into the interpreter's end.
    """

    __slots__ = (
        "_as_expected",
        "_offset",
        "_pairs",
        "_wanted",
        "ask_at",
        "ids",
        "name",
        "number",
        "numbered",
        "reference",
    )

    def __init__(self, name: str, group: Any, on_death: Callable[[Any], None]) -> None:
        self.name = name
        self.reference = weakref.ref(group, on_death)
        self.ids: list[int] = []
        """Op id | group id << 32 of each operation, in the ring of the thread that trains."""
        self.numbered = _is_numbered(group)
        """Whether the backend numbers its collectives."""
        self.number = self.own_number()
        """Number of the last collective that returned."""
        self.ask_at = 0 if self.numbered else _NEVER
        """The number of a collective is one more than the last one's below this; from here on `ask` tells it."""
        self._as_expected = 0
        self._wanted = ASKED_FIRST
        self._offset = 1
        """Backend's number of the last collective + offset = number of the next."""
        self._pairs: dict[tuple[int, int], int] = {}

    def next_number(self) -> int:
        """The number of the collective that begins now."""
        number = self.number + 1
        return number if number < self.ask_at else self.ask()

    def ask(self) -> int:
        """The number of the collective that begins now, from the backend."""
        actual = self.own_number() + self._offset
        if actual == self.number + 1:
            self._as_expected += 1
        else:
            # Collectives of this group pass us by. The more often, the longer until we count by ourselves again.
            self._as_expected = 0
            self._wanted *= 2
        self.ask_at = actual + ASKED_EVERY if self._as_expected >= self._wanted else 0
        return actual

    def lose_count(self) -> None:
        """Collectives were not counted: ask at the next one, if the backend can tell."""
        if self.numbered:
            self.number = self.own_number() + self._offset - 1
            self.ask_at = min(self.ask_at, self.number + 1)

    def pass_over(self, messages: int) -> None:
        """The backend has numbered messages too: they must not shift the numbers of collectives."""
        self._offset -= messages

    def own_number(self) -> int:
        """The backend's number of the last collective or message; 0 if it has none."""
        return sequence_number()(self.reference()) if self.numbered else 0

    def next_of_pair(self, pair: tuple[int, int]) -> int:
        """The number of the next message from one rank to another."""
        number = self._pairs.get(pair, 0) + 1
        self._pairs[pair] = number
        return number

    def numbering(self) -> Counted:
        """What was counted: the offset, the collectives of a backend without numbers, the messages of each pair."""
        messages = tuple((source, target, count) for (source, target), count in self._pairs.items())
        return self._offset, self.number, messages

    def global_rank(self, rank: int | None) -> int | None:
        """The global rank of a rank of the group."""
        import torch.distributed as dist

        return None if rank is None else int(dist.get_global_rank(self.reference(), rank))

    def own_rank(self) -> int:
        """This process's global rank."""
        import torch.distributed as dist

        return int(dist.get_rank())


def sequence_number() -> Callable[[Any], int]:
    """The function that reads a group's number; not bound to a group, which would hold it."""
    from torch.distributed import ProcessGroup

    read: Callable[[Any], int] = ProcessGroup._get_sequence_number_for_group
    return read


def _is_numbered(group: Any) -> bool:
    try:
        sequence_number()(group)
    except Exception:
        # Backends without sequence numbers say so in several ways; all of them mean: count ourselves.
        return False
    return True


def name_of(group: Any, kinds: Kinds) -> str:
    """The group's name: ``world/0``, ``kind/index`` where the person said so, else made of its ranks."""
    import torch.distributed as dist

    if group is dist.group.WORLD:
        return WORLD
    return name_of_members(group, sorted(dist.get_process_group_ranks(group)), kinds)


def name_of_members(group: Any, members: list[int], kinds: Kinds) -> str:
    """The name of a group of these global ranks, ascending, that is not the whole world."""
    names = {
        kind: f"{kind}/{index}"
        for kind, lists in kinds.items()
        for index, listed in enumerate(lists)
        if sorted(listed) == members
    }
    own = topology.kind_of(group)
    if own in names:
        return names[own]
    taken = topology.kinds_by_identity()
    known = [name for kind, name in names.items() if kind not in taken]
    position = _position_among_equals(group, members)
    if position < len(known):
        return known[position]
    again = f"#{position}" if position else ""
    return f"ranks/{spell_ranks(members)}{again}"


def _position_among_equals(group: Any, members: list[int]) -> int:
    """How many groups of the same ranks were made before this one; creation order is the same on all of them."""
    import torch.distributed as dist

    world = dist.group.WORLD
    position = 0
    for other, ranks in dist.distributed_c10d._world.pg_group_ranks.items():
        if other is group:
            break
        if other is not world and sorted(ranks) == members:
            position += 1
    return position


def spell_ranks(members: Iterable[int]) -> str:
    """Ranks as a short name, equal for equal ranks: ``0,2,5``, or ends, number and checksum of a long list."""
    listed = list(members)
    text = ",".join(map(str, listed))
    if len(listed) <= 8:
        return text
    return f"{listed[0]}-{listed[-1]}n{len(listed)}c{zlib.crc32(text.encode()):08x}"
