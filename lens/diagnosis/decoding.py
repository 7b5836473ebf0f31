"""Why tokens come more slowly: prefills in the same batch, or the owner of an expert for which its peers wait.

An iteration of a server computes one token of every running request, and prompts of new ones beside them. Tokens of those
that run come later by what the prompts take, and by nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis import notices, policy
from lens.diagnosis.arrays import Array, Floats, Ints, mean, pack, starts_of
from lens.diagnosis.examine import Examiner
from lens.diagnosis.notices import Evidence, Notice
from lens.diagnosis.requests import Requests, Sign, risen, usual
from lens.diagnosis.routing import positions

LENGTHENED, STANDING = 0.15, 0.75
"""Share by which tokens must come later than without prefills, since a moment, or always: some of it is in the nature of
batching."""
FEWEST_REQUESTS, FEWEST_STEPS, STRETCH, LONG_STRETCH = 30, 20, 60, 240
"""STRETCH: steps before and since a rise; a server that was empty has to fill first. More prefills of the same size come
with more requests, and traffic that swells for some seconds is usual: they count after LONG_STRETCH."""
LONG_TURNS = 8.0
"""The same in times the usual work on a request."""
LARGER = 1.4
"""Factor by which the prompt tokens of one iteration, or request, must have grown to be more than more requests."""
FOLLOWS = 0.5
"""Correlation of what an iteration (or a token) takes longer with the prompt tokens beside it."""
AS_PREFILL = 3.0
"""Times what a prompt token takes in a prefill of its own that it may take in others' way."""
MOST_OF_USUAL = 3.0
"""Times what its prompt tokens usually add that an iteration may take longer for them."""
STRAY = 4.0
SAME = 0.15
"""Change of the time of iterations without prefill that counts as none."""
HOT, HOT_STANDING, HOTTER, HOT_PART = 1.5, 1.75, 1.3, 1.2
"""Times its even share that an owner must get of the tokens decoded, since a moment or always; times its share before; and
in each third: at small batches another one is the fullest in each iteration."""
SMALLEST_TOKENS = 100.0


def iterations(run: Examiner) -> dict[str, Floats]:
    """Tokens of prefill and of decode that the ranks tell of each step [steps, ranks]; NaN where they do not."""
    found: dict[str, Floats] = {}
    for labels, series in run.signals.parts("infer.batch.tokens"):
        table = found.setdefault(labels.get("kind", ""), np.full(run.frame.shape, np.nan))
        table[series.step, series.row] = series.value
    return found


def crowded(run: Examiner, batch: dict[str, Floats], first: int, place: int) -> Notice | None:
    """Iterations from a first place on that decode and prefill at once and take longer for it, as the steps tell."""
    if "prefill" not in batch or "decode" not in batch:
        return None
    steps = notices.judged_steps(place)
    steps = steps[steps >= first]
    prefill, decode = (np.nansum(batch[kind][steps], axis=1) for kind in ("prefill", "decode"))
    took = run.usual[steps]
    serves = np.isfinite(took) & (decode > 0)
    steps, prefill, decode, took = steps[serves], prefill[serves], decode[serves], took[serves]
    alone = prefill == 0
    if alone.sum() < FEWEST_STEPS or (~alone).sum() < FEWEST_STEPS // 2:
        return None
    without = _expected(decode[alone], took[alone], decode)
    extra = np.where(alone, 0.0, np.maximum(took - without, 0.0))
    each = usual((extra / np.maximum(prefill, 1))[~alone])
    # What takes longer than prompts of that length ever do has another reason.
    share = np.minimum(extra, MOST_OF_USUAL * each * prefill) / without
    found = risen(share, STRETCH, LENGTHENED, STANDING)
    if found is None or not _follows(prefill[~alone], (took - without)[~alone]):
        return None
    onset, before, now = found
    if onset:
        # Of a rank that prefills: that several do at once is a matter of how many requests come.
        sizes = np.where(batch["prefill"][steps] > 0, batch["prefill"][steps], np.nan)
        if (
            not np.nanmean(sizes[onset:]) >= LARGER * np.nanmean(sizes[:onset])
            and min(onset, len(steps) - onset) < LONG_STRETCH
        ):
            return None
        earlier, later = (usual((took / without)[part][alone[part]]) for part in (slice(onset), slice(onset, None)))
        if later > (1 + SAME) * earlier:
            return None
    worst = float(np.quantile(took[onset:][~alone[onset:]], 0.9))
    typical = usual(took[alone])
    said = (
        f"iterations that also prefill take up to {notices.short(worst)}, those that only decode {notices.short(typical)}: "
        f"tokens come {100 * now:.0f} % later for the prompts in the same batch"
        + (f" ({100 * before:.0f} % before)" if onset else "")
    )
    beside = prefill[onset:].mean() / max(decode[onset:].mean(), 1e-9)
    earlier_beside = prefill[:onset].mean() / max(decode[:onset].mean(), 1e-9) if onset else None
    return Notice(
        "prefill_interference", (), int(steps[onset]) if onset else 0, None,
        notices.sureness(now - before, LENGTHENED if onset else STANDING, 0.95), said,
        (
            Evidence("infer.request.tpot", float(typical * (1 + before)), float(typical * (1 + now))),
            Evidence("infer.batch.tokens", None if earlier_beside is None else float(earlier_beside), float(beside)),
        ),
        rivals=(("decode_expert_imbalance", f"iterations without prefill take {notices.short(typical)} as before"),),
        requests=(1 + now) / (1 + before),
    )  # fmt: skip


