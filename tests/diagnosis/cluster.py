"""A small event-driven cluster for the tests: ranks compute, meet in collectives, wait, and go on.

Only physics is simulated (a collective ends when its last member entered and the transfer is done); what the engine
sees of it are records. Truth is known: `Cluster.step_seconds` runs the same random numbers without the fault.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cards import SLOWS_CLOCK, STALLS, Cards
from fabric import Fabric
from noises import NOISE

from lens.slots import NULL
from lens.tables import DTYPES, SCHEMA, Tables

SLOWS_COMPUTE = (*SLOWS_CLOCK, "unknown", "hot_expert", "ecc", "shared")
START_NS = 1_700_000_000_000_000_000


@dataclass
class Fault:
    """What goes wrong: kind names the physics, strength is a factor (compute, links) or seconds (others)."""

    kind: str
    ranks: tuple[int, ...]
    step: int
    strength: float = 1.5
    until: int | None = None

    def active(self, step: int) -> bool:
        return self.step <= step and (self.until is None or step <= self.until)


@dataclass
class Cluster:
    """ranks in `hosts` hosts, expert parallel in groups of `ep`, data parallel across, optionally pipelined."""

    ranks: int = 8
    hosts: int = 2
    ep: int = 2
    stages: int = 1
    layers: int = 2
    steps: int = 120
    step_s: float = 0.04
    noise: str = "quiet"
    seed: int = 0
    faults: tuple[Fault, ...] = ()
    offsets_s: float = 0.0
    vendors: dict[str, float] = field(default_factory=lambda: {"H200": 1.0})
    checkpoint_every: int = 0
    eval_every: int = 0
    signals: bool = True
    heartbeats: bool = True
    topology: bool = True
    phases: bool = True
    ports: str = ""
    hosts_per_switch: int = 0
    rate_known: bool = True
    small: int = 0
    weather: str = "calm"
    pipe: bool = False
    xids: bool = True
    capped: bool = False
    throttle_counters: bool = False
    copies: float = 0.0
    loading: float = 0.02
    beats_tell: str = "state"

    def run(self) -> dict[str, Any]:
        """The run object."""
        if not self.topology:
            return {"run": "test"}
        models, fabric = self._models(), Fabric(self)
        return {
            "run": "test", "world_size": self.ranks, "groups": self._groups(),
            "ranks": [
                {
                    "rank": r, "host": self._host(r), "device": self._device(r), "model": models[r],
                    "vendor": "amd" if models[r].startswith("MI") else "nvidia", "local_rank": r % self._per_host(),
                    "nic": fabric.port(r), "switch": fabric.switch(r),
                }
                for r in range(self.ranks)
            ],
            "experts": {"layers": self.layers, "experts": 4 * self.ep, "top_k": 2},
        }  # fmt: skip

    def tables(self) -> Tables:
        """All records of the run."""
        return Simulation(self).records()

    def step_seconds(self, without_faults: bool) -> np.ndarray:
        """Mean duration of each step over ranks, with or without the faults and otherwise the same."""
        cluster = Cluster(**{**self.__dict__, "faults": () if without_faults else self.faults})
        simulation = Simulation(cluster)
        simulation.records()
        return simulation.durations.mean(axis=1)

    def _per_host(self) -> int:
        return max(1, self.ranks // self.hosts)

    def _host(self, rank: int) -> str:
        return f"host{rank // self._per_host()}"

    def _device(self, rank: int) -> str:
        return f"{self._host(rank)}/gpu{rank % self._per_host()}"

    def _models(self) -> list[str]:
        names = list(self.vendors)
        return [names[(r // self._per_host()) % len(names)] for r in range(self.ranks)]

    def _groups(self) -> dict[str, list[list[int]]]:
        per_stage = self.ranks // self.stages
        groups: dict[str, list[list[int]]] = {"world": [list(range(self.ranks))], "ep": [], "dp": []}
        for stage in range(self.stages):
            first = stage * per_stage
            groups["ep"] += [list(range(first + i, first + i + self.ep)) for i in range(0, per_stage, self.ep)]
            groups["dp"] += [list(range(first + i, first + per_stage, self.ep)) for i in range(self.ep)]
        if self.stages > 1:
            groups["pp"] = [list(range(i, self.ranks, per_stage)) for i in range(per_stage)]
        return groups


class Writer:
    """Collects columns and gives Tables."""

    def __init__(self) -> None:
        self.pool: dict[str, int] = {}
        self.parts: dict[str, list[dict[str, Any]]] = {name: [] for name in SCHEMA}
        self.values: list[np.ndarray] = []
        self.used = 0

    def code(self, text: str | None) -> int:
        return -1 if text is None else self.pool.setdefault(text, len(self.pool))

    def codes(self, texts: Iterable[str | None]) -> np.ndarray:
        return np.array([self.code(text) for text in texts], np.int32)

    def add(self, table: str, **columns: Any) -> None:
        count = max((len(v) for v in columns.values() if isinstance(v, np.ndarray)), default=1)
        row = {}
        for column, kind in SCHEMA[table].items():
            absent: Any = NULL if kind == "i8" else 0 if kind in ("f8", "i1") else -1
            value = columns.get(column, absent)
            if isinstance(value, str):
                value = self.code(value)
            row[column] = np.broadcast_to(np.asarray(value), count).astype(DTYPES[kind])
        self.parts[table].append(row)

    def vector(self, metric: str, values: np.ndarray, **columns: Any) -> None:
        self.add("vectors", metric=metric, offset=self.used, length=len(values), **columns)
        self.used += len(values)
        self.values.append(np.asarray(values, float))

    def event(self, kind: str, t_ns: int, attrs: dict[str, Any] | None = None, **columns: Any) -> None:
        self.add("events", kind=kind, t_ns=t_ns, attrs=json.dumps(attrs or {}, sort_keys=True), **columns)

    def tables(self) -> Tables:
        result = Tables(strings=list(self.pool))
        for name, parts in self.parts.items():
            if parts:
                setattr(result, name, {c: np.concatenate([p[c] for p in parts]) for c in SCHEMA[name]})
        if self.values:
            result.vector_values = np.concatenate(self.values)
        return result


class Simulation:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.writer = cluster, Writer()
        self.random = np.random.default_rng([cluster.seed, 77])
        count = cluster.ranks
        self.clock = np.zeros(count)
        host = np.arange(count) // cluster._per_host()
        per_host = np.random.default_rng([cluster.seed, 5]).uniform(-1, 1, cluster.hosts + 1) * cluster.offsets_s
        self.offset = per_host[np.minimum(host, cluster.hosts)]
        self.speed = np.array([cluster.vendors[model] for model in cluster._models()])
        self.noise = NOISE[cluster.noise](cluster, np.random.default_rng([cluster.seed, 9]))
        self.groups = {
            f"{kind}/{i}": np.array(members)
            for kind, lists in cluster._groups().items()
            for i, members in enumerate(lists)
        }
        self.seq = dict.fromkeys(self.groups, 0)
        self.durations = np.zeros((cluster.steps, count))
        self.fabric = Fabric(cluster)
        self.cards = Cards(cluster)
        self.dead: set[int] = set()

    def records(self) -> Tables:
        for step in range(self.cluster.steps):
            self._step(step)
        return self.writer.tables()

    def stamp(self, seconds: np.ndarray) -> np.ndarray:
        return START_NS + np.rint((seconds + self.offset) * 1e9).astype(np.int64)

    def _step(self, step: int) -> None:
        c = self.cluster
        everybody = np.arange(c.ranks)
        factor, stall, gc = self.noise(step)
        for fault in c.faults:
            if fault.kind == "gc" and fault.active(step) and step % 6 == 0:
                stall[list(fault.ranks)] += fault.strength
                gc[list(fault.ranks)] += fault.strength
        if step < 2:
            factor = factor * (6.0 if step == 0 else 2.0)
        begun = self.clock.copy()
        # What a step is made of: 2 % data, 60 % compute, the rest transfer and optimizer.
        slow = np.ones(c.ranks)
        for fault in c.faults:
            if fault.kind in SLOWS_COMPUTE and fault.active(step):
                slow[list(fault.ranks)] *= fault.strength
        unit = c.step_s * factor * slow / self.speed
        data = c.step_s * c.loading * self._jitter(0.3)
        for fault in c.faults:
            if fault.kind == "data" and fault.active(step):
                data[list(fault.ranks) or everybody] += (
                    fault.strength * self._jitter(0.1)[list(fault.ranks) or everybody]
                )
        self._phase(step, "data", lambda: self._busy(data))
        if c.copies:
            copies = c.step_s * c.copies * self._jitter(0.1)
            for fault in c.faults:
                if fault.kind in ("pcie", "copies") and fault.active(step):
                    touched = list(fault.ranks) or everybody
                    copies[touched] *= fault.strength
            self._phase(step, "h2d", lambda: self._busy(copies))
        segments = 2 * c.layers

        def pass_through(share: float, phase: str) -> None:
            for layer in range(c.layers):
                for _ in range(2):
                    self._busy(unit * share / segments * self._jitter(0.02))
                    self._meet(step, "ep", "all_to_all", phase, layer, 0.01 * c.step_s)

        saves = c.checkpoint_every > 0 and step % c.checkpoint_every == c.checkpoint_every - 1
        # Whoever saves allocates, and what is collected then is collected there.
        in_save = gc if saves else np.zeros(c.ranks)

        def forward() -> None:
            self._busy(stall - in_save)
            pass_through(0.25, "forward")

        def backward() -> None:
            pass_through(0.40, "backward")
            self._meet(step, "dp", "all_reduce", "backward", -1, 0.06 * c.step_s)

        for fault in c.faults:
            if fault.kind in STALLS and step == fault.step:
                # In the middle of the computing, of the loading, or between the phases.
                stall[list(fault.ranks)] += fault.strength
                self.cards.stalled(fault, float(self.clock.max()))
        self._phase(step, "forward", forward)
        if c.pipe:
            self._phase(step, "other", lambda: self._pass_on(step, 0.08 * c.step_s))
        self._phase(step, "backward", backward)
        update = 0.04 * c.step_s / self.speed * self._jitter(0.05)
        for fault in c.faults:
            if fault.kind == "update" and fault.active(step):
                update[list(fault.ranks)] += fault.strength * c.step_s
        self._phase(step, "optimizer", lambda: self._busy(update))
        self._meet(step, "world", "all_reduce", "optimizer", -1, 0.01 * c.step_s)
        if saves:
            saving = c.step_s * 2 * self._jitter(0.2)
            for fault in c.faults:
                if fault.kind == "checkpoint" and fault.active(step):
                    saving[list(fault.ranks)] *= fault.strength
            self._phase(step, "checkpoint", lambda: self._busy(saving + in_save))
        if c.eval_every and step % c.eval_every == c.eval_every - 1:
            self._phase(step, "eval", lambda: self._busy(c.step_s * 3 * self._jitter(0.05)))
        for _ in range(c.small):
            self._meet(step, "world", "all_reduce", "optimizer", -1, 0.002 * c.step_s, size=8)
        for fault in c.faults:
            if fault.kind == "between" and fault.active(step):
                self._busy(np.isin(everybody, fault.ranks) * fault.strength * c.step_s)
        self.durations[step] = self.clock - begun
        self.fabric.passed(step, float(self.durations[step].mean()))
        self.writer.add(
            "steps", rank=everybody, step=step, t0_ns=self.stamp(begun), t1_ns=self.stamp(self.clock),
            tokens=4096, gc_ns=np.rint(gc * 1e9).astype(np.int64),
        )  # fmt: skip
        self._experts(step)
        self._numerics(step)
        self.clock += 1e-5
        if self.cluster.signals:
            self.cards.passed(self, step)

    def _jitter(self, sigma: float) -> np.ndarray:
        return np.exp(sigma * self.random.standard_normal(self.cluster.ranks))

    def _busy(self, seconds: np.ndarray) -> None:
        self.clock = self.clock + seconds

    def _phase(self, step: int, name: str, work: Callable[[], None]) -> None:
        begun = self.clock.copy()
        work()
        if self.cluster.phases:
            self.writer.add(
                "spans", rank=np.arange(self.cluster.ranks), step=step, kind="phase", name=name,
                t0_ns=self.stamp(begun), t1_ns=self.stamp(self.clock),
            )  # fmt: skip

    def _meet(
        self, step: int, kind: str, op: str, phase: str, layer: int, transfer: float, size: int = 1 << 20
    ) -> None:
        names = [name for name in self.groups if name.startswith(kind + "/")]
        entered, left = self.clock.copy(), self.clock.copy()
        group = np.zeros(self.cluster.ranks, np.int32)
        seq = np.zeros(self.cluster.ranks, np.int64)
        for name in names:
            members = self.groups[name]
            nominal = transfer * float(np.exp(0.1 * self.random.standard_normal()))
            seconds = self.fabric.seconds(step, members, op, nominal, size < 1 << 16)
            left[members] = entered[members].max() + seconds
            group[members], seq[members] = self.writer.code(name), self.seq[name]
            self.seq[name] += 1
        self.clock = left
        self.writer.add(
            "collectives", rank=np.arange(self.cluster.ranks), step=step, op=op, group=group, seq=seq, phase=phase,
            layer=layer, bytes=size, t0_ns=self.stamp(entered), t1_ns=self.stamp(left),
        )  # fmt: skip

    def _pass_on(self, step: int, transfer: float) -> None:
        """Each stage sends to the next: a send and a receive that meet."""
        for name in [name for name in self.groups if name.startswith("pp/")]:
            for source, target in itertools.pairwise(self.groups[name].tolist()):
                pair = np.array([source, target])
                entered = self.clock[pair].copy()
                nominal = transfer * float(np.exp(0.1 * self.random.standard_normal()))
                left = entered.max() + self.fabric.seconds(step, pair, "recv", nominal, False)
                self.clock[pair] = left
                group = self.writer.code(f"{name}:{source}-{target}")
                for place, op in enumerate(("send", "recv")):
                    self.writer.add(
                        "collectives", rank=pair[place], step=step, op=op, group=group, seq=step, phase="forward",
                        bytes=1 << 20, peer=pair[1 - place], t0_ns=self._one(entered[place], pair[place]),
                        t1_ns=self._one(left[place], pair[place]),
                    )  # fmt: skip

    def _one(self, seconds: float, rank: int) -> int:
        return int(START_NS + round((seconds + self.offset[rank]) * 1e9))

    def _experts(self, step: int) -> None:
        c = self.cluster
        experts = 4 * c.ep
        for layer in range(c.layers):
            tokens = np.full((c.ranks, experts), 1024.0) + self.random.integers(-50, 50, (c.ranks, experts))
            for fault in c.faults:
                if fault.kind == "hot_expert" and fault.active(step):
                    position = fault.ranks[0] % c.ep
                    tokens[:, 4 * position : 4 * position + 4] *= fault.strength
            offsets = self.writer.used + experts * np.arange(c.ranks)
            self.writer.add(
                "vectors", metric="moe.expert.tokens", rank=np.arange(c.ranks), step=step, layer=layer,
                t_ns=self.stamp(self.clock), offset=offsets, length=experts,
            )  # fmt: skip
            self.writer.values.append(tokens.reshape(-1))
            self.writer.used += tokens.size

    def _numerics(self, step: int) -> None:
        local = 3.0 * np.exp(-step / 200) + 0.01 * self.random.standard_normal(self.cluster.ranks)
        norm = np.abs(1 + 0.1 * self.random.standard_normal(self.cluster.ranks))
        for fault in self.cluster.faults:
            if fault.kind == "nan" and step >= fault.step:
                local[list(fault.ranks) if step == fault.step else slice(None)] = np.nan
                norm[:] = np.nan
        times = self.stamp(self.clock)
        for metric, values in (("train.loss.local", local), ("train.grad_norm.local", norm)):
            self.writer.add(
                "samples", metric=metric, value=values, rank=np.arange(self.cluster.ranks), step=step, t_ns=times
            )
        mean = np.full(self.cluster.ranks, local.mean())
        self.writer.add(
            "samples", metric="train.loss", value=mean, rank=np.arange(self.cluster.ranks), step=step, t_ns=times
        )
