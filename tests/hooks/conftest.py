"""Fixtures of the hook's tests: a watched test process, and what it recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lens
from lens.settings import Settings
from tests.hooks.ringside import Recorded, read_rings


@pytest.fixture(scope="module", params=["native", "python"])
def tier(request: pytest.FixtureRequest) -> str:
    """Who sees collectives: the native observer, or patches in Python."""
    if request.param == "native":
        request.getfixturevalue("observer_library")
    return str(request.param)


@pytest.fixture
def rings(tmp_path: Path) -> Path:
    return tmp_path / "rings"


@pytest.fixture
def watch(rings: Path) -> Iterator[Callable[..., None]]:
    """``lens.watch`` into this test's rings."""

    def start(
        model: Any = None, optimizer: Any = None, *, native: bool = True, ring_mib: int = 1, **more: Any
    ) -> None:
        settings = Settings.load(
            {}, rings=rings, ring_mib=ring_mib, agent=False, native=native, max_overhead_pct=100
        )
        lens.watch(model, optimizer, settings=settings, **more)
        assert lens.enabled()

    yield start
    lens.detach()


@pytest.fixture
def recorded(rings: Path) -> Callable[[], Recorded]:
    """Ends the recording and reads it."""

    def read() -> Recorded:
        lens.detach()
        (one,) = read_rings(rings)
        return one

    return read
