"""Cards whose memory fails: told as an event, also while it costs no time yet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis import policy
from lens.diagnosis.card_measures import ERRORS, MEMORY_XIDS, ROWS, rows_grown
from lens.diagnosis.examine import Examiner
from lens.diagnosis.notices import Cause, Evidence, Notice
from lens.diagnosis.signatures import ADVICE

CAUSES = {
    "ecc_remap": Cause(ADVICE["ecc_remap"], absorbs=("compute", "h2d", "host")),
}
BY_XID, BY_COUNT = 0.95, 0.85
"""How sure an error is that the card names, and one that only a counter shows."""


@dataclass(frozen=True)
class Cards:
    """What the cards of a run reported."""

    run: Examiner

    @classmethod
    def of(cls, run: Examiner) -> Cards:
        """Nothing is read before it is asked for."""
        return cls(run)

    def at(self, place: int) -> list[Notice]:
        """Cards that reported failing memory up to a place."""
        if place < policy.WARM_UP_STEPS:
            return []
        found = (self._reported(row, place) or self._counted(row, place) for row in self._rows())
        return [notice for notice in found if notice is not None]

    def _rows(self) -> list[int]:
        """Ranks of whose cards anything is known."""
        signals = self.run.signals
        counted = [series for _, series in signals.parts(ROWS)]
        uncorrected = signals.series(ERRORS)
        counted += [] if uncorrected is None else [uncorrected]
        rising = [np.unique(series.row) for series in counted if np.ptp(series.value) > 0]
        return sorted({*signals.xid_rows(), *(int(row) for rows in rising for row in rows)})

    def _reported(self, row: int, place: int) -> Notice | None:
        told = [(at, xid) for at, xid in self.run.signals.xids(row) if xid in MEMORY_XIDS and at <= place]
        if not told:
            return None
        onset, xid = told[0]
        times = f" {len(told)} times" if len(told) > 1 else ""
        return Notice(
            "ecc_remap", (row,), onset, None, BY_XID,
            f"the card of {{ranks}} reported failing memory (Xid {xid}){times} since step {{onset}}",
            (Evidence("gpu.xid", None, float(xid)),),
            rivals=(("slow_device", f"the card itself reported a memory error (Xid {xid})"),),
        )  # fmt: skip

    def _counted(self, row: int, place: int) -> Notice | None:
        grown = rows_grown(self.run.signals, row, 0, place)
        if not grown:
            return None
        first = self._first(row, place)
        return Notice(
            "ecc_remap", (row,), first, None, BY_COUNT,
            f"memory of the card of {{ranks}} fails: {grown:.0f} more rows or errors since step {{onset}}",
            (Evidence(ROWS, 0.0, grown),),
            rivals=(("slow_device", "the card counts failing memory"),),
        )  # fmt: skip

    def _first(self, row: int, place: int) -> int:
        """The first step by which a card counted a failure; counts only grow, so that the middle tells which half."""
        low, high = 0, place
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if rows_grown(self.run.signals, row, 0, middle) else (middle + 1, high)
        return low
