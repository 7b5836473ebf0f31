"""Asks a real server every request that docs/api.md shows, and writes the replies below them.

    python docs/api_examples.py            # rewrite the replies
    python docs/api_examples.py --check    # exit code 1 and the difference if a reply is not as the page says

A request is a block that begins with GET, POST, PUT, DELETE or WS; the block after it is its reply. What differs from day to day
(ages, cursors, the server's own words) is replaced by a fixed value, numbers are rounded, long lists cut. Of a verdict
only the shape is compared: its numbers improve with the diagnosis, its keys do not change. Every route of the server
must be shown.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PAGE = Path(__file__).with_name("api.md")
WIDTH = 112
MOST_NUMBERS, MOST_OBJECTS, MOST_LINES = 6, 2, 5
FIXED: dict[str, Any] = {"age_s": 0.4, "state": "live", "cursor": 1764081234567, "elapsed_s": 0.004}
"""Depends on when one asks. A rank's own `age_s` and `state` do not, and stay as they are."""
BYTES = ("POST /api/v1/write",)
"""Routes whose bodies are no text: the page says in words what they take."""
SHAPE_ONLY = ("diagnosis", "alerts", "ledger", "store", "compact")
"""Routes whose numbers are the diagnosis's own, or the database's."""
BLOCK = re.compile(r"^```(?P<info>\w+[^\n]*)?\n(?P<body>.*?)^```$", re.M | re.S)
SECOND, MS = 1_000_000_000, 1_000_000
START = 1_700_000_000 * SECOND
RUN, RANKS, STEPS, SLOW_FROM = "example", 4, 40, 16


def described() -> dict[str, Any]:
    """The run of the examples: two hosts of two cards, data parallel over all."""
    ranks = [
        {"rank": rank, "host": f"host{rank // 2}", "device": f"host{rank // 2}/gpu{rank % 2}", "local_rank": rank % 2,
         "vendor": "nvidia" if rank < 2 else "amd", "model": "H200" if rank < 2 else "MI455X", "pid": 4711 + rank}
        for rank in range(RANKS)
    ]  # fmt: skip
    experts = {"layers": 1, "experts": 4, "top_k": 2}
    return {"run": RUN, "name": "an example", "world_size": RANKS, "ranks": ranks, "groups": {"dp": [[0, 1, 2, 3]]},
            "experts": experts, "config": {"batch": 8}, "tags": ["docs"]}  # fmt: skip


def records() -> Iterator[dict[str, Any]]:
    """Steps of 100 ms; from step 16 on rank 2's card is throttled and computes longer, and the others wait for it."""
    for step in range(STEPS):
        slow = step >= SLOW_FROM
        length = 130 if slow else 100
        began = START + step * 150 * MS
        for rank in range(RANKS):
            # A little of each rank's own, or no noise could be told from the fault.
            compute = (110 if slow and rank == 2 else 80) * MS + (step * 7 + rank * 3) % 5 * MS // 4
            yield from step_of(rank, step, began, compute, length * MS)
            yield sample("train.loss", 3.0 - step / 40, began + length * MS, rank=rank, step=step)
        counts = [100 + step, 60, 56, 40 - step]
        yield {
            "type": "vector",
            "t_ns": began,
            "metric": "moe.expert.tokens",
            "values": counts,
            "step": step,
            "layer": 0,
        }
        for rank in range(RANKS):
            yield from card(rank, began, throttled=slow and rank == 2)
    end = START + STEPS * 150 * MS
    for rank in range(RANKS):
        state = {
            "state": "collective",
            "op": "all_reduce",
            "group": "dp/0",
            "seq": STEPS,
            "since_ns": end - 40 * MS,
        }
        attrs = {**(state if rank != 2 else {"state": "running"}), "phase": "backward", "step": STEPS}
        yield {
            "type": "event",
            "t_ns": end,
            "kind": "heartbeat",
            "severity": "info",
            "text": "",
            "rank": rank,
            "attrs": attrs,
        }


