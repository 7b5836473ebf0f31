"""Four real ranks that come to stand still, under `lens run` and without a line of lens: the verdict says who and where."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Hosted

pytestmark = [pytest.mark.processes, pytest.mark.timeout(400), pytest.mark.xdist_group("demo")]
YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
READABLE = os.geteuid() == 0 or not YAMA.exists() or YAMA.read_text().strip() == "0"
"""Whether the agent may read where ranks stand, which do not descend from it."""
SCRIPT = str(Path(__file__).with_name("hanging.py"))


def judged(hosted: Hosted) -> tuple[Any, ...]:
    """Status, cause, ranks and step of the verdict."""
    reply = hosted.diagnosis()
    found = reply["hypotheses"][0]
    return reply["status"], found["cause"], found["ranks"], reply["upto_step"]


@pytest.mark.parametrize(
    ("how", "status", "cause", "told"),
    [
        ("skip", "hung", "collective_mismatch", "in all_reduce 61 of ranks/2,3"),
        ("shape", "failed", "collective_mismatch", "28 bytes as number 121 of world/0"),
        ("sleep", "hung", "rank_stuck", "in all_reduce 61 of ranks/2,3"),
    ],
)
def test_the_rank_that_left_the_line_is_named_with_group_and_number(
    how: str, status: str, cause: str, told: str, start_hosted: Callable[..., Hosted]
) -> None:
    hosted = start_hosted(SCRIPT, how, "3", "60")
    # Who it is and which call shows once every rank has said where it stands, and the ends of all that fail are told.
    expected = (status, cause, [3], 60)
    hosted.wait_for(lambda: judged(hosted) == expected, str(expected))
    hosted.wait_for(lambda: told in hosted.diagnosis()["hypotheses"][0]["recommendation"], told)
    if how == "sleep" and READABLE:
        line = next(n for n, text in enumerate(Path(SCRIPT).read_text().splitlines(), 1) if "3600" in text)
        at = f"It is at hanging.py:{line} in main. Look at that line."
        hosted.wait_for(lambda: at in hosted.diagnosis()["hypotheses"][0]["recommendation"], at)
