"""This process: its rank and device, its run, its agent, its end."""

from __future__ import annotations

import gc
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lens.hooks.guard import Part, warn
from lens.hooks.timeline import Timeline
from lens.recorder import Recorder
from lens.settings import Settings

_watched_times = itertools.count()
_HOOKS = f"{Path(__file__).parent}{os.sep}"
_SHARE_S = 10
"""Longest that a rank waits for rank 0's run id: rank 0 may not be watched at all."""


def describe(settings: Settings, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of this rank: rank, world_size, local_rank, device, vendor, model; unknown is None."""
    distributed = initialised_distributed()
    found: dict[str, Any] = {
        "rank": distributed.get_rank() if distributed else _number("RANK"),
        "world_size": distributed.get_world_size() if distributed else _number("WORLD_SIZE"),
        "local_rank": _number("LOCAL_RANK"),
        **_accelerator(settings),
    }
    if found["rank"] is None:
        found |= {"rank": 0, "world_size": 1}
    given = dict(given)
    # ``model`` is taken by the module to watch: the card's model is called card.
    if "card" in given:
        given["model"] = given.pop("card")
    return found | {key: value for key, value in given.items() if value is not None}


def run_id(settings: Settings, wanted: str | None) -> str:
    """The run's id: asked for, LENS_RUN, drawn by rank 0 and read from torch's store by others, or drawn here."""
    if wanted or settings.run:
        return str(wanted or settings.run)
    distributed = initialised_distributed()
    if distributed is None or distributed.get_world_size() == 1:
        return draw_run_id()
    try:
        store = distributed.distributed_c10d._get_default_store()
        # Numbered: a process that detaches and is watched again is a new run on all ranks.
        key = f"lens/run/{next(_watched_times)}"
        if distributed.get_rank() == 0:
            store.set(key, draw_run_id())
        store.wait([key], timedelta(seconds=_SHARE_S))
        return str(store.get(key).decode())
    except Exception as error:
        warn(
            f"rank 0 has shared no run id ({type(error).__name__}): this process is a run of its own; set LENS_RUN"
        )
        return draw_run_id()


def draw_run_id() -> str:
    """A new id: the time, for people, and a random part, for uniqueness."""
    # The system's randomness: the training's own generator must not move.
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{random.SystemRandom().randrange(16**6):06x}"


def initialised_distributed() -> Any:
    """The module torch.distributed when a process group exists, else None; imports nothing."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def start_agent(settings: Settings) -> None:
    """Start this host's agent, detached, unless that is forbidden; it ends by itself when one runs already."""
    if not settings.agent or not settings.server:
        return
    command = [sys.executable, "-m", "lens", "agent", "--server", settings.server]
    detach = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
    try:
        settings.spool.mkdir(parents=True, exist_ok=True)
        with (settings.spool / "agent.log").open("ab") as log:
            # By way of a process that ends at once: the agent is init's child, not the training's.
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", detach, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_agent_environment(settings),
                timeout=_SHARE_S,
                check=True,
            )
    except (OSError, subprocess.SubprocessError) as error:
        warn(f"no agent could be started ({error}); records stay on this machine until `lens agent` runs here")


def watch_collector(timeline: Timeline) -> Part:
    """Time garbage collection."""
    part = Part("garbage collections")
    began = 0

    def note(when: str, _: dict[str, int]) -> None:
        nonlocal began
        if when == "start":
            began = time.monotonic_ns()
        elif began:
            timeline.gc_ns += time.monotonic_ns() - began
            began = 0

    gc.callbacks.append(note)
    part.at_end(lambda: gc.callbacks.remove(note))
    return part


def watch_errors(recorder: Recorder, timeline: Timeline, on_error: Callable[[BaseException], None]) -> Part:
    """Record the exception that ends the process, before Python prints it."""
    part = Part("errors")
    before = sys.excepthook

    def note(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if part.on:
            try:
                on_error(error)
                attributes = {"type": kind.__name__, "message": str(error)[:2000]}
                text = f"{kind.__name__}: {error}"[:500]
                recorder.event("process.error", text, "error", step=timeline.step, attrs=attributes)
            except Exception as own:
                part.fail(own)
            traceback = _without_own_frames(error, traceback)
        before(kind, error, traceback)

    part.patch(sys, "excepthook", note)
    return part


def _without_own_frames(error: BaseException, traceback: Any) -> Any:
    """The traceback as it would be without lens: our wrappers' frames are taken out, of what caused it too."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = _users_part(one.__traceback__)
            waiting += [one.__cause__, one.__context__]
    return _users_part(traceback)


def _users_part(traceback: Any) -> Any:
    kept = [entry for entry in _entries(traceback) if not entry.tb_frame.f_code.co_filename.startswith(_HOOKS)]
    for entry, following in itertools.zip_longest(kept, kept[1:]):
        entry.tb_next = following
    return kept[0] if kept else None


def _entries(traceback: Any) -> Iterator[Any]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else None


def _accelerator(settings: Settings) -> dict[str, Any]:
    """Device, vendor and model of the card in use; never wakes a card that is not in use yet."""
    torch = sys.modules.get("torch")
    device: dict[str, Any] = {"device": settings.device}
    if torch is None or not torch.cuda.is_initialized():
        return device
    index = torch.cuda.current_device()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    shown = visible[index] if index < len(visible) and visible[index].isdigit() else str(index)
    return {
        "device": settings.device or f"{settings.host}/gpu{shown}",
        "vendor": "amd" if torch.version.hip else "nvidia",
        "model": torch.cuda.get_device_name(index),
    }


def _agent_environment(settings: Settings) -> dict[str, str]:
    """The agent's environment: the settings in force here, wherever they came from, and the way to this lens."""
    shared = {
        f"LENS_{name.upper()}": str(getattr(settings, name))
        for name in ("host", "token", "data", "rings", "spool", "simulate")
        if getattr(settings, name) is not None
    }
    own = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH")]))
    # The agent trains nothing: it is not to be watched.
    return {**os.environ, **shared, "PYTHONPATH": path, "LENS_AUTOLOAD": "0"}
