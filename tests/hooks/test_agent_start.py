"""``watch`` starts the host's agent when there is a server to ship to, unless that is forbidden."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hooks.ringside import run_script
from tests.waiting import wait_for

pytestmark = pytest.mark.processes
SCRIPT = "import lens; lens.watch(); lens.log({'n': 1})"
NOBODY = "http://127.0.0.1:9"


def agents(rings: Path) -> Iterator[int]:
    for path in rings.glob("*/*/about.json"):
        with contextlib.suppress(FileNotFoundError):  # the agent removes what a training has left
            about = json.loads(path.read_text())
            if about["role"] == "agent":
                yield about["pid"]


def locks(rings: Path) -> list[Path]:
    """What `watch` takes before it starts an agent."""
    return list(rings.glob("*/agent.lock"))


def test_the_agent_outlives_the_training_and_is_not_its_child(rings: Path) -> None:
    done = run_script(SCRIPT, rings, LENS_AGENT="1", LENS_SERVER=NOBODY)
    found = wait_for(lambda: list(agents(rings)))
    try:
        assert (done.returncode, done.stderr) == (0, "")
        assert locks(rings)
        assert "agent\0--server\0" + NOBODY in Path(f"/proc/{found[0]}/cmdline").read_text()
        assert os.getsid(found[0]) != os.getsid(0)
    finally:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("environment", [{"LENS_AGENT": "0", "LENS_SERVER": NOBODY}, {"LENS_AGENT": "1"}])
def test_no_agent_is_started_when_forbidden_or_without_a_server(rings: Path, environment: dict[str, str]) -> None:
    assert run_script(SCRIPT, rings, **environment).returncode == 0
    assert locks(rings) == []