def step_of(rank: int, step: int, began: int, compute: int, length: int) -> Iterator[dict[str, Any]]:
    """A step of one rank: forward, backward with its all-reduce, optimizer."""
    span = {"type": "span", "rank": rank, "step": step}
    end = began + length
    yield {**span, "kind": "step", "name": "step", "t0_ns": began, "t1_ns": end, "attrs": {"tokens": 256}}
    for name, first, last in (
        ("forward", began, began + compute // 2), ("backward", began + compute // 2, end - 5 * MS),
        ("optimizer", end - 5 * MS, end),
    ):  # fmt: skip
        yield {**span, "kind": "phase", "name": name, "t0_ns": first, "t1_ns": last}
    call = {"group": "dp/0", "seq": step, "bytes": 1 << 20, "phase": "backward"}
    entry = {"t0_ns": began + compute, "t1_ns": end - 6 * MS}
    yield {**span, "kind": "collective", "name": "all_reduce", **entry, "attrs": call}


def card(rank: int, t_ns: int, throttled: bool) -> Iterator[dict[str, Any]]:
    """What a rank's card reports."""
    host = f"host{rank // 2}"
    whose = {"rank": rank, "host": host, "device": f"{host}/gpu{rank % 2}"}
    clock = (1980.0 if rank < 2 else 2400.0) * (0.6 if throttled else 1.0)
    yield sample("gpu.clock.sm", clock, t_ns, **whose)
    yield sample("hw.gpu.utilization", 0.97, t_ns, **whose)
    yield sample("hw.power", 410.0, t_ns, labels={"hw.type": "gpu"}, **whose)
    yield sample("hw.gpu.memory.usage", 80.0 * 2**30, t_ns, **whose)
    yield sample("hw.gpu.memory.limit", 141.0 * 2**30, t_ns, **whose)


def sample(metric: str, value: float, t_ns: int, **more: Any) -> dict[str, Any]:
    """One number."""
    return {"type": "sample", "t_ns": t_ns, "metric": metric, "value": value, **more}


class Server:
    """``lens serve`` in a process of its own."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.token = url, token

    def ask(self, text: str) -> tuple[int, Any]:
        """Send a request as the page writes it; status and reply."""
        head, _, body = text.partition("\n\n")
        first, *lines = head.splitlines()
        method, path = first.split(" ", 1)
        if method == "WS":
            return 200, asyncio.run(self._first_frame(path, json.loads(body)))
        headers = dict(line.split(": ", 1) for line in lines) | {"Authorization": f"Bearer {self.token}"}
        request = Request(self.url + path, body.encode() or None, headers, method=method)
        try:
            with urlopen(request, timeout=60) as reply:
                is_json = reply.headers.get_content_type() == "application/json"
                return reply.status, json.load(reply) if is_json else reply.read().decode()
        except HTTPError as error:
            return error.code, json.load(error)

    async def _first_frame(self, path: str, subscription: Any) -> Any:
        """The header of the first frame that carries what was posted after the subscription."""
        from websockets.asyncio.client import connect

        headers = {"Authorization": f"Bearer {self.token}"}
        async with connect(self.url.replace("http", "ws") + path, additional_headers=headers) as socket:
            await socket.send(json.dumps(subscription))
            await socket.recv()
            new = step_of(0, STEPS, START + STEPS * 150 * MS, 80 * MS, 100 * MS)
            await asyncio.to_thread(self.post, RUN, list(new))
            while True:
                frame = await socket.recv()
                assert isinstance(frame, bytes)
                header = json.loads(frame[4 : 4 + int.from_bytes(frame[:4], "little")])
                if header["blocks"]:
                    # The verdict comes with whichever frame is next, and a slow machine hears of ranks too late.
                    header = {key: each for key, each in header.items() if key not in ("diagnosis", "ledger")}
                    return {**header, "ranks_reporting": RANKS}

    def post(self, run: str, lines: list[dict[str, Any]]) -> None:
        """Send records."""
        body = "\n".join(map(json.dumps, lines))
        status, reply = self.ask(f"POST /api/v1/runs/{run}/records\nContent-Type: application/x-ndjson\n\n{body}")
        assert (status, reply["rejected"]) == (200, []), reply

    def routes(self) -> list[str]:
        """Every route: "GET /api/v1/runs/{run}"."""
        paths = self.ask("GET /openapi.json")[1]["paths"]
        return [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]


@contextmanager
def serving() -> Iterator[Server]:
    """A server that holds the run of the examples and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lens", "serve", "--json", "--port", "0", "--data", f"{folder}/data"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"].partition("/?")[0]
            server = Server(url, Path(folder, "data", "token").read_text().strip())
            body = json.dumps(described())
            assert server.ask(f"POST /api/v1/runs\nContent-Type: application/json\n\n{body}")[0] == 201
            server.post(RUN, list(records()))
            yield server
        finally:
            process.terminate()
            process.wait(60)


