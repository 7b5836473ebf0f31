"""One SELECT over the records, as a table, CSV or JSON.

Views: runs, ranks, series, samples, latest, steps, spans, collectives, vectors, events; docs/sql.md has their columns.
Example: lens query "SELECT rank, avg(duration_s) FROM steps GROUP BY rank ORDER BY rank" --run latest
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from typing import Any

from lens.cli.errors import DONE, UNUSABLE, CommandError
from lens.cli.options import add_data, add_server, settings_of
from lens.cli.reader import choose_run, open_reader

HELP = "one SELECT over the records"
WIDEST = 60
"""Characters of a cell in the table; CSV and JSON are never cut."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("sql", metavar="SQL", help="one SELECT; - reads it from standard input")
    parser.add_argument("--run", metavar="RUN|latest", help="only this run's records")
    parser.add_argument("--limit", type=int, default=10_000, metavar="N", help="most rows (default: %(default)s)")
    parser.add_argument("--csv", action="store_true", help="print CSV")
    add_data(parser)
    add_server(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the rows."""
    sql = sys.stdin.read() if arguments.sql == "-" else arguments.sql
    reply = _ask(arguments, sql)
    if arguments.json:
        print(json.dumps(reply, ensure_ascii=False))
    elif arguments.csv:
        _print_csv(reply)
    else:
        print(table_of(reply))
    if reply["truncated"] and not arguments.json:
        print(f"lens: there are more than {arguments.limit} rows; --limit takes more", file=sys.stderr)
    return DONE


def _ask(arguments: argparse.Namespace, sql: str) -> dict[str, Any]:
    reader = open_reader(settings_of(arguments))
    try:
        run = choose_run(reader, arguments.run) if arguments.run else None
        return reader.sql_reply(sql, run, arguments.limit)
    except RuntimeError as error:
        # A folder that no server owns answers here, with the store's own errors.
        raise CommandError(str(error), getattr(error, "hint", "") or "see docs/sql.md", UNUSABLE) from error
    finally:
        reader.close()


def _print_csv(reply: dict[str, Any]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([column["name"] for column in reply["columns"]])
    for row in reply["rows"]:
        writer.writerow(["" if cell is None else cell if isinstance(cell, str) else _text(cell) for cell in row])


def table_of(reply: dict[str, Any]) -> str:
    """The rows as aligned columns: numbers to the right, absent values as n/a."""
    names = [column["name"] for column in reply["columns"]]
    cells = [[_cut("n/a" if cell is None else _text(cell)) for cell in row] for row in reply["rows"]]
    numeric = [
        column["type"].rstrip("0123456789") in ("int", "uint", "float", "double") for column in reply["columns"]
    ]
    widths = [max(map(len, column)) for column in zip(*[[_cut(name) for name in names], *cells], strict=True)]

    def line(row: list[str]) -> str:
        placed = zip(row, widths, numeric, strict=True)
        return "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w, right in placed).rstrip()

    ruler = "  ".join("-" * width for width in widths)
    return "\n".join([line([_cut(name) for name in names]), ruler, *map(line, cells)])


def _text(cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    return json.dumps(cell, ensure_ascii=False)


def _cut(text: str) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
