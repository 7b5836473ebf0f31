"""What ``import lens`` offers to training code. Nothing here raises, and without `watch` nothing happens."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from lens.hooks import process
from lens.hooks.guard import warn
from lens.hooks.marked import Phase
from lens.hooks.session import Session
from lens.ring_files import RecorderError
from lens.settings import Settings, SettingsError

Item = TypeVar("Item")

_session: Session | None = None
_refused = False


def watch(
    model: Any = None,
    optimizer: Any = None,
    *,
    run: str | None = None,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    groups: Mapping[str, Sequence[Sequence[int]]] | None = None,
    experts: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    **about: Any,
) -> None:
    """Begin to record this process; a second call adds what it brings. Never changes what the training computes.

    Args:
        model: its root ``forward`` gives the forward phase; None where phases are marked by hand.
        optimizer: its ``step`` gives the optimizer phase.
        run: run id; default LENS_RUN, else drawn by rank 0 and shared.
        name: a name for people.
        config: what to show and compare later: sizes, hyper-parameters.
        groups: process groups by kind, such as ``{"dp": [[0, 2], [1, 3]], "ep": [[0, 1], [2, 3]]}`` (global ranks).
        experts: ``{"layers": 4, "experts": 8, "top_k": 2, "capacity_factor": 1.25, "owner": [0, 0, ...]}``.
        settings: everything else; default ``Settings.load()``.
        about: more of this rank: vendor, model, device, nic, switch.
    """
    global _session, _refused
    if _refused:
        return
    described = {"name": name, "config": config, "groups": groups, "experts": experts}
    changes = {key: value for key, value in described.items() if value is not None}
    try:
        _give_way()
        if _session is None:
            settings = settings or Settings.load()
            if settings.disabled:
                return
            whole = process.describe(settings, about) | changes | {"run": process.run_id(settings, run)}
            _begin(settings, whole, groups or {})
            assert _session is not None
        elif changes:
            _session.recorder.describe(**changes)
            if groups:
                _session.know_groups(groups)
        _session.watch(model, optimizer)
    except (RecorderError, SettingsError) as error:
        _refuse(str(error))
    except Exception as error:
        _refuse(f"nothing is recorded, training goes on ({type(error).__name__}: {error})")


def watch_unprepared() -> None:
    """Begin to record a training that has no line of lens in it, at its first optimizer; see ``lens run``."""
    _begin_unprepared(Settings.load, Session.watch_unprepared)


def watch_framework(
    steps_done: int | None,
    *,
    run: str | None = None,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Begin to record a training as `watch_unprepared` does, unless it is recorded already, and add what is given.

    Args:
        steps_done: optimizer steps that the framework has made so far, which number the next one; None: unknown.
        run, name, config: see `watch`; of the last, numbers and texts are kept.
    """
    _begin_unprepared(Settings.load, Session.watch_unprepared, run)
    session = _session
    if session is None:
        return
    try:
        plain = {key: value for key, value in (config or {}).items() if isinstance(value, (bool, int, float, str))}
        changes = {key: value for key, value in (("name", name), ("config", plain or None)) if value is not None}
        if changes:
            session.recorder.describe(**changes)
        session.places.number(steps_done)
    except Exception as error:
        session.places.part.fail(error)


def number_steps(steps_done: int) -> None:
    """Let the next step have this number, where none is open."""
    if _session is not None:
        _session.places.number(steps_done)


def watch_running(settings: Settings) -> None:
    """Begin to record a training that is under way, in the thread that trains; see ``lens attach``."""
    _begin_unprepared(lambda: settings, Session.watch_running)


def _begin_unprepared(
    load: Callable[[], Settings], watch: Callable[[Session], None], run: str | None = None
) -> None:
    if _refused or _session is not None:
        return
    try:
        settings = load()
        if settings.disabled:
            return
        watch(_begin(settings, process.describe(settings, {}) | {"run": process.run_id(settings, run)}, {}))
    except (RecorderError, SettingsError) as error:
        _refuse(str(error))
    except Exception as error:
        _refuse(f"nothing is recorded, training goes on ({type(error).__name__}: {error})")


def step(
    number: int | None = None,
    *,
    tokens: int | None = None,
    micro_batches: int | None = None,
    seq_sq: int | None = None,
) -> AbstractContextManager[Any]:
    """One training step, as a ``with`` block; `number` continues from the last one when left out.

    Args:
        tokens: tokens this rank works on in the step.
        micro_batches: how many micro-batches the step has.
        seq_sq: sum of squared sequence lengths, which attention cost follows.
    """
    session = _session
    if session is None:
        return _NOTHING
    try:
        return session.new_step(number, tokens, micro_batches, seq_sq) or _NOTHING
    except Exception as error:
        session.timeline.part.fail(error)
        return _NOTHING


def phase(name: str, micro_batch: int | None = None) -> AbstractContextManager[Any]:
    """A phase inside a step: data, h2d, forward, backward, optimizer, checkpoint, eval, logging or other."""
    session = _session
    if session is None or not session.timeline.here():
        return _NOTHING
    found = session.phases.get((name, micro_batch))
    if found is None:
        found = session.phases[name, micro_batch] = Phase(session.timeline, name, micro_batch)
    return found


