"""Requests that wait for a server to become warm: compiling, loading weights, connecting, or meeting a shape anew.

The first ones take many times as long as those after them, and then it is over. What is slow again and again is not cold.
"""

from __future__ import annotations

import numpy as np

from lens.diagnosis import notices
from lens.diagnosis.arrays import Array, Floats, Ints
from lens.diagnosis.notices import Evidence
from lens.diagnosis.queues import CALM
from lens.diagnosis.requests import Requests, Sign, rolling, usual

SLOW = 3.0
"""Times what a first token usually takes, for a prompt of that length."""
COLD = 20.0
"""Times a usual first token that the slow ones must have taken together, by the clock: a first call is always slower."""
COST, COST_OF_ALL = 0.05, 0.01
"""Of all the time that requests waited for their first token so far, and of all that they took."""
FEWEST = 20
"""Requests that must have been served since it was over."""
ALIKE = 5
"""So many in a row with at most one slow one among them, and it is over."""
RARE = 0.1
"""Share of the other requests that may be slow: more is no matter of a start."""
IDLE = 10.0
"""Times the usual work on a request without any: what begins after such a pause begins anew."""
LONGER = 1.25
"""A prompt longer than any before by this factor is a new shape."""


def cold(seen: Requests, rows: tuple[int, ...]) -> Sign | None:
    """Starts of one server, the first or later ones, whose requests waited for it to become warm."""
    seen = seen.only(np.isfinite(seen.to_first) & np.isfinite(seen.ended))
    if len(seen) < FEWEST:
        return None
    expected = _expected(seen)
    slow = seen.to_first > SLOW * expected
    spells = _spells(seen, slow)
    inside = np.zeros(len(seen), bool)
    for begin, end in spells:
        inside[begin:end] = True
    rest = ~inside
    if not spells or rest.sum() < FEWEST or (slow & rest).sum() > RARE * rest.sum():
        return None
    if len(seen) - spells[-1][1] < FEWEST:
        return None
    late = inside & slow
    warm = usual(expected[rest])
    took = _together(seen.begun[late], seen.first[late])
    waits = np.nan_to_num(seen.waited)
    # Those that arrived meanwhile waited in the queue for it.
    meanwhile = inside | ((seen.arrived <= seen.first[late].max()) & (seen.begun >= seen.begun[spells[0][0]]))
    lost = float((waits + seen.to_first - expected)[meanwhile].sum())
    spent = float((waits + seen.to_first).sum())
    lasted = float((waits + seen.worked).sum())
    if took < COLD * warm or lost < max(COST * spent, COST_OF_ALL * lasted):
        return None
    begin, end = spells[0][0], spells[-1][1]
    where = "first" if begin == 0 else "first after a pause or with a new shape"
    said = (
        f"the {where} {late.sum()} requests took {notices.short(took)} until they had their first tokens, "
        f"{notices.short(usual(seen.to_first[rest]))} each is usual since: {100 * lost / spent:.0f} % of all waiting for first tokens"
    )
    tokens = usual(seen.to_first[rest]), float(seen.to_first[late].max())
    return Sign(
        "cold_start", rows, float(seen.begun[begin]), notices.sureness(took, COLD * warm, 0.95), said,
        (Evidence("infer.request.ttft", *tokens),), lasted / (lasted - lost) if lasted > lost else None,
        (
            ("queue_overload", "the queue came from the start and has drained since"),
            ("recompilation", "it is over: requests since are as fast as usual"),
        ),
        over=_drained(seen, float(seen.first[begin:end].max())),
    )  # fmt: skip


def _drained(seen: Requests, warm: float) -> float:
    """When those that had to wait for a start have been begun too."""
    calm = (seen.begun > warm) & (rolling(seen.waited, ALIKE) <= CALM * usual(seen.worked))
    return max(warm, float(seen.begun[calm].min())) if calm.any() else warm


def late_rows(own: Floats, blocked: Floats, ended: Ints, until_ns: int) -> Array | None:
    """Ranks (rows) that the first steps waited for; None where all took as long, or nobody waited for another.

    own, blocked: seconds of each step and rank [steps, ranks], outside collectives and inside. ended: of each step, ns.
    """
    first = np.flatnonzero(ended <= until_ns)
    later = np.flatnonzero(ended > until_ns)
    if not len(first) or len(later) < FEWEST or own.shape[1] < 2 or not np.isfinite(blocked).any():
        return None
    excess = np.nansum(own[first], axis=0) - len(first) * np.nanmedian(own[later], axis=0)
    most = float(np.nanmax(excess)) if np.isfinite(excess).any() else 0.0
    late = np.flatnonzero(excess >= 0.5 * most) if most > 0 else np.zeros(0, np.int64)
    return late if 0 < len(late) < own.shape[1] else None


def _expected(seen: Requests) -> Floats:
    """What the first token of each request takes once the server is warm: by the length of its prompt where that is told."""
    warm = np.arange(len(seen)) >= len(seen) // 2
    typical = usual(seen.to_first[warm])
    prompt = seen.prompt
    if not np.isfinite(prompt).all() or float(np.std(prompt[warm])) < 0.05 * float(prompt[warm].mean()):
        return np.full(len(seen), typical)
    slope, level = np.polyfit(prompt[warm], np.minimum(seen.to_first[warm], SLOW * typical), 1)
    result: Floats = np.maximum(level + max(0.0, float(slope)) * prompt, 0.5 * typical)
    return result


def _spells(seen: Requests, slow: Array) -> list[tuple[int, int]]:
    """Begin and end (places) of slow requests that follow on a start: of the server, after a pause, of a new shape."""
    work = usual(seen.worked)
    idle = np.r_[np.inf, seen.begun[1:] - np.maximum.accumulate(seen.ended)[:-1]] > IDLE * work
    longest = np.r_[-np.inf, np.maximum.accumulate(np.nan_to_num(seen.prompt))[:-1]]
    starts = slow & (idle | (seen.prompt > LONGER * longest))
    # The first of all may have been quick by chance, such as one that came from a cache.
    starts[:ALIKE] |= slow[:ALIKE]
    found: list[tuple[int, int]] = []
    for begin in np.flatnonzero(starts).tolist():
        if found and begin < found[-1][1]:
            continue
        end = begin + 1
        while end < len(slow) and slow[end : end + ALIKE].sum() > 1:
            end += 1
        found.append((begin, end))
    return found


def _together(begun: Floats, ended: Floats) -> float:
    """Seconds by the clock that intervals cover."""
    order = np.argsort(begun, kind="stable")
    reached = np.r_[-np.inf, np.maximum.accumulate(ended[order])[:-1]]
    return float(np.maximum(ended[order] - np.maximum(begun[order], reached), 0.0).sum())
