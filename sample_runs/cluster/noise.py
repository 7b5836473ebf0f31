"""What healthy clusters do: the noise of step times, by family. None of it is a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sample_runs.cluster.condition import Condition, Floats

Draw = Callable[[int, Condition], Floats]
"""Adds a step's noise to the condition; the factor on each rank's compute time [ranks]."""


@dataclass(frozen=True)
class Family:
    """A kind of noise. make: for so many ranks, with a step's usual seconds, from a generator. save_every and
    evaluate_every: steps between checkpoints and evaluations, 0 for none. cards: makes by host where it asks for some."""

    make: Callable[[int, float, np.random.Generator], Draw]
    save_every: int = 0
    evaluate_every: int = 0
    cards: tuple[str, ...] = ()


def _even(sigma: float) -> Callable[[int, float, np.random.Generator], Draw]:
    def make(ranks: int, step_s: float, random: np.random.Generator) -> Draw:
        return lambda step, condition: np.exp(sigma * random.standard_normal(ranks))

    return make


def _spiky(ranks: int, step_s: float, random: np.random.Generator) -> Draw:
    """One step in a hundred of a rank is interrupted, for up to some steps."""

    def draw(step: int, condition: Condition) -> Floats:
        hit = random.random(ranks) < 0.01
        condition.pause_s += hit * random.exponential(1.5 * step_s, ranks)
        return np.exp(0.04 * random.standard_normal(ranks))

    return draw


def _sequences(ranks: int, step_s: float, random: np.random.Generator) -> Draw:
    """Steps of long and of short sequences for all, and a little unevenness between ranks."""

    def draw(step: int, condition: Condition) -> Floats:
        condition.sequence *= np.exp(0.25 * random.standard_normal()) * np.exp(0.06 * random.standard_normal(ranks))
        return np.exp(0.02 * random.standard_normal(ranks))

    return draw


def _shared(ranks: int, step_s: float, random: np.random.Generator) -> Draw:
    """Hosts whose cores are shared: every process is kept off them, now more, now less, for tens of steps."""
    state = random.standard_normal(ranks)

    def draw(step: int, condition: Condition) -> Floats:
        nonlocal state
        state = 0.9 * state + np.sqrt(1 - 0.81) * random.standard_normal(ranks)
        condition.off_cpu += np.clip(0.08 + 0.04 * state, 0.0, 0.3)
        preempted = random.random(ranks) < 0.08
        condition.pause_s += preempted * random.exponential(0.2 * step_s, ranks)
        return np.exp(0.06 * random.standard_normal(ranks))

    return draw


def _warming(ranks: int, step_s: float, random: np.random.Generator) -> Draw:
    """The first steps compile and connect; caches and clocks settle over the next ones."""
    until = int(random.integers(2, 8))

    def draw(step: int, condition: Condition) -> Floats:
        first = (6.0 if step == 0 else 2.0) if step < 2 else 1 + 0.6 * np.exp(-(step - 2) / until)
        return first * np.exp(0.03 * random.standard_normal(ranks))

    return draw


NOISE: dict[str, Family] = {
    "clean": Family(_even(0.01)),
    "spiky": Family(_spiky),
    "checkpoint": Family(_even(0.03), save_every=25),
    "sequences": Family(_sequences),
    "shared_host": Family(_shared),
    "warm_up": Family(_warming),
    "evaluation": Family(_even(0.03), save_every=50, evaluate_every=20),
    "vendor_mix": Family(_even(0.03), cards=("H200", "MI300X")),
}
