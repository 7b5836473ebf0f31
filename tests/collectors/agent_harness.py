"""What the agent's tests stand on: a small server that misbehaves on demand, writers, and agents as processes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import zstandard

from lens.slots import SLOT_BYTES, Batch, RingPart, decode_batch, iter_records
from tests.waiting import PATIENCE_S, wait_for

ROOT = Path(__file__).resolve().parents[2]
LOSE_REPLY = -1
"""Answer of a plan: keep the batch, then break the connection."""
BREAK = -2
"""Answer of a plan: break the connection without keeping the batch."""


@dataclass
class Request:
    """One request as the server saw it."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class StubServer:
    """Keeps what agents send, once per (source, sequence), as the real server does.

    `plan` is asked for the status of each request; 200 keeps the batch, LOSE_REPLY and BREAK are above.
    """

    plan: Callable[[Request], int] = lambda request: 200
    token: str | None = None
    requests: list[Request] = field(default_factory=list)
    kept: dict[tuple[str, int], bytes] = field(default_factory=dict)
    repeats: int = 0
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    retry_after: str | None = "0"

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = Request(self.path, dict(self.headers), body)
                status, content = stub.answer(request)
                if status < 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                reply = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                if status in (429, 503) and stub.retry_after is not None:
                    self.send_header("Retry-After", stub.retry_after)
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *arguments: Any) -> None:
                pass

        class QuietServer(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._server = QuietServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, request: Request) -> tuple[int, dict[str, Any]]:
        with self._lock:
            self.requests.append(request)
            if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
                return 401, {"error": "a token is needed"}
            status = self.plan(request)
            if request.path == "/api/v1/runs":
                if status == 200:
                    about = json.loads(request.body)
                    self.runs.setdefault(about["run"], {}).update(about)
                return max(status, 200), {}
            run = request.path.split("/")[4]
            if status in (200, LOSE_REPLY) and run not in self.runs:
                return 404, {"error": "no such run"}
            if status in (200, LOSE_REPLY):
                self._keep(request)
            return status, {"accepted": 1, "rejected": []} if status == 200 else {"error": f"planned {status}"}

    def _keep(self, request: Request) -> None:
        pair = (request.headers["Lens-Source"], int(request.headers["Lens-Sequence"]))
        if pair in self.kept:
            self.repeats += 1
        else:
            self.kept[pair] = unpack(request)

    def batches(self) -> list[Batch]:
        with self._lock:
            return [decode_batch(body) for body in self.kept.values()]

    def parts(self, role: str | None = None) -> list[RingPart]:
        found = [part for batch in self.batches() for part in batch.rings]
        return [part for part in found if role is None or part.about.get("role") == role]

    def records(self) -> list[dict[str, Any]]:
        return [record for part in self.parts() for record in iter_records(part)]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records() if record.get("kind") == kind and "severity" in record]

    def samples(self) -> list[tuple[str, float, dict[str, str], dict[str, Any]]]:
        """Every sample of a row: metric, value, labels, record."""
        found = []
        for record in self.records():
            for key, value in record.get("values", {}).items() if isinstance(record.get("values"), dict) else ():
                metric, _, labels = key.partition("\x1e")
                found.append((metric, value, json.loads(labels) if labels else {}, record))
        return found

    def slots(self, role: str | None = "trainer") -> dict[str, dict[int, bytes]]:
        """Slots by sequence, by the process that wrote them; fails when one came twice."""
        found: dict[str, dict[int, bytes]] = {}
        for part in self.parts(role):
            key = "-".join(str(part.about.get(name)) for name in ("pid", "start_ticks", "run"))
            ring = found.setdefault(key, {})
            for place in range(part.count):
                sequence = part.first + place
                assert sequence not in ring, f"slot {sequence} came twice"
                ring[sequence] = part.slots[place * SLOT_BYTES : (place + 1) * SLOT_BYTES]
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def unpack(request: Request) -> bytes:
    if request.headers["Content-Encoding"] == "gzip":
        return gzip.decompress(request.body)
    return zstandard.ZstdDecompressor().decompress(request.body)


WRITER = """
import sys, time
from lens.recorder import Recorder
from lens.settings import Settings
count, pause, end = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
settings = Settings.load()
recorder = Recorder.create(settings, {about})
for number in range(1, count + 1):
    recorder.step(number, number * 1000, number * 1000 + 500, tokens=number * 7)
    if pause:
        time.sleep(pause)
print(recorder.path, flush=True)
if end == "wait":
    sys.stdin.readline()
if end == "crash":
    raise SystemExit(3)
recorder.close()
"""


@dataclass
class Host:
    """One host's folders, with writers and agents as real processes."""

    folder: Path
    server: StubServer
    host: str = "host0"
    more: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def environment(self, **more: str) -> dict[str, str]:
        own = {
            "LENS_RINGS": str(self.folder / "rings"),
            "LENS_DATA": str(self.folder / "data"),
            "LENS_SPOOL": str(self.folder / "spool"),
            "LENS_SERVER": self.server.url,
            "LENS_HOST": self.host,
            "LENS_SHIP_S": "0.02",
            "LENS_AGENT_LINGER": "0.3",
            "LENS_RING_MIB": "4",
            "PYTHONPATH": str(ROOT),
        }
        plain = {key: value for key, value in os.environ.items() if not key.startswith("LENS_")}
        return {**plain, **own, **self.more, **more}

    def agent(self, **more: str) -> subprocess.Popen[str]:
        return self._start([sys.executable, "-m", "lens.collectors.agent"], self.environment(**more))

    def all_shipped_by(self, agent: subprocess.Popen[str]) -> None:
        """Wait until an agent has ended and nothing is left in its spool.

        One that gets no answer for some seconds, because the machine lets us stand, leaves the rest to the next.
        """
        assert agent.wait(PATIENCE_S) == 0, agent.communicate()
        for _ in range(5):
            if not list(self.folder.glob("spool/*/*.segment")):
                return
            assert self.agent().wait(PATIENCE_S) == 0
        raise AssertionError("agents have ended, and left what they should have shipped")

    def writer(self, count: int, pause: float = 0.0, end: str = "close", **about: Any) -> subprocess.Popen[str]:
        described = {"run": "r1", "rank": 0, "world_size": 1, "role": "trainer", **about}
        code = WRITER.replace("{about}", repr(described))
        return self.recording(code, str(count), str(pause), end)

    def recording(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """A process that records, once it has begun to: an agent that comes first finds nobody and soon ends."""
        process = self.script(code, *arguments)
        rings = self.folder / "rings" / self.host
        wait_for(lambda: any(rings.glob(f"{process.pid}-*/about.json")) or process.poll() is not None)
        return process

    def script(self, code: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
        return self._start([sys.executable, "-c", code, *arguments], self.environment(**more))

    def _start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
