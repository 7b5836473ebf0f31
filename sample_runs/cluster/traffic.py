"""What comes to a simulated service, healthy and not: arrivals, lengths, first iterations, and what goes wrong.

A new fault of serving is one row of `TROUBLES`, a new kind of healthy traffic one row of `SERVED`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sample_runs.cluster.condition import Floats
from sample_runs.cluster.faults import rows_of
from sample_runs.cluster.layout import Layout


@dataclass
class Disturbance:
    """One iteration's state: factors that are 1 while nothing is wrong.

    rate, prompt: on arrivals and on their prompt tokens. chunk: on the prompt tokens that an iteration may take. room: on
    what each rank can keep. slow: on each rank's computing. compiled: compilations of each rank. router: on what routers
    send to an owner's experts in decoding.
    """

    ranks: int
    rate: float = 1.0
    prompt: float = 1.0
    chunk: float = 1.0
    room: Floats = field(init=False)
    slow: Floats = field(init=False)
    compiled: Floats = field(init=False)
    router: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.room, self.slow, self.compiled = np.ones(self.ranks), np.ones(self.ranks), np.zeros(self.ranks)


Act = Callable[[Disturbance, list[int], float, int], None]
"""State, ranks (or owners), strength, iterations since the onset."""


@dataclass(frozen=True)
class Ill:
    """One fault of serving. where: which ranks it touches, "all" for none in particular. weak, strong: bounds of its
    strength, a factor. load: of the service that it befalls. always: since the first iteration."""

    where: str
    weak: float
    strong: float
    load: float
    act: Act
    meaning: str
    always: bool = False
    cause: str = ""


@dataclass(frozen=True)
class Trouble:
    """One fault of a service: what, from which iteration on, at which rank, how strong."""

    name: str
    step: int
    rank: int = 0
    strength: float = 1.0

    @property
    def kind(self) -> Ill:
        """What is known of it."""
        return TROUBLES[self.name]

    @property
    def cause(self) -> str:
        """The right code."""
        return self.kind.cause or self.name

    def rows(self, layout: Layout) -> list[int]:
        """Ranks that it touches, ascending."""
        if self.kind.where == "experts":
            return [rank for rank in range(layout.ranks) if layout.owner[rank] == layout.owner[self.rank]]
        return rows_of(self.kind.where, self.rank, layout)

    def named(self, layout: Layout) -> list[int]:
        """Ranks that a right verdict names."""
        return [] if self.kind.where == "all" else self.rows(layout)


def _smaller(now: Disturbance, rows: list[int], strength: float, since: int) -> None:
    now.room[rows] /= strength


def _long_prompts(now: Disturbance, rows: list[int], strength: float, since: int) -> None:
    now.prompt *= strength
    now.chunk *= 16


def _imbalanced(now: Disturbance, rows: list[int], strength: float, since: int) -> None:
    now.router[rows[0]] = strength


def _more(now: Disturbance, rows: list[int], strength: float, since: int) -> None:
    now.rate *= strength


def _cold(now: Disturbance, rows: list[int], strength: float, since: int) -> None:
    """The first iteration compiles, the next ones meet shapes that are new, too."""
    now.slow[rows] *= 1 + (strength - 1) * 0.4**since if since < 8 else 1.0


def _recompiles(now: Disturbance, rows: list[int], strength: float, since: int) -> None:
    """A rank compiles again for every batch of a size that it has not seen, which does not end."""
    if since % 15 == 0:
        now.slow[rows] *= strength
        now.compiled[rows] += 1


TROUBLES: dict[str, Ill] = {
    "kv_cache_exhausted": Ill("rank", 10.2, 13.2, 0.8, _smaller, "the cache of keys and values of a rank becomes too small"),
    "kv_cache_everywhere": Ill(
        "all", 10.2, 13.2, 0.9, _smaller, "the caches of all ranks become too small", cause="kv_cache_exhausted"
    ),
    "prefill_interference": Ill("all", 2.5, 4.0, 0.45, _long_prompts, "prompts become long, and are prefilled in one piece"),
    "decode_expert_imbalance": Ill(
        "experts", 4.0, 8.0, 0.7, _imbalanced, "routers send most of what is decoded to one owner's experts"
    ),
    "queue_overload": Ill("all", 2.6, 3.6, 0.6, _more, "more requests come than can be served"),
    "cold_start": Ill("all", 150.0, 400.0, 0.5, _cold, "the first iterations compile and load", always=True),
    "cold_rank": Ill(
        "rank", 150.0, 400.0, 0.5, _cold, "one rank compiles and loads in the first iterations", always=True, cause="cold_start"
    ),
    "recompiling": Ill("rank", 6.0, 12.0, 0.45, _recompiles, "one rank compiles again and again", cause="recompilation"),
}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """Healthy traffic. rate: factor on arrivals at a moment (s). lengths: factors on prompt and output of a request.
    open_from: the first moment from one on at which requests come. cold: what the first iterations do."""

    rate: Callable[[float], float] = lambda moment: 1.0
    lengths: Callable[[np.random.Generator], tuple[float, float]] = lambda random: (
        float(np.exp(0.3 * random.standard_normal())), float(np.exp(0.3 * random.standard_normal()))
    )  # fmt: skip
    open_from: Callable[[float], float] = lambda moment: moment
    cold: Callable[[int, Disturbance], None] = lambda step, now: None


@dataclass(frozen=True)
class Traffic:
    """A kind of healthy traffic."""

    make: Callable[[np.random.Generator], Load]


def _bursty(random: np.random.Generator) -> Load:
    """Bursts above what can be served, and quiet between them."""
    period, phase = float(random.uniform(4.0, 7.0)), float(random.uniform(0.0, 5.0))
    return Load(rate=lambda moment: 2.2 if (moment + phase) % period < 0.25 * period else 0.5)


def _mixed(random: np.random.Generator) -> Load:
    """Short and long prompts, short and long answers."""

    def lengths(draw: np.random.Generator) -> tuple[float, float]:
        return float(np.exp(0.8 * draw.standard_normal() - 0.2)), float(np.exp(0.7 * draw.standard_normal() - 0.2))

    return Load(lengths=lengths)


def _swelling(random: np.random.Generator) -> Load:
    """Traffic that swells and ebbs slowly, and batches with it."""
    period = float(random.uniform(12.0, 25.0))
    return Load(rate=lambda moment: 0.85 + 0.4 * float(np.sin(2 * np.pi * moment / period)))


def _idle(random: np.random.Generator) -> Load:
    """Pauses without any request."""
    open_s, closed_s = float(random.uniform(3.0, 6.0)), float(random.uniform(2.0, 5.0))

    def open_from(moment: float) -> float:
        into = moment % (open_s + closed_s)
        return moment if into < open_s else moment + open_s + closed_s - into

    return Load(open_from=open_from)


def _warming(random: np.random.Generator) -> Load:
    """First iterations that take some times as long."""

    def cold(step: int, now: Disturbance) -> None:
        now.slow *= {0: 6.0, 1: 3.0, 2: 2.0}.get(step, 1.0)

    return Load(cold=cold)


SERVED: dict[str, Traffic] = {
    "steady": Traffic(lambda random: Load()),
    "bursty": Traffic(_bursty),
    "mixed": Traffic(_mixed),
    "swelling": Traffic(_swelling),
    "idle": Traffic(_idle),
    "warm_up": Traffic(_warming),
}
