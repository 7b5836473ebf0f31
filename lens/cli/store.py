"""The store itself: how big it is, how long records are kept, what is deleted. More: docs/store.md.

    lens store info                            # rows and bytes by table and run, bytes a sample, schema
    lens store retention                       # how long records are kept
    lens store retention 30d                   # keep those of all runs for 30 days (s, m, h, d or w)
    lens store retention 7d --run NAME         # keep those of this run for 7 days
    lens store retention --off                 # keep for ever; with --run, this run alone
    lens store retention --follow --run NAME   # keep this run as all others are kept
    lens store compact                         # delete what is past its time now, merge parts
    lens store delete RUN                      # delete a run with all its records, for good
    lens store token                           # who has a token beside the owner, and what for
    lens store token NAME --scope ingest,read  # make one (ingest, read, admin); it is shown once
    lens store token NAME --scope read --project moe  # for the runs of this project alone
    lens store token NAME --off                # take it back
    lens store init --cluster NAME             # print the tables for a ClickHouse cluster (docs/cluster.md)
    lens store init --cluster NAME --apply http://host:8123   # make them there

A server deletes what is past its time every hour. While one runs, this verb asks it; else it opens the folder.
Tokens are made where the folder is, and hold at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from lens.cli.errors import DONE, FAILED, UNREACHABLE, UNUSABLE, CommandError, missing_extra
from lens.cli.options import add_data, add_server, settings_of
from lens.cli.query import table_of
from lens.cli.reader import ServerReader, server_of
from lens.settings import Settings

if TYPE_CHECKING:
    from lens.store.tokens import Holder

HELP = "the store's size, retention, compaction; deletes runs"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LOOK_S = 0.2
_HINT = "see: lens store --help"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("action", choices=_NAMES, metavar="|".join(_NAMES))
    parser.add_argument(
        "word", nargs="?", metavar="TIME|RUN|NAME", help="how long (retention), which run (delete), whose (token)"
    )
    parser.add_argument("--run", metavar="RUN", help="retention: of this run alone")
    parser.add_argument("--off", action="store_true", help="retention: keep for ever; token: take it back")
    parser.add_argument("--follow", action="store_true", help="retention: keep the run as all others are kept")
    parser.add_argument(
        "--scope", metavar="SCOPES", help="token: what it is for: ingest, read, admin; several with commas"
    )
    parser.add_argument("--project", metavar="PROJECT", help="token: for the runs of this project alone")
    parser.add_argument("--yes", action="store_true", help="delete: do not ask")
    parser.add_argument("--cluster", metavar="NAME", help="init: the cluster's name in its servers' configuration")
    parser.add_argument(
        "--apply", metavar="URL", help="init: run the statements there, as CLICKHOUSE_USER with CLICKHOUSE_PASSWORD"
    )
    add_data(parser)
    add_server(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do what the action says."""
    _check(arguments)
    if arguments.action == "init":
        return _init(arguments)
    if arguments.action == "token":
        return _token(settings_of(arguments).data, arguments)
    store = _open(settings_of(arguments))
    try:
        try:
            return _ACTIONS[arguments.action](store, arguments)
        finally:
            store.close()
    except RuntimeError as error:
        # A folder that no server owns answers here, with the store's own errors.
        code = UNUSABLE if isinstance(error, LookupError) else FAILED
        raise CommandError(str(error), getattr(error, "hint", "") or _HINT, code) from error


class StoreDoor(Protocol):
    """What can be asked of a store; both ways in give the same answers."""

    def info(self) -> dict[str, Any]:
        """Rows and bytes of every table and run."""

    def retention(self) -> dict[str, Any]:
        """The rules."""

    def set_retention(self, run: str | None, keep_s: int | None, follow: bool = False) -> dict[str, Any]:
        """The rules with one more."""

    def compact(self) -> dict[str, Any]:
        """Returns when all is done, with bytes before and after."""

    def delete_run(self, run: str) -> dict[str, Any]:
        """The rows removed, by table."""

    def close(self) -> None:
        """Let go of the connection or the folder."""


class ServedStore:
    """The store behind a server."""

    def __init__(self, url: str, token: str | None) -> None:
        self._server = ServerReader(url, token)

    def info(self) -> dict[str, Any]:
        """Rows and bytes of every table and run."""
        return self._server.get("/api/v1/store")

    def retention(self) -> dict[str, Any]:
        """The rules."""
        return self._server.get("/api/v1/store/retention")

    def set_retention(self, run: str | None, keep_s: int | None, follow: bool = False) -> dict[str, Any]:
        """The rules with one more."""
        rule = {"run": run, "keep_s": keep_s, "follow": follow}
        return self._server.ask("PUT", "/api/v1/store/retention", rule)

    def compact(self) -> dict[str, Any]:
        """Begins, then asks until it is done.

        Raises:
            CommandError: it failed.
        """
        said = self._server.ask("POST", "/api/v1/store/compact")
        while said["status"] == "running":
            time.sleep(_LOOK_S)
            said = self._server.get("/api/v1/store/compact")
        if said["status"] != "done":
            raise CommandError(
                said.get("error", "the server was stopped meanwhile"), "see the server's log", FAILED
            )
        return said

    def delete_run(self, run: str) -> dict[str, Any]:
        """The rows removed, by table."""
        return self._server.ask("DELETE", f"/api/v1/runs/{quote(run, safe='')}")

    def close(self) -> None:
        """Nothing is held open."""


