"""A real server that gets more requests than it can serve: `lens diagnose` says so, and nothing of one that keeps up."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import PATIENCE_S, Family

pytestmark = [pytest.mark.processes, pytest.mark.timeout(400), pytest.mark.xdist_group("demo")]
SCRIPT = str(Path(__file__).with_name("serving_by_hand.py"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    """A store, and rings of its own."""
    data = tmp_path_factory.mktemp("served") / "data"
    family = Family(data)
    family.process = family.start(
        "serve", "--data", str(data), "--port", "0", LENS_RINGS=str(data.with_name("rings"))
    )
    try:
        family.wait_for(lambda: (data / "server.json").exists() and family.get("/api/v1/runs"), "the server")
        yield family
    finally:
        family.end()


def judged(served: Family, run: str) -> dict[str, Any] | None:
    """What `lens diagnose` says once there is enough to say anything."""
    process = served.start("diagnose", run, "--json", "--data", str(served.data))
    out, _ = process.communicate(timeout=PATIENCE_S)
    reply: dict[str, Any] = json.loads(out) if out.strip().startswith("{") else {}
    return reply if reply.get("status") not in (None, "insufficient") else None


@pytest.mark.parametrize("how", ["open", "closed"])
def test_a_server_is_overloaded_when_more_comes_than_it_can_serve(how: str, served: Family) -> None:
    rings = str(served.data.with_name("rings"))
    words = ("run", "--run", how, "--data", str(served.data), "--", sys.executable, SCRIPT, how)
    done = served.start(*words, LENS_RINGS=rings)
    _, err = done.communicate(timeout=PATIENCE_S)
    assert done.returncode == 0, err
    if how == "closed":
        reply = served.wait_for(lambda: judged(served, how), "a verdict")
        assert "queue_overload" not in {item["cause"] for item in reply["hypotheses"]}
        return

    def overloaded() -> dict[str, Any] | None:
        found = (judged(served, how) or {}).get("hypotheses", [])
        return next((item for item in found if item["cause"] == "queue_overload"), None)

    found = served.wait_for(overloaded, "queue_overload")
    assert found["ranks"] == []
    assert found["onset_step"] is None
    queued = next(item for item in found["evidence"] if item["metric"] == "infer.request.queue_time")
    # Three of four requests come while another is served: the newest waited for most of the others' work.
    assert found["slowdown_pct"] > 100
    assert queued["observed"] > 0
