"""Bodies that no sender should send, against the real application; `make prove-api` sends many more."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from benchmarks.api_robustness import send_bodies


def test_bad_bodies_get_no_server_error_and_cost_no_good_record(client: TestClient) -> None:
    tallies = send_bodies(client, 500, seed=1)
    assert [each for tally in tallies.values() for each in tally.failures] == []
    assert {name: tally.stored for name, tally in tallies.items()} == {
        name: tally.good for name, tally in tallies.items()
    }
    assert all(tally.good > 100 for tally in tallies.values())


@pytest.mark.parametrize("path", ["/api/v1/runs", "/api/v1/query", "/v1/metrics"])
@pytest.mark.parametrize("body", [b'{"run": "\xff"}', b'{"sql": "\xed\xa0\x80"}', b"[" * 100_000])
def test_a_body_that_is_no_json_is_the_senders_error(client: TestClient, path: str, body: bytes) -> None:
    reply = client.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
