"""``Accelerator(log_with=lens.AccelerateTracker())``."""

from __future__ import annotations

from typing import Any

from accelerate.tracking import GeneralTracker

from lens.hooks import api


class AccelerateTracker(GeneralTracker):
    """Begin to record with ``accelerator.init_trackers``, as ``lens run`` would.

    What ``accelerator.log`` is given is recorded, and ``save_state`` is a phase of the step.

    Args:
        run: run id; default LENS_RUN, else drawn by rank 0 and shared.
    """

    name = "lens"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, run: str | None = None) -> None:
        super().__init__()
        self._run = run

    @property
    def tracker(self) -> None:
        """There is nothing behind it to be used directly: see `lens.log`."""
        return None

    def start(self) -> None:
        """Every rank begins by itself."""
        api.watch_framework(None, run=self._run)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """What to show and compare."""
        api.watch_framework(None, run=self._run, config=values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Nothing: what ``accelerator.log`` is given has been read there, on every rank."""
