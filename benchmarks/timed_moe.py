"""The sample training, with the time of every step noted beside lens: one rank of `benchmarks/endurance.py`.

torchrun --nproc-per-node 4 benchmarks/timed_moe.py FOLDER [options of sample_runs.moe]
"""

from __future__ import annotations

import os
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sample_runs.moe import observe, options, train

KEPT = 100
"""Times written at once."""


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


if __name__ == "__main__":
    folder, rank = Path(sys.argv.pop(1)), os.environ["RANK"]
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    train.observer = lambda with_lens: Timed(observe.observer(with_lens), folder / f"{rank}.times")
    sys.exit(train.main(options.parse()))
