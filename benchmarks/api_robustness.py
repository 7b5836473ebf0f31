"""Send a real server what no sender should, and count what it answers and what it keeps.

Bodies of every ingest format, in two ways. *Spoiled*: good records between bad ones, of which every good one must be
stored, and no bad one. *Broken*: bytes flipped, cut and repeated, which may be refused but never answered with a
server error. Then schemathesis asks every route of /openapi.json what its schema allows and what it does not, again with
another seed until it has made up as many cases as were asked for.

    python benchmarks/api_robustness.py [--bodies 20000] [--cases 20000] [--seed 0] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa

SENDERS = 16
ROUTES = 12
"""How many routes have many different requests, about: the others are asked their few and no more."""
START = 1_700_000_000_000_000_000
Rows = list[tuple[int, bool]]
"""Time in ns, and whether the record is to be good."""


def ndjson(rows: Rows, draw: random.Random) -> bytes:
    """Samples, a line each."""
    bad = [
        '{"type":"sample"}', "[" * 5000, '{"type":"sample","t_ns":1e40,"metric":"a","value":1}', "null", "\x00",
        '{"type":"sample","t_ns":1,"metric":"no name","value":1}', '{"type":"gone"}', '{"type":"sample","t_ns":1', "9" * 5000,
        '{"type":"sample","t_ns":1,"metric":"a","value":1,"rank":4294967297}', '"\\ud800"', '{"type":{"a":1}}',
    ]  # fmt: skip
    good = '{{"type":"sample","t_ns":{},"metric":"a.b","value":1.5,"rank":0,"labels":{{"k":"\\ud83d\\ude00"}}}}'
    return "\n".join(good.format(t) if is_good else draw.choice(bad) for t, is_good in rows).encode()


def arrow(rows: Rows, draw: random.Random) -> bytes:
    """Samples as a stream; one column spoils the bad rows."""
    columns: dict[str, list[Any]] = {
        "t_ns": [t for t, _ in rows], "metric": ["a.b"] * len(rows), "value": [1.5] * len(rows),
        "rank": [0] * len(rows), "labels": ['{"k":"v"}'] * len(rows),
    }  # fmt: skip
    bad = {
        "t_ns": [None], "metric": [None, "no name", ""], "value": [None], "rank": [2**32, -7, 2**31],
        "labels": ['{"a":', "[" * 5000, '{"a":1}', "7"],
    }  # fmt: skip
    name = draw.choice(list(bad))
    columns[name] = [
        value if is_good else draw.choice(bad[name])
        for value, (_, is_good) in zip(columns[name], rows, strict=True)
    ]
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def otlp_json(rows: Rows, draw: random.Random) -> bytes:
    """Points of one gauge."""
    bad: list[dict[str, Any]] = [
        {}, {"timeUnixNano": "x", "asDouble": 1}, {"timeUnixNano": "5"}, {"timeUnixNano": 2**63, "asInt": "1"},
        {"timeUnixNano": "5", "asInt": {}}, {"timeUnixNano": "5", "asDouble": "one"}, {"timeUnixNano": [], "asInt": 1},
    ]  # fmt: skip
    points = [{"timeUnixNano": str(t), "asDouble": 1.5} if is_good else draw.choice(bad) for t, is_good in rows]
    metrics = [{"name": "a.b", "gauge": {"dataPoints": points}}]
    return json.dumps({"resourceMetrics": [{"scopeMetrics": [{"metrics": metrics}]}]}).encode()


def otlp_protobuf(rows: Rows, draw: random.Random) -> bytes:
    """Points of one gauge."""
    points = b""
    for t, is_good in rows:
        at, value = b"\x19" + struct.pack("<Q", t), b"\x21" + struct.pack("<d", 1.5)
        points += _part(1, at + value if is_good else draw.choice([b"", at, value]))
    return _part(1, _part(2, _part(2, _part(1, b"a.b") + _part(5, points))))


def remote_write(rows: Rows, draw: random.Random) -> bytes:
    """A series a sample."""
    series = b""
    for t, is_good in rows:
        name = _part(1, _part(1, b"__name__") + _part(2, b"a_b"))
        sample = b"\x09" + struct.pack("<d", 1.5)
        dated = _part(2, sample + b"\x10" + _varint(t // 1_000_000))
        series += _part(1, name + dated if is_good else draw.choice([dated, name + _part(2, sample)]))
    return (
        _varint(len(series)) + bytes(pa.Codec("snappy").compress(series, asbytes=True))[len(_varint(len(series))) :]
    )


def _part(number: int, body: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


FORMATS: dict[str, tuple[str, str, Callable[[Rows, random.Random], bytes]]] = {
    "NDJSON": ("/api/v1/runs/{}/records", "application/x-ndjson", ndjson),
    "Arrow": ("/api/v1/runs/{}/records", "application/vnd.apache.arrow.stream", arrow),
    "OTLP JSON": ("/v1/metrics?run={}", "application/json", otlp_json),
    "OTLP protobuf": ("/v1/metrics?run={}", "application/x-protobuf", otlp_protobuf),
    "remote write": ("/api/v1/write?run={}", "application/x-protobuf", remote_write),
}


@dataclass
class Tally:
    """What became of one format's bodies."""

    statuses: Counter[int] = field(default_factory=Counter)
    good: int = 0
    """Good records sent between bad ones."""
    stored: int = 0
    """Records found in the run they were sent to."""
    failures: list[str] = field(default_factory=list)

    @property
    def server_errors(self) -> int:
        """Answers of 500 and over."""
        return sum(count for status, count in self.statuses.items() if status >= 500)


