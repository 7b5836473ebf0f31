"""Answers ClickHouse's HTTP interface from chDB: ``python -m tests.store.clickhouse FOLDER`` prints its port.

What `lens.store.clickhouse` speaks and no more: a statement as the body, or ``query=INSERT … FORMAT ArrowStream`` with the
rows as the body; settings and database as parameters; 500 with the engine's own words when it refuses.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa

NOT_SETTINGS = {"query", "database", "default_format", "wait_end_of_query"}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    folder = ""

    def do_POST(self) -> None:
        """Run a statement in a session of its own."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        given = dict(parse_qsl(urlsplit(self.path).query))
        try:
            self._reply(200, self._run(given, body))
        except Exception as error:
            self._reply(500, str(error).encode())

    def _run(self, given: dict[str, str], body: bytes) -> bytes:
        from chdb import session

        opened = session.Session(self.folder)
        try:
            settings = {name: value for name, value in given.items() if name not in NOT_SETTINGS}
            readonly = settings.pop("readonly", None)  # a session cannot change anything after it
            for name, value in [*settings.items(), *([("readonly", readonly)] if readonly else [])]:
                if name == "readonly" and "database" in given:
                    opened.query(f"USE {given['database']}", "Null")
                opened.query(f"SET {name} = '{value}'", "Null")
            if "query" not in given:
                found: bytes = opened.query(body.decode(), given["default_format"]).bytes()
                return found
            rows = pa.ipc.open_stream(body).read_all()
            into, columns = given["query"].removesuffix(" FORMAT ArrowStream"), ", ".join(rows.column_names)
            opened.query(f"{into} SELECT {columns} FROM Python(rows)", "Null")
            return b""
        finally:
            opened.close()

    def _reply(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class ClickHouse:
    """That server over a folder, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.store.clickhouse", str(folder)]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


def main(folder: str) -> None:
    """Serve until the standard input ends."""
    from chdb import session

    kept = session.Session(folder)
    Handler.folder = folder
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    server.shutdown()
    kept.close()


if __name__ == "__main__":
    main(sys.argv[1])
