"""Who stands where: stacks of many ranks, told in the training's own lines, equal ones together. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lens.attach.frames import Frame
from lens.attach.stacks import ProcessStacks

_LIBRARY = re.compile(
    r"/(?:site|dist)-packages/(?:torch|torchgen|functorch|numpy)/|/lib(?:64)?/python3\.\d+/(?!\w+-packages/)"
)
_IMPORT = "<frozen importlib"
_OWN = str(Path(__file__).resolve().parents[1])
_WRAPPERS = {"wrapper", "inner", "_fn", "decorate_context", "_call_impl", "_wrapped_call_impl", "<lambda>"}
"""Functions of libraries that only pass a call on."""


@dataclass(frozen=True)
class Place:
    """Where a stack stands. called: the library's function that the training's own line has called, if any.
    frames: the training's own, the innermost first."""

    called: str | None
    frames: tuple[Frame, ...]

    def __str__(self) -> str:
        if not self.frames:
            return "no Python code"
        line = spot(self.frames[0])
        return f"{self.called} at {line}" if self.called else line


@dataclass(frozen=True)
class Group:
    """Processes whose main threads stand at the same place."""

    place: Place
    members: tuple[ProcessStacks, ...]


def spot(frame: Frame) -> str:
    """A frame for people: ``train.py:88 in step``."""
    line = "?" if frame.line is None else frame.line
    return f"{frame.file.rsplit('/', 1)[-1]}:{line} in {_short(frame.name)}"


def place_of(frames: Sequence[Frame]) -> Place:
    """The training's own part of a stack; all of it where nothing is the training's own."""
    importing = [place for place, frame in enumerate(frames) if frame.file.startswith(_IMPORT)]
    # Whatever is loaded runs inside the import, whoever wrote it.
    begin = importing[-1] if importing else 0
    places = [place for place in range(begin, len(frames)) if not is_library(frames[place])]
    if not places:
        return Place(None, tuple(frames))
    own = tuple(frames[place] for place in places)
    if importing and all(frame.file.startswith(_IMPORT) for frame in frames[begin : places[0]]):
        return Place("import", own)
    called = [_short(frame.name) for frame in reversed(frames[: places[0]]) if _short(frame.name) not in _WRAPPERS]
    return Place(called[0] if called else None, own)


def is_library(frame: Frame) -> bool:
    """Whether a frame belongs to torch, Python or lens itself. Packages that train (transformers, megatron) count as
    the training's own: what a rank does in them is what is asked for."""
    return frame.file.startswith((_OWN, "<frozen")) or _LIBRARY.search(frame.file) is not None


def groups(processes: Iterable[ProcessStacks]) -> list[Group]:
    """Those that were read, grouped by the place of their main thread, the largest group first."""
    found: dict[Place, list[ProcessStacks]] = {}
    for process in processes:
        main = next((thread for thread in process.threads if thread.main), None)
        if main is not None:
            found.setdefault(place_of(main.frames), []).append(process)
    alike = [Group(place, tuple(members)) for place, members in found.items()]
    return sorted(alike, key=lambda group: -len(group.members))


def _short(name: str) -> str:
    return name.rsplit("<locals>.", 1)[-1]