def send_bodies(client: httpx.Client, count: int, seed: int) -> dict[str, Tally]:
    """Send that many bodies, half spoiled and half broken, and ask what is stored."""
    draw, tallies, counting = random.Random(seed), {name: Tally() for name in FORMATS}, threading.Lock()
    runs = {name: f"spoiled-{number}" for number, name in enumerate(FORMATS)}
    for run in (*runs.values(), "broken"):
        client.post("/api/v1/runs", json={"run": run}).raise_for_status()

    def send(number: int, name: str, is_broken: bool, body: bytes) -> None:
        path, content_type, _ = FORMATS[name]
        path = path.format("broken" if is_broken else runs[name])
        reply = client.post(path, content=body, headers={"content-type": content_type})
        with counting:
            tallies[name].statuses[reply.status_code] += 1
            if reply.status_code >= 500 or (not is_broken and reply.status_code >= 300):
                tallies[name].failures.append(
                    f"{number} {name}: {reply.status_code} {reply.text[:200]} {body[:200]!r}"
                )

    with ThreadPoolExecutor(SENDERS) as senders:
        sent = [senders.submit(send, number, *each) for number, each in enumerate(_bodies(count, draw, tallies))]
    for each in sent:
        each.result()
    for name, tally in tallies.items():
        question = {"sql": "SELECT count() AS n FROM samples", "run": runs[name]}
        reply = client.post("/api/v1/query", json=question).raise_for_status()
        tally.stored = reply.json()["rows"][0][0]
    return tallies


def _bodies(count: int, draw: random.Random, tallies: dict[str, Tally]) -> Iterator[tuple[str, bool, bytes]]:
    """Format, whether it is broken, and the body; the good records of those that are spoiled are counted."""
    for number in range(count):
        name = list(FORMATS)[number % len(FORMATS)]
        is_broken = number // len(FORMATS) % 2 == 1
        times = [START + (number * 8 + place) * 1_000_000 for place in range(draw.randint(1, 8))]
        rows = [(t, is_broken or draw.random() < 0.6) for t in times]
        if not any(is_good for _, is_good in rows):
            rows[0] = (times[0], True)
        body = FORMATS[name][2](rows, draw)
        if not is_broken:
            tallies[name].good += sum(is_good for _, is_good in rows)
        yield name, is_broken, broken(body, draw) if is_broken else body


def broken(body: bytes, draw: random.Random) -> bytes:
    """The body after one to four accidents."""
    data = bytearray(body)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        accident = draw.randrange(4)
        if accident == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif accident == 1:
            del data[at : at + draw.randint(1, 30)]
        elif accident == 2:
            data[at:at] = draw.randbytes(draw.randint(1, 8))
        else:
            data[at:at] = data[at : at + draw.randint(1, 60)]
    return bytes(data)


