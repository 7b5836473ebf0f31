"""What run B does otherwise than run A: step time, phases, waiting, transfer and memory, and on which ranks.

A and B are runs (an id, its beginning, or `latest`), data folders (their newest run; no server may own them), or
files of records (NDJSON, plain or gzip). Steps are paired by number. Every number has a 99 % interval, made from
blocks of steps, and what lies within noise is no difference.

Exit code 0 whatever changed; 1 when --max-regression-pct is given, B's steps are longer by more than that and the
whole interval lies above zero; 2 when an input cannot be used. The evidence is written before the exit code is given.
Example, in CI: lens compare good.ndjson latest --max-regression-pct 5 --evidence compare.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens.cli.errors import DONE, FAILED, UNUSABLE, CommandError, missing_extra
from lens.cli.options import add_data, add_server

if TYPE_CHECKING:
    from lens.tables import Tables

HELP = "what changed between two runs, and where; for CI too"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("a", metavar="A", help="the run to compare with")
    parser.add_argument("b", metavar="B", help="the run to judge")
    parser.add_argument(
        "--max-regression-pct",
        type=float,
        metavar="P",
        help="exit code 1 if steps are surely longer, by more than P %%",
    )
    parser.add_argument("--evidence", metavar="FILE", type=Path, help="write the whole comparison there as JSON")
    add_data(parser)
    add_server(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what changed."""
    try:
        from lens.diagnosis.comparison import ComparisonError, compare
    except ImportError as error:
        raise missing_extra(error, "server") from error
    a, b = (_read(word, arguments) for word in (arguments.a, arguments.b))
    try:
        reply = compare(a, b)
    except ComparisonError as error:
        raise CommandError(str(error), "give two runs of one training that did some steps", UNUSABLE) from error
    failed = _is_regression(reply, arguments.max_regression_pct)
    reply["max_regression_pct"], reply["failed"] = arguments.max_regression_pct, failed
    text = json.dumps(reply, ensure_ascii=False)
    if arguments.evidence:
        _write(arguments.evidence, text)
    print(text if arguments.json else describe(reply), flush=True)
    return FAILED if failed else DONE


def _is_regression(reply: dict[str, Any], most: float | None) -> bool:
    step = reply["step_time"]
    return most is not None and bool(step["pct"] > most and step["pct_low"] > 0)


def _read(word: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], Tables]:
    """The run object and the records of a file, a folder's newest run, or a stored run."""
    from lens.diagnosis.comparison import CPU_WAIT, MEMORY
    from lens.reading import ReadingError, open_run
    from lens.reading.records import records_of
    from lens.tables import Tables, TablesBuilder

    path = Path(word)
    try:
        if path.is_file() or path.suffix in (".ndjson", ".gz"):
            known, tables, _ = Tables.read_ndjson(path)
            return known, tables
        where = {"data": path} if path.is_dir() else {"data": arguments.data, "server": arguments.server}
        with open_run("latest" if path.is_dir() else word, token=arguments.token, **where) as stored:
            builder = TablesBuilder()
            for record in records_of(stored, (*MEMORY, CPU_WAIT)):
                builder.add(record)
            return stored.about(), builder.build()
    except ReadingError as error:
        raise CommandError(str(error), error.hint, UNUSABLE) from error
    except (OSError, EOFError, ValueError) as error:
        raise CommandError(f"{word} cannot be used: {error}", "give a run, a folder or a file", UNUSABLE) from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n")
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}", "name another file", FAILED) from error


def describe(reply: dict[str, Any]) -> str:
    """The comparison for people: the verdict, the step time, then what changed and where."""
    step, paired = reply["step_time"], reply["paired"]
    lines = [
        f"{reply['b'] or 'B'} against {reply['a'] or 'A'}: {reply['verdict']} "
        f"({paired['steps']} steps paired by {paired['by']}, {paired['ranks']} ranks)",
        f"  step {1e3 * step['a']['mean']:.4g} → {1e3 * step['b']['mean']:.4g} ms, {_change(step)}",
    ]
    for name in ("p50", "p95"):
        lines.append(f"    {name} {1e3 * step['a'][name]:.4g} → {1e3 * step['b'][name]:.4g} ms")
    if None not in reply["cpu_wait"].values():
        waits = " → ".join(f"{100 * reply['cpu_wait'][side]:.0f}" for side in ("a", "b"))
        lines.append(f"  a rank's process waited for a CPU {waits} % of the time")
    lines += [_line(change) for change in reply["changes"]]
    if reply["not_compared"]:
        lines.append("  known of one run only: " + ", ".join(reply["not_compared"]))
    if reply["max_regression_pct"] is not None:
        told = "steps are longer by more than" if reply["failed"] else "no sure regression beyond"
        lines.append(f"{'FAILED' if reply['failed'] else 'passed'}: {told} {reply['max_regression_pct']:g} %")
    return "\n".join(lines)


def _line(change: dict[str, Any]) -> str:
    where = "all ranks" if change["all_ranks"] else ", ".join(f"rank {rank}" for rank in change["ranks"])
    scale, unit = (2**-20, "MiB") if change["kind"] == "memory" else (1e3, "ms")
    of = "" if change["kind"] == "memory" else " of A's step"
    levels = f"{scale * change['a']:.4g} → {scale * change['b']:.4g} {unit}"
    return f"  {change['kind']} {change['name']} · {where} · {levels}, {_change(change)}{of}"


def _change(change: dict[str, Any]) -> str:
    return f"{change['pct']:+.1f} % [{change['pct_low']:+.1f}, {change['pct_high']:+.1f}]"
