"""A token is for what its scopes say and for nothing else, from the moment it is made until it is taken back."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse

from lens.settings import Settings
from lens.store.access import scope_of
from lens.store.audit import Audit, Refusals
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


def test_a_token_of_a_project_sees_its_runs_alone_wherever_runs_are_shown(
    client: TestClient, settings: Settings
) -> None:
    client.post("/api/v1/runs", json={"run": "theirs", "project": "dense"})
    client.post("/api/v1/runs", json={"run": "nobodys"})
    token = Tokens(settings.data).add("team", {INGEST, READ}, "moe")
    mine = {"authorization": f"Bearer {token}"}
    reply = client.post("/api/v1/runs", json={"run": "ours", "project": "dense"}, headers=mine)
    assert (reply.status_code, reply.json()["project"]) == (201, "moe"), "what it describes is of its project"
    for run in ("ours", "theirs", "nobodys"):
        line = json.dumps({"type": "sample", "t_ns": time.time_ns(), "metric": "m", "value": 1.0}).encode()
        moved = json.dumps({"type": "run", "run": run, "project": "elsewhere"}).encode()
        path = f"/api/v1/runs/{run}/records"
        sent = client.post(path, content=moved + b"\n" + line, headers={**NDJSON, **mine})
        assert sent.status_code == (200 if run == "ours" else 404)
        if run != "ours":
            assert client.post(path, content=line, headers=NDJSON).status_code == 200
            assert client.post("/api/v1/runs", json={"run": run}, headers=mine).status_code == 403
    assert [run["run"] for run in client.get("/api/v1/runs", headers=mine).json()["runs"]] == ["ours"]
    for path in ("", "/now", "/series?metric=m", "/export?format=csv", "/alerts", "/latest?metric=m"):
        assert client.get(f"/api/v1/runs/ours{path}", headers=mine).status_code == 200, path
        assert client.get(f"/api/v1/runs/theirs{path}", headers=mine).status_code == 404, path
        assert client.get(f"/api/v1/runs/theirs{path}").status_code == 200, path
    for sql in ("SELECT run FROM samples", "SELECT run FROM runs", "SELECT run FROM samples WHERE run = 'theirs'"):
        rows = client.post("/api/v1/query", json={"sql": sql}, headers=mine).json()["rows"]
        assert rows == ([] if "theirs" in sql else [["ours"]]), sql
    asked = {"sql": "SELECT 1", "run": "theirs"}
    assert client.post("/api/v1/query", json=asked, headers=mine).status_code == 404
    scraped = client.get("/metrics", headers=mine).text
    assert 'run="ours"' in scraped
    assert 'run="theirs"' not in scraped
    assert client.get("/metrics?run=theirs", headers=mine).status_code == 404
    for path in ("/api/v1/store", "/api/v1/store/retention", "/api/v1/anything"):
        assert client.get(path, headers=mine).status_code == 403, path


def test_metrics_sent_with_a_token_of_a_project_make_its_runs_and_reach_no_others(
    client: TestClient, settings: Settings
) -> None:
    client.post("/api/v1/runs", json={"run": "theirs", "project": "dense"})
    token = Tokens(settings.data).add("team", {INGEST, READ}, "moe")
    point = {"dataPoints": [{"timeUnixNano": "1", "asDouble": 1.0}]}
    metrics = {"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"name": "m", "gauge": point}]}]}]}
    headers = {"authorization": f"Bearer {token}"}
    assert client.post("/v1/metrics?run=new", json=metrics, headers=headers).json() == {}
    refused = client.post("/v1/metrics?run=theirs", json=metrics, headers=headers).json()
    assert refused["partialSuccess"]["rejectedDataPoints"] == "1"
    assert [run["run"] for run in client.get("/api/v1/runs", headers=headers).json()["runs"]] == ["new"]


def test_a_project_is_no_place_to_administer_from(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="ingest and read"):
        Tokens(tmp_path).add("bob", {ADMIN}, "moe")
    with pytest.raises(StoreError, match="no name of a project"):
        Tokens(tmp_path).add("bob", {READ}, "a/b")


def refusals_of(settings: Settings) -> list[dict[str, Any]]:
    noted = [json.loads(line) for line in (settings.data / "audit.ndjson").read_text().splitlines()]
    return [line for line in noted if line["action"] == "refused"]


def test_refused_attempts_are_noted_with_who_tried_what_and_without_the_token(
    client: TestClient, settings: Settings
) -> None:
    token = Tokens(settings.data).add("bob", {READ})
    assert ask(client, "a-wrong-one", "GET", "/api/v1/runs", {}) == 401
    assert ask(client, token, "DELETE", "/api/v1/runs/r", {}) == 403
    assert ask(client, token, "GET", "/api/v1/runs/r", {}) == 404
    assert client.get("/api/v1/runs", headers={"host": "evil.example"}).status_code == 403
    wrong, bobs, foreign = refusals_of(settings)
    assert (wrong["who"], wrong["status"], wrong["request"]) == ("nobody", 401, "GET /api/v1/runs")
    assert (bobs["who"], bobs["status"], bobs["request"]) == ("bob", 403, "DELETE /api/v1/runs/r")
    assert "admin is needed" in bobs["why"]
    assert foreign["status"] == 403
    text = (settings.data / "audit.ndjson").read_text()
    assert "a-wrong-one" not in text
    assert token not in text


def test_whoever_tries_without_end_does_not_fill_the_disk(tmp_path: Path) -> None:
    refusals = Refusals(Audit(tmp_path), window_s=1000, most=5)
    for number in range(300):
        refusals.note("nobody", f"10.0.0.{number % 50}", 401, "GET /" + "x" * 5000, "a token is needed")
    refusals.close()
    lines = [json.loads(line) for line in (tmp_path / "audit.ndjson").read_text().splitlines()]
    told = sum(line.get("more", 1) for line in lines)
    assert len(lines) <= 12
    assert told == 300
    assert all(len(json.dumps(line)) < 700 for line in lines)
