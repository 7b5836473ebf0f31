"""A real server process for tests, and what can be asked of it."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

import httpx

from .conftest import TOKEN

SERVE = """
import sys
from lens.settings import Settings
from lens.store.server import serve
settings = Settings.load({}, data=sys.argv[1], token=sys.argv[3])
sys.exit(serve(settings, port=int(sys.argv[2]), ready=lambda url: print(url, flush=True)))
"""


PORTS = range(10_000, 65_000)


def unasked_port() -> int:
    """A free port that the kernel hands to nobody who does not name it, where there is one: such a port can be bound
    again after its server's end."""
    try:
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except OSError:
        first, last = 32_768, 60_999
    outside = [port for port in PORTS if not first <= port <= last] or PORTS
    for port in random.sample(outside, len(outside)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


class Server:
    """``lens.store.server.serve`` in a process of its own, ready when entered."""

    def __init__(self, data: Path, port: int = 0) -> None:
        self.data = data
        command = [sys.executable, "-c", SERVE, str(data), str(port), TOKEN]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def port(self) -> int:
        """The port it announced."""
        return int(json.loads((self.data / "server.json").read_text())["url"].rsplit(":", 1)[1])

    def wait_ready(self, timeout_s: float = 120.0) -> str:
        """The URL it printed."""
        line = self._lines.get(timeout=timeout_s)
        assert line, f"the server ended: {self.process.stderr.read() if self.process.stderr else ''}"
        return line

    def client(self) -> httpx.Client:
        """A client with the token."""
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers={"authorization": f"Bearer {TOKEN}"}, timeout=100
        )

    def kill(self) -> None:
        """``kill -9``."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        return self.process.wait(100)

    def __enter__(self) -> Server:
        self.wait_ready()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.process.poll() is None:
            self.kill()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())
        self._lines.put("")
