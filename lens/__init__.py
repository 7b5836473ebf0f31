"""lens: where the time, the memory and the money go in training, and what to do about it.

    import lens
    lens.watch(model, optimizer)
    for batch in lens.data(loader):
        with lens.step():
            ...

Importing lens pulls in neither torch nor the server; the hook (`lens.hooks.api`) loads with the first name asked for.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from lens.hooks.api import (
        attachable,
        data,
        detach,
        enabled,
        expert_tokens,
        log,
        phase,
        profile,
        request,
        step,
        watch,
    )
    from lens.hooks.frameworks.accelerate import AccelerateTracker as AccelerateTracker
    from lens.hooks.frameworks.lightning import LightningCallback as LightningCallback
    from lens.hooks.frameworks.transformers import TransformersCallback as TransformersCallback
    from lens.reading import StoredRun

__version__ = "0.1.0"
__all__ = [
    "attachable",
    "data",
    "detach",
    "enabled",
    "expert_tokens",
    "log",
    "open",
    "phase",
    "profile",
    "request",
    "step",
    "watch",
]

_CALLBACKS = {
    "AccelerateTracker": "accelerate",
    "LightningCallback": "lightning",
    "TransformersCallback": "transformers",
}
"""Callback -> its file, which imports the framework; not in ``__all__``, since most are not installed."""

if sys.platform == "win32":
    raise ImportError(
        "lens does not run on Windows: training and agent need Linux, the server Linux or macOS. "
        "Windows Subsystem for Linux works."
    )


def open(
    run: str = "latest", *, server: str | None = None, token: str | None = None, data: str | Path | None = None
) -> StoredRun:
    """A stored run to read from: ``lens.open("latest").series("train.loss").pandas()``.

    Args:
        run: its id, the beginning of its id, or ``latest``.
        server: URL of a lens server; default LENS_SERVER, else the server that owns the data folder.
        token: that server's token; default LENS_TOKEN, else the folder's token file.
        data: the data folder; default LENS_DATA, else ``./lens-data``.

    Raises:
        lens.reading.ReadingError: no such run, no folder, or nobody answers.
    """
    from lens.reading import open_run

    return open_run(run, server=server, token=token, data=data)


def __getattr__(name: str) -> Any:
    # The function itself, and from then on without a detour: these are called in every step.
    if name not in __all__ and name not in _CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    file = importlib.import_module(
        f"lens.hooks.frameworks.{_CALLBACKS[name]}" if name in _CALLBACKS else "lens.hooks.api"
    )
    found = globals()[name] = getattr(file, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
