"""What a server has freed goes back to the system while it serves."""

from __future__ import annotations

import ctypes
import sys
import time

import numpy as np
import psutil
import pytest

from lens.store.memory import given_back


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library keeps nothing to give back"
)
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux")
def test_freed_memory_between_pieces_in_use_goes_back() -> None:
    process = psutil.Process()
    # Small enough to come from the heap, with a piece in use after each.
    freed, kept = [], []
    for _ in range(2000):
        freed.append(np.ones(100_000, "u1"))
        kept.append(np.ones(900, "u1"))
    full = process.memory_info().rss
    freed.clear()
    with given_back(0.01):
        deadline = time.monotonic() + 20
        while process.memory_info().rss > full - 100_000_000 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.memory_info().rss <= full - 100_000_000
    assert len(kept) == 2000
