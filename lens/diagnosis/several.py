"""Several causes at once: what one rank suffers twice, and what hides behind a rank that is slower still.

Ranks wait for the slowest, so of two slow ranks the faster one costs nothing until the other is repaired; and two that
are equally slow cost nothing each. What a cause costs once the others are gone tells whether it must be named.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lens.diagnosis import policy, replay
from lens.diagnosis.arrays import Ints
from lens.diagnosis.parts import WITHIN
from lens.diagnosis.signatures import confirmed

if TYPE_CHECKING:
    from lens.diagnosis.examine import Examiner
    from lens.diagnosis.findings import Verdict

MOST_HIDDEN = 6
"""So many of the largest hidden findings are replayed."""
UNCONFIRMED_TIMES = 2.0
"""A hidden cause that no other signal confirms must cost this many times as much to be named: its victims and those of
the other cause look alike."""


@dataclass(frozen=True)
class Hidden:
    """Behind whom a finding hides, and what it costs without them. rows: places of ranks. ratio: mean step time once
    the others are repaired over that with this one repaired too."""

    rows: tuple[int, ...]
    ratio: float


def settled(run: Examiner, judged: list[Verdict]) -> list[Verdict]:
    """The findings that must be named, of those judged one by one; those that hide say behind whom."""
    apart = _once_a_rank(judged)
    told = [v for v in apart if v.ratio is None or v.ratio - 1 >= policy.WORTH_KEEPING]
    faint = sorted((v for v in apart if v not in told), key=lambda v: (-v.share, v.finding.rows))[:MOST_HIDDEN]
    rivals = [v for v in (*told, *faint) if v.share >= policy.SMALLEST_EFFECT]
    cleared: dict[tuple[int, int], float | None] = {}
    for verdict in faint:
        others = [v for v in rivals if v is not verdict and _overlap(v, verdict)]
        certain = confirmed(verdict.explained[0])
        # Findings that nothing confirms and that cost nothing by themselves do not vouch for each other.
        if not others or not (certain or any(v in told for v in others)) or _robbed(run, verdict, others):
            continue
        window = int(verdict.after[0]), int(verdict.after[-1])
        if window not in cleared:
            cleared[window] = joint_ratio(run, [verdict, *others], verdict.after)
        before, all_gone = joint_ratio(run, others, verdict.after), cleared[window]
        ratio = None if before is None or all_gone is None else all_gone / before
        needed = policy.SMALLEST_EFFECT * (1.0 if certain else UNCONFIRMED_TIMES)
        if ratio is not None and ratio - 1 >= needed:
            rows = sorted({row for v in others for row in v.finding.rows} - set(verdict.finding.rows))
            told.append(replace(verdict, hidden=Hidden(tuple(rows), ratio)))
    return told


def joint_ratio(run: Examiner, verdicts: list[Verdict], after: Ints | None = None) -> float | None:
    """Mean step time over what it would be without all of these findings, in some steps (those of the costliest where none
    are given); None without a replay."""
    after = max(verdicts, key=lambda v: v.share).after if after is None else after
    seconds = replay.without(run.frame, after, [_within(run, verdict, after) for verdict in verdicts])
    return seconds[0] / seconds[1] if seconds is not None and seconds[1] > 0 else None


def _once_a_rank(judged: list[Verdict]) -> list[Verdict]:
    """Without what is another view of a rank's costlier finding: a second cause must be confirmed by itself, in a part of
    the step that the first does not reach."""
    kept = [v for v in judged if not v.finding.second]
    for verdict in (v for v in judged if v.finding.second):
        owners = [v for v in kept if set(v.finding.rows) & set(verdict.finding.rows) and _overlap(v, verdict)]
        if owners and confirmed(verdict.explained[0]) and not any(_reaches(v, verdict) for v in owners):
            kept.append(verdict)
    return kept


def _reaches(one: Verdict, other: Verdict) -> bool:
    """Whether the cause of either finding also shows in the other's part of the step: then it is one cause, or unclear."""
    causes = one.explained[0].signature, other.explained[0].signature
    parts = (WITHIN.get(part, part) for part in (other.finding.feature, one.finding.feature))
    return any(cause is None or part in cause.features for cause, part in zip(causes, parts, strict=True))


def _robbed(run: Examiner, verdict: Verdict, others: list[Verdict]) -> bool:
    """Whether a rank wants for processor time beside a slower rank of its host: that one may be who takes it."""
    hosts = run.topology.host_index()
    beside = {int(hosts[row]) for v in others for row in v.finding.rows}
    return verdict.explained[0].cause == "cpu_contention" and any(hosts[r] in beside for r in verdict.finding.rows)


def _overlap(one: Verdict, other: Verdict) -> bool:
    """Whether two findings run together for most of the shorter."""
    together = min(int(one.after[-1]), int(other.after[-1])) - max(int(one.after[0]), int(other.after[0])) + 1
    return together >= 0.5 * min(len(one.after), len(other.after))


def _within(run: Examiner, verdict: Verdict, after: Ints) -> replay.Excess:
    """What a finding costs in these steps, as far as it is among them."""
    extra = np.zeros((len(after), run.frame.shape[1]))
    _, mine, theirs = np.intersect1d(after, verdict.after, return_indices=True)
    extra[mine] = verdict.extra[theirs]
    return replay.Excess(extra, verdict.at_begin, verdict.where)
