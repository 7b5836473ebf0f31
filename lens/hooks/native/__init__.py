"""Optional C++: compiled once per torch version into the user's cache, never in a training process.

`libraries` says what there is and how it is named, `cache` where it lies and whether it may be trusted, `build`
compiles it (a process of its own, started by the agent, ``lens run``, ``lens demo`` or ``lens doctor --build``), and
`load` is all that a training process calls. Without a compiler everything works, in Python.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from lens.hooks.native import cache
from lens.hooks.native.libraries import LIBRARIES, torch_identity

__all__ = ["built", "complete", "load", "torch_identity"]


def built(name: str) -> Path | None:
    """Where the library of this name lies, built for this very Python and torch; None if it is not, or not safely."""
    try:
        file_name = LIBRARIES[name].file_name()
        return cache.find(file_name) if file_name else None
    except (OSError, cache.CacheError):
        return None


def complete() -> bool:
    """Whether all that can be built is built."""
    return all(built(name) for name in LIBRARIES)


def load(name: str) -> Any | None:
    """The module of this name, if it is built; else None, quietly."""
    module_name = f"lens_{name}"
    found = sys.modules.get(module_name)
    if found is not None:
        return found
    path = built(name)
    spec = importlib.util.spec_from_file_location(module_name, path) if path else None
    if spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception:
        # Built against something that has gone, or cut short: Python does the work instead.
        return None
    sys.modules[module_name] = module
    return module
