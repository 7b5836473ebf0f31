"""Sends a simulated run on: to a file of records, or through a server's HTTP API."""

from __future__ import annotations

import gzip
import http.client
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from lens.slots import NULL, SEVERITIES
from lens.tables import SCHEMA, STEP_ATTRIBUTES, Tables

BATCH = 20_000
TIMEOUT_S = 120.0
IN_ATTRS = {
    "steps": STEP_ATTRIBUTES,
    "collectives": (
        "group", "seq", "bytes", "layer", "phase", "micro_batch", "peer", "dtype", "t_wait_ns", "t_done_ns",
    ),
}  # fmt: skip
"""Columns that a record bears among its attributes."""


def write(run: dict[str, Any], tables: Tables, folder: Path) -> Path:
    """Write DIR/<run>.ndjson.gz, which `lens diagnose` reads; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run['run']}.ndjson.gz"
    with gzip.open(path, "wt", compresslevel=3) as file:
        file.write(json.dumps({"type": "run", **run}) + "\n")
        file.writelines(json.dumps(record) + "\n" for record in records(tables))
    return path


def post(run: dict[str, Any], tables: Tables, server: str, token: str | None) -> int:
    """Post the run and its records to a server; how many it took.

    Raises:
        OSError: no server answers, or it refuses.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    _ask(server, "/api/v1/runs", json.dumps(run).encode(), {**headers, "Content-Type": "application/json"})
    accepted, source, left = 0, f"sample_runs.cluster/{run['run']}", records(tables)
    for sequence, batch in enumerate(iter(lambda: list(islice(left, BATCH)), []), 1):
        body = gzip.compress("\n".join(map(json.dumps, batch)).encode(), 3)
        about = {
            "Content-Type": "application/x-ndjson", "Content-Encoding": "gzip", "Lens-Source": source,
            "Lens-Sequence": str(sequence),
        }  # fmt: skip
        reply = _ask(server, f"/api/v1/runs/{quote(str(run['run']), safe='')}/records", body, {**headers, **about})
        accepted += int(reply["accepted"])
    return accepted


def records(tables: Tables) -> Iterator[dict[str, Any]]:
    """Every record in its public form, table by table."""
    for name in SCHEMA:
        table = tables.table(name)
        columns = {column: _read(tables, name, column) for column in table}
        for row in range(tables.count(name)):
            yield _record(tables, name, {column: values[row] for column, values in columns.items()})


def _read(tables: Tables, name: str, column: str) -> list[Any]:
    """A column's values, None where they are unknown."""
    kind, values = SCHEMA[name][column], tables.table(name)[column]
    if kind == "s":
        return list(tables.texts(values))
    absent = {"i8": NULL, "i4": -1}.get(kind)
    return [None if value == absent else value for value in values.tolist()]


def _record(tables: Tables, name: str, row: dict[str, Any]) -> dict[str, Any]:
    attrs = json.loads(row.pop("attrs", None) or "{}")
    attrs.update({key: value for key in IN_ATTRS.get(name, ()) if (value := row.pop(key)) is not None})
    if name == "steps":
        row.update(kind="step", name="step")
    elif name == "collectives":
        row.update(kind="collective", name=row.pop("op"))
        if row.pop("is_async"):
            attrs["async"] = True
    elif name == "vectors":
        start = row.pop("offset")
        values = tables.vector_values[start : start + row.pop("length")].tolist()
        row["values"] = [_plain(value) for value in values]
    elif name == "events":
        row["severity"] = SEVERITIES[row["severity"]]
    elif name == "samples":
        row["value"] = _plain(row["value"])
    if labels := row.pop("labels", None):
        row["labels"] = json.loads(labels)
    known = {key: value for key, value in row.items() if value is not None}
    kind = {"samples": "sample", "vectors": "vector", "events": "event"}.get(name, "span")
    return {"type": kind, **known, **({"attrs": attrs} if attrs else {})}


def _plain(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _ask(server: str, path: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
    parts = urlsplit(server)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        said = response.read().decode(errors="replace")
        if response.status >= 400:
            raise OSError(f"{server} answers {response.status}: {said[:300]}")
        reply: dict[str, Any] = json.loads(said)
        return reply
    finally:
        connection.close()
