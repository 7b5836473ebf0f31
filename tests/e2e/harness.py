"""A real demo: server, agents, torchrun, four ranks. Nothing is replaced by a stand-in but the cards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 150.0


class Family:
    """Processes that a test started, with a data folder of their own."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.process: subprocess.Popen[str]
        """The one that serves."""

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Start `lens` with these words."""
        return self.start_python("-m", "lens", *words, **environment)

    def start_python(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Start Python with these words; a marker of our own in the environment finds every descendant."""
        return subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "LENS_TEST_MARK": str(self.data), **environment},
        )

    def family(self) -> dict[int, dict[str, str]]:
        """Every living process that descends from this demo, with its environment."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_bytes().split(b"\0")
                if (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                    continue
            except OSError:
                continue
            environment = dict(word.decode(errors="replace").partition("=")[::2] for word in words if word)
            if environment.get("LENS_TEST_MARK") == str(self.data):
                found[int(folder.name)] = environment
        return found

    def rank_pid(self, rank: int) -> int:
        """The process of one rank: the oldest with its RANK (DataLoader workers inherit the variable)."""
        pids = [pid for pid, env in self.family().items() if env.get("RANK") == str(rank)]
        return min(pids)

    def get(self, path: str) -> Any:
        """A JSON reply of the demo's server."""
        owner = json.loads((self.data / "server.json").read_text())
        token = (self.data / "token").read_text().strip()
        request = urllib.request.Request(owner["url"] + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=100) as response:
            return json.load(response)

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """What the condition gives once it gives something."""
        end, last = time.monotonic() + PATIENCE_S, None
        while time.monotonic() < end:
            try:
                value = condition()
                if value:
                    return value
            except (OSError, ValueError, KeyError, IndexError) as error:
                last = error
            assert self.process.poll() is None, (
                f"the server ended by {self.process.returncode}: {self.process.communicate()}"
            )
            time.sleep(0.2)
        raise AssertionError(f"{what} did not happen ({last})")

    def end(self) -> None:
        """Make sure nothing of it is left, whatever the test did."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself since
                os.kill(pid, signal.SIGKILL)


class Demo(Family):
    """One `lens demo` process and what can be seen of it from outside."""

    def __init__(self, data: Path, *words: str) -> None:
        super().__init__(data)
        # Short: sockets in it have paths of 107 bytes at most.
        self.scratch = Path(tempfile.mkdtemp(prefix="lens-"))
        command = ("demo", "--no-browser", "--port", "0", "--data", str(data), *words)
        self.process = self.start(*command, TMPDIR=str(self.scratch))

    def end(self) -> None:
        """The same, and its temporary files."""
        super().end()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def wait_for_step(self, step: int) -> dict[str, Any]:
        """The run's summary once all ranks report and this step is stored."""

        def reached() -> dict[str, Any] | None:
            run = self.get("/api/v1/runs")["runs"][0]
            done = run["last_step"] is not None and run["last_step"] >= step and run["ranks_reporting"] == 4
            return run if done else None

        return self.wait_for(reached, f"step {step}")

    def finish(self) -> dict[str, Any]:
        """The JSON reply of `--exit --json`."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        assert out.strip(), f"no reply: {err}"
        reply: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        assert "diagnosis" in reply, f"no verdict: {reply}\n{err}"
        return reply


class Hosted(Family):
    """`lens serve`, and a script of four ranks under `lens run`."""

    def __init__(self, data: Path, *script: str) -> None:
        super().__init__(data)
        # Rings of their own: a server takes in what it finds of earlier runs.
        rings = str(data.with_name("rings"))
        self.process = self.start("serve", "--data", str(data), "--port", "0", LENS_RINGS=rings)
        self.wait_for(lambda: (data / "server.json").exists() and self.get("/api/v1/runs"), "the server")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
        self.training = self.start("run", "--data", str(data), "--", *launcher, *script, LENS_RINGS=rings)

    def diagnosis(self) -> dict[str, Any]:
        """The verdict on the only run."""
        run = self.get("/api/v1/runs")["runs"][0]["run"]
        reply: dict[str, Any] = self.get(f"/api/v1/runs/{run}/diagnosis")
        return reply
