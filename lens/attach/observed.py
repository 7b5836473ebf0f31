"""Watching a process from outside alone: what the kernel and the vendors' libraries tell of it, nothing of its steps.

It gets the place that a watched process has among the rings of its host, with an empty ring; the agent then follows it
like any other: its heartbeats, memory, processor time, disk, card, and how it ends.
"""

from __future__ import annotations

import dataclasses

from lens.attach.facts import Facts
from lens.recorder import Recorder
from lens.ring_files import free_name, host_directory, private_directory, start_ticks
from lens.settings import Settings

_RING_MIB = 1


def observe(facts: Facts, settings: Settings) -> None:
    """Let this host's agent follow a process.

    Raises:
        RecorderError: the place of the rings cannot be used.
        OSError: the process has ended.
    """
    ticks = start_ticks(facts.pid)
    private_directory(settings.rings)
    private_directory(host_directory(settings))
    directory = private_directory(host_directory(settings) / f"observed-{facts.pid}-{ticks}")
    about = {
        "run": settings.run,
        "name": settings.name,
        "rank": 0 if facts.rank is None else facts.rank,
        "world_size": 1 if facts.rank is None else facts.world_size,
        "host": settings.host,
        "device": None,
        "role": "trainer",
        "server": settings.server,
        "pid": facts.pid,
        "start_ticks": ticks,
        "config": {"observed": "from outside"},
    }
    recorder = Recorder(free_name(directory, "main"), dataclasses.replace(settings, ring_mib=_RING_MIB), about)
    recorder.describe()
    # Nobody will write to it, and how the process ends is not for us to say.
    recorder.close()
