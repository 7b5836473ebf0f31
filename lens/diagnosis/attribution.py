"""From a hot expert to the step: its rank, who waits for that rank in which layer, and the step under balanced routing.

Dispatch and combine of a layer are all-to-alls of the expert-parallel group. Whoever owns the hot expert enters them
last, and what its peers wait there is what the layer costs. What balance would give is a what-if: the self time before
each all-to-all, and its transfer, are laid against the tokens that arrive; what follows them (least squares over steps
and ranks, never more than in proportion) is set to what even shares would take, and the step graph is run again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lens.diagnosis import policy, replay, report
from lens.diagnosis.arrays import Array, Floats, Ints, finite_mean, mean, pack, starts_of
from lens.diagnosis.decompose import SECONDS, Frame
from lens.diagnosis.measures import BEFORE_STEPS
from lens.diagnosis.report import Hypothesis
from lens.diagnosis.routing import ExpertLoad
from lens.slots import NULL

if TYPE_CHECKING:
    from lens.diagnosis.examine import Examiner

CAUSE = "hot_expert"
MOST_LAYERS = 4
"""So many layers are told of, those that cost most."""
FEWEST_OF_LAYER, MOST_OF_LAYER = 2, 8
"""All-to-alls of a layer in a pass: dispatch and combine, with an exchange of counts, and again where it is recomputed."""
SURE = 3.0
"""Standard errors by which time must follow tokens."""
LONGEST = 3.0
"""A self time that is longer than so many usual ones is a pause and counts for no more."""


@dataclass(frozen=True)
class LayerCost:
    """What the hot experts of a layer cost. layer: its number. expert: of the hot ranks', the one with most tokens; times:
    of its even share. waited_s: seconds a step that each peer waits there for the hot ranks, before_s: that it did
    before, None without a past."""

    layer: int
    expert: int
    times: float
    waited_s: float
    before_s: float | None


@dataclass(frozen=True)
class Attribution:
    """Where the time of hot experts goes. layers: costliest first. peers: places of the ranks that wait. now_s: mean
    seconds of a step, balanced_s: under balanced routing, None where the records do not allow a replay."""

    layers: tuple[LayerCost, ...]
    peers: tuple[int, ...]
    now_s: float
    balanced_s: float | None


def of_hot(run: Examiner, rows: tuple[int, ...], past: Ints, after: Ints) -> Attribution | None:
    """Attribute what hot ranks (places) cost since some steps; None where no all-to-all tells."""
    frame, load, exchanges = run.frame, run.load, _exchanges(run)
    now = run.step_seconds(after)
    if load is None or exchanges is None or now is None:
        return None
    peers = _peers(frame, rows)
    waited = exchanges.waited_for(rows, peers, after)
    before = exchanges.waited_for(rows, peers, past) if len(past) else None
    routed = mean(load.routed[after])
    theirs = np.flatnonzero(np.isin(load.position, load.place[list(rows)]))
    layers = []
    for place in np.argsort(-waited, kind="stable").tolist():
        tokens = routed[place]
        if not waited[place] > 0 or not len(theirs) or not np.isfinite(tokens[theirs]).all():
            continue
        expert = int(theirs[np.argmax(tokens[theirs])])
        times = float(tokens[expert] / max(float(np.nanmean(tokens)), 1e-9))
        earlier = None if before is None else float(before[place])
        layers.append(LayerCost(load.layers[place], expert, times, float(waited[place]), earlier))
    balanced = TokenTimes.of(exchanges, load, past, after).ratio(after, balanced=True)
    return Attribution(tuple(layers), peers, now, None if balanced is None else now / balanced)


@dataclass(frozen=True)
class Exchanges:
    """The all-to-alls of experts: rows of Collectives, each with its layer (place in ExpertLoad.layers) and its number
    among those of its rank, step, layer and phase."""

    frame: Frame
    rows: Ints
    layer: Ints
    number: Ints
    layers: int

    @classmethod
    def of(cls, frame: Frame, load: ExpertLoad, op: int) -> Exchanges | None:
        """Those whose layer is told or follows from their order; None without any."""
        collectives = frame.collectives
        if "ep" not in collectives.kinds:
            return None
        rows = np.flatnonzero((collectives.kind == collectives.kinds.index("ep")) & (collectives.op == op))
        told = collectives.layer[rows]
        place = np.minimum(np.searchsorted(load.layers, told), len(load.layers) - 1)
        layer = np.where(np.array(load.layers, np.int64)[place] == told, place, -1)
        if len(rows) and (told < 0).all():
            layer = _by_order(frame, load, rows)
        known = np.flatnonzero(layer >= 0)
        if not len(known):
            return None
        rows, layer = rows[known], layer[known]
        number = _within(pack(collectives.row[rows], collectives.step[rows], collectives.phase[rows], layer))
        return cls(frame, rows, layer, number, len(load.layers))

    def waited_for(self, late: tuple[int, ...], peers: tuple[int, ...], steps: Ints) -> Floats:
        """Seconds a step that each peer waits where one of these ranks enters last [layers]."""
        collectives = self.frame.collectives
        last = collectives.entry_ns == collectives.last_entry_ns
        held = np.zeros(int(collectives.instance.max()) + 1, bool)
        held[collectives.instance[last & np.isin(collectives.row, late)]] = True
        counted = held[collectives.instance[self.rows]] & np.isin(collectives.step[self.rows], steps)
        counted &= np.isin(collectives.row[self.rows], peers)
        total = np.bincount(self.layer[counted], self.frame.pieces.wait[self.rows][counted], self.layers)
        return total / max(1, len(steps) * len(peers))


def attributed(run: Examiner, item: Hypothesis, index: int) -> Hypothesis:
    """A hypothesis about hot experts with where their time goes, as of a step place; any other as it is.

    Waiting is evidence layer by layer, as `comm.wait/layer3`, whose ranks are those that wait.
    """
    if item["cause"] != CAUSE or item["onset_step"] is None:
        return item
    steps = run.timeline.steps
    onset = int(np.searchsorted(steps, item["onset_step"]))
    last = index if item["end_step"] is None else int(np.searchsorted(steps, item["end_step"]))
    rows = tuple(run.topology.row(np.array(item["ranks"], np.int64)).tolist())
    past = np.arange(max(policy.WARM_UP_STEPS, onset - BEFORE_STEPS), onset)
    found = of_hot(run, rows, past, np.arange(max(onset, policy.WARM_UP_STEPS), last + 1))
    if found is None:
        return item
    words, evidence = _told(found, item["ranks"], run.topology.ranks[list(found.peers)].tolist())
    return {
        **item,
        "evidence": item["evidence"] + evidence,
        "recommendation": f"{item['recommendation']} {report.sentence('; '.join(words))}"
        if words
        else item["recommendation"],
    }


def _told(found: Attribution, ranks: list[int], peers: list[int]) -> tuple[list[str], list[dict[str, Any]]]:
    """The attribution in words, and as evidence of the reply."""
    words, evidence = [], []
    for cost in found.layers[:MOST_LAYERS]:
        words.append(
            f"in layer {cost.layer} expert {cost.expert} gets {cost.times:.2f} times its even share and each peer waits "
            f"{report.milliseconds(cost.waited_s)} a step for {report.named(ranks)} ({100 * cost.waited_s / found.now_s:.0f} %)"
        )
        evidence.append(_number(f"comm.wait/layer{cost.layer}", peers, cost.before_s, cost.waited_s))
    rest = found.layers[MOST_LAYERS:]
    if rest:
        waited = report.milliseconds(sum(cost.waited_s for cost in rest))
        words.append(f"in {len(rest)} more layer{'s' if len(rest) > 1 else ''} each waits {waited}")
    if found.balanced_s is not None:
        words.append(
            f"with balanced routing the step would take {report.milliseconds(found.balanced_s)} instead of "
            f"{report.milliseconds(found.now_s)}"
        )
        evidence.append(_number("step.duration", [], found.balanced_s, found.now_s))
    return words, evidence


def _number(metric: str, ranks: list[int], baseline: float | None, observed: float) -> dict[str, Any]:
    effect = observed / baseline - 1 if baseline else None
    return {
        "metric": metric, "ranks": ranks, "baseline": report.rounded(baseline, 6),
        "observed": report.rounded(observed, 6), "effect": report.rounded(effect, 4),
    }  # fmt: skip


def _peers(frame: Frame, rows: Iterable[int]) -> tuple[int, ...]:
    """Places of the other members of these ranks' expert-parallel groups, ascending."""
    topology, own = frame.topology, set(rows)
    groups = [topology.row(np.array(m, np.int64)) for name, m in topology.members.items() if name.startswith("ep/")]
    return tuple(sorted({int(row) for group in groups if own & set(group.tolist()) for row in group} - own))


