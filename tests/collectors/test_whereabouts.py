"""A rank that stays where it is is looked up in its code; one that moves, or does not want it, is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lens.attach.facts import look
from lens.attach.preflight import READING_RULES, judge
from lens.collectors.whereabouts import AGAIN_NS, STILL_NS, Whereabouts, read_stack
from tests.waiting import wait_for

pytestmark = pytest.mark.processes
SCRIPT = """
import sys, time
def wait_for_shard():
    print("here", flush=True)
    sys.stdin.read()
wait_for_shard()
"""


@contextmanager
def waiting(path: Path, **environment: str) -> Iterator[int]:
    path.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"here\n"
            yield child.pid
        finally:
            child.kill()


def reads(pid: int) -> bool:
    """Whether it has left the line that said its word, which reaches us before."""
    stack = read_stack(pid)
    return stack is not None and stack[-1]["line"] == 5


def test_the_line_at_which_a_rank_stands_is_read_once_it_has_stood_there(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    with waiting(script) as pid:
        if judge(look(pid), READING_RULES) is not None:
            pytest.skip("the memory of a child cannot be read here")
        wait_for(lambda: reads(pid))
        whereabouts = Whereabouts(pid)
        assert whereabouts.stack(None, 10 * STILL_NS) is None
        assert whereabouts.stack(STILL_NS, 2 * STILL_NS - 1) is None
        stack = whereabouts.stack(STILL_NS, 2 * STILL_NS)
        assert stack is not None
        assert [frame["name"] for frame in stack if frame["file"] == str(script)] == ["<module>", "wait_for_shard"]
        assert [frame["line"] for frame in stack if frame["file"] == str(script)] == [6, 5]
        # Not read again at once, and not held when it moves on.
        assert whereabouts.stack(STILL_NS, 2 * STILL_NS + AGAIN_NS - 1) is stack
        assert whereabouts.stack(9 * STILL_NS, 9 * STILL_NS) is None
    assert Whereabouts(pid).stack(0, STILL_NS) is None


def test_a_process_that_wants_nobody_in_it_is_not_looked_at(tmp_path: Path) -> None:
    with waiting(tmp_path / "train.py", LENS_ATTACH="0") as pid:
        assert Whereabouts(pid).stack(0, STILL_NS) is None
