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
    return Cluster(
        layout, steps, noise, seed=int(random.integers(2**31)), tokens=int(random.choice([4096, 8192, 16384])),
        compute_s=float(random.uniform(0.2, 0.6)), name=name,
    )  # fmt: skip


def _has(layout: Layout, needs: str) -> bool:
    return {
        "hosts": layout.hosts > 1, "makes": layout.hosts > 1 and layout.pp == 1, "pp": layout.pp > 1,
        "leaves": layout.hosts > layout.hosts_per_switch, "dp": "dp" in layout.groups(),
        "inside": layout.ep * layout.tp <= layout.per_host,
    }.get(needs, True)  # fmt: skip


def _of(random: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(random.integers(len(choices)))]
