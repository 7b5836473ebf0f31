"""Alerts: what holds a run back is told once, and once more when it is over."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from lens.diagnosis.report import hypothesis
from lens.settings import Settings, SettingsError
from lens.store import webhook as webhooks
from lens.store.alerts import FILE, FORGOTTEN, GONE, Alerts
from lens.store.app import create_app
from lens.store.prices import Prices
from lens.store.webhook import Webhook
from sample_runs.cluster import Cluster, Fault, Layout, emit, simulate

from .conftest import TOKEN

SLOW = hypothesis("slow_device", [3], onset_step=20, recommendation="Take rank 3 out.")


def judged(*findings: dict[str, Any]) -> dict[str, Any]:
    return {"hypotheses": [{**found, "finding": number} for number, found in enumerate(findings)]}


class Told:
    """Alerts on a folder, and what they said of run r."""

    def __init__(self, folder: Path) -> None:
        self.alerts = Alerts(folder, [lambda alert: self.said.append((alert.state, alert.cause))])
        self.said: list[tuple[str, str]] = []

    def after(self, *evaluations: dict[str, Any]) -> list[tuple[str, str]]:
        self.said.clear()
        for evaluation in evaluations:
            self.alerts.update("r", evaluation)
        return list(self.said)


def test_a_finding_is_told_once_it_is_sure_and_once_when_it_is_over(tmp_path: Path) -> None:
    told = Told(tmp_path)
    assert told.after(judged(SLOW), judged()) == []
    assert told.after(*[judged(SLOW)] * 10) == [("firing", "slow_device")]
    assert told.after(*[judged({**SLOW, "end_step": 60})] * 10) == [("resolved", "slow_device")]
    assert told.after(*[judged()] * 10) == []


def test_what_is_no_longer_found_is_over_after_a_while(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.after(*[judged(SLOW)] * 2)
    assert told.after(*[judged()] * (GONE - 1), judged(SLOW)) == []
    assert told.after(*[judged()] * GONE) == [("resolved", "slow_device")]


def test_what_stops_a_run_is_told_at_once_and_notes_never(tmp_path: Path) -> None:
    told = Told(tmp_path)
    dead = hypothesis("rank_dead", [1], severity="error")
    mixed = hypothesis("mixed_vendor_imbalance", [2, 3], severity="info")
    assert told.after(judged(dead, mixed)) == [("firing", "rank_dead")]


def test_another_name_for_the_same_thing_is_a_change_and_another_rank_is_another_thing(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.after(*[judged(SLOW)] * 2)
    hot = {**SLOW, "cause": "thermal_throttle"}
    assert told.after(judged(hot), judged(hot)) == [("changed", "thermal_throttle")]
    assert told.after(*[judged(hot, {**SLOW, "ranks": [4]})] * 2) == [("firing", "slow_device")]


def test_a_server_that_starts_again_does_not_repeat_itself(tmp_path: Path) -> None:
    Told(tmp_path).after(*[judged(SLOW)] * 2)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"half a li')
    again = Told(tmp_path)
    assert again.after(*[judged(SLOW)] * 4) == []
    assert again.after(*[judged()] * GONE) == [("resolved", "slow_device")]
    assert Told(tmp_path).after(*[judged()] * GONE) == []


def test_what_was_told_of_a_run_that_is_gone_is_cut_out_at_the_next_start(tmp_path: Path) -> None:
    first = Alerts(tmp_path)
    for _ in range(2):
        first.update("kept", judged(SLOW))
        first.update("deleted", judged(SLOW))
    said: list[str] = []
    again = Alerts(tmp_path, [lambda alert: said.append(alert.run)], {"kept"})
    assert [json.loads(line)["run"] for line in (tmp_path / FILE).read_text().splitlines()] == ["kept"]
    for _ in range(2):
        again.update("kept", judged(SLOW))
        again.update("deleted", judged(SLOW))
    assert said == ["deleted"]


def test_what_comes_again_long_after_it_was_over_is_told_again(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.after(*[judged(SLOW)] * 2, *[judged()] * FORGOTTEN)
    assert told.after(*[judged(SLOW)] * 2) == [("firing", "slow_device")]


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[dict[str, Any]], threading.Event]]:
    """A URL that fails at first, what was posted to it since, and whether something was."""
    got: list[dict[str, Any]] = []
    some, tries = threading.Event(), iter([503, *[200] * 100])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status = next(tries)
            self.send_response(status)
            self.end_headers()
            if status == 200:
                got.append(json.loads(body))
                some.set()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret", got, some
    server.shutdown()
    server.server_close()


def test_the_webhook_is_told_by_name_which_rank_holds_a_run_back(
    tmp_path: Path, receiver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, got, some = receiver
    monkeypatch.setattr(webhooks, "PAUSES_S", (0.1, 0.1))
    cluster = Cluster(Layout(8), 60, faults=(Fault("thermal_throttle", 30, 3),), seed=7)
    settings = Settings.load({}, data=tmp_path, token=TOKEN, alert_webhook=url, device_hour_price="5 EUR")
    app = create_app(settings)
    with TestClient(app, base_url="http://127.0.0.1:8321", headers={"authorization": f"Bearer {TOKEN}"}) as client:
        run = {**cluster.run(), "run": "hot"}
        assert client.post("/api/v1/runs", json=run).status_code == 201
        lines = [json.dumps(record) for record in emit.records(simulate(cluster).tables)]
        half = len(lines) // 2
        for number, part in enumerate((lines[:half], lines[half:])):
            sent = client.post(
                "/api/v1/runs/hot/records",
                content="\n".join(part),
                headers={"content-type": "application/x-ndjson", "lens-source": "t", "lens-sequence": str(number)},
            )
            assert sent.json()["rejected"] == []
        for beat in range(60):
            if some.wait(1):
                break
            client.post(
                "/api/v1/runs/hot/records",
                content=json.dumps({"type": "sample", "t_ns": beat, "metric": "user.beat", "value": beat}),
                headers={
                    "content-type": "application/x-ndjson",
                    "lens-source": "t",
                    "lens-sequence": str(2 + beat),
                },
            )
        assert client.get("/api/v1/runs/hot").json()["device_hour_price"] == {"amount": 5.0, "currency": "EUR"}
    assert (got[0]["state"], got[0]["run"], got[0]["cause"], got[0]["ranks"]) == (
        "firing", "hot", "thermal_throttle", [3],
    )  # fmt: skip
    assert "thermal throttle of rank 3 since step" in got[0]["text"]


def test_a_webhook_must_be_a_url() -> None:
    for wrong in ("file:///etc/passwd", "example.org", "http://"):
        with pytest.raises(SettingsError, match="http"):
            Webhook(wrong)


def test_prices_are_those_of_the_cards_and_absent_where_one_is_not_known() -> None:
    prices = Prices.parse("H200 4.5, MI300X 3.5 USD")
    h200, mi300x = {"model": "NVIDIA H200"}, {"model": "AMD Instinct MI300X"}
    assert prices.of([h200, mi300x]) == {"amount": 4.0, "currency": "USD"}
    assert prices.of([h200, {"model": "other"}]) is None
    assert Prices.parse("2 €").of([{"model": None}, {}]) == {"amount": 2.0, "currency": "€"}
    assert Prices.parse(None).of([h200]) is None
    for wrong in ("2.5", "cheap USD", "H200 USD", "-1 USD"):
        with pytest.raises(SettingsError):
            Prices.parse(wrong)
