"""What holds a run back: which rank, why, what it costs, what to do.

RUN is a run's id, its beginning, or `latest`; or a file of records (NDJSON, plain or gzip) with a `run` line first.
Exit code 0 whatever the verdict, 2 when the input cannot be used.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lens.cli.errors import DONE, UNUSABLE, CommandError, missing_extra
from lens.cli.options import add_data, add_server, settings_of
from lens.cli.reader import choose_run, open_reader
from lens.settings import Settings

Price = dict[str, Any] | None

HELP = "what holds a run back, and what to do"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("run", metavar="RUN|latest|FILE")
    add_data(parser)
    add_server(parser)
    parser.add_argument("--upto-step", type=int, metavar="N", help="judge only what was known by step N")


def run(arguments: argparse.Namespace) -> int:
    """Print the verdict."""
    path, settings = Path(arguments.run), settings_of(arguments)
    reply, price = (
        _of_file(path, settings, arguments.upto_step)
        if path.is_file() or path.suffix in (".ndjson", ".gz")
        else _of_run(arguments.run, settings, arguments.upto_step)
    )
    print(json.dumps(reply, ensure_ascii=False) if arguments.json else describe(reply, price))
    return DONE


def _of_run(name: str, settings: Settings, upto_step: int | None) -> tuple[dict[str, Any], Price]:
    reader = open_reader(settings)
    try:
        from lens.store.prices import Prices

        run = choose_run(reader, name)
        about = reader.run(run)
        price = about.get("device_hour_price") or Prices.parse(settings.device_hour_price).of(about["ranks"])
        return reader.diagnosis(run, upto_step), price
    finally:
        reader.close()


def _of_file(path: Path, settings: Settings, upto_step: int | None) -> tuple[dict[str, Any], Price]:
    try:
        from lens.diagnosis import diagnose
        from lens.store.prices import Prices
        from lens.tables import Tables
    except ImportError as error:
        raise missing_extra(error, "server") from error
    try:
        known, tables, _ = Tables.read_ndjson(path)
    except (OSError, EOFError, ValueError) as error:
        raise CommandError(
            f"{path} cannot be used: {error}", "give a file of records, one JSON object a line", UNUSABLE
        ) from error
    price = Prices.parse(settings.device_hour_price).of((known or {}).get("ranks") or [])
    return diagnose(known, tables, upto_step), price


def describe(reply: dict[str, Any], price: Price = None) -> str:
    """The verdict for people: a headline, then each cause with cost, evidence, look-alikes and advice."""
    coverage = reply["coverage"]
    lines = [
        f"{reply['run'] or 'run'}: {reply['status']} at step {_shown(reply['upto_step'])} "
        f"({coverage['ranks_reporting']} of {_shown(coverage['world_size'])} ranks report)"
    ]
    for hypothesis in reply["hypotheses"]:
        lines += ["", headline(hypothesis)]
        if hypothesis["lost_device_hours"]:
            lines.append(f"  so far: {_lost(hypothesis['lost_device_hours'], price)}")
        for item in hypothesis["evidence"]:
            lines.append(f"  why: {item['metric']} {_number(item['observed'])}, else {_number(item['baseline'])}")
        for item in hypothesis["against"]:
            lines.append(f"  not {item['cause']}: {item['because']}")
        lines.append(f"  do: {hypothesis['recommendation']}")
    if coverage["signals_missing"]:
        lines += ["", "not seen: " + ", ".join(coverage["signals_missing"])]
    return "\n".join(lines)


def headline(hypothesis: dict[str, Any]) -> str:
    """One cause in one line: what, where, since when, what it costs, how sure."""
    where = ", ".join(f"rank {rank}" for rank in hypothesis["ranks"]) or "no particular rank"
    cost = hypothesis["slowdown_pct"]
    return (
        f"{hypothesis['cause']} · {where} · since step {_shown(hypothesis['onset_step'])} · "
        f"{'cost n/a' if cost is None else f'costs {cost:.0f} % of step time'} · "
        f"confidence {hypothesis['confidence']:.2f}"
    )


def _lost(device_hours: float, price: Price) -> str:
    amount, unit = (device_hours, "hours") if device_hours >= 0.1 else (device_hours * 3600, "seconds")
    spent = f"{amount:.3g} device {unit}"
    if price is None:
        return spent
    cost = device_hours * price["amount"]
    return f"{spent}, {f'{cost:.2f}' if cost >= 0.01 else 'less than 0.01'} {price['currency']}"


def _shown(value: Any) -> str:
    return "n/a" if value is None else str(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else _shown(value)
