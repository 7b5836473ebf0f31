"""Draws runs to be judged: faults at random places, of random strength, in clusters and noise of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from sample_runs.cluster.faults import FAULTS, Fault
from sample_runs.cluster.layout import Layout
from sample_runs.cluster.noise import NOISE
from sample_runs.cluster.simulation import Cluster, Outcome, simulate

T = TypeVar("T")
STEPS = 140
WARM_UP_STEPS = 10
ONSET = (40, 70)
LAYOUTS = (
    Layout(8, ep=4), Layout(16, ep=8), Layout(16, ep=4, tp=2), Layout(16, ep=4, pp=2), Layout(32, ep=8),
    Layout(32, ep=16), Layout(32, ep=4, tp=2, pp=2), Layout(64, ep=8), Layout(64, ep=16, hosts_per_switch=2),
    Layout(64, ep=8, pp=4),
)  # fmt: skip


PAIRED = (
    "slow_device", "thermal_throttle", "ecc_remap", "shared_device", "cpu_contention", "cpu_quota", "slow_dataloader",
    "recompilation", "logging_overhead", "hot_expert", "slow_link", "checkpoint_stall", "odd_card",
)  # fmt: skip
"""Faults that are put into one run by twos."""
SAME_ONSET = 0.5
"""Share of the pairs whose faults begin with the same step."""


@dataclass(frozen=True)
class Case:
    """A run and what is wrong in it. cause: the right code, None in a healthy run. ranks: those that a right verdict
    names, ascending."""

    cluster: Cluster
    fault: Fault | None = None

    @property
    def cause(self) -> str | None:
        """The right code."""
        return None if self.fault is None else self.fault.kind.cause

    @property
    def ranks(self) -> list[int]:
        """Where it sits."""
        return [] if self.fault is None else self.fault.named(self.cluster.layout)

    def cost(self, outcome: Outcome) -> float | None:
        """Share by which the fault makes steps longer: the same run without it, to the last random number, is taken
        beside it. None for faults that cost no time, or are of the layout."""
        fault = self.fault
        if fault is None or fault.kind.free or fault.kind.act is None:
            return None
        usual = simulate(self.cluster.healthy()).durations
        since = slice(max(fault.step, WARM_UP_STEPS), None)
        return float(outcome.durations[since].mean() / usual[since].mean()) - 1


@dataclass(frozen=True)
class Pair:
    """A run with two faults on different ranks."""

    cluster: Cluster

    def truth(self) -> list[tuple[str, list[int]]]:
        """Cause and ranks of each."""
        return [(fault.kind.cause, fault.named(self.cluster.layout)) for fault in self.cluster.faults]

    def costs(self) -> list[float]:
        """Share by which each fault makes steps longer where the other is not: the same run is taken with one of them and
        with none."""
        since = slice(max(fault.step for fault in self.cluster.faults), None)
        usual = simulate(self.cluster.healthy()).durations[since].mean()
        alone = [replace(self.cluster, faults=(fault,)) for fault in self.cluster.faults]
        return [float(simulate(cluster).durations[since].mean() / usual) - 1 for cluster in alone]


def draw_pairs(count: int, seed: int) -> list[Pair]:
    """So many runs with two faults at once, half of them with the same onset."""
    pairs = []
    for place in range(count):
        random = np.random.default_rng([seed, place, 3])
        kinds = [str(name) for name in random.choice(PAIRED, 2, replace=False)]
        fits = [
            layout for layout in LAYOUTS if layout.ranks <= 32 and all(_has(layout, FAULTS[k].needs) for k in kinds)
        ]
        cluster = _cluster(
            _of(random, fits), _of(random, [n for n in NOISE if n != "vendor_mix"]), STEPS, random, f"pair-{place}"
        )
        if "checkpoint_stall" in kinds and not NOISE[cluster.noise].save_every:
            cluster = replace(cluster, save_every=20)
        onset = int(random.integers(*ONSET))
        onsets = [onset, onset if random.random() < SAME_ONSET else int(random.integers(*ONSET))]
        faults: list[Fault] = []
        for name, step in zip(kinds, onsets, strict=True):
            taken = {row for fault in faults for row in fault.rows(cluster.layout)}
            strength = float(random.uniform(FAULTS[name].weak, FAULTS[name].strong))
            ranks = [
                r
                for r in range(cluster.layout.ranks)
                if taken.isdisjoint(Fault(name, step, r).rows(cluster.layout))
            ]
            faults.append(Fault(name, step, _of(random, ranks), strength))
        pairs.append(Pair(replace(cluster, faults=tuple(faults))))
    return pairs


def draw_cases(count: int, seed: int) -> list[Case]:
    """So many faulty runs, all faults in turn."""
    names = list(FAULTS)
    return [_draw(names[place % len(names)], np.random.default_rng([seed, place]), place) for place in range(count)]


def draw_healthy(steps: int, seed: int) -> list[Case]:
    """Healthy runs of so many steps together, all families of noise in turn."""
    names, cases = list(NOISE), []
    lengths = [200] * (steps // 200) + ([steps % 200] if steps % 200 else [])
    for place, length in enumerate(lengths):
        random = np.random.default_rng([seed, place, 1])
        layout = _of(random, [layout for layout in LAYOUTS if layout.ranks <= 32])
        cases.append(Case(_cluster(layout, names[place % len(names)], length, random, f"healthy-{place}")))
    return cases


def _draw(name: str, random: np.random.Generator, place: int) -> Case:
    kind = FAULTS[name]
    layout = _of(random, [layout for layout in LAYOUTS if _has(layout, kind.needs)])
    noise = _of(random, [noise for noise in NOISE if noise != "vendor_mix" or kind.where != "stage"])
    if kind.needs == "makes":
        noise = "vendor_mix"
    cluster = _cluster(layout, noise, STEPS, random, f"{name}-{place}")
    if kind.needs == "saves" and not NOISE[noise].save_every:
        cluster = replace(cluster, save_every=20)
    strength = float(random.uniform(kind.weak, kind.strong))
    onset = 0 if kind.always else int(random.integers(*ONSET))
    fault = Fault(name, onset, int(random.integers(layout.ranks)), strength)
    return Case(replace(cluster, faults=(fault,)), fault)


def _cluster(layout: Layout, noise: str, steps: int, random: np.random.Generator, name: str) -> Cluster:
    cards = NOISE[noise].cards
    # Makes can only be mixed where there are several hosts.
    layout = replace(layout, cards=cards) if cards else layout
    cluster = Cluster(
        layout, steps, noise, seed=int(random.integers(2**31)), tokens=int(random.choice([4096, 8192, 16384])),
        compute_s=float(random.uniform(0.2, 0.6)), name=name,
    )  # fmt: skip
    return replace(cluster, unwaited=layout.pp > 1 and cluster.seed % 2 == 1)


def _has(layout: Layout, needs: str) -> bool:
    return {
        "hosts": layout.hosts > 1, "makes": layout.hosts > 1 and layout.pp == 1, "pp": layout.pp > 1,
        "leaves": layout.hosts > layout.hosts_per_switch, "dp": "dp" in layout.groups(),
        "many": layout.ranks >= 64, "inside": layout.ep * layout.tp <= layout.per_host,
    }.get(needs, True)  # fmt: skip


def _of(random: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(random.integers(len(choices)))]
