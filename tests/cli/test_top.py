"""``lens top`` shows what each rank is doing: once, or again and again in place on a terminal that it gives back."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lens.cli.terminal import ENTER, LEAVE, paint
from lens.cli.top_view import view
from tests.cli.conftest import MS, Post, heartbeat, step_of
from tests.store.processes import Server

pytestmark = pytest.mark.processes
COLOUR = re.compile(r"\x1b\[[0-9;]+m")


def top(server: Server, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lens", "top", "--data", str(server.data), *words],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip


def row_of(output: str, rank: int) -> str:
    return next(line for line in output.splitlines() if re.match(rf"[▶ ] +{rank} ", line))


def test_where_the_output_is_no_terminal_it_is_printed_once_and_plainly(
    server: Server, run: tuple[str, int], post: Post
) -> None:
    name, now = run
    done = top(server, name)
    for _ in range(5):  # it is live for some seconds after anything came, which a busy machine may sleep through
        if "live" in done.stdout:
            break
        post(name, [heartbeat(0, now, state="running", phase="backward", step=5)])
        done = top(server, name)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    head, verdict, *_ = done.stdout.splitlines()
    assert "(small)  live" in head
    assert "4 of 4 ranks  step 4  10.00 steps/s" in head
    assert verdict
    # Rank 0 came to the all-reduce 50 ms before rank 2 did, of 100.
    assert re.search(
        r"host0/gpu0 +H200 +4711 +4 +100.0 ms +50 % +backward +96 % +1980 MHz +612 W", row_of(done.stdout, 0)
    )
    assert re.search(r"20.0/140 GiB +3.0 GiB +8.0/64 GiB", row_of(done.stdout, 0))
    assert re.search(r"100.0 ms +0 % +backward", row_of(done.stdout, 2))
    assert "all_reduce dp/0 5 for 7.0 s" in row_of(done.stdout, 3)


def test_what_was_not_read_lately_is_not_available_and_never_zero(server: Server, run: tuple[str, int]) -> None:
    reply = json.loads(top(server, run[0], "--json").stdout)
    assert [rank["values"].get("hw.gpu.utilization") for rank in reply["ranks"]] == [0.96, None, None, None]
    assert reply["diagnosis"]["run"] == run[0]
    assert re.search(r"n/a +n/a +n/a +n/a +n/a +8.0/64 GiB", row_of(top(server, run[0]).stdout, 1))
    assert row_of(top(server, run[0]).stdout, 3).count("n/a") == 6


def test_a_rank_that_ended_says_how(server: Server, run: tuple[str, int], post: Post) -> None:
    name, now = run
    event = {"type": "event", "kind": "process.exit", "severity": "error", "text": "", "t_ns": now + MS}
    post(name, [{**event, "rank": 1, "attrs": {"exit_code": None, "signal": 9}},
                {**event, "rank": 2, "attrs": {"exit_code": 3}}])  # fmt: skip
    output = top(server, name).stdout
    assert "ended by SIGKILL" in row_of(output, 1)
    assert "ended, code 3" in row_of(output, 2)
    assert "2 of 4 ranks" in output


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [(["no-such-run"], 2, "is not a run here"), (["--interval", "0"], 2, "too short"),
     (["--server", "http://127.0.0.1:9"], 3, "lens serve")],
)  # fmt: skip
def test_what_cannot_be_shown_is_said(server: Server, words: list[str], code: int, said: str) -> None:
    done = top(server, *words)
    assert done.returncode == code
    assert said in done.stderr


class Terminal:
    """A pseudo-terminal with ``lens top`` in it."""

    def __init__(self, server: Server, *words: str, **environment: str) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 170, 0, 0))
        self.mode = termios.tcgetattr(self.slave)
        self.output = ""
        clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lens", "top", "--interval", "0.2", "--data", str(server.data), *words],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**clean, "TERM": "xterm-256color", **environment},
        )  # fmt: skip

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Read until this text has been shown (colours left out), from here on."""
        seen, end = "", time.monotonic() + seconds
        while text not in COLOUR.sub("", seen):
            assert time.monotonic() < end, f"{text!r} was not shown; the terminal has {self.output[-3000:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                got = os.read(self.master, 65536).decode(errors="replace")
                seen += got
                self.output += got

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        """Its exit code. What it writes is read meanwhile: it could not end before a terminal that takes no more."""
        end = time.monotonic() + 60
        while (code := self.process.poll()) is None or not self.output.endswith(LEAVE):
            if time.monotonic() > end:
                break
            if select.select([self.master], [], [], 0.1)[0]:
                self.output += os.read(self.master, 65536).decode(errors="replace")
        assert code is not None, f"it did not end; the terminal has {self.output[-3000:]!r}"
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for descriptor in (self.master, self.slave):
            os.close(descriptor)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def test_on_a_terminal_it_goes_on_in_place_and_gives_the_terminal_back(
    server: Server, run: tuple[str, int], post: Post, terminals: list[Terminal]
) -> None:
    name, now = run
    terminals.append(terminal := Terminal(server, name))
    terminal.wait_for("step 4")
    assert termios.tcgetattr(terminal.slave) != terminal.mode
    post(name, [record for rank in range(4) for record in step_of(rank, 5, now, 40)])
    terminal.wait_for("step 5")
    assert COLOUR.search(terminal.output)
    terminal.type("q")
    assert terminal.end() == 0
    assert terminal.output.startswith(ENTER)
    assert terminal.output.endswith(LEAVE)
    assert terminal.output.count(ENTER) == 1
    assert termios.tcgetattr(terminal.slave) == terminal.mode
    # In place: it goes back to the first line each time and never below the last.
    pictures = terminal.output.split("\x1b[H")[1:]
    assert len(pictures) >= 2
    assert all(picture.count("\n") < 30 for picture in pictures)


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_however_it_ends_the_terminal_comes_back(
    server: Server, run: tuple[str, int], terminals: list[Terminal], how: str
) -> None:
    terminals.append(terminal := Terminal(server, run[0], NO_COLOR="1"))
    terminal.wait_for("q quits")
    assert not COLOUR.search(terminal.output)
    if how == "ctrl-c":
        terminal.type("\x03")
    else:
        terminal.process.send_signal(signal.SIGTERM)
    assert terminal.end() == (0 if how == "ctrl-c" else 128 + signal.SIGTERM)
    assert terminal.output.endswith(LEAVE)
    assert "Traceback" not in terminal.output
    assert termios.tcgetattr(terminal.slave) == terminal.mode


