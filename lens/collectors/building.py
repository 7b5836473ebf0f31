"""Have the hook's libraries compiled beside the training, for the very Python that trains: never inside it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path


def start_build(python: str) -> subprocess.Popen[bytes] | None:
    """Start the build with this interpreter, at the lowest priority; one that is under way or done is left alone."""
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    with contextlib.suppress(OSError):
        return subprocess.Popen(
            [python, "-m", "lens.hooks.native.build", "--background"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={**os.environ, "PYTHONPATH": path, "LENS_AUTOLOAD": "0"},
            start_new_session=True,
        )
    return None


class Builder:
    """Starts a build once for each Python that trains here and lacks one."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._started: dict[str, subprocess.Popen[bytes] | None] = {}

    def look(self, lacking: str | None) -> None:
        """A training process says which interpreter it runs in, if what could be built for it is not."""
        if self._wanted and lacking and lacking not in self._started:
            self._started[lacking] = start_build(lacking)
        for process in self._started.values():
            if process is not None:
                process.poll()
