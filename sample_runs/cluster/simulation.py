"""Steps of a training on a simulated cluster, from physics.

A rank computes for as long as its tokens and its card take, then meets others: a collective ends when its last member
has entered and the bytes are across. A rank that never enters holds its group for ever: its clock is infinite, and so
are the exits of whoever waits for it, which is all that a hang is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lens.slots import NULL
from lens.tables import Tables
from sample_runs.cluster import endings, sensors
from sample_runs.cluster.condition import Condition, Floats
from sample_runs.cluster.fabric import COPY_RATE, Fabric
from sample_runs.cluster.faults import Fault, Moment
from sample_runs.cluster.layout import CARDS, Layout
from sample_runs.cluster.noise import NOISE
from sample_runs.cluster.reduced import Reduced
from sample_runs.cluster.writer import Writer

START_NS = 1_700_000_000_000_000_000
TOP_K, EXPERTS_OF_RANK, HIDDEN, HALF = 4, 4, 4096, 2
BATCH_BYTES, GRADIENT_BYTES = 0.25e9, 1.5e9
DATA_SHARE, UPDATE_SHARE, ATTENTION_SHARE, SQUARED_SHARE = 0.02, 0.04, 0.5, 0.3
"""Of a step's compute seconds: waiting for data, the optimizer; of compute: attention, and of that what grows with the
squared sequence length."""
MEAN_LENGTH = 2048
USUALLY_DROPPED = 0.02
HAND_OVER_S = 2e-5
"""A send is over once the port has it."""
REDUCED_FROM = 1024
"""Clusters of more ranks send vectors over ranks instead of spans, as large runs do."""
CLOCK_OFFSET_S = 0.001
Rows = NDArray[np.int64]


class Place(NamedTuple):
    """Where in a step a collective is; stage: None for those of all stages."""

    phase: str
    layer: int = -1
    batch: int = 0
    stage: int | None = None


@dataclass(frozen=True)
class Cluster:
    """A run to simulate. tokens: of each rank and step; compute_s: what an H200 needs for them, forward and backward.
    unwaited: stages send asynchronously and never wait for it."""

    layout: Layout = field(default_factory=Layout)
    steps: int = 120
    noise: str = "clean"
    faults: tuple[Fault, ...] = ()
    seed: int = 0
    tokens: int = 8192
    compute_s: float = 0.25
    save_every: int = 0
    evaluate_every: int = 0
    name: str = "cluster"
    unwaited: bool = False

    @property
    def layers(self) -> int:
        """Layers of a stage; fewer in pipelines, whose micro-batches multiply the records."""
        return {1: 3, 2: 2}.get(self.layout.pp, 1)

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return EXPERTS_OF_RANK * self.layout.ep

    def run(self) -> dict[str, Any]:
        """The run object."""
        return self.layout.run(self.name, self.layers * self.layout.pp, self.experts, TOP_K)

    def healthy(self) -> Cluster:
        """The same run, to the last random number, without its faults."""
        return replace(self, faults=())


@dataclass(frozen=True)
class Outcome:
    """What a simulation gave. durations: seconds of each step and rank [steps, ranks], inf where one never ended."""

    tables: Tables
    durations: Floats


def simulate(cluster: Cluster) -> Outcome:
    """Run it."""
    simulation = _Simulation(cluster)
    return Outcome(simulation.records(), simulation.durations)


class _Simulation:
    def __init__(self, cluster: Cluster) -> None:
        layout, seed = cluster.layout, cluster.seed
        self.cluster, self.layout, self.writer = cluster, layout, Writer()
        # Faults draw from a generator of their own: what is random without them stays as it is with them.
        self.random, self.faulty = (np.random.default_rng([seed, place]) for place in (1, 2))
        family = NOISE[cluster.noise]
        self.noise = family.make(layout.ranks, cluster.compute_s, np.random.default_rng([seed, 3]))
        self.save_every = cluster.save_every or family.save_every
        self.evaluate_every = cluster.evaluate_every or family.evaluate_every
        self.clock = np.zeros(layout.ranks)
        offset = np.random.default_rng([seed, 4]).uniform(-CLOCK_OFFSET_S, CLOCK_OFFSET_S, layout.hosts)
        self.offset = offset[layout.host]
        self.speed = np.array([CARDS[layout.card(rank)].speed for rank in range(layout.ranks)])
        self.groups = layout.groups()
        self.stages = np.arange(layout.ranks).reshape(layout.pp, -1)
        self.seq = {kind: np.zeros(len(members), np.int64) for kind, members in self.groups.items()}
        self.names = {
            kind: self.writer.codes(f"{kind}/{place}" for place in range(len(members)))
            for kind, members in self.groups.items()
        }
        self.fabric = Fabric(layout, np.random.default_rng([seed, 5]), np.random.default_rng([seed, 6]))
        self.reduced = Reduced(layout.ranks) if layout.ranks > REDUCED_FROM else None
        self.sensors = sensors.Sensors(
            cluster.layout, self.writer, np.random.default_rng([seed, 7]), self.reduced is not None
        )
        self.durations = np.full((cluster.steps, layout.ranks), np.inf)
        self.now = Condition(layout.ranks)
        self.factor = np.ones(layout.ranks)
        self.step = 0
        self.ending: Fault | None = None
        self.begun = self.before = self.clock
        self.dropped, self.routed = np.zeros(layout.ranks), np.zeros(layout.ranks)

    def records(self) -> Tables:
        for step in range(self.cluster.steps):
            self.step = step
            self._step()
            if not np.isfinite(self.clock).all():
                assert self.ending is not None
                endings.tell(self.ending, self.layout, self.writer, self.stamp, self.begun, self.before, self.step)
                break
        return self.writer.tables()

    def stamp(self, seconds: Floats, rows: Rows | None = None) -> NDArray[np.int64]:
        """Nanoseconds by the clock of each rank's host; NULL for what never comes."""
        offset = self.offset if rows is None else self.offset[rows]
        known = np.isfinite(seconds)
        shifted = np.where(known, seconds, 0.0) + offset
        return np.where(known, START_NS + np.rint(shifted * 1e9).astype(np.int64), NULL)

    def _step(self) -> None:
        cluster, ranks = self.cluster, self.layout.ranks
        self.now = Condition(ranks)
        self.factor = self.noise(self.step, self.now)
        self._suffer()
        self.begun = self.clock.copy()
        tokens = self._route()
        self._phase("data", lambda: self._busy(DATA_SHARE * cluster.compute_s * self._jitter(0.3), self.now.data_s))
        self._phase("h2d", lambda: self._busy(BATCH_BYTES / COPY_RATE * self.now.h2d * self._jitter(0.05)))
        self._phase("forward", lambda: self._pass(tokens, True))
        self._phase("backward", lambda: self._pass(tokens, False))
        self._phase("optimizer", self._update)
        self._now_and_then(
            self.save_every, "checkpoint", lambda: 1.5 * cluster.compute_s * self._jitter(0.15) * self.now.save
        )
        self._now_and_then(
            self.evaluate_every, "eval", lambda: 3.0 * cluster.compute_s * self._jitter(0.05) / self.speed
        )
        self._busy(0.002 * cluster.compute_s * self._jitter(0.3), self.now.host_s)
        self.durations[self.step] = self.clock - self.begun
        self._tell_step(tokens)
        self.clock = self.clock + 1e-5
        if np.isfinite(self.clock).all():
            self.sensors.passed(self.step, self.begun, self.clock, self.now, self.fabric.sent, self.stamp)
            self._numbers()

    def _suffer(self) -> None:
        """Let the faults of this step act."""
        for fault in self.cluster.faults:
            if self.step < fault.step:
                continue
            rows = fault.rows(self.layout)
            if fault.kind.ends:
                self.ending = fault
            elif fault.kind.act is not None:
                if fault.name == "hot_expert":
                    rows = [int(self.layout.owner[fault.rank])]
                elif fault.name == "dead_expert":
                    rows = [fault.rank % self.cluster.experts]
                since = self.step - fault.step
                moment = Moment(rows, fault.strength, since, self.cluster.compute_s, self.faulty)
                fault.kind.act(self.now, moment)

    def _jitter(self, sigma: float) -> Floats:
        return np.exp(sigma * self.random.standard_normal(self.layout.ranks))

    def _busy(self, seconds: Floats, more: Floats | float = 0.0, rows: Rows | None = None) -> None:
        """A process works for so long, longer where it is kept off the processors."""
        share = np.minimum(0.9, self.now.off_cpu + self.now.quota)
        if rows is None:
            self.clock = self.clock + (seconds + more) / (1 - share)
        else:
            self.clock[rows] += (seconds + more) / (1 - share[rows])

    def _phase(self, name: str, work: Callable[[], None]) -> None:
        begun = self.clock.copy()
        work()
        if self.reduced is not None:
            self.reduced.phase(name, self.clock - begun)
            return
        rows = np.flatnonzero(np.isfinite(begun))
        self.writer.add(
            "spans", len(rows), rank=rows, step=self.step, kind="phase", name=name,
            t0_ns=self.stamp(begun[rows], rows), t1_ns=self.stamp(self.clock[rows], rows),
        )  # fmt: skip

    def _now_and_then(self, every: int, name: str, seconds: Callable[[], Floats]) -> None:
        if every and self.step % every == every - 1:
            self._phase(name, lambda: self._busy(seconds()))

    def _route(self) -> Floats:
        """Tokens that each rank's routers send to each expert of each of its layers [layers, ranks, experts]."""
        cluster, now, experts = self.cluster, self.now, self.cluster.experts
        share = np.exp(0.05 * self.random.standard_normal((cluster.layers, 1, experts)))
        for owner, factor in now.router.items():
            share[:, :, EXPERTS_OF_RANK * owner : EXPERTS_OF_RANK * (owner + 1)] *= factor
        if now.dead is not None:
            share[now.dead[0], 0, now.dead[1]] = 0.0
        share /= share.sum(axis=2, keepdims=True)
        if now.collapse:
            few = max(1, experts // 12)
            share *= 1 - now.collapse
            # One of each few owners, so that no single rank bears them all.
            share[:, :, :: max(1, experts // few)] += now.collapse / len(range(0, experts, max(1, experts // few)))
        sent = cluster.tokens * now.tokens[None, :, None] * TOP_K * share
        noise = self.random.standard_normal(sent.shape)
        tokens: Floats = np.rint(np.maximum(sent + np.sqrt(sent) * noise, 0.0))
        return tokens

    def _arrived(self, tokens: Floats) -> Floats:
        """Tokens that arrive at each rank's experts [layers, ranks]."""
        of_owner: Floats = tokens.reshape(*tokens.shape[:2], self.layout.ep, EXPERTS_OF_RANK).sum(axis=3)
        arrived: Floats = of_owner.sum(axis=2)
        if "ep" in self.groups:
            members = self.groups["ep"]
            arrived[:, members] = of_owner[:, members, :].sum(axis=2)
        return arrived

    def _pass(self, tokens: Floats, forward: bool) -> None:
        """One pass of all micro-batches through all stages; each stage waits for its neighbour's."""
        layout, name = self.layout, "forward" if forward else "backward"
        batches = layout.pp
        arrived = self._arrived(tokens)
        if forward:
            self._busy(self.now.pause_s)
        order = list(range(layout.pp)) if forward else list(reversed(range(layout.pp)))
        for batch in range(batches):
            for place, stage in enumerate(order):
                if place:
                    self._hand_over(self.stages[order[place - 1]], self.stages[stage], name, batch)
                for layer in range(self.cluster.layers):
                    self._layer(stage, layer, tokens[layer] / batches, arrived[layer] / batches, name, batch)
        if not forward:
            self._meet("dp", "all_reduce", Place("backward"), GRADIENT_BYTES / layout.pp, skipping=True)

    def _layer(self, stage: int, layer: int, tokens: Floats, arrived: Floats, name: str, batch: int) -> None:
        """Attention, dispatch, experts, combine; backwards the same takes twice as long."""
        cluster, now, rows = self.cluster, self.now, self.stages[stage]
        share = (1 / 3 if name == "forward" else 2 / 3) / cluster.layers / self.layout.pp
        pace = self.factor * now.compute / (self.speed * now.clock)
        attention = ATTENTION_SHARE * now.tokens * (1 - SQUARED_SHARE + SQUARED_SHARE * now.sequence)
        unit = share * cluster.compute_s * pace * self._jitter(0.01)
        even = cluster.tokens * TOP_K / self.layout.pp
        sent_bytes, come_bytes = tokens.sum(axis=1) * HIDDEN * HALF, arrived * HIDDEN * HALF
        number = stage * cluster.layers + layer
        about = Place(name, number, batch, stage)
        self._busy((unit * attention)[rows], 0.0, rows)
        if "tp" in self.groups:
            size = now.tokens * cluster.tokens * HIDDEN * HALF / self.layout.pp
            self._meet("tp", "all_reduce", about, size)
        if self.ending is not None and self.step == self.ending.step and number == 0 and name == "forward":
            self._end()
        self._meet("ep", "all_to_all", about, sent_bytes, come_bytes)
        self._busy((unit * (1 - ATTENTION_SHARE) * arrived / even)[rows], 0.0, rows)
        self._meet("ep", "all_to_all", about, come_bytes, sent_bytes)

    def _end(self) -> None:
        """The rank of an ending fault goes no further."""
        assert self.ending is not None
        if self.ending.kind.ends != "skipped" and np.isfinite(self.clock[self.ending.rank]):
            self.before = self.clock.copy()
            self.clock[self.ending.rank] = np.inf

    def _update(self) -> None:
        self._busy(UPDATE_SHARE * self.cluster.compute_s / self.speed * self.now.optimizer * self._jitter(0.05))
        self._meet("world", "all_reduce", Place("optimizer"), 8.0)

    def _meet(
        self,
        kind: str,
        op: str,
        about: Place,
        size: Floats | float,
        other: Floats | float = 0.0,
        skipping: bool = False,
    ) -> None:
        """Ranks of each group meet: all leave once the last has entered and the bytes are across."""
        if kind not in self.groups:
            return
        count = len(self.groups[kind])
        part = slice(None)
        if about.stage is not None:
            part = slice(about.stage * count // self.layout.pp, (about.stage + 1) * count // self.layout.pp)
        members = self.groups[kind][part]
        given = np.broadcast_to(np.asarray(size, float), (self.layout.ranks,))[members]
        most = np.maximum(given, np.broadcast_to(np.asarray(other, float), (self.layout.ranks,))[members])
        entered = self.clock[members]
        absent = self._skips(members) if skipping else np.zeros(members.shape, bool)
        last = np.where(absent, np.inf, entered).max(axis=1)
        left = np.broadcast_to((last + self.fabric.seconds(op, members, most, self.now))[:, None], members.shape)
        here = np.isfinite(entered) & ~absent
        if self.reduced is not None:
            self.reduced.collective(kind, op, about.phase, members, entered, last, left)
        else:
            rows = members[here]
            shape = members.shape
            self.writer.add(
                "collectives", len(rows), rank=rows, step=self.step, op=op, phase=about.phase, layer=about.layer,
                group=np.broadcast_to(self.names[kind][part][:, None], shape)[here],
                seq=np.broadcast_to(self.seq[kind][part][:, None], shape)[here],
                bytes=np.rint(given[here]), micro_batch=about.batch if self.layout.pp > 1 else -1,
                t0_ns=self.stamp(entered[here], rows), t1_ns=self.stamp(left[here], rows),
            )  # fmt: skip
        self.seq[kind][part] += 1
        self.clock[members] = np.where(absent, entered, left)

    def _skips(self, members: Rows) -> NDArray[np.bool_]:
        fault = self.ending
        if fault is None or fault.kind.ends != "skipped" or self.step != fault.step:
            return np.zeros(members.shape, bool)
        self.before = self.clock.copy()
        skips: NDArray[np.bool_] = members == fault.rank
        return skips

    def _hand_over(self, source: Rows, target: Rows, name: str, batch: int) -> None:
        """Each rank of a stage gives what it sends to its port, and goes on; its counterpart in the next waits for the bytes."""
        pairs = np.stack([source, target], axis=1)
        size = self.cluster.tokens * HIDDEN * HALF / self.layout.pp
        entered, sent = self.clock[target].copy(), self.clock[source].copy()
        last = np.maximum(entered, sent)
        left = last + self.fabric.seconds("recv", pairs, np.full(pairs.shape, size), self.now)
        handed = sent + (0.0 if self.cluster.unwaited else HAND_OVER_S)
        self.clock[source], self.clock[target] = handed, left
        if self.reduced is not None:
            self.reduced.collective("pp", "recv", name, target[:, None], entered[:, None], last, left[:, None])
            return
        groups = self.writer.codes(f"pp/{place}:{a}-{b}" for place, (a, b) in enumerate(pairs.tolist()))
        seq = self.step * self.layout.pp + batch
        sides = (("send", source, target, sent, handed), ("recv", target, source, entered, left))
        for op, rows, peer, begun, ended in sides:
            here = np.isfinite(begun)
            self.writer.add(
                "collectives", int(here.sum()), rank=rows[here], step=self.step, op=op, phase=name, group=groups[here],
                seq=seq, bytes=round(size), peer=peer[here], micro_batch=batch, is_async=int(self.cluster.unwaited and op == "send"),
                t0_ns=self.stamp(begun[here], rows[here]), t1_ns=self.stamp(ended[here], rows[here]),
            )  # fmt: skip

    def _tell_step(self, tokens: Floats) -> None:
        """The step itself, and what its routers did."""
        now, ranks = self.now, self.layout.ranks
        if self.reduced is not None:
            if np.isfinite(self.clock).all():
                when = int(self.stamp(self.clock).max())
                self.reduced.flush(self.writer, self.step, when, self.durations[self.step])
                for layer in range(len(tokens)):
                    self.writer.vectors(
                        "moe.expert.tokens", tokens[layer].sum(axis=0)[None], step=self.step, layer=layer, t_ns=when
                    )
            return
        squares = np.rint(self.cluster.tokens * now.tokens * MEAN_LENGTH * now.sequence)
        self.writer.add(
            "steps", ranks, rank=np.arange(ranks), step=self.step, t0_ns=self.stamp(self.begun),
            t1_ns=self.stamp(self.clock), tokens=np.rint(self.cluster.tokens * now.tokens), seq_sq=squares,
            micro_batches=self.layout.pp, recompiles=now.recompiled, gc_ns=np.rint(now.gc_s * 1e9),
            log_ns=np.rint(now.log_s * 1e9),
        )  # fmt: skip
        if np.isfinite(self.clock).all():
            self._tell_routing(tokens)

    def _tell_routing(self, tokens: Floats) -> None:
        """What the routers of each rank sent where, and what found no room, which is counted since the start."""
        rows, when = np.arange(self.layout.ranks), self.stamp(self.clock)
        for layer in range(len(tokens)):
            number = self.layout.stage * len(tokens) + layer
            self.writer.vectors(
                "moe.expert.tokens", tokens[layer], rank=rows, step=self.step, layer=number, t_ns=when
            )
        sent = tokens[0].sum(axis=1)
        self.routed = self.routed + sent
        self.dropped = self.dropped + np.rint(
            sent * np.clip(USUALLY_DROPPED * self._jitter(0.2) + self.now.dropped, 0, 1)
        )
        for metric, values in (("moe.tokens.routed", self.routed), ("moe.tokens.dropped", self.dropped)):
            self.writer.samples(metric, values, {"layer": "0"}, rank=rows, step=self.step, t_ns=when)

    def _numbers(self) -> None:
        """Loss and gradient norm of each rank, and what all of them come to."""
        count, draw = self.layout.ranks, self.random.standard_normal
        usual = 3.2 * np.exp(-self.step / 400)
        local = usual * (1 + 0.02 * draw(count)) * self.now.local_loss
        norm = np.exp(0.08 * draw(count)) * self.now.gradient
        told = slice(0, 1 if self.reduced is not None else count)
        rows, when = np.arange(count)[told], self.stamp(self.clock)[told]
        for metric, values in (("train.loss.local", local), ("train.grad_norm.local", norm)):
            self.writer.samples(metric, values[told], rank=rows, step=self.step, t_ns=when)
        self.writer.samples("train.loss", local.mean(keepdims=True), rank=0, step=self.step, t_ns=when[:1])