def _open(settings: Settings) -> StoreDoor:
    url = server_of(settings)
    if url is not None:
        return ServedStore(url, settings.read_token())
    try:
        from lens.store.errors import StoreError
        from lens.store.upkeep.keeper import Upkeep
    except ImportError as error:
        raise missing_extra(error, "server") from error
    try:
        store: StoreDoor = Upkeep.open_folder(settings.data, settings.clickhouse)
    except StoreError as error:
        raise CommandError(str(error), error.hint, UNREACHABLE) from error
    return store


def _check(arguments: argparse.Namespace) -> None:
    """Refuse words that do not go together, before anything is opened."""
    action, word = arguments.action, arguments.word
    changes = sum((word is not None, arguments.off, arguments.follow))
    problem = None
    if action == "delete" and word is None:
        problem = "lens store delete takes the id of a run"
    elif action in ("info", "compact", "init") and word is not None:
        problem = f"lens store {action} takes no {word!r}"
    elif action != "retention" and (arguments.run or arguments.follow):
        problem = "--run and --follow belong to lens store retention"
    elif action not in ("retention", "token") and arguments.off:
        problem = "--off belongs to lens store retention and lens store token"
    elif (action == "init") != bool(arguments.cluster) or (arguments.apply and action != "init"):
        problem = "lens store init takes --cluster NAME, and --apply URL; no other action does"
    elif arguments.project and (action != "token" or not arguments.scope):
        problem = "--project belongs to lens store token NAME --scope"
    elif arguments.scope and (action != "token" or word is None):
        problem = "--scope belongs to lens store token NAME"
    elif action == "token" and (arguments.off if word is None else bool(arguments.scope) == arguments.off):
        problem = "a token takes its name and either --scope or --off"
    elif action == "token" and arguments.server:
        problem = "tokens are made where the folder is: leave out --server"
    elif action == "retention" and changes > 1:
        problem = "a time, --off and --follow exclude each other"
    elif arguments.follow and not arguments.run:
        problem = "--follow takes --run"
    if problem:
        raise CommandError(problem, _HINT, UNUSABLE)
    if action == "retention" and word is not None:
        seconds_of(word)


def _info(store: StoreDoor, arguments: argparse.Namespace) -> int:
    said = store.info()
    if arguments.json:
        print(json.dumps(said, ensure_ascii=False))
        return DONE
    each = said["bytes_per_sample"]
    print(
        f"{said['samples']:,} samples, {said['rows']:,} rows, {size_of(said['bytes'])}"
        + (f", {each:.2f} bytes a sample" if each is not None else "")
    )
    print(f"beside that: log {size_of(said['bytes_log'])}, parts merged away {size_of(said['bytes_merged_away'])}")
    print(f"schema {said['schema']['version']}; records are kept {kept(said['keep_s'])}\n")
    print(_table([("table", "string"), ("rows", "int"), ("size", "int"), ("parts", "int")],
                 [[row["table"], f"{row['rows']:,}", size_of(row["bytes"]), row["parts"]] for row in said["tables"]]))  # fmt: skip
    if said["runs"]:
        print()
        print(_table([("run", "string"), ("samples", "int"), ("rows", "int"), ("about", "int"), ("kept", "string")],
                     [[row["run"], f"{row['tables'].get('samples', 0):,}", f"{row['rows']:,}",
                       size_of(row["bytes_about"]), kept(row["keep_s"])] for row in said["runs"]]))  # fmt: skip
    return DONE


def _retention(store: StoreDoor, arguments: argparse.Namespace) -> int:
    if arguments.word is None and not (arguments.off or arguments.follow):
        said = store.retention()
    else:
        keep_s = None if arguments.word is None else seconds_of(arguments.word)
        said = store.set_retention(arguments.run, keep_s, arguments.follow)
    if arguments.json:
        print(json.dumps(said, ensure_ascii=False))
        return DONE
    print(f"records are kept {kept(said['keep_s'])}")
    for each in said["runs"]:
        print(f"  those of {each['run']}: {kept(each['keep_s'])}")
    return DONE


def _compact(store: StoreDoor, arguments: argparse.Namespace) -> int:
    said = store.compact()
    if arguments.json:
        print(json.dumps(said))
        return DONE
    before, after = said["before"], said["after"]
    print(f"{size_of(before['bytes'])} in {before['parts']} parts before, ", end="")
    print(f"{size_of(after['bytes'])} in {after['parts']} parts now; {_removed(said['removed'])}")
    return DONE


