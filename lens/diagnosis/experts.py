"""Load of the experts: too much for the owners of some, none for others, all of it for a few, or more than fits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis import attribution, notices, policy
from lens.diagnosis.arrays import Array, Floats, Ints, cells, mean, median
from lens.diagnosis.examine import Examiner
from lens.diagnosis.notices import Cause, Evidence, Notice
from lens.diagnosis.routing import ExpertLoad, drops
from lens.diagnosis.signatures import ADVICE

CAUSES = {
    "hot_expert": Cause(ADVICE["hot_expert"], absorbs=("compute",)),
    "router_collapse": Cause(
        "Raise the auxiliary loss or add router noise, and go back to a checkpoint from before the collapse.",
        absorbs=("compute", "transfer"),
        # Whoever owns the few experts has too many tokens: that is how a collapse costs time.
        brings=("hot_expert",),
    ),
    "dead_expert": Cause("Reset its router row (or its bias) so that it gets tokens again, or prune it."),
    "dropped_tokens": Cause("Raise the capacity factor or balance the router: what is dropped is not learned."),
}

HOT = 1.1
"""An owner's share of the tokens must exceed the even share, and its own before, by this factor."""
HOT_STANDING = 1.25
SLOWER = 1.04
"""Its own time must have grown by this factor against what the others' did."""
MORE_THAN_TOKENS = 1.5
"""By this factor of what its tokens grew the time of an owner may have grown, and by SLOWER more: noise adds to it."""
STRAY_ERRORS = 3.0
"""Standard errors that the growth must exceed: noise of a shared machine is correlated, so two are not enough."""
WINDOW_STEPS = 10
"""Newest steps over which shares of experts are judged."""
FEW_EXPERTS, MOST_TOKENS = 0.1, 0.5
"""A router has collapsed when this share of its experts gets that share of its tokens, in every layer."""
LAYERS_COLLAPSED = 0.9
DEAD_SHARE, DEAD_STEPS, UNSETTLED_STEPS = 0.01, 20, 60
"""An expert is dead with less than this share of the mean expert's tokens for so many steps; for more when it had hardly
any before, since a router needs its first steps to find all of its experts."""
DEAD_AMONG = 0.25
"""More experts than this dead in one layer are a collapse."""
REST_MOVED = 0.05
"""Change of the entropy of the other experts that counts as none."""
DEAD_NORM = 1e-3
DROPPED_MORE, DROPPED_TIMES, DROPPED_WINDOW, DROPPED_STEPS = 0.05, 2.0, 5, 20
"""Tokens are dropped when their share of the routed rose by so much, by this factor, and each later window of so many
steps drops more than any earlier one by half as much; before and after are so many steps at least. A share that was
high from the beginning is what the capacity factor asks for."""


