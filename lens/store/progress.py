"""How far each rank of a run has come: kept as batches arrive, so that nobody has to ask the database."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from lens.slots import NULL
from lens.tables import Column, Tables

STALE_S = 15.0
"""Seconds without a record after which a run that has not ended counts as stale, and a rank as silent."""
_EXIT_SLACK_NS = 5_000_000_000
"""Records of a rank this long after its end are echoes (the host's last poll), later ones a new life."""
_TIMES = {"samples": "t_ns", "steps": "t1_ns", "spans": "t1_ns", "collectives": "t1_ns", "vectors": "t_ns",
          "events": "t_ns"}  # fmt: skip


@dataclass
class RankProgress:
    """One rank; -1 stands for records of no rank. `NULL` where nothing is known."""

    last_step: int = NULL
    first_t_ns: int = NULL
    last_t_ns: int = NULL
    exit_t_ns: int = NULL

    @property
    def ended(self) -> bool:
        """Whether its process has ended and no later one took its place."""
        return self.exit_t_ns != NULL and self.last_t_ns <= self.exit_t_ns + _EXIT_SLACK_NS


@dataclass
class Progress:
    """One run. Counts are of this data folder, whichever process took them."""

    ranks: dict[int, RankProgress] = field(default_factory=dict)
    lost_slots: int = 0
    rejected: int = 0
    batches: int = 0
    pruned: int = 0
    """How often records past their retention were deleted since the server started."""
    arrived: float | None = None
    """time.monotonic() of the newest batch; None if none came since the server started."""

    def take(self, tables: Tables) -> set[int]:
        """Note what these records say; returns the ranks that they speak of."""
        touched: set[int] = set()
        for name, column in _TIMES.items():
            if tables.count(name):
                table = tables.table(name)
                times = table[column]
                began = table.get("t0_ns", times)
                touched |= self._times(table["rank"], began, np.maximum(began, times))
        self._steps(tables)
        self._exits(tables)
        return touched

    @property
    def last_step(self) -> int | None:
        """Newest step that any rank has finished."""
        return _known(max((rank.last_step for rank in self.ranks.values()), default=NULL))

    @property
    def last_t_ns(self) -> int | None:
        """Time of the newest record."""
        return _known(max((rank.last_t_ns for rank in self.ranks.values()), default=NULL))

    @property
    def first_t_ns(self) -> int | None:
        """Time of the oldest record."""
        known = [rank.first_t_ns for rank in self.ranks.values() if rank.first_t_ns != NULL]
        return min(known) if known else None

    def age_s(self) -> float | None:
        """Seconds since the newest batch came, or, from before the server's start, since its newest record."""
        if self.arrived is not None:
            return max(0.0, time.monotonic() - self.arrived)
        newest = self.last_t_ns
        return None if newest is None else max(0.0, time.time() - newest / 1e9)

    def state(self) -> str:
        """live, stale or ended."""
        ranks = [progress for rank, progress in self.ranks.items() if rank >= 0]
        if ranks and all(progress.ended for progress in ranks):
            return "ended"
        age = self.age_s()
        return "live" if age is not None and age <= STALE_S else "stale"

    def ranks_reporting(self) -> int:
        """Ranks heard of lately, by the run's own clock; of a run that is over, all that ever reported."""
        ranks = [progress for rank, progress in self.ranks.items() if rank >= 0]
        newest = max((progress.last_t_ns for progress in ranks), default=NULL)
        if newest == NULL or self.state() == "ended":
            return len(ranks)
        return sum(progress.last_t_ns >= newest - STALE_S * 1e9 and not progress.ended for progress in ranks)

    def _times(self, ranks: Column, began: Column, ended: Column) -> set[int]:
        distinct, inverse = np.unique(ranks, return_inverse=True)
        newest, oldest = np.full(len(distinct), NULL), np.full(len(distinct), 2**63 - 1)
        np.maximum.at(newest, inverse, ended)
        np.minimum.at(oldest, inverse, began)
        for rank, low, high in zip(distinct.tolist(), oldest.tolist(), newest.tolist(), strict=True):
            progress = self.ranks.setdefault(rank, RankProgress())
            progress.last_t_ns = max(progress.last_t_ns, high)
            progress.first_t_ns = low if progress.first_t_ns == NULL else min(progress.first_t_ns, low)
        return set(distinct.tolist())

    def _steps(self, tables: Tables) -> None:
        done = tables.steps["t1_ns"] != NULL
        ranks, steps = tables.steps["rank"][done], tables.steps["step"][done]
        for rank in np.unique(ranks).tolist():
            progress = self.ranks[rank]
            progress.last_step = max(progress.last_step, int(steps[ranks == rank].max()))

    def _exits(self, tables: Tables) -> None:
        events = tables.select("events", tables.events["kind"] == tables.code("process.exit"))
        for rank, time_ns in zip(events["rank"].tolist(), events["t_ns"].tolist(), strict=True):
            progress = self.ranks[rank]
            progress.exit_t_ns = max(progress.exit_t_ns, time_ns)


def _known(value: int) -> int | None:
    return None if value == NULL else value
