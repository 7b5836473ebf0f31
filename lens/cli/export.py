"""A run as a file for other tools: Parquet, CSV, Arrow, or a trace for ui.perfetto.dev.

Parquet, CSV and Arrow hold one table (samples, unless --table names another); --table all makes a ZIP of all tables.
--iceberg writes all tables as Apache Iceberg, beside those of other runs.
Examples: lens export latest --format perfetto -o run.json.gz
          lens export latest --iceberg warehouse
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from lens.cli.errors import DONE, FAILED, UNUSABLE, CommandError, missing_extra
from lens.cli.options import add_data, add_server, settings_of
from lens.cli.reader import RunReader, choose_run, open_reader

HELP = "a run as Parquet, CSV, Arrow, a Perfetto trace or Iceberg tables"
FORMATS = ("parquet", "csv", "arrow", "perfetto")
TABLES = ("samples", "steps", "spans", "collectives", "vectors", "events", "all")


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("run", metavar="RUN|latest")
    parser.add_argument("--format", choices=FORMATS, default="parquet", help="(default: %(default)s)")
    parser.add_argument("--table", choices=TABLES, default="samples", help="(default: %(default)s)")
    parser.add_argument("--from", dest="first", type=int, metavar="STEP", help="first step")
    parser.add_argument("--to", dest="last", type=int, metavar="STEP", help="last step")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="where to (default: named after the run); - prints it"
    )
    parser.add_argument(
        "--iceberg", metavar="FOLDER", type=Path, help="all tables into this local warehouse, in place of a file"
    )
    add_data(parser)
    add_server(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the file."""
    reader = open_reader(settings_of(arguments))
    try:
        run = choose_run(reader, arguments.run)
        if arguments.iceberg:
            return _iceberg(reader, run, arguments)
        parts = reader.exported(run, arguments.format, arguments.table, arguments.first, arguments.last)
        if arguments.output == "-":
            for part in parts:
                sys.stdout.buffer.write(part)
            return DONE
        path = Path(arguments.output or _name(run, arguments.format, arguments.table))
        size = _write(path, parts)
    except RuntimeError as error:
        # A folder that no server owns answers here, with the store's own errors.
        raise CommandError(str(error), getattr(error, "hint", "") or "see docs/cli.md", UNUSABLE) from error
    finally:
        reader.close()
    if arguments.json:
        print(json.dumps({"run": run, "file": str(path), "bytes": size}))
    else:
        print(f"{path}: {size:,} bytes of run {run}")
    return DONE


def _iceberg(reader: RunReader, run: str, arguments: argparse.Namespace) -> int:
    try:
        from lens.reading.iceberg import write_iceberg
    except ImportError as error:
        raise missing_extra(error, "iceberg") from error
    rows = write_iceberg(
        lambda table: reader.exported(run, "arrow", table, arguments.first, arguments.last), run, arguments.iceberg
    )
    if arguments.json:
        print(json.dumps({"run": run, "warehouse": str(arguments.iceberg), "rows": rows}))
    else:
        told = ", ".join(f"{count:,} of {table}" for table, count in rows.items() if count)
        print(f"{arguments.iceberg}: run {run}, rows {told or 'none'}")
    return DONE


def _write(path: Path, parts: Iterator[bytes]) -> int:
    """The whole file or none: what broke off leaves nothing under this name."""
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
            size = file.tell()
        partial.replace(path)
    except OSError as error:
        raise CommandError(
            f"{path} cannot be written: {error.strerror or error}", "name another with -o", FAILED
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return size


def _name(run: str, format: str, table: str) -> str:
    if format == "perfetto":
        return f"{run}.json.gz"
    return f"{run}.zip" if table == "all" else f"{run}.{table}.{format}"
