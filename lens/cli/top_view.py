"""What ``lens top`` shows, as lines of styled text: pure functions of a server's replies.

Seconds, bytes and ratios become ms, GiB and % here; what is not known reads n/a and is never zero.
"""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lens.cli.diagnose import headline
from lens.cli.terminal import Line, Span

MISSING = "n/a"
STALE_S = 5.0
"""Seconds after which the age of data is coloured as a warning."""
LONG_S = 1.0
"""Seconds after which it is said how long a rank has been where it is."""
STATUS_STYLE = {"healthy": "good", "degraded": "warn", "failed": "bad", "hung": "bad"}
SIGN = {"healthy": "✓", "degraded": "▲", "failed": "✖", "hung": "■"}
ADVICE_SHARE = 8
"""What to do gets a line of every so many of the terminal."""

Reply = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of the table: its title, what it says of a rank, and how soon it goes when there is no room."""

    title: str
    say: Callable[[Reply, Reply], str]
    """From a rank and the whole reply."""
    keep: int
    """Columns with the smallest number go first."""
    left: bool = False


def milliseconds(seconds: float | None) -> str:
    """A duration."""
    if seconds is None:
        return MISSING
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def percent(ratio: float | None) -> str:
    """A share."""
    return MISSING if ratio is None else f"{ratio * 100:.0f} %"


def gibibytes(size: float | None, limit: float | None = None) -> str:
    """A size, and what there is."""
    if size is None:
        return MISSING
    return f"{size / 2**30:.1f} GiB" if limit is None else f"{size / 2**30:.1f}/{limit / 2**30:.0f} GiB"


def age(seconds: float | None) -> str:
    """How long ago, in the coarsest unit that still says something."""
    if seconds is None:
        return MISSING
    for most, divide, unit, digits in ((10, 1, "s", 1), (120, 1, "s", 0), (7200, 60, "min", 0)):
        if seconds < most:
            return f"{seconds / divide:.{digits}f} {unit}"
    return f"{seconds / 3600:.0f} h"


def whereabouts(rank: Reply, reply: Reply) -> str:
    """Where a rank is: its phase, the collective it is in and for how long, or how it ended."""
    if rank["state"] == "ended":
        return _ended(rank["exit"] or {})
    call = rank["collective"]
    if call:
        where = f"{call['op']} {call['group']} {'' if call.get('seq') is None else call['seq']}".strip()
        spent = call.get("for_s") or 0.0
        return f"{where} for {age(spent)}" if spent > LONG_S else where
    return str(rank["phase"] or rank["state"] or MISSING)


def _ended(how: Reply) -> str:
    number, code = how.get("signal"), how.get("exit_code")
    if number is not None:
        known = isinstance(number, int) and number in {each.value for each in signal.Signals}
        return f"ended by {signal.Signals(number).name if known else number}"
    return "ended" if code is None else f"ended, code {code}"


def _value(metric: str, say: Callable[[float], str]) -> Callable[[Reply, Reply], str]:
    def cell(rank: Reply, reply: Reply) -> str:
        value = rank["values"].get(metric)
        return say(value) if isinstance(value, (int, float)) else MISSING

    return cell


def _card_memory(rank: Reply, reply: Reply) -> str:
    values = rank["values"]
    return gibibytes(values.get("hw.gpu.memory.usage"), values.get("hw.gpu.memory.limit"))


def _host_memory(rank: Reply, reply: Reply) -> str:
    values: Reply = next((each["values"] for each in reply["hosts"] if each["host"] == rank["host"]), {})
    return gibibytes(values.get("system.memory.usage"), values.get("system.memory.limit"))


def rank_age(rank: Reply, reply: Reply) -> float | None:
    """Seconds since the newest record of a rank; of a run that is over, how long before its end that was."""
    if rank["age_s"] is None or reply["age_s"] is None:
        return None
    return float(rank["age_s"]) + (0.0 if reply["state"] == "ended" else float(reply["age_s"]))


COLUMNS = (
    Column("RANK", lambda rank, reply: str(rank["rank"]), 99),
    Column("DEVICE", lambda rank, reply: str(rank["device"] or rank["host"] or MISSING), 50, left=True),
    Column("CARD", lambda rank, reply: str(rank["model"] or MISSING), 10, left=True),
    Column("PID", lambda rank, reply: MISSING if rank["pid"] is None else str(rank["pid"]), 15),
    Column("STEP", lambda rank, reply: MISSING if rank["step"] is None else str(rank["step"]), 90),
    Column("STEP TIME", lambda rank, reply: milliseconds(rank["step_s"]), 95),
    Column("WAITS", lambda rank, reply: percent(rank["wait_share"]), 94),
    Column("NOW", whereabouts, 93, left=True),
    Column("BUSY", _value("hw.gpu.utilization", percent), 60),
    Column("CLOCK", _value("gpu.clock.sm", lambda mhz: f"{mhz:.0f} MHz"), 40),
    Column("POWER", _value("hw.power", lambda watts: f"{watts:.0f} W"), 30),
    Column("CARD MEMORY", _card_memory, 55),
    Column("PROCESS", _value("process.memory.usage", gibibytes), 25),
    Column("HOST MEMORY", _host_memory, 20),
    Column("AGE", lambda rank, reply: age(rank_age(rank, reply)), 70),
)
GAP = "  "


def blamed(diagnosis: Reply | None) -> list[int]:
    """The ranks in which the verdict's causes sit."""
    found = [
        hypothesis for hypothesis in (diagnosis or {}).get("hypotheses", ()) if hypothesis["severity"] != "info"
    ]
    return sorted({int(rank) for hypothesis in found[:1] for rank in hypothesis["ranks"]})