@dataclass
class Asked:
    """What schemathesis did in all its runs."""

    runs: int = 0
    generated: int = 0
    passed: int = 0
    unmade: int = 0
    """Routes whose bodies it cannot make."""
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        failed = f", {len(self.failures)} runs failed" if self.failures else ""
        without = f"; it cannot make the bodies of {self.unmade} routes" if self.unmade else ""
        return f"{self.generated:,} cases generated in {self.runs} runs, {self.passed:,} passed{failed}{without}"


def ask_routes(url: str, token: str, cases: int, seed: int) -> Asked:
    """Let schemathesis ask until it has made up so many requests."""
    asked = Asked()
    while asked.generated < cases:
        left = cases - asked.generated
        said = _schemathesis(url, token, min(2000, max(20, left // ROUTES)), seed + asked.runs)
        found = re.search(
            r"Test cases:\n\s+([\d,]+) generated(?:, ([\d,]+) found[^,\n]*)?(?:, ([\d,]+) passed)?", said
        )
        if not found:
            raise SystemExit(f"schemathesis did not finish:\n{said[-3000:]}")
        generated, passed = (int((found[group] or "0").replace(",", "")) for group in (1, 3))
        asked.runs += 1
        asked.generated += generated
        asked.passed += passed
        unmade = re.search(r"Serialization not possible: (\d+)", said)
        asked.unmade = int(unmade[1]) if unmade else 0
        if passed < generated:
            asked.failures.append(said[-3000:])
    return asked


def _schemathesis(url: str, token: str, examples: int, seed: int) -> str:
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {token}",
        "--checks", "not_a_server_error", "--phases", "fuzzing", "-n", str(examples), "--workers", "4", "--seed", str(seed),
        "--no-color", "--no-shrink", "--continue-on-failure", "--generation-database", "none",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lens-routes-") as folder:
        return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout


def table(tallies: dict[str, Tally]) -> str:
    """The table of the bodies."""
    lines = ["| format | bodies | answers | server errors | good records sent | stored |", "|---" * 6 + "|"]
    for name, tally in tallies.items():
        answers = ", ".join(f"{count} × {status}" for status, count in sorted(tally.statuses.items()))
        cells = [name, tally.statuses.total(), answers, tally.server_errors, tally.good, tally.stored]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    """Run both and print what was found; exit 1 when something was lost or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=20_000)
    parser.add_argument(
        "--cases", type=int, default=20_000, help="that schemathesis makes up (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result there too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lens-api-") as folder:
        data = Path(folder) / "data"
        with (Path(folder) / "log").open("w+") as log:
            command = [sys.executable, "-m", "lens", "serve", "--data", str(data), "--port", "0"]
            server = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                while not (data / "server.json").exists():
                    if server.poll() is not None:
                        raise SystemExit(f"the server did not start: {Path(log.name).read_text()}")
                    time.sleep(0.1)
                url = json.loads((data / "server.json").read_text())["url"]
                token = (data / "token").read_text().strip()
                with httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=60) as client:
                    tallies = send_bodies(client, arguments.bodies, arguments.seed)
                    routes = ask_routes(url, token, arguments.cases, arguments.seed)
                    client.get("/healthz").raise_for_status()
            finally:
                server.terminate()
                server.wait(60)
    failures = [each for tally in tallies.values() for each in tally.failures]
    kept = all(tally.good == tally.stored for tally in tallies.values())
    said = f"{table(tallies)}\n\nRoutes of /openapi.json, asked by schemathesis: {routes}."
    print(said, *failures[:20], *routes.failures[:1], sep="\n")
    if arguments.out:
        command_line = (
            f"`python benchmarks/api_robustness.py --bodies {arguments.bodies} --cases {arguments.cases}`"
        )
        head = f"# What the API does with bad bodies\n\n{command_line}, {time.strftime('%Y-%m-%d')}, 2 cores."
        note = "Half of the bodies hold good records between bad ones; half have flipped, cut or repeated bytes."
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(f"{head}\n{note}\n\n{said}\n")
    return 0 if kept and not failures and not routes.failures else 1


if __name__ == "__main__":
    raise SystemExit(main())