def _within(key: Ints) -> Ints:
    """Number of each entry among those of equal key, in their order."""
    order = np.argsort(key, kind="stable")
    first = starts_of(key[order])
    number = np.zeros(len(key), np.int64)
    number[order] = np.arange(len(key)) - np.repeat(first, np.diff(np.append(first, len(key))))
    return number


def _by_order(frame: Frame, load: ExpertLoad, rows: Ints) -> Ints:
    """Layer of each all-to-all from its place in the pass: forward from the first layer to the last, backward the other
    way; -1 where their number is not a few for each layer and micro-batch."""
    collectives, names = frame.collectives, load.sent.tables
    row, step, phase = collectives.row[rows], collectives.step[rows], collectives.phase[rows]
    of_rank = load.layers_of(frame.shape[1])
    counts = of_rank.sum(axis=1)[row]
    batches = frame.count.get("micro_batches")
    many = np.ones(len(rows)) if batches is None else np.nan_to_num(batches[step, row], nan=1.0)
    many = np.maximum(many, 1).astype(np.int64)
    key = pack(row, step, phase)
    number = _within(key)
    total = np.bincount(np.unique(key, return_inverse=True)[1])[np.unique(key, return_inverse=True)[1]]
    each = total // (counts * many)
    ordered = (total == each * counts * many) & (each >= FEWEST_OF_LAYER) & (each <= MOST_OF_LAYER)
    each = np.maximum(each, 1)
    place = number % (each * counts) // each
    place = np.where(phase == names.code("backward"), counts - 1 - place, place)
    ordered &= np.isin(phase, [names.code("forward"), names.code("backward")])
    # The n-th layer of a rank is the n-th of all that its routers told of.
    nth = np.argsort(~of_rank, axis=1, kind="stable")
    return np.where(ordered, nth[row, np.clip(place, 0, of_rank.shape[1] - 1)], -1)