@dataclass(frozen=True)
class Experts:
    """The load of a run's experts."""

    run: Examiner
    drops: tuple[Floats, Floats] | None

    @classmethod
    def of(cls, run: Examiner) -> Experts:
        """Vectors are read when first asked for."""
        return cls(run, drops(run.tables, run.timeline))

    def at(self, place: int) -> list[Notice]:
        """What the routers did up to a place."""
        load = self.run.load
        steps = notices.judged_steps(place)
        if len(steps) < policy.FIRST_JUDGED_STEPS:
            return []
        found: list[Notice | None] = []
        if load is not None:
            collapse = self._collapsed(load, steps)
            found = [collapse] if collapse is not None else [self._hot(load, steps), self._dead(load, steps)]
        told = [notice for notice in found if notice is not None]
        dropped = None if told else self._dropped(steps)
        return told if dropped is None else [dropped]

    def _dropped(self, steps: Ints) -> Notice | None:
        """More of the tokens beyond the capacity than before, while no expert's load tells why."""
        if self.drops is None:
            return None
        dropped, routed = (values[steps] for values in self.drops)
        known = np.isfinite(dropped) & np.isfinite(routed) & (routed > 0)
        steps, dropped, share = steps[known], dropped[known], dropped[known] / routed[known]
        onset, before, now = notices.begins(share, DROPPED_STEPS)
        if not onset or now - before < DROPPED_MORE or now < DROPPED_TIMES * before:
            return None
        windows = np.convolve(share, np.ones(DROPPED_WINDOW) / DROPPED_WINDOW, "valid")
        if windows[onset:].min() < windows[: onset - DROPPED_WINDOW + 1].max() + DROPPED_MORE / 2:
            return None
        said = f"{100 * now:.0f} % of the routed tokens are beyond the capacity and dropped, {100 * before:.0f} % before"
        return Notice(
            "dropped_tokens", (), int(steps[onset]), None, notices.sureness(now - before, DROPPED_MORE, 0.95), said,
            (Evidence("moe.tokens.dropped", float(dropped[:onset].mean()), float(dropped[onset:].mean())),),
        )  # fmt: skip

    def _hot(self, load: ExpertLoad, steps: Ints) -> Notice | None:
        """Owners whose experts get more tokens than the others', and who take longer for it."""
        places = np.unique(load.place[load.place >= 0])
        compute = self.run.features.get("compute")
        if len(places) < 2 or compute is None:
            return None
        at_place = np.stack(
            [mean(cells(load.tokens, steps, np.flatnonzero(load.place == p)), axis=1) for p in places], axis=1
        )
        even = at_place / mean(at_place, axis=1)[:, None]
        known = np.isfinite(even).all(axis=1)
        if known.sum() < policy.FIRST_JUDGED_STEPS:
            return None
        steps, even = steps[known], even[known]
        risen = [self._risen(even[:, column]) for column in range(len(places))]
        best = max(range(len(places)), key=lambda column: risen[column][2])
        onset, before, now = risen[best]
        if now == 0:
            return None
        hot = [p for p, (o, _, n) in enumerate(risen) if n >= 0.6 * now and n > 0 and (o == 0) == (onset == 0)]
        rows = notices.listed(np.flatnonzero(np.isin(load.place, places[hot])))
        others = np.setdiff1d(np.arange(len(load.place)), rows)
        standing = onset == 0
        return self._priced_hot(
            load, compute, rows, others, steps, onset, standing, before, float(even[onset:, best].mean())
        )

    @staticmethod
    def _risen(even: Floats) -> tuple[int, float, float]:
        """Where an owner's share began to be high, its share before, and how far it rose; (0, 0, 0) where it did not."""
        onset, before, now = notices.begins(even, 3)
        noise = float(np.median(np.abs(np.diff(even)))) / np.sqrt(2) * 1.5
        if (
            onset >= policy.FIRST_JUDGED_STEPS
            and now >= HOT * max(before, 1e-9)
            and now >= HOT
            and now - before >= 2 * noise
        ):
            return onset, before, now - before
        if len(even) < policy.STANDING_STEPS_CONFIRMED:
            return 0, 0.0, 0.0
        level = float(even.mean())
        lows = [part.mean() for part in np.array_split(even, 4)]
        return (0, 1.0, level - 1) if level >= HOT_STANDING and min(lows) >= HOT else (0, 0.0, 0.0)

    def _priced_hot(
        self, load: ExpertLoad, compute: Floats, rows: tuple[int, ...], others: Ints, steps: Ints, onset: int,
        standing: bool, before: float, now: float,
    ) -> Notice | None:  # fmt: skip
        after, past = steps[onset:], steps[:onset]
        if len(after) < policy.SHORTEST_CHANGE_STEPS or not len(others):
            return None
        mine = cells(compute, after, rows)
        if standing:
            kind = self.run.topology.kind
            base = np.array([_level(compute, after, others[kind[others] == kind[row]]) for row in rows])
            shared = 1.0
        else:
            base = mean(cells(compute, past, rows))
            rest = mean(cells(compute, after, others)) / mean(cells(compute, past, others))
            shared = max(1.0, float(np.nanmedian(rest)))
        own = mean(mine) / base / shared
        tokens = float(np.nanmean(cells(load.tokens, after, rows)))
        earlier = float(np.nanmean(cells(load.tokens, past, rows))) if len(past) else tokens / now
        usual = mean(cells(load.tokens, past, rows)) if len(past) else np.full(len(rows), earlier)
        grown = mean(cells(load.tokens, after, rows)) / np.where(usual > 0, usual, np.nan)
        fits = ~(own - 1 > MORE_THAN_TOKENS * (grown - 1) + SLOWER - 1)
        if not fits.all():
            # Computing grows at most with the tokens: a rank that is slower than that has another reason.
            left = tuple(row for row, fit in zip(rows, fits, strict=True) if fit)
            rest_of_all = np.setdiff1d(np.arange(len(load.place)), left)
            return (
                self._priced_hot(load, compute, left, rest_of_all, steps, onset, standing, before, now)
                if left
                else None
            )
        slower = float(np.nanmean(own)) if np.isfinite(own).any() else 0.0
        needed = SLOWER if not standing else 1 + 2 * (SLOWER - 1)
        if not slower >= needed or not (standing or _no_chance(compute, rows, others, past, after)):
            return None
        part = np.clip(1 - base / mean(mine), 0, 1)
        extra = np.zeros((len(after), compute.shape[1]))
        extra[:, rows] = np.nan_to_num(mine) * np.nan_to_num(part)
        ratio = attribution.cost_ratio(self.run, past, after) or self.run.cost_ratio(after, extra)
        if ratio is None or ratio - 1 < policy.WORTH_KEEPING:
            return None
        layer, expert = self._hottest(load, rows, past, after)
        said = (
            f"experts of {{ranks}} get {now:.2f} times their even share of the tokens"
            f"{'' if standing else f' ({before:.2f} before)'}, most so expert {expert} of layer {load.layers[layer]}, "
            f"and {{ranks}} compute{{s}} {100 * (slower - 1):.0f} % longer for it"
        )
        per_token = "milliseconds per token stayed the same while the tokens of its experts rose"
        return Notice(
            "hot_expert", rows, 0 if standing else int(after[0]), None,
            notices.sureness(slower - 1, needed - 1, 0.95 if not standing else 0.85), said,
            (
                Evidence("moe.expert.tokens", earlier, tokens),
                Evidence("comm.self", float(np.nanmean(base)), float(np.nanmean(mine))),
            ),
            ratio, f"layer{load.layers[layer]}/expert{expert}", (("slow_device", per_token),),
        )  # fmt: skip

    @staticmethod
    def _hottest(load: ExpertLoad, rows: tuple[int, ...], past: Ints, after: Ints) -> tuple[int, int]:
        """Layer (its number in the list) and expert of these ranks whose tokens rose most."""
        gain = mean(load.routed[after]) - (
            mean(load.routed[past]) if len(past) else mean(load.routed[after]).mean()
        )
        theirs = np.isin(load.position, load.place[list(rows)])
        gain = np.where(theirs[None, :], np.nan_to_num(gain), -np.inf)
        layer, expert = np.unravel_index(int(np.argmax(gain)), gain.shape)
        return int(layer), int(expert)

    def _collapsed(self, load: ExpertLoad, steps: Ints) -> Notice | None:
        """Nearly all tokens for a few experts of every layer."""
        experts = load.routed.shape[2]
        few = max(1, round(FEW_EXPERTS * experts))
        newest = _shares(load.routed[steps[-WINDOW_STEPS:]])
        if experts < 4 or not np.isfinite(newest).all():
            return None
        top = np.sort(newest, axis=1)[:, -few:].sum(axis=1)
        if (top >= MOST_TOKENS).mean() < LAYERS_COLLAPSED or few / experts > MOST_TOKENS / 2:
            return None
        entropy = mean(_entropy(load.routed[steps]), axis=1)
        onset, before, now = notices.begins(-np.nan_to_num(entropy, nan=float(np.nanmean(entropy))), 3)
        onset = _first_departure(-entropy, onset)
        said = (
            f"{few} of {experts} experts get {100 * float(top.mean()):.0f} % of the tokens in every layer; the routers' "
            f"entropy is {-now:.2f}" + (f", {-before:.2f} before" if onset else "")
        )
        return Notice(
            "router_collapse", (), int(steps[onset]) if onset else 0, None,
            notices.sureness(float(top.min()), MOST_TOKENS * 0.8, 0.95), said,
            (Evidence("moe.router.entropy", -before if onset else None, -now),), None, None,
            (("hot_expert", "the tokens of every layer crowd on few experts, not those of one owner"),),
        )  # fmt: skip

    def _dead(self, load: ExpertLoad, steps: Ints) -> Notice | None:
        """One expert of a layer that gets next to nothing, while the others share as before."""
        if len(steps) < DEAD_STEPS or load.routed.shape[2] < 4:
            return None
        newest = load.routed[steps[-DEAD_STEPS:]]
        starved = newest < DEAD_SHARE * mean(newest, axis=2)[:, :, None]
        dead: Array = np.all(starved & np.isfinite(newest), axis=0)
        found = [
            (int(layer), int(expert)) for layer, expert in np.argwhere(dead) if dead[layer].mean() <= DEAD_AMONG
        ]
        for layer, expert in found:
            told = self._told_dead(load, steps, layer, expert, len(found))
            if told is not None:
                return told
        return None

    def _told_dead(self, load: ExpertLoad, steps: Ints, layer: int, expert: int, count: int) -> Notice | None:
        part = load.routed[steps, layer]
        with np.errstate(invalid="ignore"):  # of a step without tokens no expert has a share
            share = part[:, expert] / mean(part, axis=1)
        alive = np.flatnonzero(share >= DEAD_SHARE)
        onset = int(alive[-1]) + 1 if len(alive) else 0
        if onset < DEAD_STEPS and len(steps) - onset < UNSETTLED_STEPS:
            return None
        rest = _entropy(np.delete(part, expert, axis=1)[:, None, :])[:, 0]
        now = float(np.nanmean(rest[onset:]))
        before = float(np.nanmean(rest[:onset])) if onset else None
        if before is not None and abs(now - before) > REST_MOVED:
            return None
        number = load.layers[layer]
        more = f" (and {count - 1} more)" if count > 1 else ""
        said = (
            f"expert {expert} of layer {number}{more} gets {100 * float(np.nanmean(share[onset:])):.1f} % of the mean "
            f"expert's tokens for {len(share) - onset} steps, while the others share as before"
        )
        earlier = float(np.nanmean(part[:onset, expert])) if onset else None
        return Notice(
            "dead_expert", (), int(steps[onset]) if onset else 0, None, 0.95 if onset else 0.8, said,
            (Evidence("moe.expert.tokens", earlier, float(np.nanmean(part[onset:, expert]))),), None,
            f"layer{number}/expert{expert}",
            (("router_collapse", f"the entropy of the layer's other experts is {now:.2f}, as before"),),
        )  # fmt: skip