def delayed(seen: Requests, rows: tuple[int, ...]) -> Sign | None:
    """The same from requests alone: their tokens come later the more prompt tokens were prefilled while they decoded."""
    seen = seen.only(
        np.isfinite(seen.per_token) & np.isfinite(seen.prompt) & ~(seen.preempted > 0) & (seen.first >= seen.begun)
    )
    if len(seen) < FEWEST_REQUESTS:
        return None
    seen = seen.only(np.argsort(seen.first, kind="stable"))
    total = np.concatenate([[0.0], np.cumsum(seen.prompt)])
    inside = [np.searchsorted(seen.first, moments, "right") for moments in (seen.first, seen.ended)]
    beside = (total[inside[1]] - total[inside[0]]) / (seen.output - 1)
    running = 0.5 * (seen.at_work(seen.first) + seen.at_work(seen.ended - 1e-9))
    for_prompts, for_size = _parts(seen.per_token, beside, running)
    each = float(for_prompts.sum() / max(float(beside.sum()), 1e-9))
    alone = usual(seen.to_first / np.maximum(seen.prompt, 1))
    if not 0 < each <= AS_PREFILL * alone or not _follows(beside, seen.per_token - for_size):
        return None
    without = np.maximum(seen.per_token - for_prompts, 0.1 * seen.per_token)
    share = np.minimum(for_prompts, seen.per_token) / without
    found = risen(share, FEWEST_REQUESTS // 2, LENGTHENED, STANDING)
    if found is None:
        return None
    onset, before, now = found
    sure = notices.sureness(now - before, LENGTHENED if onset else STANDING, 0.9)
    if onset:
        base, long = without - for_size, LONG_TURNS * usual(seen.worked)
        if usual(base[onset:]) > (1 + SAME) * usual(base[:onset]):
            return None
        spans = seen.first[onset] - seen.first[0], seen.first[-1] - seen.first[onset]
        if not usual(seen.prompt[onset:]) >= LARGER * usual(seen.prompt[:onset]) and min(spans) < long:
            return None
    times = usual(seen.per_token[:onset]) if onset else usual(without), usual(seen.per_token[onset:])
    said = (
        f"tokens come {100 * now:.0f} % later for prompts that are prefilled in the same batch"
        + (f" ({100 * before:.0f} % before)" if onset else "")
        + f": a token takes {notices.short(times[1])}, without them it would take {notices.short(usual(without[onset:]))}"
    )
    return Sign(
        "prefill_interference", rows, float(seen.first[onset]), sure, said,
        (
            Evidence("infer.request.tpot", times[0], times[1]),
            Evidence("infer.batch.tokens", float(beside[:onset].mean()) if onset else None, float(beside[onset:].mean())),
        ),
        (1 + now) / (1 + before),
        (("decode_expert_imbalance", "what tokens take without prompts beside them has not changed"),),
    )  # fmt: skip


def _expected(size: Floats, took: Floats, sizes: Floats) -> Floats:
    """What an iteration takes that decodes so many tokens and prefills none."""
    typical = usual(took)
    if float(np.std(size)) < 0.05 * float(size.mean()):
        return np.full(len(sizes), typical)
    slope, level = np.polyfit(size, np.clip(took, 0.3 * typical, 3 * typical), 1)
    inside = np.clip(sizes, size.min(), size.max())
    result: Floats = np.maximum(level + max(0.0, float(slope)) * inside, 0.3 * typical)
    return result


def _follows(cause: Floats, effect: Floats) -> bool:
    """Whether one grows with the other; causes that are all alike cannot tell."""
    if float(np.std(cause)) < 0.1 * float(np.mean(cause)):
        return True
    if float(np.std(effect)) <= 0:
        return False
    # By rank: single stalls must neither make nor hide it.
    order = [
        np.argsort(np.argsort(part, kind="stable"), kind="stable").astype(np.float64) for part in (cause, effect)
    ]
    return float(np.corrcoef(order[0], order[1])[0, 1]) >= FOLLOWS


def _parts(per_token: Floats, beside: Floats, running: Floats) -> tuple[Floats, Floats]:
    """Seconds of each time per token that prompt tokens beside it add, and that the size of the batch does."""
    columns = [beside, running] if float(np.std(running)) > 0.1 * float(np.mean(running)) else [beside]
    design = np.stack([np.ones(len(beside)), *columns], axis=1)
    # What takes several times as long as usual has another reason, and must not bend the line.
    weights = np.linalg.lstsq(design, np.minimum(per_token, STRAY * usual(per_token)), rcond=None)[0]
    size: Floats = (
        max(float(weights[2]), 0.0) * (running - running.mean()) if len(columns) > 1 else np.zeros(len(running))
    )
    return float(weights[1]) * beside, size


@dataclass(frozen=True)
class Decoded:
    """Tokens for the experts of each owner, by iteration that only decodes (or by request), in order of time.

    owned [observations, owners]. visible: step place of each. seconds: when.
    """

    owned: Floats
    visible: Ints
    seconds: Floats
    place: Ints
    """Place of each rank among the owners, -1 = in none [ranks]."""

    @classmethod
    def of(cls, run: Examiner, batch: dict[str, Floats], origin: int) -> Decoded | None:
        """What routers told of decoding; None where they did not, or nobody shares experts."""
        groups = [members for name, members in run.topology.members.items() if name.split("/")[0] == "ep"]
        owners = max((len(members) for members in groups), default=1)
        if owners < 2:
            return None
        place = np.full(len(run.topology), -1, np.int64)
        for members in groups:
            place[run.topology.row(np.array(members, np.int64))] = np.arange(len(members))
        return cls._of_requests(run, place, owners, origin) or cls._of_steps(run, batch, place, owners, origin)

    @classmethod
    def _of_requests(cls, run: Examiner, place: Ints, owners: int, origin: int) -> Decoded | None:
        tables, table = run.tables, run.tables.vectors
        kinds = [code for code, text in enumerate(tables.strings) if text == '{"kind":"decode"}']
        rows = np.flatnonzero(
            (table["metric"] == tables.code("infer.expert.tokens")) & np.isin(table["labels"], kinds)
        )
        if not len(rows):
            return None
        experts = int(table["length"][rows].max())
        rows = rows[(table["length"][rows] == experts) & (table["length"][rows] > 0)]
        sent = pack(*(table[name][rows] for name in ("t_ns", "rank", "layer")))
        rows = rows[np.unique(sent, return_index=True)[1]]
        position = positions(run.topology, experts, owners)
        flat = tables.vector_values[table["offset"][rows][:, None] + np.arange(experts)]
        owned = np.stack([flat[:, position == owner].sum(axis=1) for owner in range(owners)], axis=1)
        first = starts_of(pack(table["t_ns"][rows], table["rank"][rows]))
        when = table["t_ns"][rows][first]
        visible = run.timeline.visible_from(table["step"][rows][first], when)
        return cls(np.add.reduceat(owned, first, axis=0), visible, (when - origin) * np.float64(1e-9), place)

    @classmethod
    def _of_steps(
        cls, run: Examiner, batch: dict[str, Floats], place: Ints, owners: int, origin: int
    ) -> Decoded | None:
        load = run.load
        if load is None:
            return None
        routed = load.routed.sum(axis=1)
        known = np.isfinite(routed).all(axis=1)
        if "prefill" in batch:
            known &= np.nansum(batch["prefill"], axis=1) == 0
        steps = np.flatnonzero(known)
        owned = np.stack([routed[steps][:, load.position == owner].sum(axis=1) for owner in range(owners)], axis=1)
        return cls(owned, steps, (run.timeline.ended_ns[steps] - origin) * np.float64(1e-9), place)

    def until(self, step: int) -> Decoded:
        """What is visible at a step place."""
        seen = self.visible <= step
        return Decoded(self.owned[seen], self.visible[seen], self.seconds[seen], self.place)


def lopsided(run: Examiner, decoded: Decoded, seen: Requests | None, has_steps: bool) -> Notice | None:
    """An owner whose experts get most of what is decoded, while its peers wait for it or tokens take longer."""
    total = decoded.owned.sum(axis=1)
    some = total > 0
    owned, visible, seconds = decoded.owned[some], decoded.visible[some], decoded.seconds[some]
    if len(owned) < FEWEST_STEPS:
        return None
    even = owned.shape[1] * owned / total[some][:, None]
    hot = [
        (found[2], owner, found[0], found[1]) for owner in range(even.shape[1]) if (found := _hot(even[:, owner]))
    ]
    if not hot:
        return None
    now, _, onset, before = max(hot)
    owners = [
        owner for level, owner, begun, _ in hot if level >= 0.7 * now and abs(begun - onset) <= len(even) // 10
    ]
    if owned[onset:, owners].sum() < SMALLEST_TOKENS:
        return None
    rows = np.flatnonzero(np.isin(decoded.place, owners))
    steps = np.unique(visible[onset:]), np.unique(visible[:onset])
    lost = _waited_for(run, rows, *steps) if has_steps else None
    slower = _slower(seen, seconds[onset] if onset else None) if seen is not None else None
    if lost is None and slower is None:
        return None
    step_s = run.usual_seconds(steps[0]) if has_steps else float("nan")
    if lost is not None and not lost >= policy.SMALLEST_EFFECT * step_s:
        return None
    ratio = step_s / (step_s - min(lost, 0.9 * step_s)) if lost is not None and step_s > 0 else None
    evidence = [Evidence("infer.expert.tokens", float(before), float(now))]
    if lost is not None:
        evidence.append(Evidence("comm.wait", None, float(lost)))
    if slower is not None:
        evidence.append(Evidence("infer.request.tpot", slower[0], slower[1]))
    said = (
        f"experts of {{ranks}} get {now:.1f} times their even share of the tokens that are decoded"
        + (f" ({before:.1f} before)" if onset else "")
        + (f", and the other ranks wait {notices.short(lost)} an iteration for them" if lost is not None else "")
        + (
            f"; a token takes {notices.short(slower[1])}, {notices.short(slower[0])} before"
            if slower is not None
            else ""
        )
    )
    return Notice(
        "decode_expert_imbalance", notices.listed(rows), int(visible[onset]) if onset and has_steps else (0 if has_steps else -1),
        None, notices.sureness(now - 1, HOT - 1, 0.95 if lost is not None else 0.75), said, tuple(evidence), ratio,
        rivals=(
            ("prefill_interference", "it is so in iterations that only decode"),
            ("slow_device", "it has more tokens to compute than its peers"),
        ),
        requests=slower[1] / slower[0] if slower is not None else None,
    )  # fmt: skip


def _hot(even: Floats) -> tuple[int, float, float] | None:
    """Where an owner's share of its even share became high to stay: place, level before and since."""
    onset, before, now = notices.begins(even, FEWEST_STEPS // 2)
    if onset and now >= HOT and now >= HOTTER * before and _least(even[onset:]) >= HOT_PART * max(before, 1.0):
        return onset, before, now
    level = float(even.mean())
    return (0, 1.0, level) if level >= HOT_STANDING and _least(even) >= HOT else None


def _least(values: Floats) -> float:
    return min(float(part.mean()) for part in np.array_split(values, 3) if len(part))


def _waited_for(run: Examiner, rows: Array, after: Ints, before: Ints) -> float | None:
    """Seconds an iteration for which the others wait more than these ranks do, since the onset."""
    if not run.frame.wait:
        return None
    wait = np.sum([np.nan_to_num(part) for part in run.frame.wait.values()], axis=0)
    others = np.setdiff1d(np.arange(wait.shape[1]), rows)
    if not len(others):
        return None

    def apart(steps: Ints) -> float:
        gap = mean(wait[np.ix_(steps, others)], axis=1) - mean(wait[np.ix_(steps, rows)], axis=1)
        return float(np.mean(gap)) if len(steps) else 0.0

    return max(0.0, apart(after) - max(0.0, apart(before)))


def _slower(seen: Requests, since: float | None) -> tuple[float, float] | None:
    """Time per token before a moment and since, where it rose."""
    if since is None:
        return None
    each = seen.per_token
    before, now = usual(each[seen.ended <= since]), usual(each[seen.first >= since])
    return (before, now) if now >= (1 + policy.SMALLEST_EFFECT) * before else None
