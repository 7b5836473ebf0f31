"""The same tables for a ClickHouse cluster: one replicated table on each shard, and a distributed one in front of them.

Replication, sharding and recovery are ClickHouse's. What is decided here is which rows lie together: those of a series,
or of a rank, on one shard, so that merging (newest value, roll-up) sees all rows that belong together.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterable
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from lens.store.engine import quote
from lens.store.errors import StoreError
from lens.store.schema import MIGRATIONS

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
LOCAL = "_local"
"""End of the names of the tables that hold the rows; without it a name means all shards together."""
_TABLE = re.compile(
    r"CREATE TABLE IF NOT EXISTS lens\.(?P<name>\w+) \((?P<columns>.*)\) "
    r"ENGINE = (?P<engine>\w+)(?:\((?P<version>\w+)\))? ORDER BY (?P<rest>.*)",
    re.S,
)
_ALTER = re.compile(r"ALTER TABLE lens\.(?P<name>\w+) (?P<what>MODIFY COLUMN .*)")
_MIGRATIONS = "CREATE TABLE IF NOT EXISTS lens.migrations (version UInt32) ENGINE = MergeTree ORDER BY version"
_TOGETHER = {
    **dict.fromkeys(("samples", "rollup", "rollup_fine", "latest", "vectors", "series"), "cityHash64(run, mid)"),
    **dict.fromkeys(
        ("steps", "spans", "collectives", "events", "progress", "ranks", "moments"), "cityHash64(run, rank)"
    ),
    "migrations": "version",
}
"""What rows have in common that lie on one shard; of all other tables: the run."""


def cluster_ddl(cluster: str) -> list[str]:
    """The statements that make lens's tables on a cluster of this name; they do no harm when they are run again.

    Servers must have the macros `shard` and `replica`, and a ClickHouse Keeper.

    Raises:
        StoreError: no name for a cluster.
    """
    if not NAME.fullmatch(cluster):
        raise StoreError(f"{cluster!r} is no name of a cluster", "see: SELECT cluster FROM system.clusters")
    on = f"ON CLUSTER {quote(cluster)}"
    made = [f"CREATE DATABASE IF NOT EXISTS lens {on}"]
    for statement in (_MIGRATIONS, *(each for migration in MIGRATIONS for each in migration)):
        found = _TABLE.fullmatch(statement)
        if found is not None:
            made += _pair(cluster, on, found)
        elif altered := _ALTER.fullmatch(statement):
            made.append(f"ALTER TABLE lens.{altered['name']}{LOCAL} {on} {altered['what']}")
        elif statement.startswith("INSERT INTO lens."):
            made.append(statement)
        else:
            raise StoreError(f"no form for a cluster is known of: {statement[:80]}", "this is a fault of lens")
    version = f"INSERT INTO lens.migrations SELECT {len(MIGRATIONS)} WHERE {len(MIGRATIONS)} NOT IN"
    return [*made, f"{version} (SELECT version FROM lens.migrations)"]


def apply(
    statements: Iterable[str], url: str, user: str, password: str, done: Callable[[str], None] = lambda _: None
) -> None:
    """Run statements over ClickHouse's HTTP interface, one after the other; `done` is told of each.

    Raises:
        StoreError: the server cannot be reached or refuses one; those before it are done.
    """
    credentials = b64encode(f"{user}:{password}".encode()).decode()
    for statement in statements:
        asked = Request(url, statement.encode(), {"Authorization": f"Basic {credentials}"}, method="POST")
        try:
            with urlopen(asked, timeout=300) as reply:
                reply.read()
        except HTTPError as error:
            said = error.read().decode("utf-8", "replace").strip()[:300]
            raise StoreError(f"{url} refused {statement[:80]} …: {said}", "mend that and run it again") from error
        except (URLError, OSError, ValueError) as error:
            raise StoreError(
                f"{url} does not answer: {error}", "name ClickHouse's HTTP port: http://host:8123"
            ) from error
        done(statement)


def _pair(cluster: str, on: str, table: re.Match[str]) -> list[str]:
    name, version = table["name"], f", {table['version']}" if table["version"] else ""
    place = f"'/clickhouse/tables/{{shard}}/lens/{name}', '{{replica}}'{version}"
    key = _TOGETHER.get(name, "cityHash64(run)")
    return [
        f"CREATE TABLE IF NOT EXISTS lens.{name}{LOCAL} {on} ({table['columns']}) "
        f"ENGINE = Replicated{table['engine']}({place}) ORDER BY {table['rest']}",
        f"CREATE TABLE IF NOT EXISTS lens.{name} {on} AS lens.{name}{LOCAL} "
        f"ENGINE = Distributed({quote(cluster)}, 'lens', '{name}{LOCAL}', {key})",
    ]