def data(loader: Iterable[Item]) -> Iterable[Item]:
    """The loader, with the time each batch was waited for recorded as phase ``data``."""
    return _Waits(loader)


def log(values: Mapping[str, Any] | None = None, *, step: int | None = None, **more: Any) -> None:
    """Record numbers of this rank: catalogue names such as ``train.loss`` or any name of your own."""
    session = _session
    if session is None or not session.values.part.on:
        return
    try:
        session.values.log({**(values or {}), **more} if more else values or {}, step)
    except Exception as error:
        session.values.part.fail(error)


def expert_tokens(layer: int, counts: Any, dropped: Any = None) -> None:
    """Tokens that this rank's router of `layer` sends to each expert in this step, and how many it dropped."""
    session = _session
    if session is None or not session.values.part.on:
        return
    try:
        session.experts.given_by_hand()
        session.values.expert_tokens(layer, counts, dropped)
    except Exception as error:
        session.values.part.fail(error)


def profile(steps: int = 2) -> None:
    """Run torch's profiler over the next steps; its trace of this rank goes to ``traces/RUN`` in the data folder.

    Where a step is under way the window begins at its end. Only one runs at a time, and none while the training runs a
    profiler of its own: then a line on standard error says so.

    Args:
        steps: how many.
    """
    session = _session
    if session is None:
        return
    try:
        session.profiling.ask(int(steps))
    except Exception as error:
        session.profiling.part.fail(error)


def request(
    model: str = "model",
    *,
    prompt_tokens: int | None = None,
    batch: int | None = None,
    queue_s: float | None = None,
) -> AbstractContextManager[Any]:
    """One request of a server written by hand, as a ``with`` block that gives an object to tell it by.

    Its ``token(count=1)`` says that tokens of each sequence have been made, its ``cache(past_key_values)`` measures keys
    and values, its ``preempted(count=1)`` says that it was put back to be computed again. ``generate`` of a watched model
    is recorded without it.

    Args:
        model: whose requests these are.
        prompt_tokens: of all sequences of the batch together.
        batch: sequences worked on together.
        queue_s: seconds from its arrival to this block.
    """
    session = _session
    if session is None:
        return _UNTOLD
    try:
        return session.requests().request(model, prompt_tokens, batch, queue_s)
    except Exception as error:
        warn(f"a request is not recorded ({type(error).__name__}: {error})")
        return _UNTOLD


def attachable() -> None:
    """Open a way in for ``lens attach``: a unix socket for this user alone, where tracing is not allowed.

    It takes a thread that sleeps until somebody connects. LENS_ATTACH=1 opens it when recording begins; LENS_ATTACH=0
    forbids it.
    """
    _open_door(None)


def detach() -> None:
    """Stop recording and put back everything that was patched."""
    global _session
    session, _session = _session, None
    if session is None:
        return
    try:
        session.close()
    except Exception as error:
        warn(f"not everything could be put back ({type(error).__name__}: {error})")


def enabled() -> bool:
    """Whether this process is recording."""
    return _session is not None


def recording() -> dict[str, Any] | None:
    """Where and as what this process records: ring, rank, run; None while it does not."""
    if _session is None:
        return None
    about = _session.recorder.about
    return {"ring": _session.recorder.path, "rank": about.get("rank"), "run": about.get("run")}


class _Nothing:
    """A step or phase that is not recorded."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


_NOTHING = _Nothing()


class _Untold:
    """A request that is not recorded."""

    def __enter__(self) -> _Untold:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def token(self, count: int = 1) -> None:
        """Nothing is told."""

    def preempted(self, count: int = 1) -> None:
        """Nothing is told."""

    def cache(self, past_key_values: Any) -> None:
        """Nothing is told."""


_UNTOLD = _Untold()


class _Waits:
    """A loader whose batches' waits are timed; everything else is the loader's own."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        source = iter(self._loader)
        while True:
            session = _session
            try:
                item = next(source) if session is None else session.timeline.wait_for(next, source)
            except StopIteration:
                return
            yield item

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _begin(settings: Settings, about: Mapping[str, Any], groups: Mapping[str, Sequence[Sequence[int]]]) -> Session:
    global _session
    _session = Session(settings, about, groups, detach)
    _session.install()
    process.start_agent(settings)
    if os.environ.get("LENS_ATTACH") == "1":
        _open_door(settings)
    return _session


def _open_door(settings: Settings | None) -> None:
    try:
        from lens.hooks.door import open_door

        settings = settings or Settings.load()
        if not settings.disabled:
            open_door(settings)
    except Exception as error:
        warn(f"it cannot be attached to without tracing ({type(error).__name__}: {error})")


def _give_way() -> None:
    """The training speaks for itself: what was begun without it makes room, unless steps were recorded already."""
    global _session
    session = _session
    if session is None or not session.unprepared:
        return
    session.unprepared = False
    if not session.timeline.last_end:
        _session = None
        session.close()
        session.recorder.path.unlink(missing_ok=True)


def _refuse(reason: str) -> None:
    """Say once why nothing is recorded, and leave no trace."""
    global _refused
    _refused = True
    warn(reason)
    detach()


def _forget() -> None:
    """In a forked child: a DataLoader's worker records nothing."""
    global _session
    if _session is not None:
        _session.forget()
        _session = None


os.register_at_fork(after_in_child=_forget)
atexit.register(detach)
