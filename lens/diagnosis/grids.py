"""Places at which a run is judged by what does not change from one step to the next: close at first, ever wider later.

A run of a million steps has a few hundred of them, so that what is asked at each costs no more as a run grows.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lens.diagnosis.arrays import Ints

NOTICED, STANDING = 5, 20
"""Steps between two places at first, for what families notice and for what was slow since the first step."""
SHARE = 40
"""Later every 40th part of the run so far."""


def grid(count: int, every: int = NOTICED) -> Ints:
    """Places of a grid in a run of so many steps, ascending."""
    places, place = [], every - 1
    while place < count:
        places.append(place)
        place += max(every, (place + 1) // SHARE)
    return np.array(places, np.int64)


@lru_cache(maxsize=64)
def on_grid(place: int, every: int = NOTICED) -> int:
    """The last place of a grid not after a place; -1 before the first."""
    places = grid(place + 1, every)
    return int(places[-1]) if len(places) else -1