def view(
    reply: Reply,
    diagnosis: Reply | None,
    *,
    width: int | None = None,
    height: int | None = None,
    scroll: int = 0,
    note: str = "",
) -> list[Line]:
    """The whole picture: a line on the run, the verdict and its advice, then the ranks.

    Without `width` every column is there, without `height` every rank. Where not all ranks fit, those the verdict
    names come first, and `scroll` says how many of the rest are passed over.
    """
    lines = _head(reply, diagnosis, width, height)
    named = set(blamed(diagnosis))
    ranks = list(reply["ranks"])
    hidden = hidden_ranks(reply, diagnosis, width, height)
    if hidden:
        ranks.sort(key=lambda rank: (rank["rank"] not in named, rank["rank"]))
        first = min(max(scroll, 0), hidden)
        last = first + len(ranks) - hidden
        note = f"ranks {first + 1} to {last} of {len(ranks)}" + (f" · {note}" if note else "")
        ranks = ranks[first:last]
    lines += _table(ranks, reply, named, width)
    return [*lines, [(note, "dim")]] if note else lines


def hidden_ranks(reply: Reply, diagnosis: Reply | None, width: int | None, height: int | None) -> int:
    """How many ranks do not fit below the head of the picture."""
    if height is None:
        return 0
    # The table's head and the note below it take a line each.
    room = height - len(_head(reply, diagnosis, width, height)) - 2
    return max(0, len(reply["ranks"]) - max(1, room))


def _head(reply: Reply, diagnosis: Reply | None, width: int | None, height: int | None) -> list[Line]:
    return [_run_line(reply), *_verdict_lines(diagnosis, width, height), [("", "")]]


def _run_line(reply: Reply) -> Line:
    name = f" ({reply['name']})" if reply["name"] else ""
    size = MISSING if reply["world_size"] is None else reply["world_size"]
    whole = reply["ranks_reporting"] == reply["world_size"]
    step = MISSING if reply["last_step"] is None else reply["last_step"]
    pace = MISSING if reply["steps_per_s"] is None else f"{reply['steps_per_s']:.2f} steps/s"
    stale = reply["age_s"] is None or reply["age_s"] > STALE_S
    state = {"live": "good", "stale": "warn"}.get(reply["state"], "")
    return [
        (f"{reply['run']}{name}", "bold"), (GAP, ""), (str(reply["state"]), state), (GAP, ""),
        (f"age {age(reply['age_s'])}", "warn" if stale and reply["state"] != "ended" else ""), (GAP, ""),
        (f"{reply['ranks_reporting']} of {size} ranks", "" if whole else "warn"), (GAP, ""),
        (f"step {step}", ""), (GAP, ""), (pace, ""), (f"{GAP}simulated cards" if reply["simulated"] else "", "dim"),
    ]  # fmt: skip


def _verdict_lines(diagnosis: Reply | None, width: int | None, height: int | None) -> list[Line]:
    """What holds the run back, and what to do."""
    if diagnosis is None:
        return [[("… no verdict yet", "dim")]]
    status = str(diagnosis["status"])
    badge: Span = (f"{SIGN.get(status, '…')} {status}", STATUS_STYLE.get(status, "dim"))
    found = diagnosis["hypotheses"]
    if not found:
        words = "nothing holds this run back" if status == "healthy" else "no cause is known"
        return [[badge, (f"{GAP}{words}", "")]]
    advice = f"do: {found[0]['recommendation']}"
    wrapped = [advice]
    if width is not None and height is not None:
        wrapped = textwrap.wrap(advice, max(10, width - 6))[: height // ADVICE_SHARE]
    lines = [f"{GAP}{'' if number == 0 else '    '}{text}" for number, text in enumerate(wrapped)]
    return [[badge, (f"{GAP}{headline(found[0])}", "")], *([(line, "")] for line in lines)]


def _table(ranks: Sequence[Reply], reply: Reply, named: set[int], width: int | None) -> list[Line]:
    cells = {column.title: [column.say(rank, reply) for rank in ranks] for column in COLUMNS}
    wide = {title: max([len(title), *map(len, texts)]) for title, texts in cells.items()}
    shown = list(COLUMNS)
    while width is not None and len(shown) > 1 and sum(wide[c.title] + len(GAP) for c in shown) + 1 > width:
        shown.remove(min(shown, key=lambda column: column.keep))
    lines: list[Line] = [[(GAP, ""), *_cells(shown, wide, {c.title: (c.title, "head") for c in shown})]]
    for row, rank in enumerate(ranks):
        styled = {
            column.title: (cells[column.title][row], _style(column, cells[column.title][row])) for column in shown
        }
        seconds = rank_age(rank, reply)
        if seconds is not None and seconds > STALE_S and rank["state"] != "ended":
            styled["AGE"] = (styled["AGE"][0], "warn") if "AGE" in styled else ("", "")
        mark: Span = ("▶ ", "bad") if rank["rank"] in named else (GAP, "")
        lines.append([mark, *_cells(shown, wide, styled)])
    return lines


def _style(column: Column, text: str) -> str:
    return "dim" if text == MISSING else "bad" if column.title == "NOW" and text.startswith("ended by") else ""


def _cells(shown: Sequence[Column], wide: Mapping[str, int], styled: Mapping[str, Span]) -> list[Span]:
    spans: list[Span] = []
    for column in shown:
        text, style = styled[column.title]
        pad = " " * (wide[column.title] - len(text))
        spans += [(text, style), (pad, "")] if column.left else [(pad, ""), (text, style)]
        spans.append((GAP, ""))
    return spans