@dataclass(frozen=True)
class TokenTimes:
    """How time follows tokens at the all-to-alls of experts, from some steps before and after an onset.

    rows: of Collectives. own, transfer: seconds a token. mine, most: tokens that arrive at the rank, and at that of its
    group which gets most; even: at each on average. usual, usual_most: what mine and most were of even before, 1 without a
    past.
    """

    frame: Frame
    rows: Ints
    own: Floats
    transfer: Floats
    mine: Floats
    most: Floats
    even: Floats
    usual: Floats
    usual_most: Floats

    @classmethod
    def of(cls, exchanges: Exchanges, load: ExpertLoad, past: Ints, after: Ints) -> TokenTimes:
        """Lay times against tokens."""
        frame, collectives = exchanges.frame, exchanges.frame.collectives
        past, after = _some(past), _some(after)
        steps = np.concatenate([past, after])
        place = np.full(frame.shape[0], -1)
        place[steps] = np.arange(len(steps))
        inside = np.flatnonzero(place[collectives.step[exchanges.rows]] >= 0)
        rows, layer, number = exchanges.rows[inside], exchanges.layer[inside], exchanges.number[inside]
        row, phase = collectives.row[rows], collectives.phase[rows]
        at = place[collectives.step[rows]], layer, row
        arrived = load.arrived(steps)
        even, most = _of_groups(frame, arrived)
        moved = frame.pieces.length[rows] - frame.pieces.wait[rows]
        own = _per_token(
            _own_before(frame)[rows], arrived[at], pack(phase, layer, number, frame.topology.kind[row])
        )
        transfer = _per_token(moved, most[at], pack(phase, layer, number))
        grown = _grown(frame, load, past, after)
        usual, usual_most = (
            _usual(part[: len(past)], even[: len(past)])[at[1:]] / grown for part in (arrived, most)
        )
        return cls(frame, rows, own, transfer, arrived[at], most[at], even[at], usual, usual_most)

    def ratio(self, after: Ints, balanced: bool) -> float | None:
        """Mean step time over what these steps would take with the shares of before, or with even ones; None where the
        records do not allow a replay."""
        count = len(self.frame.collectives)
        ahead, less = np.zeros((2, count))
        shares = (1.0, 1.0) if balanced else (self.usual, self.usual_most)
        ahead[self.rows] = np.nan_to_num(self.own * (self.mine - shares[0] * self.even))
        less[self.rows] = np.nan_to_num(self.transfer * (self.most - shares[1] * self.even))
        seconds = replay.step_seconds(
            self.frame, np.zeros((len(after), self.frame.shape[1])), after, less, ahead=ahead
        )
        return None if seconds is None or not seconds[1] > 0 else seconds[0] / seconds[1]