def test_a_server_that_goes_away_is_said_and_the_last_picture_stays(
    run: tuple[str, int], server: Server, terminals: list[Terminal], tmp_path: Any
) -> None:
    with Server(tmp_path / "own") as own:
        with own.client() as client:
            client.post("/api/v1/runs", json={"run": "short", "world_size": 1})
        terminals.append(terminal := Terminal(own, "--server", f"http://127.0.0.1:{own.port}", "short"))
        terminal.wait_for("0 of 1 ranks")
    terminal.wait_for("does not answer")
    assert terminal.process.poll() is None
    terminal.type("q")
    assert terminal.end() == 0


def reply_of(count: int, **more: Any) -> dict[str, Any]:
    rank = {"host": "host0", "device": None, "pid": None, "vendor": None, "model": None, "step": 7, "step_s": 0.1, "wait_share": 0.5,
            "state": "running", "phase": "forward", "collective": None, "exit": None, "age_s": 0.0, "values": {}}  # fmt: skip
    run = {"run": "r", "name": None, "state": "live", "age_s": 0.5, "world_size": count, "ranks_reporting": count,
           "last_step": 7, "last_t_ns": 10**18, "steps_per_s": 10.0, "simulated": False, "hosts": []}  # fmt: skip
    return {**run, "ranks": [{"rank": number, **rank} for number in range(count)], **more}


def test_the_picture_never_exceeds_the_terminal_and_names_the_guilty_first() -> None:
    cause = {"cause": "slow_device", "ranks": [40], "severity": "warning", "onset_step": 3, "slowdown_pct": 22.0,
             "confidence": 0.9, "recommendation": "drain host5"}  # fmt: skip
    diagnosis = {"status": "degraded", "hypotheses": [cause]}
    for width, height in ((170, 30), (80, 24), (40, 10), (20, 7)):
        lines = [paint(line, False, width) for line in view(reply_of(64), diagnosis, width=width, height=height)]
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
        first = next(line for line in lines if line.startswith("▶"))
        assert first.split()[1] == "40"
        if width >= 80:
            assert any("STEP TIME" in line and "WAITS" in line for line in lines)
    seen = set()
    for scroll in range(0, 64, 8):
        text = "\n".join(paint(line, False) for line in view(reply_of(64), diagnosis, height=24, scroll=scroll))
        seen |= {int(match[1]) for match in re.finditer(r"^[▶ ] +(\d+) ", text, re.M)}
    assert seen == set(range(64))
