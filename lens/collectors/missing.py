"""Which batches a spool has lost to its disk, and how many slots they held.

Each batch says how many slots were spooled before it, so what is missing between two of them is known exactly. What was
told of before is kept in the spool's state: an agent that starts again must not count it a second time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lens.collectors.segments import Entry


@dataclass(frozen=True)
class Gap:
    """Batches that are gone: those after `after` and before `before`."""

    after: int
    before: int
    slots: int


def slots_of(entry: Entry) -> int:
    """Slots in a batch."""
    return int(entry.head.get("slots", 0))


def slots_before(entry: Entry) -> int:
    """Slots in all batches before it."""
    return int(entry.head.get("slots_before", 0))


def slots_through(entry: Entry) -> int:
    """Slots in all batches up to this one."""
    return slots_before(entry) + slots_of(entry)


def gaps(unsent: Sequence[Entry], state: Mapping[str, Any]) -> list[Gap]:
    """What is missing among batches that nobody has acknowledged, in their order.

    What lay after the last of them counts only if the state knows of it: else the rings still have its slots, and
    they are read again from there.
    """
    found = [
        Gap(left.sequence, right.sequence, slots_before(right) - slots_through(left))
        for left, right in pairwise(unsent)
        if right.sequence > left.sequence + 1
    ]
    if "slots" in state:
        sent, sent_slots = int(state["acknowledged"]), int(state["slots_acknowledged"])
        saved, saved_slots = int(state["saved_at"]), int(state["slots"])
        if unsent and unsent[0].sequence > sent + 1:
            found.append(Gap(sent, unsent[0].sequence, slots_before(unsent[0]) - sent_slots))
        last, last_slots = (unsent[-1].sequence, slots_through(unsent[-1])) if unsent else (sent, sent_slots)
        if saved > last:
            found.append(Gap(last, saved + 1, saved_slots - last_slots))
    return [gap for gap in found if gap.slots > 0]


def not_told(found: Sequence[Gap], told: Mapping[str, int]) -> int:
    """Slots of these gaps beyond those counted before; `told` is slots by the batch that follows a gap."""
    return sum(
        max(0, gap.slots - sum(slots for key, slots in told.items() if gap.after < int(key) <= gap.before))
        for gap in found
    )
