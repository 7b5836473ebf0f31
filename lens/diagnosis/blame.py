"""Who waits in which collective and for whom: from a standstill to the rank that caused it.

Every rank that waits points at the members of its group that have not entered the same collective. Followed to the
end, the pointing stops at ranks that wait for nobody: dead, stuck outside of a collective, or ended. Before that, the
calls of the ranks are laid side by side: one that called something else, or in another order, than its like caused
it, wherever it waits now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lens.diagnosis.calls import Calls, Waiting, ahead_or_behind, called_otherwise, kind_of, out_of_order
from lens.diagnosis.topology import Topology

MOST_GROUPS = 16
ENDED = "ended its program without it"


@dataclass(frozen=True)
class Hang:
    """Why nothing moves. cause: rank_dead, rank_stuck, collective_mismatch, process_stopped or unexplained.

    group, seq, op: of the collective in which others wait for these ranks. groups: all such. reached: number of the
    last collective of that group that the first of the ranks entered. how: words for what it did instead. line: its
    line of source. direct: who waits in that very collective, waiting: who waits in any. quiet_s: since when nothing
    moved, None where the run did not stand still but ended.
    """

    cause: str
    ranks: tuple[int, ...]
    group: str | None
    seq: int | None
    op: str | None
    waiting: tuple[int, ...]
    direct: tuple[int, ...]
    quiet_s: float | None
    state: str | None
    groups: tuple[str, ...] = ()
    reached: int | None = None
    how: str | None = None
    line: str | None = None


@dataclass(frozen=True)
class Standstill:
    """All that is known when nothing moves. Sets are of global ranks; unheard: that report, but send no heartbeats
    while most others do. states, lines: by rank, of the last heartbeat."""

    topology: Topology
    waiting: Mapping[int, Waiting]
    calls: Calls
    dead: set[int]
    stopped: set[int]
    gone: set[int]
    unheard: set[int]
    reporting: set[int]
    states: Mapping[int, str]
    lines: Mapping[int, str]
    quiet_s: float | None

    def members(self, group: str) -> set[int]:
        """Global ranks of a group."""
        known = set(self.topology.members_of(group))
        # Who never entered it was not seen in it: of the world it is a member all the same.
        return known | set(self.topology.ranks.tolist()) if kind_of(group) == "world" else known


def who(still: Standstill) -> Hang:
    """The ranks that keep the others from going on, and why it is they."""
    absent = _absent(still)
    if still.dead:
        return _hang(still, "rank_dead", still.dead, absent)
    if still.stopped:
        return _hang(still, "process_stopped", still.stopped, absent)
    missing = set().union(*absent.values()) if absent else set()
    free = missing - set(still.waiting)
    for differs in (called_otherwise, ahead_or_behind, out_of_order):
        odd, how = differs(still.calls, still.waiting, still.topology)
        # Where somebody is in no collective at all, the waiting ends there, unless it is who left the line.
        if odd and (not free or odd & free or (differs is called_otherwise and odd <= set(still.waiting))):
            return _hang(still, "collective_mismatch", odd & free or odd, absent, how)
    if ended := free & still.gone:
        return _hang(still, "collective_mismatch", ended, absent, ENDED)
    known = free & still.reporting
    if unheard := known & still.unheard:
        return _hang(still, "rank_dead", unheard, absent)
    if known:
        return _hang(still, "rank_stuck", known, absent)
    if free:
        return _hang(still, "unexplained", (), absent, f"rank {min(free)} sends no records")
    held = _held(still)
    if held:
        return _hang(still, "rank_stuck", held, absent, "did not leave what all others left")
    behind = _waited_for_most(missing & set(still.waiting), absent)
    return _hang(still, "collective_mismatch" if behind else "unexplained", behind, absent, "waits in another one")


def out_of_line(still: Standstill) -> Hang | None:
    """Who called something else than the others before processes ended; None when all calls agree."""
    for differs in (called_otherwise, out_of_order):
        odd, how = differs(still.calls, still.waiting, still.topology)
        if odd:
            return _hang(still, "collective_mismatch", odd, _absent(still), how)
    return None


def left_early(still: Standstill) -> Hang | None:
    """Who ended without an error while others waited for it; None when nobody did."""
    absent = _absent(still)
    ended = (set().union(*absent.values()) if absent else set()) & still.gone
    return _hang(still, "collective_mismatch", ended, absent, ENDED) if ended else None


def _hang(
    still: Standstill, cause: str, ranks: Iterable[int], absent: Mapping[int, set[int]], how: str | None = None
) -> Hang:
    """Put the answer together: the collective told of is the one in which the fewest others are missing beside these ranks
    (who is held up on the way to it waits there for them already), and the first of several such."""
    blamed = set(ranks)
    victims = {rank: w for rank, w in still.waiting.items() if rank not in blamed}
    own = {w.group for rank, w in still.waiting.items() if rank in blamed}
    pointing = (
        [w for rank, w in victims.items() if absent.get(rank, set()) & blamed]
        or [w for w in victims.values() if w.group in own]
        or [w for rank, w in still.waiting.items() if rank in blamed]
        or list(victims.values())
    )
    first = min(pointing, key=lambda w: (len(absent.get(w.rank, set()) - blamed), w.t0_ns, w.rank), default=None)
    lead = min(blamed, default=None)
    reached = None if first is None or lead is None else still.calls.reached().get((lead, first.group))
    return Hang(
        cause, tuple(sorted(blamed)),
        group=first.group if first else None, seq=first.seq if first and first.seq >= 0 else None,
        op=first.op if first else None, waiting=tuple(sorted(victims)),
        direct=tuple(sorted(w.rank for w in pointing if first and (w.group, w.seq) == (first.group, first.seq))),
        quiet_s=still.quiet_s, state=None if lead is None else still.states.get(lead),
        groups=tuple(sorted({w.group for w in pointing}))[:MOST_GROUPS], reached=None if reached is None else reached[0],
        how=how, line=None if lead is None else still.lines.get(lead),
    )  # fmt: skip


def _absent(still: Standstill) -> dict[int, set[int]]:
    """For each rank that waits: the members of its group that neither are inside the same collective nor left it."""
    reached, finished = still.calls.reached(), still.calls.finished()
    inside: dict[tuple[str, int], set[int]] = {}
    for item in still.waiting.values():
        inside.setdefault((item.group, item.seq), set()).add(item.rank)
    by_collective: dict[tuple[str, int], set[int]] = {}
    for item in still.waiting.values():
        key = item.group, item.seq
        if key not in by_collective:
            by_collective[key] = {
                rank for rank in still.members(item.group) - inside[key]
                if (rank, *key, item.step) not in finished
                # Further in that group, and not by the numbers of an earlier step, which may have begun anew.
                and not _further(reached.get((rank, item.group)), item)
            }  # fmt: skip
    return {item.rank: by_collective[item.group, item.seq] for item in still.waiting.values()}


def _further(reached: tuple[int, int] | None, item: Waiting) -> bool:
    return reached is not None and reached[0] > item.seq and reached[1] >= item.step


def _held(still: Standstill) -> set[int]:
    """Ranks inside a collective that every other member left."""
    finished = still.calls.finished()
    return {
        item.rank for item in still.waiting.values()
        if (others := still.members(item.group) - {item.rank})
        and all((rank, item.group, item.seq, item.step) in finished for rank in others)
    }  # fmt: skip


def _waited_for_most(ranks: set[int], absent: Mapping[int, set[int]]) -> set[int]:
    """Those of the ranks that most others wait for."""
    counts = Counter(rank for missing in absent.values() for rank in missing & ranks)
    most = max(counts.values(), default=0)
    return {rank for rank, count in counts.items() if count == most}
