"""The tables for a cluster: ClickHouse's own parser takes them, its planner sends questions to every shard, and they are
made over its HTTP interface. No cluster is started here: see docs/cluster.md for what that leaves open."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lens.cli.main import main
from lens.store.cluster import LOCAL, cluster_ddl
from lens.store.errors import StoreError
from lens.store.schema import MIGRATIONS, TARGETS

CONFIG = """<clickhouse><remote_servers><two>
<shard><replica><host>127.0.0.1</host><port>9</port></replica></shard>
<shard><replica><host>127.0.0.2</host><port>9</port></replica></shard>
</two></remote_servers></clickhouse>"""
IN_A_PROCESS = """
import json, re, sys
from chdb import session
folder, statements = sys.argv[1], json.load(sys.stdin)
open(folder + "/config.xml", "w").write(%r)
engine = session.Session(folder + "/db?config-file=" + folder + "/config.xml")
ask = lambda sql: engine.query(sql, "TabSeparated").bytes().decode()
for statement in statements:
    ask("EXPLAIN AST " + statement)
for statement in [each for each in statements if not each.startswith("INSERT")]:
    # What needs a Keeper is made without one: same columns, keys and settings.
    alone = re.sub(r" ON CLUSTER '[^']+'", "", statement)
    ask(re.sub(r"Replicated(\\w+)\\('[^']+', '[^']+'(?:, )?", r"\\1(", alone))
print(json.dumps([ask("EXPLAIN SELECT max(value) FROM lens.samples WHERE run = 1 AND mid = 2"),
                  ask("SELECT name FROM system.tables WHERE database = 'lens'").split()]))
"""


def test_clickhouse_parses_every_statement_and_asks_every_shard(tmp_path: Path) -> None:
    statements = cluster_ddl("two")
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS % CONFIG, str(tmp_path)],
        input=json.dumps(statements), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    plan, tables = json.loads(done.stdout.splitlines()[-1])
    assert "ReadFromRemote" in plan
    wanted = {*TARGETS, "retention", "deleted", "early_runs", "migrations"}
    assert set(tables) == wanted | {f"{name}{LOCAL}" for name in wanted}


def test_every_table_of_the_schema_is_there_replicated_and_in_front(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "init", "--cluster", "prod"]) == 0
    printed = [each.strip() for each in capsys.readouterr().out.rstrip().rstrip(";").split(";\n\n")]
    assert printed == cluster_ddl("prod")
    statements = [each for migration in MIGRATIONS for each in migration]
    tables = sum(each.startswith("CREATE TABLE") for each in statements)
    assert len(printed) == 2 * (tables + 1) + (len(statements) - tables) + 2
    in_front = sum(each.startswith("INSERT INTO") for each in printed)
    assert sum("ON CLUSTER 'prod'" in each for each in printed) == len(printed) - in_front == len(printed) - 2
    assert (
        "ALTER TABLE lens.rollup_local ON CLUSTER 'prod' MODIFY COLUMN rank Int32 CODEC(Delta, ZSTD(3)), "
        in "".join(printed)
    )
    assert sum("ENGINE = Replicated" in each for each in printed) == sum(
        "ENGINE = Distributed" in each for each in printed
    )
    assert any(
        "ReplicatedReplacingMergeTree('/clickhouse/tables/{shard}/lens/latest', '{replica}', t_ns)" in each
        for each in printed
    )
    with pytest.raises(StoreError, match="no name of a cluster"):
        cluster_ddl("x' SETTINGS y")


@pytest.fixture
def clickhouse() -> Iterator[Any]:
    """What hears and answers as ClickHouse's HTTP interface does; it refuses what its `refuse` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            statement = self.rfile.read(int(self.headers["Content-Length"])).decode()
            server.heard.append((self.headers["Authorization"], statement))  # type: ignore[attr-defined]
            refused = server.refuse in statement  # type: ignore[attr-defined]
            content = b"Code: 999. DB::Exception: no keeper" if refused else b""
            self.send_response(500 if refused else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.heard, server.refuse = [], "\0"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_they_are_made_over_http_in_order_and_a_refusal_ends_it(
    clickhouse: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLICKHOUSE_USER", "lens")
    monkeypatch.setenv("CLICKHOUSE_PASSWORD", "secret")
    words = ["store", "init", "--cluster", "prod", "--apply", f"http://127.0.0.1:{clickhouse.server_port}"]
    assert main(words) == 0
    assert [statement for _, statement in clickhouse.heard] == cluster_ddl("prod")
    assert {who for who, _ in clickhouse.heard} == {"Basic bGVuczpzZWNyZXQ="}
    clickhouse.heard.clear()
    clickhouse.refuse = "lens.ranks_local"
    assert main(words) == 1
    assert "no keeper" in capsys.readouterr().err
    assert "ranks_local" in clickhouse.heard[-1][1]
