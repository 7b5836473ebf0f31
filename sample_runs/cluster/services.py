"""Draws services to be judged: troubles at random places, of random strength, in traffic of every healthy kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sample_runs.cluster.layout import Layout
from sample_runs.cluster.serving import Served, Service, serve
from sample_runs.cluster.traffic import SERVED, TROUBLES, Trouble

ONSET = (250, 350)
LAYOUTS = (Layout(8, ep=8), Layout(8, ep=4))
STEADY = ("steady", "mixed", "warm_up")
"""Traffic that neither swells nor pauses: where it does, a trouble comes and goes with it."""
LOAD = (0.35, 0.65)
"""Of healthy services."""


@dataclass(frozen=True)
class ServiceCase:
    """A service and what is wrong with it. cause: the right code, None in a healthy one. ranks: those that a right verdict
    names, ascending."""

    service: Service

    @property
    def trouble(self) -> Trouble | None:
        """What is wrong."""
        return self.service.faults[0] if self.service.faults else None

    @property
    def cause(self) -> str | None:
        """The right code."""
        return None if self.trouble is None else self.trouble.cause

    @property
    def ranks(self) -> list[int]:
        """Where it sits."""
        return [] if self.trouble is None else self.trouble.named(self.service.layout)

    def cost(self, served: Served) -> float | None:
        """Share by which requests of its ranks that came since the onset took longer than the same service without it needs."""
        if self.trouble is None:
            return None
        rows = self.trouble.rows(self.service.layout)
        step, usual = self.trouble.step, serve(self.service.healthy())
        return _mean(served, rows, step) / _mean(usual, rows, step) - 1


def draw_services(count: int, seed: int) -> list[ServiceCase]:
    """So many services with a trouble, all troubles in turn."""
    cases = []
    for place in range(count):
        name, random = list(TROUBLES)[place % len(TROUBLES)], np.random.default_rng([seed, place, 8])
        kind = TROUBLES[name]
        layout = LAYOUTS[int(random.integers(len(LAYOUTS)))]
        step = 0 if kind.always else int(random.integers(*ONSET))
        trouble = Trouble(
            name, step, int(random.integers(layout.ranks)), float(random.uniform(kind.weak, kind.strong))
        )
        noise = STEADY[int(random.integers(2 if kind.always else len(STEADY)))]
        cases.append(_case(layout, noise, kind.load, (trouble,), random, f"{name}-{place}"))
    return cases


def draw_served(count: int, seed: int) -> list[ServiceCase]:
    """So many healthy services, all kinds of traffic in turn."""
    cases = []
    for place in range(count):
        random = np.random.default_rng([seed, place, 9])
        layout, noise = LAYOUTS[int(random.integers(len(LAYOUTS)))], list(SERVED)[place % len(SERVED)]
        cases.append(_case(layout, noise, float(random.uniform(*LOAD)), (), random, f"served-{place}"))
    return cases


def _case(
    layout: Layout, noise: str, load: float, faults: tuple[Trouble, ...], random: np.random.Generator, name: str
) -> ServiceCase:
    seed = int(random.integers(2**31))
    return ServiceCase(Service(layout, noise=noise, load=load, faults=faults, seed=seed, name=name))


def _mean(served: Served, rows: list[int], step: int) -> float:
    late = (served.arrived >= served.begun[step]) & np.isin(served.rank, rows)
    return float(served.lasted[late].mean())