def _delete(store: StoreDoor, arguments: argparse.Namespace) -> int:
    run = arguments.word
    known = next((each for each in store.info()["runs"] if each["run"] == run), None)
    if known is None:
        raise CommandError(f"{run} is not a run here", "deleting takes a whole id: lens list", UNUSABLE)
    if not arguments.yes:
        _confirm(f"Delete {run} for good, {known['rows']:,} rows, about {size_of(known['bytes_about'])}? [y/N] ")
    said = store.delete_run(run)
    print(json.dumps(said, ensure_ascii=False) if arguments.json else f"{run}: {_removed(said['removed'])}")
    return DONE


_ACTIONS: dict[str, Callable[[StoreDoor, argparse.Namespace], int]] = {
    "info": _info,
    "retention": _retention,
    "compact": _compact,
    "delete": _delete,
}


_NAMES = (*_ACTIONS, "token", "init")


def _init(arguments: argparse.Namespace) -> int:
    """Tables for a cluster: printed, or made there."""
    from lens.store.cluster import apply, cluster_ddl
    from lens.store.errors import StoreError

    try:
        statements = cluster_ddl(arguments.cluster)
        if arguments.apply:
            user = os.environ.get("CLICKHOUSE_USER", "default")
            apply(statements, arguments.apply, user, os.environ.get("CLICKHOUSE_PASSWORD", ""))
    except StoreError as error:
        raise CommandError(str(error), error.hint, FAILED if arguments.apply else UNUSABLE) from error
    if arguments.json:
        print(
            json.dumps({"cluster": arguments.cluster, "applied": bool(arguments.apply), "statements": statements})
        )
    elif arguments.apply:
        print(f"{len(statements)} statements run at {arguments.apply}")
    else:
        print(";\n\n".join(statements) + ";")
    return DONE


def _token(data: Path, arguments: argparse.Namespace) -> int:
    """Tokens are a file of the folder: no server and no database is asked."""
    from lens.store.audit import Audit, local_user
    from lens.store.errors import StoreError
    from lens.store.tokens import Tokens

    if not data.is_dir():
        raise CommandError(f"there is no data folder {data}", "name one with --data", UNUSABLE)
    name, audit, tokens = arguments.word, Audit(data), Tokens(data)
    try:
        if name is None:
            return _list_tokens(tokens.holders(), arguments.json)
        if arguments.off:
            tokens.remove(name)
            audit.note(local_user(), "token.removed", name=name)
            print(json.dumps({"name": name}) if arguments.json else f"the token of {name} holds no more")
            return DONE
        scopes = sorted({scope.strip() for scope in arguments.scope.split(",")})
        token = tokens.add(name, scopes, arguments.project)
        of_project = {"project": arguments.project} if arguments.project else {}
        audit.note(local_user(), "token.added", name=name, scopes=scopes, **of_project)
    except StoreError as error:
        raise CommandError(str(error), error.hint or _HINT, UNUSABLE) from error
    said = {"name": name, "scopes": scopes, "token": token, **of_project}
    print(json.dumps(said) if arguments.json else token)
    return DONE


def _list_tokens(holders: list[Holder], as_json: bool) -> int:
    if as_json:
        rows = [{**vars(each), "scopes": sorted(each.scopes)} for each in holders]
        print(json.dumps({"tokens": rows}))
        return DONE
    lines = [
        f"{each.name}: {', '.join(sorted(each.scopes))}" + (f", runs of {each.project}" if each.project else "")
        for each in holders
    ]
    print("\n".join(lines) or "nobody but the owner has a token")
    return DONE


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise CommandError(
            "deleting asks first, and nobody is there to answer", "say --yes if that is meant", UNUSABLE
        )
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was deleted", "answer y, or say --yes", FAILED)


def seconds_of(text: str) -> int:
    """Seconds of a time such as 30d.

    Raises:
        CommandError: it is no such time.
    """
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS or not number.isascii() or not number.isdigit() or int(number) == 0:
        raise CommandError(f"{text} is no time", "write 12h, 30d or 8w (s, m, h, d or w); or --off", UNUSABLE)
    return int(number) * UNITS[unit]


def kept(keep_s: int | None) -> str:
    """How long that is, in the largest unit in which it is whole."""
    if keep_s is None:
        return "for ever"
    unit = next(unit for unit in ("d", "h", "m", "s") if keep_s % UNITS[unit] == 0)
    return f"for {keep_s // UNITS[unit]}{unit}"


def size_of(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _removed(removed: dict[str, int]) -> str:
    rows = ", ".join(f"{count:,} of {table}" for table, count in removed.items())
    return f"rows deleted: {rows}" if rows else "nothing was past its time"


def _table(columns: list[tuple[str, str]], rows: list[list[Any]]) -> str:
    """Aligned columns; those of kind int to the right."""
    return table_of({"columns": [{"name": name, "type": kind} for name, kind in columns], "rows": rows})
