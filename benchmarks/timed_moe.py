"""The sample training, with the time of every step noted beside lens: one rank of `benchmarks/endurance.py`.

torchrun --nproc-per-node 4 benchmarks/timed_moe.py FOLDER [options of sample_runs.moe]
"""

from __future__ import annotations

import json
import os
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens.hooks import api
from lens.ring_reader import RingReader
from sample_runs.moe import observe, options, train

KEPT = 100
"""Times written at once."""


def written() -> dict[str, int]:
    """Slots that this process has written so far into its own ring and into that of its collectives, read or not."""
    recording = api.recording()
    counts = {"main": 0, "native": 0}
    for path in recording["ring"].parent.glob("*.ring") if recording else ():
        reader = RingReader(path)
        while reader.poll() is not None:
            pass
        counts["native" if path.stem.startswith("native") else "main"] += reader.cursor - 1
        reader.close()
    return counts


class Timed:
    """lens or nothing, and a clock at every batch."""

    def __init__(self, inner: Any, path: Path) -> None:
        self._inner = inner
        self._path = path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def data(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader of what is inside; each batch begins a step."""
        kept = array("q")
        with self._path.open("wb") as file:
            try:
                for batch in self._inner.data(loader):
                    kept.append(time.monotonic_ns())
                    if len(kept) == KEPT:
                        kept.tofile(file)
                        file.flush()
                        del kept[:]
                    yield batch
            finally:
                kept.append(time.monotonic_ns())
                kept.tofile(file)
                self._path.with_suffix(".slots").write_text(json.dumps(written()))


if __name__ == "__main__":
    folder, rank = Path(sys.argv.pop(1)), os.environ["RANK"]
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    train.observer = lambda with_lens: Timed(observe.observer(with_lens), folder / f"{rank}.times")
    sys.exit(train.main(options.parse()))
