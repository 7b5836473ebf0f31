"""What can be built, and the file name under which it is kept: equal names may stand for one another."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import platform
import runpy
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parent
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-DNDEBUG", "-w")


class Library(NamedTuple):
    """One extension module, ``lens_<name>``."""

    name: str
    sources: tuple[str, ...]
    """Files beside this one; the first is compiled, the others it includes."""
    torch: bool
    """Whether it is built against torch, and so for one torch only."""
    does: str
    """What there is with it, in words."""
    without: str
    """What there is not without it."""

    @functools.cache  # noqa: B019 - libraries live as long as the process
    def file_name(self) -> str | None:
        """Name of the built file: what it was made from and what it fits. None without the torch that it needs."""
        torch = torch_identity() if self.torch else ""
        if torch is None:
            return None
        digest = hashlib.sha256()
        fits = (*FLAGS, str(sysconfig.get_config_var("SOABI")), platform.machine(), torch)
        for part in fits:
            digest.update(part.encode() + b"\0")
        for source in self.sources:
            digest.update((SOURCES / source).read_bytes() + b"\0")
        return f"{self.name}-{digest.hexdigest()[:32]}.so"


LIBRARIES = {
    library.name: library
    for library in (
        Library(
            "observer",
            (
                "observer.cpp",
                *("observed.hpp", "flights.hpp", "groups.hpp", "operators.hpp", "ring.hpp", "told.hpp"),
            ),
            True,
            "collectives of every caller are seen",
            "collectives of DDP, FSDP2, DTensor and functional ones are not seen",
        ),
        Library(
            "timeline",
            ("timeline.cpp", "around.hpp", "timeline.hpp", "told.hpp"),
            False,
            "steps and phases are recorded in C",
            "steps and phases are recorded in Python, which costs the training more",
        ),
    )
}


def torch_identity() -> str | None:
    """Which torch this Python has: version, commit, card toolkits; None without one. Imports nothing."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    loaded = sys.modules.get("torch.version")
    version = vars(loaded) if loaded else runpy.run_path(str(Path(found.origin).with_name("version.py")))
    return " ".join(str(version.get(key)) for key in ("__version__", "git_version", "cuda", "hip"))
