"""A token is for what its scopes say and for nothing else, from the moment it is made until it is taken back."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse

from lens.settings import Settings
from lens.store.access import scope_of
from lens.store.errors import StoreError
from lens.store.tokens import ADMIN, FILE, INGEST, READ, Tokens

from .conftest import TOKEN

NDJSON = {"content-type": "application/x-ndjson"}
REQUESTS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    INGEST: [
        ("POST", "/api/v1/runs", {"json": {"run": "r"}}),
        ("POST", "/api/v1/runs/r/records", {"content": b"", "headers": NDJSON}),
    ],
    READ: [
        ("GET", "/api/v1/runs", {}),
        ("GET", "/api/v1/runs/r", {}),
        ("GET", "/api/v1/store", {}),
        ("GET", "/metrics", {}),
        ("POST", "/api/v1/query", {"json": {"sql": "SELECT 1"}}),
    ],
    ADMIN: [
        ("PUT", "/api/v1/store/retention", {"json": {"keep_s": 86400}}),
        ("POST", "/api/v1/store/compact", {}),
        ("DELETE", "/api/v1/runs/r", {}),
    ],
}


def ask(client: TestClient, token: str, method: str, path: str, more: dict[str, Any]) -> int:
    headers = {**more.get("headers", {}), "authorization": f"Bearer {token}"}
    return client.request(method, path, **{**more, "headers": headers}).status_code


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [({INGEST}, {INGEST}), ({READ}, {READ}), ({INGEST, READ}, {INGEST, READ}), ({ADMIN}, {INGEST, READ, ADMIN})],
)
def test_a_token_is_for_its_scopes(
    client: TestClient, settings: Settings, scopes: set[str], allowed: set[str]
) -> None:
    client.post("/api/v1/runs", json={"run": "r"})
    token = Tokens(settings.data).add("bob", scopes)
    for scope, requests in REQUESTS.items():
        for method, path, more in requests:
            status = ask(client, token, method, path, more)
            assert status in ((200, 201, 202) if scope in allowed else (403,)), (method, path)


def test_every_route_needs_a_scope_that_is_meant(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    needed = {
        (method.upper(), path): scope_of(method.upper(), path.replace("{run}", "r"))
        for path, methods in paths.items()
        for method in methods
    }
    changes = {key: scope for key, scope in needed.items() if key[0] != "GET"}
    assert {scope for key, scope in needed.items() if key[0] == "GET"} == {READ}
    assert changes == {
        ("POST", "/api/v1/runs"): INGEST,
        ("POST", "/api/v1/runs/{run}/records"): INGEST,
        ("POST", "/api/v1/write"): INGEST,
        ("POST", "/v1/metrics"): INGEST,
        ("POST", "/api/v1/query"): READ,
        ("PUT", "/api/v1/store/retention"): ADMIN,
        ("POST", "/api/v1/store/compact"): ADMIN,
        ("DELETE", "/api/v1/runs/{run}"): ADMIN,
    }


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/api/v1/runs/r/records/x"), ("DELETE", "/api/v1/query"), ("PATCH", "/"), ("POST", "/api/v1/new"),
     ("POST", "/api/v1/runs/a/b/records"), ("POST", "/api/v1/store/compact/"), ("PUT", "/api/v1/runs")],
)  # fmt: skip
def test_what_is_not_named_needs_admin(method: str, path: str) -> None:
    assert scope_of(method, path) == ADMIN


def test_a_token_taken_back_holds_no_more(client: TestClient, settings: Settings) -> None:
    tokens = Tokens(settings.data)
    token = tokens.add("bob", {READ})
    assert ask(client, token, "GET", "/api/v1/runs", {}) == 200
    tokens.remove("bob")
    assert ask(client, token, "GET", "/api/v1/runs", {}) == 401
    assert ask(client, TOKEN, "GET", "/api/v1/runs", {}) == 200


def test_a_browser_signed_in_with_a_token_has_that_one(client: TestClient, settings: Settings) -> None:
    token = Tokens(settings.data).add("bob", {READ})
    del client.headers["authorization"]
    reply = client.get(f"/?token={token}", follow_redirects=False)
    assert reply.status_code == 303
    assert token in reply.headers["set-cookie"]
    assert TOKEN not in reply.headers["set-cookie"]
    assert client.get("/api/v1/runs").status_code == 200
    assert client.post("/api/v1/store/compact").status_code == 403


def test_the_live_feed_needs_read(client: TestClient, settings: Settings) -> None:
    client.post("/api/v1/runs", json={"run": "r"})
    tokens = Tokens(settings.data)
    # The test client calls websockets by another name than the server has.
    headers = {
        scope: {"authorization": f"Bearer {tokens.add(scope, {scope})}", "host": "127.0.0.1:8321"}
        for scope in (INGEST, READ)
    }
    with client.websocket_connect("/api/v1/runs/r/live", headers=headers[READ]) as socket:
        socket.send_text(json.dumps({"subscribe": ["step.duration"]}))
        assert socket.receive_bytes()
    with (
        pytest.raises(WebSocketDenialResponse) as refused,
        client.websocket_connect("/api/v1/runs/r/live", headers=headers[INGEST]),
    ):
        pass
    assert refused.value.status_code == 403
    assert "read is needed" in refused.value.text


def test_a_broken_file_of_tokens_lets_in_nobody_but_the_owner(client: TestClient, settings: Settings) -> None:
    token = Tokens(settings.data).add("bob", {ADMIN})
    (settings.data / FILE).write_text("{")
    assert ask(client, token, "GET", "/api/v1/runs", {}) == 401
    assert ask(client, TOKEN, "GET", "/api/v1/runs", {}) == 200
    with pytest.raises(StoreError, match="cannot be used"):
        Tokens(settings.data).add("eve", {READ})


def test_tokens_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    made: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda name=str(n): made.update({name: Tokens(tmp_path).add(name, {READ})}))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokens = Tokens(tmp_path)
    assert {holder.name for holder in tokens.holders()} == set(made)
    assert len(made) == 8
    for name, token in made.items():
        holder = tokens.find(token)
        assert holder is not None
        assert holder.name == name
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0


def test_acts_of_administrators_are_noted_with_who_did_them(client: TestClient, settings: Settings) -> None:
    client.post("/api/v1/runs", json={"run": "r"})
    token = Tokens(settings.data).add("bob", {ADMIN})
    for method, path, more in REQUESTS[ADMIN]:
        assert ask(client, token, method, path, more) in (200, 202)
    assert ask(client, TOKEN, "DELETE", "/api/v1/runs/none", {}) == 404
    assert ask(client, TOKEN, "PUT", "/api/v1/store/retention", {"json": {"keep_s": None}}) == 200
    noted = [json.loads(line) for line in (settings.data / "audit.ndjson").read_text().splitlines()]
    assert [(line["who"], line["action"]) for line in noted] == [
        ("bob", "retention.set"), ("bob", "compacted"), ("bob", "run.deleted"), ("owner", "retention.set")
    ]  # fmt: skip
    assert noted[0]["keep_s"] == 86400
    assert noted[2]["run"] == "r"
    assert all(line["t_ns"] > 0 for line in noted)


def test_nothing_is_done_that_cannot_be_noted(client: TestClient, settings: Settings) -> None:
    client.post("/api/v1/runs", json={"run": "r"})
    (settings.data / "audit.ndjson").mkdir()
    assert client.delete("/api/v1/runs/r").status_code == 500
    assert client.post("/api/v1/store/compact").status_code == 500
    assert client.get("/api/v1/runs/r").status_code == 200
    assert client.get("/api/v1/store/compact").json() == {"status": "idle"}
