"""lens: where the time, the memory and the money go in training, and what to do about it.

    import lens
    lens.watch(model, optimizer)
    for batch in lens.data(loader):
        with lens.step():
            ...

Importing lens pulls in neither torch nor the server; the hook loads with the first call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

__version__ = "0.1.0"
__all__ = ["data", "detach", "enabled", "expert_tokens", "log", "open", "phase", "step", "watch"]

if sys.platform == "win32":
    raise ImportError(
        "lens does not run on Windows: training and agent need Linux, the server Linux or macOS. "
        "Windows Subsystem for Linux works."
    )

if TYPE_CHECKING:
    from pathlib import Path

    from lens.reading import StoredRun
    from lens.settings import Settings

Item = TypeVar("Item")


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
    """Begin to record this process; never raises and never changes what the training computes.

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
    from lens.hooks import api

    api.watch(
        model,
        optimizer,
        run=run,
        name=name,
        config=config,
        groups=groups,
        experts=experts,
        settings=settings,
        **about,
    )


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
    from lens.hooks import api

    return api.step(number, tokens=tokens, micro_batches=micro_batches, seq_sq=seq_sq)


def phase(name: str, micro_batch: int | None = None) -> AbstractContextManager[Any]:
    """A phase inside a step: data, h2d, forward, backward, optimizer, checkpoint, eval, logging or other."""
    from lens.hooks import api

    return api.phase(name, micro_batch)


def data(loader: Iterable[Item]) -> Iterable[Item]:
    """The loader, with the time each batch was waited for recorded as phase ``data``."""
    from lens.hooks import api

    return api.data(loader)


def log(values: Mapping[str, float] | None = None, *, step: int | None = None, **more: float) -> None:
    """Record numbers of this rank: catalogue names such as ``train.loss`` or any name of your own."""
    from lens.hooks import api

    api.log(values, step=step, **more)


def expert_tokens(layer: int, counts: Any, dropped: Any = None) -> None:
    """Tokens that this rank's router of `layer` sends to each expert in this step, and how many it dropped."""
    from lens.hooks import api

    api.expert_tokens(layer, counts, dropped)


def detach() -> None:
    """Stop recording and put back everything that was patched."""
    from lens.hooks import api

    api.detach()


def enabled() -> bool:
    """Whether this process is recording."""
    from lens.hooks import api

    return api.enabled()


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
