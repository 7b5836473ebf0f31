"""Why requests wait before they are worked on: more arrive than are served, or the keys and values have no room left.

A queue that builds up and drains is what queues are for. It is a finding once it has not drained for several times as
long as a request is worked on, and its newest requests waited for longer than that work takes.
"""

from __future__ import annotations

import numpy as np

from lens.diagnosis import notices
from lens.diagnosis.arrays import Array, Floats
from lens.diagnosis.notices import Evidence
from lens.diagnosis.requests import Requests, Sign, rolling, usual

FEWEST = 20
"""Requests, or samples of a gauge."""
CALM = 0.1
"""Of the usual work on a request: who waited no longer was begun as soon as there was a place."""
LONG = 2.0
"""Times the usual work on a request that the newest must have waited …"""
TURNS = 3.0
"""… and for so many times must more have arrived than were begun: each place was taken that often meanwhile."""
NEWEST = 5
CHANCE = 3.0
"""Standard errors of a count by which arrivals must exceed what was begun."""
MORE = 1.1
"""Demand that has a past must have risen by this factor: else it is the service that fell."""
HELD = 0.25
"""Change of the time per token that counts as none: fuller batches take a little longer."""
FULL, LEAST_FULL = 0.9, 0.7
"""Of the cache of keys and values, where nobody tells how many requests share it: else it is full when another like those
that run does not fit, and never below LEAST_FULL."""
FULL_SHARE, SOMETIMES = 0.5, 0.1
"""Of the samples since the onset that must show it full; SOMETIMES where requests were put back."""
PUT_BACK, FEWEST_PUT_BACK = 0.02, 3
"""Share of the requests, and number, that must have been put back."""
PUT_BACK_ALONE = 0.05
"""Share where the use of the cache is not told."""
AT_PEAK = 0.8
"""Share of the time at which fewer run than ever did: else places are short, not room."""


