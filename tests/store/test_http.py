"""The HTTP API: every refusal is a JSON object with an error and a hint, and good records are always kept."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
import zstandard
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from lens.settings import Settings
from lens.slots import Anchor, encode_batch
from lens.store.app import create_app
from lens.store.decode import NDJSON, SLOTS
from lens.store.folder import Limits

from .conftest import TOKEN
from .helpers import ndjson, sample, step_span

RECORDS = "/api/v1/runs/r/records"


@pytest.fixture
def run(client: TestClient) -> str:
    assert client.post("/api/v1/runs", json={"run": "r", "world_size": 2}).status_code == 201
    return "r"


def post(client: TestClient, body: bytes, content_type: str = NDJSON, **headers: str) -> Any:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return client.post(RECORDS, content=body, headers={"content-type": content_type, **named})


def refusal(response: Any, status: int) -> dict[str, str]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    body: dict[str, str] = response.json()
    assert set(body) == {"error", "hint"}
    assert all(isinstance(text, str) and text for text in body.values())
    return body


def losses(client: TestClient) -> list[float]:
    reply = client.get("/api/v1/runs/r/series", params={"metric": "train.loss"}).json()
    return [value for line in reply["series"] for value in line["max"]]


def test_a_run_is_made_once_and_then_merged(client: TestClient) -> None:
    first = client.post("/api/v1/runs", json={"run": "r", "world_size": 2, "config": {"lr": 0.1}})
    assert (first.status_code, first.json()["world_size"]) == (201, 2)
    second = client.post("/api/v1/runs", json={"run": "r", "name": "mine", "config": {"seed": 1}})
    assert second.status_code == 200
    assert second.json() == {"run": "r", "world_size": 2, "config": {"lr": 0.1, "seed": 1}, "name": "mine"}
    assert [run["run"] for run in client.get("/api/v1/runs").json()["runs"]] == ["r"]


@pytest.mark.parametrize(
    "described",
    [
        [], {}, {"run": ""}, {"run": "a/b"}, {"run": 3}, {"run": "r", "world_size": 0}, {"run": "r", "ranks": [1]},
        {"run": "r", "ranks": [{"rank": "0"}]}, {"run": "r", "groups": {"dp": [0, 1]}}, {"run": "r", "config": []},
        {"run": "r", "tags": "x"}, {"run": "r" * 200},
    ],
)  # fmt: skip
def test_what_describes_no_run_is_refused(client: TestClient, described: Any) -> None:
    refusal(client.post("/api/v1/runs", json=described), 400)
    assert client.get("/api/v1/runs").json() == {"runs": []}


def test_a_malformed_line_costs_no_good_one(client: TestClient, run: str) -> None:
    body = (
        ndjson([sample("train.loss", 1.0, 0)])
        + b"{oops\n"
        + ndjson([sample("train.loss", 2.0, 1)])
        + b'{"type":"x"}'
    )
    reply = post(client, body)
    assert reply.status_code == 200
    assert reply.json()["accepted"] == 2
    assert [entry["line"] for entry in reply.json()["rejected"]] == [2, 4]
    assert losses(client) == [1.0, 2.0]


def test_a_batch_sent_again_gets_the_same_answer_and_is_stored_once(client: TestClient, run: str) -> None:
    body = ndjson([sample("train.loss", 1.0, 0)]) + b"bad\n"
    first, second = (post(client, body, Lens_Source="a", Lens_Sequence="1") for _ in range(2))
    assert first.json() == second.json()
    assert first.json()["accepted"] == 1
    line = client.get("/api/v1/runs/r/series", params={"metric": "train.loss"}).json()["series"][0]
    assert line["count"] == [1]


@pytest.mark.parametrize(
    "headers", [{"Lens_Source": "a"}, {"Lens_Sequence": "1"}, {"Lens_Source": "", "Lens_Sequence": "1"}]
)
def test_source_and_sequence_go_together(client: TestClient, run: str, headers: dict[str, str]) -> None:
    refusal(post(client, b"", **headers), 400)


@pytest.mark.parametrize("sequence", ["-1", "x", str(2**63)])
def test_a_sequence_is_a_number(client: TestClient, run: str, sequence: str) -> None:
    assert "equence" in refusal(post(client, b"", Lens_Source="a", Lens_Sequence=sequence), 422)["error"]


def test_an_unknown_run_is_404_and_a_file_that_describes_its_run_is_taken(client: TestClient) -> None:
    body = ndjson([sample("train.loss", 1.0, 0)])
    refusal(post(client, body), 404)
    for path in ("", "/series?metric=m", "/heatmap?metric=m", "/steps/1", "/diagnosis", "/ledger", "/alerts"):
        assert "unknown run" in refusal(client.get(f"/api/v1/runs/nobody{path}"), 404)["error"]
    assert post(client, ndjson([{"type": "run", "run": "r", "world_size": 4}]) + body).json()["accepted"] == 2
    assert client.get("/api/v1/runs/r").json()["world_size"] == 4
    assert losses(client) == [1.0]


def test_wrong_content_types_and_encodings_are_415_or_400(client: TestClient, run: str) -> None:
    body = ndjson([sample("train.loss", 1.0, 0)])
    for content_type in ("text/plain", "application/json", "application/x-www-form-urlencoded", ""):
        refusal(post(client, body, content_type), 415)
    refusal(client.post("/api/v1/runs", content=b"{}", headers={"content-type": "text/plain"}), 415)
    refusal(post(client, body, Content_Encoding="br"), 400)
    refusal(post(client, body, Content_Encoding="gzip"), 400)
    refusal(post(client, body, SLOTS), 400)
    refusal(client.post("/api/v1/runs", content=b"{", headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("zstd", zstandard.compress), ("identity", bytes)]
)
def test_packed_bodies_are_taken(client: TestClient, run: str, encoding: str, pack: Any) -> None:
    reply = post(client, pack(ndjson([sample("train.loss", 3.0, 0)])), Content_Encoding=encoding)
    assert reply.json() == {"accepted": 1, "rejected": []}
    assert losses(client) == [3.0]


def test_an_empty_batch_of_slots_is_taken(client: TestClient, run: str) -> None:
    assert post(client, encode_batch("h", Anchor(0, 0), []), SLOTS).json() == {"accepted": 0, "rejected": []}


def test_bodies_over_the_limit_are_413_as_sent_and_as_unpacked(settings: Settings) -> None:
    app = create_app(settings, limits=Limits(body=10_000, unpacked=50_000))
    with TestClient(app, base_url="http://127.0.0.1", headers={"authorization": f"Bearer {TOKEN}"}) as client:
        client.post("/api/v1/runs", json={"run": "r"})
        refusal(post(client, b"x" * 10_001), 413)
        refusal(post(client, gzip.compress(b" " * 50_001), Content_Encoding="gzip"), 413)
        assert post(client, ndjson([sample("train.loss", 1.0, 0)])).status_code == 200


def test_too_many_at_once_is_429_and_too_much_waiting_503_both_with_retry_after(settings: Settings) -> None:
    for limits, status in ((Limits(requests=0), 429), (Limits(waiting=-1), 503)):
        app = create_app(settings, limits=limits)
        with TestClient(app, base_url="http://127.0.0.1", headers={"authorization": f"Bearer {TOKEN}"}) as client:
            client.post("/api/v1/runs", json={"run": "r"})
            response = post(client, ndjson([sample("train.loss", 1.0, 0)]))
            refusal(response, status)
            assert int(response.headers["retry-after"]) > 0


def test_nothing_is_told_without_the_token(client: TestClient, run: str) -> None:
    for headers in ({"authorization": ""}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
        for path in ("/api/v1/runs", "/openapi.json", "/api/nothing"):
            response = client.get(path, headers=headers)
            refusal(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
        refusal(client.post("/api/v1/runs", json={"run": "x"}, headers=headers), 401)
    page = client.get("/", headers={"authorization": "", "accept": "text/html"})
    assert page.status_code == 401
    assert "token" in page.text
    assert client.get("/healthz", headers={"authorization": ""}).json() == {"status": "ok"}


def test_the_ready_url_signs_a_browser_in_and_hides_the_token(client: TestClient, run: str) -> None:
    anonymous = {"authorization": ""}
    response = client.get(f"/run/r?token={TOKEN}&x=1-2", headers=anonymous, follow_redirects=False)
    assert response.status_code == 303
    assert response.headers["location"] == "/run/r?x=1-2"
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    bare = TestClient(client.app, base_url="http://127.0.0.1:8321")
    bare.cookies.set(*cookie.split(";")[0].split("=", 1))
    assert bare.get("/api/v1/runs").status_code == 200
    client.cookies.clear()
    wrong = client.get("/?token=wrong", headers=anonymous, follow_redirects=False)
    assert wrong.status_code == 401
    assert "set-cookie" not in wrong.headers
    refusal(client.get(f"/api/v1/runs?token={TOKEN}", headers=anonymous), 401)
    outside = client.get(f"//evil.example/?token={TOKEN}", headers=anonymous, follow_redirects=False)
    assert not outside.headers["location"].startswith("//")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8321", "127.0.0.1.evil.example", "192.168.0.7", "", "["]
)
def test_another_host_name_is_refused(client: TestClient, host: str) -> None:
    refusal(client.get("/api/v1/runs", headers={"host": host}), 403)
    refusal(client.get("/healthz", headers={"host": host}), 403)


@pytest.mark.parametrize("host", ["127.0.0.1:8321", "localhost", "LOCALHOST:9", "[::1]:8321"])
def test_the_names_of_this_machine_are_taken(client: TestClient, host: str) -> None:
    assert client.get("/api/v1/runs", headers={"host": host}).status_code == 200


def test_pages_of_other_origins_cannot_post_or_listen(client: TestClient, run: str) -> None:
    for origin in ("http://evil.example", "https://127.0.0.1:1", "null", "http://localhost:8321"):
        refusal(client.post("/api/v1/runs", json={"run": "x"}, headers={"origin": origin}), 403)
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect("/api/v1/runs/r/live", headers={"origin": origin, "host": "127.0.0.1:8321"}),
        ):
            pass
    own = {"origin": "http://127.0.0.1:8321"}
    assert client.post("/api/v1/runs", json={"run": "x"}, headers=own).status_code == 201
    with (
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect(
            "/api/v1/runs/r/live", headers={**own, "host": "127.0.0.1:8321", "authorization": ""}
        ),
    ):
        pass


def test_records_reach_the_live_feed_once_durable(client: TestClient, run: str) -> None:
    headers = {"origin": "http://127.0.0.1:8321", "host": "127.0.0.1:8321"}
    with client.websocket_connect("/api/v1/runs/r/live", headers=headers) as socket:
        socket.send_text(json.dumps({"subscribe": ["train.loss"]}))
        post(client, ndjson([sample("train.loss", 1.5, 7, rank=0)]))
        for _ in range(50):
            frame = socket.receive_bytes()
            header = json.loads(frame[4 : 4 + int.from_bytes(frame[:4], "little")])
            if header["blocks"]:
                break
    assert [block["metric"] for block in header["blocks"]] == ["train.loss"]


def test_what_is_not_there_is_404_json_and_a_wrong_method_405(client: TestClient, run: str) -> None:
    for path in ("/api", "/api/", "/api/v1/nothing", "/api/v2/runs", "/api/v1/runs/r/nothing"):
        response = client.get(path)
        assert response.status_code == 404
        assert response.json()["error"]
    response = client.delete("/api/v1/runs")
    refusal(response, 405)
    assert "GET" in response.headers["allow"]
    refusal(client.get(RECORDS), 405)


@pytest.mark.parametrize(
    "path",
    [
        "series", "series?metric=m&points=0", "series?metric=m&axis=depth", "series?metric=m&from=x",
        "heatmap?metric=m&pool=sum",
        "heatmap?metric=m&rows=host", "steps/x", "diagnosis?upto_step=x",
    ],
)  # fmt: skip
def test_parameters_that_make_no_sense_are_refused(client: TestClient, run: str, path: str) -> None:
    refusal(client.get(f"/api/v1/runs/r/{path}"), 422)


@pytest.mark.parametrize(
    "path", ["series?metric=m&rank=a", "series?metric=m&rank=1,,2", "heatmap?metric=m&rows=expert"]
)
def test_questions_that_cannot_be_answered_are_refused(client: TestClient, run: str, path: str) -> None:
    refusal(client.get(f"/api/v1/runs/r/{path}"), 400)


def test_text_in_a_question_never_becomes_sql(client: TestClient, run: str) -> None:
    post(client, ndjson([step_span(0, 1)]))
    nasty = "x' OR 1=1 --\\'"
    for params in (
        {"metric": nasty}, {"metric": "m", "device": nasty}, {"metric": "m", "label.a": nasty},
        {"metric": "phase.duration", "label.phase": nasty}, {"metric": "m", "host": nasty},
    ):  # fmt: skip
        reply = client.get("/api/v1/runs/r/series", params=params)
        assert (reply.status_code, reply.json()["series"]) == (200, [])


def test_a_failure_inside_is_a_500_that_tells_nothing_secret(
    client: TestClient, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("lens.store.query.Query.runs", fail)
    assert "secret" not in refusal(client.get("/api/v1/runs"), 500)["error"]


def test_diagnosis_ledger_and_alerts_answer_in_a_process_of_their_own(client: TestClient, run: str) -> None:
    post(client, ndjson([step_span(rank, step) for rank in (0, 1) for step in range(30)]))
    reply = client.get("/api/v1/runs/r/diagnosis").json()
    assert reply["run"] == "r"
    assert reply["upto_step"] == 29
    assert reply["coverage"]["ranks_reporting"] == 2
    assert client.get("/api/v1/runs/r/diagnosis?upto_step=10").json()["upto_step"] == 10
    assert set(client.get("/api/v1/runs/r/ledger").json()) >= {"from_step", "to_step", "wall_s", "parts"}
    assert isinstance(client.get("/api/v1/runs/r/alerts").json()["alerts"], list)


def test_every_route_is_in_the_openapi_document(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {
        f"/api/v1/runs/{{run}}{tail}" for tail in ("", "/records", "/series", "/heatmap", "/steps/{step}")
    } <= set(paths)