def _no_chance(compute: Floats, rows: tuple[int, ...], others: Ints, past: Ints, after: Ints) -> bool:
    """Whether the time of some ranks over that of others rose by more than its means stray."""
    over = [
        np.log(mean(cells(compute, s, rows), axis=1) / mean(cells(compute, s, others), axis=1))
        for s in (past, after)
    ]
    known = [part[np.isfinite(part)] for part in over]
    if min(len(part) for part in known) < 2:
        return False
    error = np.sqrt(sum(float(part.var(ddof=1)) / len(part) for part in known))
    return bool(known[1].mean() - known[0].mean() > STRAY_ERRORS * error)


def _level(values: Floats, steps: Ints, rows: Ints) -> float:
    return float(np.nanmedian(median(cells(values, steps, rows)))) if len(rows) else float("nan")


def _shares(routed: Floats) -> Floats:
    """Share of each expert in its layer's tokens over all of these steps [layers, experts]."""
    total = mean(routed)
    whole = total.sum(axis=1, keepdims=True)
    return total / np.where(whole > 0, whole, np.nan)


def _entropy(routed: Floats) -> Floats:
    """Entropy of each step's and layer's shares, 1 = even [steps, layers]."""
    whole = routed.sum(axis=2, keepdims=True)
    share = routed / np.where(whole > 0, whole, np.nan)
    terms = np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0)
    result: Floats = -terms.sum(axis=2) / np.log(max(2, routed.shape[2]))
    return np.where(np.isfinite(whole[:, :, 0]) & (whole[:, :, 0] > 0), result, np.nan)


def _first_departure(values: Floats, split: int) -> int:
    """The first step from which a series, that rises at `split`, lies outside what it did before."""
    if split < 4:
        return split
    calm = values[: max(4, split // 2)]
    centre = float(np.nanmedian(calm))
    bar = centre + max(5 * 1.4826 * float(np.nanmedian(np.abs(calm - centre))), 0.02)
    inside = np.flatnonzero(~(values[: split + 1] > bar))
    return int(inside[-1]) + 1 if len(inside) and inside[-1] < split else split
