"""Demos that a test starts, ended whatever the test did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.dashboard.conftest import browser as browser
from tests.e2e.harness import Demo, Hosted


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    demos: list[Demo] = []

    def start(*words: str) -> Demo:
        demos.append(Demo(tmp_path / f"data{len(demos)}", *words))
        return demos[-1]

    yield start
    for demo in demos:
        demo.end()


@pytest.fixture
def start_hosted(tmp_path: Path) -> Iterator[Callable[..., Hosted]]:
    hosted: list[Hosted] = []

    def start(*script: str) -> Hosted:
        hosted.append(Hosted(tmp_path / "data", *script))
        return hosted[-1]

    yield start
    for one in hosted:
        one.end()
