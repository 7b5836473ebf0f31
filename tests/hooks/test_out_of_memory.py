"""A failed allocation is written down beside the ring and told by `lens postmortem`; the exception stays as it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lens
from lens.cli.main import main
from lens.hooks import oom
from tests.hooks.ringside import Recorded

GIB = 2**30
SEGMENTS = [
    {"device": 0, "blocks": [{"state": "active_allocated", "size": 2 * GIB, "requested_size": 2 * GIB}] * 3},
    {"device": 0, "blocks": [{"state": "inactive", "size": 9 * GIB}, {"state": "active_allocated", "size": GIB}]},
    {"device": 1, "blocks": [{"state": "active_allocated", "size": 40 * GIB}]},
]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., None]]:
    """A card of 10 GiB with 7 in live tensors; returns whom its allocator tells of failures."""
    told: list[Callable[..., None]] = []
    held = {
        "allocated_bytes": {"all": {"current": 7 * GIB, "peak": 8 * GIB}},
        "reserved_bytes": {"all": {"current": 8 * GIB}},
    }
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda *_: held)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: SEGMENTS)
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", told.append, raising=False)
    return told


def _fail(told: list[Callable[..., None]], error: BaseException) -> None:
    for observe in told:
        observe(0, 4 * GIB, 10 * GIB, 2 * GIB)
    raise error


def _snapshots(rings: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(rings.rglob("oom-*.json"))]


def test_a_failed_allocation_is_kept_though_the_training_catches_it_and_goes_on(
    card: list[Callable[..., None]],
    watch: Callable[..., None],
    recorded: Callable[[], Recorded],
    rings: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = torch.cuda.OutOfMemoryError("CUDA out of memory.")
    watch()
    with lens.step(7), lens.phase("backward"), pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        _fail(card, error)
    assert caught.value is error
    assert error.args == ("CUDA out of memory.",)
    found = recorded()
    (kept,) = _snapshots(rings)
    assert (kept["step"], kept["phase"], kept["rank"], kept["device"]) == (7, "backward", 0, 0)
    assert (kept["wanted"], kept["free"], kept["limit"]) == (4 * GIB, 2 * GIB, 10 * GIB)
    assert kept["fragmentation"] == pytest.approx(1 / 8)
    assert [(block["bytes"], block["count"]) for block in kept["largest"]] == [(2 * GIB, 3), (GIB, 1)]
    assert [(event["kind"], event["severity"]) for event in found.events] == [("memory.oom", "error")]
    assert [step["step"] for step in found.steps] == [7]
    card[0](0, 1, 1, 1)  # torch keeps its observers: after a detach this one is silent
    assert len(_snapshots(rings)) == 1
    assert main(["postmortem", str(rings)]) == 0
    out = capsys.readouterr().out
    assert "out of device memory in backward of step 7; 4.00 GiB wanted, 2.00 GiB free of 10.00 GiB" in out
    assert "3 live blocks of 2048.0 MiB" in out


def test_where_torch_tells_nobody_the_exception_that_ends_the_process_is_looked_at(
    card: list[Callable[..., None]],
    watch: Callable[..., None],
    recorded: Callable[[], Recorded],
    rings: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch._C, "_cuda_attach_out_of_memory_observer")
    printed: list[BaseException] = []
    monkeypatch.setattr("sys.excepthook", lambda kind, error, traceback: printed.append(error))
    watch()
    for error in (ValueError("no"), torch.cuda.OutOfMemoryError("CUDA out of memory.")):
        sys.excepthook(type(error), error, None)
    assert [type(error) for error in printed] == [ValueError, torch.cuda.OutOfMemoryError]
    recorded()
    (kept,) = _snapshots(rings)
    assert "wanted" not in kept
    assert kept["largest"]


def test_a_snapshot_that_cannot_be_taken_changes_nothing(
    card: list[Callable[..., None]],
    watch: Callable[..., None],
    recorded: Callable[[], Recorded],
    rings: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(torch.cuda, "memory_snapshot", broken)
    watch()
    assert card
    with pytest.raises(torch.cuda.OutOfMemoryError):
        _fail(card, torch.cuda.OutOfMemoryError("CUDA out of memory."))
    recorded()
    assert _snapshots(rings) == []


def test_with_torchs_history_a_block_is_told_by_the_line_that_made_it() -> None:
    frames = [
        {"filename": "/site/torch/nn/modules/linear.py", "line": 116, "name": "forward"},
        {"filename": "/home/me/train.py", "line": 42, "name": "step"},
    ]
    segments = [{"device": 0, "blocks": [{"state": "active_allocated", "size": 8, "frames": frames}]}]
    assert oom.largest(segments, 0) == [{"bytes": 8, "count": 1, "where": "/home/me/train.py:42"}]