def overloaded(seen: Requests, rows: tuple[int, ...]) -> Sign | None:
    """A queue of one server that has grown since it last was empty."""
    seen = seen.only(np.isfinite(seen.arrived) & np.isfinite(seen.ended))
    if len(seen) < FEWEST:
        return None
    waited, work = seen.waited, usual(seen.worked)
    drained = np.flatnonzero(rolling(waited, NEWEST) <= CALM * work)
    since = int(drained[-1]) + 1 if len(drained) else 0
    queue, past = seen.only(np.arange(since, len(seen))), seen.only(np.arange(since))
    if len(queue) < FEWEST or not work > 0:
        return None
    now = usual(queue.waited[-NEWEST:])
    # A queue that has drained from such a height before may do so again.
    if now < LONG * work or now < 2 * float(past.waited.max(initial=0.0)):
        return None
    begin, end = float(queue.arrived.min()), float(queue.arrived.max())
    came = int(((seen.arrived >= begin) & (seen.arrived <= end)).sum())
    begun = int(((seen.begun >= begin) & (seen.begun <= end)).sum())
    if end - begin < TURNS * work or came - begun < CHANCE * np.sqrt(max(begun, 1)):
        return None
    halves = [float(half.mean()) for half in np.array_split(queue.waited, 2)]
    if halves[1] < 1.2 * halves[0] or not _wanted_more(past, queue, begin, end, work):
        return None
    tokens = usual(past.per_token), usual(queue.per_token)
    late = usual(queue.per_token[len(queue) // 2 :])
    steady = not late > (1 + HELD) * usual(queue.per_token[: len(queue) // 2])
    ratio = float((queue.ended - queue.arrived).mean() / queue.worked.mean())
    sure = notices.sureness(now, LONG * work, 0.95)
    said = (
        f"{came / max(begun, 1):.2f} requests arrive for each that is begun: the newest waited {notices.short(now)} before "
        f"{notices.short(work)} of work, and their queue has not been empty for {notices.short(end - begin)}"
    )
    rivals = [("kv_cache_exhausted", "no request was put back, and each is begun as soon as another ends")]
    if np.isfinite(late) and steady:
        rivals.append(
            ("slow_device", f"a token takes {notices.short(late)} as before: what is begun is served as fast")
        )
    evidence = [
        Evidence("infer.request.queue_time", usual(past.waited) if len(past) else None, now),
        Evidence("infer.queue.depth", None, float(came - begun)),
    ]
    if np.isfinite(tokens[1]):
        evidence.append(Evidence("infer.request.tpot", _known(tokens[0]), tokens[1]))
    return Sign(
        "queue_overload", rows, begin, sure if steady else 0.8 * sure, said, tuple(evidence), ratio, tuple(rivals)
    )


def _wanted_more(past: Requests, queue: Requests, begin: float, end: float, work: float) -> bool:
    """Whether more work arrives than before; with too short a past nobody knows."""
    began = float(past.arrived.min()) if len(past) else begin
    if begin - began < TURNS * work or len(past) < FEWEST // 2:
        return True
    before, now = len(past) / (begin - began), len(queue) / (end - begin)
    lengths = usual(past.output), usual(queue.output)
    longer = lengths[1] / lengths[0] if lengths[0] > 0 and np.isfinite(lengths[1]) else 1.0
    return now * longer >= MORE * before


def deepening(depth: Floats, t: Floats, running: Floats, rows: tuple[int, ...]) -> Sign | None:
    """The same from the depth of the queue alone, where requests do not tell how long they waited."""
    calm = np.flatnonzero(depth <= max(1.0, 0.1 * float(depth.max(initial=0.0))))
    since = int(calm[-1]) + 1 if len(calm) else 0
    grown, before = depth[since:], depth[:since]
    if len(grown) < FEWEST:
        return None
    quarters = [float(part.mean()) for part in np.array_split(grown, 4)]
    places = usual(running)
    bar = max(LONG * places if places > 0 else 0.0, 2 * float(before.max(initial=0.0)), 10.0)
    if quarters[3] < bar or quarters != sorted(set(quarters)):
        return None
    said = f"the queue has grown to {grown[-1]:.0f} requests and has not been empty for {notices.short(float(t[-1] - t[since]))}"
    evidence = (Evidence("infer.queue.depth", usual(before) if len(before) else None, float(grown[-1])),)
    return Sign("queue_overload", rows, float(t[since]), 0.7, said, evidence)


def is_full(usage: Floats, running: Floats) -> Array:
    """Whether another request like those that run would not fit into a cache; running: NaN where unknown."""
    bar = np.where(running > 0, np.maximum(LEAST_FULL, running / (running + 1)), FULL)
    result: Array = usage >= np.minimum(bar, 0.98)
    return result


def exhausted(
    usage: Floats, t: Floats, full: Array, put_back: tuple[Floats, Floats] | None, waiting: Floats, seen: Requests, rows: tuple[int, ...],
) -> Sign | None:  # fmt: skip
    """A cache of keys and values that is full, so that requests are put back or wait although places are free.

    usage: of the capacity, at times t, and whether that is full. put_back: growth of the counter of preemptions, and when
    it was read; None where it is not told. waiting: depths of the queue while the cache was full.
    """
    told = len(usage) >= NEWEST
    onset, began = _filled(full, t) if told else (0, float("nan"))
    counted, when = _counted(put_back, seen, began)
    part = full[onset:]
    if not told:
        began = when
    elif not part.mean() >= FULL_SHARE:
        # It is full now and then: what was put back since it first was says whether that costs anything.
        counted, began = _counted(put_back, seen, float("nan"))
        onset = int(np.searchsorted(t, began))
        part = full[onset:]
    after, past = seen.only(seen.ended >= began), seen.only(seen.ended < began)
    least = max(FEWEST_PUT_BACK, (PUT_BACK if told else PUT_BACK_ALONE) * len(after))
    many = counted is not None and counted >= least
    if told and (
        not len(part)
        or part.mean() < (SOMETIMES if many else FULL_SHARE)
        or part[-(len(part) // 2) :].mean() < SOMETIMES / 2
    ):
        return None
    if not many and not (told and _room_is_short(waiting, after, seen)):
        return None
    ratio = _longer(past, after)
    sure = (0.92 if told else 0.6) if many else 0.65
    level = usual(usage[onset:]) if told else None
    said = (
        (f"the cache of keys and values is {100 * (level or 0):.0f} % full" if told else "requests are put back")
        + (
            f" and {counted:.0f} requests were put back to be computed again"
            if many and counted is not None
            else ""
        )
        + ("" if many else ", and requests wait although fewer run than before")
        + (
            f": a token takes requests {100 * (ratio - 1):.0f} % longer"
            if ratio is not None and ratio > 1.01
            else ""
        )
    )
    evidence = []
    if told:
        evidence.append(Evidence("infer.kv_cache.usage", usual(usage[:onset]) if onset else None, level))
    if counted is not None:
        evidence.append(Evidence("infer.preemptions", None, float(counted)))
    waits = usual(past.waited), usual(after.waited)
    if np.isfinite(waits[1]):
        evidence.append(Evidence("infer.request.queue_time", _known(waits[0]), waits[1]))
    because = "requests are put back in the midst of their work" if many else "fewer run at once than before"
    return Sign(
        "kv_cache_exhausted", rows, began, sure, said, tuple(evidence), ratio,
        (("queue_overload", f"{because}: it is room that is short, not places"),),
    )  # fmt: skip


def _filled(full: Array, t: Floats) -> tuple[int, float]:
    """Where a cache began to be full: the sample and its moment; 0 where it always was, or never."""
    onset, before, now = notices.begins(full.astype(np.float64), NEWEST)
    onset = onset if now - before >= FULL_SHARE else 0
    return onset, float(t[onset])


def _counted(put_back: tuple[Floats, Floats] | None, seen: Requests, began: float) -> tuple[float | None, float]:
    """How often requests were put back since a moment (always, where it is NaN), and when first; None where nobody tells."""
    growth, read = put_back if put_back is not None else (np.zeros(0), np.zeros(0))
    own = np.isfinite(seen.preempted)
    if put_back is None and not own.any():
        return None, float("nan")
    growth_late = ~(read < began)
    own_late = own & ~(seen.ended < began)
    times = np.concatenate([read[growth_late & (growth > 0)], seen.ended[own_late & (seen.preempted > 0)]])
    most = max(float(growth[growth_late].sum()), float(seen.preempted[own_late].sum()))
    return most, float(times.min(initial=np.inf))


def _room_is_short(waiting: Floats, after: Requests, seen: Requests) -> bool:
    """Whether requests wait since a moment while fewer are worked on than were at other times."""
    waits = after.waited[np.isfinite(after.waited)]
    long = len(waits) > 0 and float(np.mean(waits > CALM * usual(after.worked))) >= FULL_SHARE
    if not (long or (len(waiting) > 0 and float(np.mean(waiting > 0)) >= FULL_SHARE)) or len(after) < FEWEST:
        return False
    running, most = after.at_work(after.begun), float(seen.at_work(seen.begun).max())
    return float(np.mean(running >= most - 1)) < 1 - AT_PEAK


def _longer(past: Requests, after: Requests) -> float | None:
    """How much longer a token of a request takes than before; else than of those that were never put back."""

    def each(part: Requests) -> Floats:
        begun = np.where(np.isfinite(part.arrived), part.arrived, part.begun)
        result: Floats = (part.ended - begun) / np.maximum(part.output, 1)
        return result

    if len(past) < FEWEST // 2:
        past, after = after.only(after.preempted == 0), after
    if len(past) < FEWEST // 2 or not len(after):
        return None
    before, now = each(past), each(after)
    ratio = (
        float(np.nanmean(now) / np.nanmean(before)) if np.isfinite(before).any() and np.isfinite(now).any() else 0.0
    )
    return ratio if ratio > 0 else None


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
