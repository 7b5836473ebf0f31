"""What healthy ranks do: families of noise in a simulated cluster's self times."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cluster import Cluster

Noise = Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _family(
    sigma: float, spikes: float = 0.0, spike_steps: float = 5.0
) -> Callable[[Cluster, np.random.Generator], Noise]:
    def make(cluster: Cluster, random: np.random.Generator) -> Noise:
        def draw(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            factor = np.exp(sigma * random.standard_normal(cluster.ranks))
            hit = random.random(cluster.ranks) < spikes
            return (
                factor,
                hit * cluster.step_s * spike_steps * random.random(cluster.ranks),
                np.zeros(cluster.ranks),
            )

        return draw

    return make


def _correlated(sigma: float, memory: float) -> Callable[[Cluster, np.random.Generator], Noise]:
    def make(cluster: Cluster, random: np.random.Generator) -> Noise:
        state = sigma * random.standard_normal(cluster.ranks)

        def draw(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            nonlocal state
            state = memory * state + sigma * np.sqrt(1 - memory**2) * random.standard_normal(cluster.ranks)
            return np.exp(state), np.zeros(cluster.ranks), np.zeros(cluster.ranks)

        return draw

    return make


def _sequences(cluster: Cluster, random: np.random.Generator) -> Noise:
    def draw(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        common = np.exp(0.3 * random.standard_normal())
        factor = common * np.exp(0.08 * random.standard_normal(cluster.ranks))
        return factor, np.zeros(cluster.ranks), np.zeros(cluster.ranks)

    return draw


def _shared(cluster: Cluster, random: np.random.Generator) -> Noise:
    """Ranks that share cores: in blocks of 5 to 40 steps some run slower, and single steps are preempted."""
    block = {"left": 0, "factor": np.ones(cluster.ranks)}

    def draw(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if block["left"] <= 0:
            block["left"] = int(random.integers(5, 40))
            block["factor"] = 1 + 0.25 * random.random(cluster.ranks) * (random.random(cluster.ranks) < 0.5)
        block["left"] -= 1
        preempted = (random.random(cluster.ranks) < 0.1) * random.exponential(0.4 * cluster.step_s, cluster.ranks)
        return (
            block["factor"] * np.exp(0.15 * random.standard_normal(cluster.ranks)),
            preempted,
            np.zeros(cluster.ranks),
        )

    return draw


def _collected(cluster: Cluster, random: np.random.Generator) -> Noise:
    """Garbage collection: a pause of half a step each 20 to 60 steps, on each rank at its own times."""
    due = random.integers(20, 60, cluster.ranks)

    def draw(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        hit = due <= step
        due[hit] = step + random.integers(20, 60, int(hit.sum()))
        pause = hit * 0.5 * cluster.step_s
        return np.exp(0.03 * random.standard_normal(cluster.ranks)), pause, pause

    return draw


def _drifting(cluster: Cluster, random: np.random.Generator) -> Noise:
    slope = random.normal(0, 0.02, cluster.ranks)

    def draw(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        common = 1 + 0.2 * np.sin(step / 150)
        factor = common * (1 + slope * step / 1000) * np.exp(0.04 * random.standard_normal(cluster.ranks))
        return factor, np.zeros(cluster.ranks), np.zeros(cluster.ranks)

    return draw


NOISE: dict[str, Callable[[Cluster, np.random.Generator], Noise]] = {
    "quiet": _family(0.02),
    "loud": _family(0.15),
    "spiky": _family(0.05, spikes=0.01, spike_steps=8.0),
    "correlated": _correlated(0.08, 0.9),
    "sequences": _sequences,
    "shared": _shared,
    "collected": _collected,
    "drifting": _drifting,
}
