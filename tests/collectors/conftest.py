from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.collectors.agent_harness import Host, StubServer


@pytest.fixture
def server() -> Iterator[StubServer]:
    stub = StubServer()
    yield stub
    stub.close()


@pytest.fixture
def host(tmp_path: Path, server: StubServer) -> Iterator[Host]:
    made = Host(tmp_path, server)
    yield made
    made.close()
