"""A bound on the series of a run: what goes beyond it is refused with its name, and costs no other record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lens.store.decode import Decoded
from lens.store.registry import Registry
from lens.store.rows import RowMaker, Series
from lens.tables import Tables

_TABLES = ("samples", "vectors")


def beyond(registry: Registry, number: int, tables: Tables, most: int) -> tuple[int, ...]:
    """Mids of the series in these records that the run has no room for.

    Series count once they have reached the database, so batches under way at the same time may pass the bound together.
    """
    room = most - registry.count_series(number)
    if sum(tables.count(name) for name in _TABLES) <= room:
        return ()  # not even if every record were a series of its own
    found: dict[int, Series] = {}
    maker = RowMaker()
    for name in _TABLES:
        maker.series(name, tables, found)
    known = {series.mid for series in registry.series(number)}
    new = [mid for mid in found if mid not in known]
    return tuple(new[max(0, room) :])


def without(decoded: Decoded, refused: tuple[int, ...], most: int) -> Decoded:
    """The same records without those of these series, which are noted as refused."""
    tables, rejected = decoded.tables, decoded.rejected
    found: dict[int, Series] = {}
    maker = RowMaker()
    kept: dict[str, Any] = {}
    unwanted = np.array(refused, "<u8")
    for name in _TABLES:
        mids = maker.series(name, tables, found)
        bad = np.isin(mids, unwanted)
        kept[name] = tables.select(name, ~bad)
        for mid, count in zip(*np.unique(mids[bad], return_counts=True), strict=True):
            series = found[int(mid)]
            reason = f"{series.metric} {series.labels or ''}: the run has {most} series already; labels must repeat"
            rejected.add(0, reason, int(count))
    return replace(decoded, tables=replace(tables, **kept))
