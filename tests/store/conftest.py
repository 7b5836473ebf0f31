"""Data folders, a client of the real application, and records to send."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from lens.settings import Settings
from lens.store.app import create_app
from lens.store.folder import DataFolder
from lens.store.query import Query

TOKEN = "a-token-for-tests"


@pytest.fixture(autouse=True)
def _close_what_a_failed_test_left_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process can have one database open: a test that fails must not fail those after it."""
    opened: list[DataFolder] = []
    begin = DataFolder.__init__

    def remember(self: DataFolder, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        opened.append(self)

    monkeypatch.setattr(DataFolder, "__init__", remember)
    yield
    for each in opened:
        each.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[DataFolder]:
    opened = DataFolder(tmp_path / "data")
    yield opened
    opened.close()


@pytest.fixture
def query(folder: DataFolder) -> Query:
    return Query(folder)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.load({}, data=tmp_path / "data", token=TOKEN)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    app = create_app(settings)
    with TestClient(
        app,
        base_url="http://127.0.0.1:8321",
        headers={"authorization": f"Bearer {TOKEN}"},
        raise_server_exceptions=False,
    ) as found:
        yield found