def normal(value: Any, key: str = "", deep: bool = False) -> Any:
    """The reply as the page shows it: what depends on when one asks is fixed, numbers rounded, long lists cut."""
    if key in FIXED and value is not None and not (deep and key in ("age_s", "state")):
        return FIXED[key]
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: normal(each, name, deep or key == "ranks") for name, each in value.items()}
    if isinstance(value, list):
        most = MOST_OBJECTS if value and isinstance(value[0], (dict, list)) else MOST_NUMBERS
        rest = [f"… {len(value) - most} more"] if len(value) > most else []
        return [normal(each, "", key == "ranks" or deep) for each in value[:most]] + rest
    return value


def first_lines(text: str) -> str:
    """The beginning of a reply that is no JSON."""
    lines = [re.sub(r"^(lens_server_\S+) .*", r"\1 1", line) for line in text.splitlines()]
    rest = ["… more lines"] if len(lines) > MOST_LINES else []
    return "\n".join(lines[:MOST_LINES] + rest)


def shape(value: Any) -> Any:
    """Only keys and kinds; a list is as its first entry is. A null may become a value and the other way round."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "a value"


def pretty(value: Any, indent: str = "") -> str:
    """JSON that stays on one line where it fits."""
    flat = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(flat) <= WIDTH or not isinstance(value, (dict, list)) or not value:
        return flat
    more = indent + "  "
    if isinstance(value, list):
        parts = [pretty(each, more) for each in value]
        return "[\n" + ",\n".join(more + part for part in parts) + f"\n{indent}]"
    lines, line = [], ""
    for key, each in value.items():
        part = f"{json.dumps(key)}: {pretty(each, more)}"
        if line and ("\n" in part or len(more) + len(line) + len(part) + 2 > WIDTH):
            lines.append(line)
            line = part
        else:
            line = f"{line}, {part}" if line else part
        if "\n" in part:
            lines.append(line)
            line = ""
    lines += [line] if line else []
    return "{\n" + ",\n".join(more + each for each in lines) + f"\n{indent}}}"


def rewritten(page: str, server: Server) -> str:
    """The page with the replies of this server."""
    result, at, request = [], 0, ""
    shown: set[str] = set()
    for block in BLOCK.finditer(page):
        if not request:
            if re.match(r"(GET|POST|PUT|DELETE|WS) /", block["body"]):
                request = block["body"].rstrip("\n")
            continue
        status, reply = server.ask(request)
        route = request.splitlines()[0].partition("?")[0]
        if isinstance(reply, str):
            result += [page[at : block.start()], f"```text\n{first_lines(reply)}\n```"]
            at, request = block.end(), ""
            shown.add(route)
            continue
        new = normal(reply)
        old = json.loads(block["body"]) if block["body"].strip() else None
        same_shape = route.endswith(SHAPE_ONLY) and shape(old) == shape(new)
        info = "json" if status < 300 else f"json {status}"
        if status >= 300 and block["info"] != info:
            sys.exit(f"{route} answers {status}: {reply}")
        result += [page[at : block.start()], f"```{info}\n{pretty(old if same_shape else new)}\n```"]
        at, request = block.end(), ""
        if status < 300:
            shown.add(route)
    missing = [
        route for route in server.routes() if route not in BYTES and not any(_fits(route, each) for each in shown)
    ]
    if missing:
        sys.exit(f"{PAGE.name} shows no request for {', '.join(missing)}")
    return "".join([*result, page[at:]])


def _fits(route: str, request: str) -> bool:
    return re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(route)), request) is not None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    page = PAGE.read_text()
    with serving() as server:
        new = rewritten(page, server)
    if not options.check:
        PAGE.write_text(new)
        return 0
    difference = list(
        difflib.unified_diff(page.splitlines(), new.splitlines(), "docs/api.md", "the server", lineterm="")
    )
    print("\n".join(difference))
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
