"""Demos that a test starts, ended whatever the test did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Demo


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    demos: list[Demo] = []

    def start(*words: str) -> Demo:
        demos.append(Demo(tmp_path / f"data{len(demos)}", *words))
        return demos[-1]

    yield start
    for demo in demos:
        demo.end()