def cost_ratio(run: Examiner, past: Ints, after: Ints) -> float | None:
    """Mean step time over what these steps would take if tokens were spread as before (without a past: evenly); None
    where no all-to-all tells."""
    exchanges = _exchanges(run)
    if exchanges is None or run.load is None:
        return None
    return TokenTimes.of(exchanges, run.load, past, after).ratio(after, balanced=not len(past))


def _exchanges(run: Examiner) -> Exchanges | None:
    return None if run.load is None else Exchanges.of(run.frame, run.load, run.tables.code("all_to_all"))


def _grown(frame: Frame, load: ExpertLoad, past: Ints, after: Ints) -> float:
    """Factor by which routers send more for each token of the batch than before; 1 where that is not known. Of top-k routers
    it is 1: what some experts gain others lose."""
    given = frame.count.get("tokens")
    if given is None or not len(past):
        return 1.0
    routed = np.nansum(load.routed, axis=(1, 2)) / np.where(
        np.nansum(given, axis=1) > 0, np.nansum(given, axis=1), np.nan
    )
    before, now = finite_mean(routed[past]), finite_mean(routed[after])
    return now / before if before and now else 1.0


def _usual(tokens: Floats, even: Floats) -> Floats:
    """What tokens were of an even share [steps, layers, ranks] on average [layers, ranks]; 1 where that is not known."""
    share = mean(tokens / np.where(even > 0, even, np.nan)) if len(tokens) else np.ones(tokens.shape[1:])
    return np.where(np.isfinite(share), share, 1.0)


def _some(steps: Ints) -> Ints:
    """Of these steps at most as many as are replayed, evenly chosen."""
    if len(steps) <= policy.REPLAY_STEPS:
        return steps
    return steps[np.unique(np.linspace(0, len(steps) - 1, policy.REPLAY_STEPS).astype(np.int64))]


def _of_groups(frame: Frame, arrived: Floats) -> tuple[Floats, Floats]:
    """Mean and most of the tokens of each rank's expert-parallel group [steps, layers, ranks]."""
    even, most = np.full(arrived.shape, np.nan), np.full(arrived.shape, np.nan)
    for name, members in frame.topology.members.items():
        if name.startswith("ep/"):
            rows = frame.topology.row(np.array(members, np.int64))
            part = arrived[:, :, rows]
            even[:, :, rows], most[:, :, rows] = part.mean(axis=2)[:, :, None], part.max(axis=2)[:, :, None]
    return even, most


def _own_before(frame: Frame) -> Floats:
    """Seconds of self time right before each collective [rows of Collectives]."""
    collectives, pieces = frame.collectives, frame.pieces
    begun = frame.start_ns[collectives.step, collectives.row]
    follows = np.r_[False, (np.diff(collectives.row) == 0) & (np.diff(collectives.step) == 0)]
    previous = np.where(follows, np.r_[0, pieces.end_ns[:-1]], np.where(begun == NULL, pieces.start_ns, begun))
    result: Floats = np.maximum(pieces.start_ns - previous, 0) * np.float64(SECONDS)
    return result


def _per_token(seconds: Floats, tokens: Floats, alike: Array) -> Floats:
    """Seconds a token by which times follow tokens among rows that are alike; 0 where they do not surely [rows]."""
    known = np.isfinite(tokens) & np.isfinite(seconds)
    kind = np.unique(alike, return_inverse=True)[1]
    kinds = int(kind.max()) + 1 if len(kind) else 0

    def total(values: Floats) -> Floats:
        return np.bincount(kind[known], values[known], kinds).astype(np.float64)

    count = np.maximum(total(np.ones(len(seconds))), 1)
    usual = total(seconds) / count
    x, y = tokens - (total(tokens) / count)[kind], np.minimum(seconds, LONGEST * usual[kind])
    y = y - (total(y) / count)[kind]
    spread, shared, scatter = total(x * x), total(x * y), total(y * y)
    slope = shared / np.where(spread > 0, spread, np.inf)
    error = np.sqrt(
        np.maximum(scatter - slope * shared, 0) / np.maximum(count - 2, 1) / np.where(spread > 0, spread, np.inf)
    )
    most = usual / np.where(total(tokens) > 0, total(tokens) / count, np.inf)
    result: Floats = np.where((slope > SURE * error) & (slope > 0), np.minimum(slope, most), 0.0)[kind]
    return result
