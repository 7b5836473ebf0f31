"""Data folders, a client of the real application, and records to send."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from lens.settings import Settings
from lens.store.app import create_app
from lens.store.clickhouse import HttpSession
from lens.store.folder import DataFolder
from lens.store.query import Query

from .clickhouse import ClickHouse

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


@pytest.fixture(autouse=True)
def _clickhouse() -> Iterator[None]:
    """With LENS_CLICKHOUSE_URL tables are kept by that server, emptied for each folder; with ``stand-in`` in its place by
    `clickhouse.ClickHouse`, one for each folder."""
    url = os.environ.get("LENS_CLICKHOUSE_URL")
    if not url:
        yield
        return
    servers: dict[Path, ClickHouse] = {}
    last: list[Path] = []

    def dsn_of(path: Path) -> str:
        place = path.resolve() / "chdb"
        if url != "stand-in":
            if last != [place]:
                emptied(url)
                last[:] = [place]
            return url
        if place not in servers:
            place.parent.mkdir(parents=True, exist_ok=True)
            servers[place] = ClickHouse(place)
        return servers[place].url

    with pytest.MonkeyPatch.context() as patch:  # a test may undo its own
        patch.setattr("lens.store.folder.embedded", dsn_of)
        yield
    for server in servers.values():
        server.stop()


def emptied(url: str) -> None:
    """Drop lens's tables from a server that holds none but those of these tests."""
    session = HttpSession(url)
    known = session.query("SELECT count() AS n FROM system.tables WHERE database = 'lens' AND name = 'runs'")
    if known.column("n")[0].as_py():
        kept = session.query(
            "SELECT id FROM lens.runs WHERE NOT has(['r', 'other', 'r é', 'many', 'first', 'second'], id)"
        )
        if kept.num_rows and not os.environ.get("LENS_CLICKHOUSE_DROP"):
            pytest.exit(f"{url} holds runs; LENS_CLICKHOUSE_DROP=1 says that they may go", 2)
    session.query("DROP DATABASE IF EXISTS lens SYNC", "Null")
    session.close()


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
