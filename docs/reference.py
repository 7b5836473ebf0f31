"""Writes the pages that are made from the code: docs/metrics.md from the catalogue, docs/cli.md from the parser.

python docs/reference.py            # write them
python docs/reference.py --check    # exit code 1 and the difference if a page is not as the code says
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields
from itertools import groupby, pairwise
from pathlib import Path

from lens import settings
from lens.catalogue import METRICS, Metric
from lens.cli.errors import EXIT_CODES
from lens.cli.main import VERBS, module_of
from lens.settings import Settings

FOLDER = Path(__file__).parent
MADE_BY = "<!-- made by docs/reference.py: change the code, not this page -->\n"
DEFAULTS = {
    "server": "the server that owns the data folder",
    "token": "the token file in the data folder",
    "run": "drawn by rank 0",
    "host": "the host's name",
    "rings": "`/dev/shm/lens-UID`",
    "spool": "`DATA/spool/HOST`",
}
"""Defaults that are found, not written down."""


def metrics_page() -> str:
    """Every metric of the catalogue, family by family."""
    lines = [
        "# Metrics",
        "",
        MADE_BY,
        "Every metric that lens knows, as it is stored and as `series`, `heatmap` and `latest` of the [API](api.md) take "
        "it. A metric of your own may have any other name; it is stored and drawn like these.",
        "",
        "Units are UCUM: `1` is a ratio from 0 to 1, `By` bytes, `s` seconds, `Cel` degrees Celsius, words in braces are "
        "counts. A **counter** only grows since its process or driver started; a decrease is a restart. A **vector** has "
        "one value for each expert or rank. Every sample also says whose it is: run, host, rank, device. What a device "
        "does not give is absent, never zero. A metric of this list is not always there: what gives it, "
        "[the hook](hook.md) or a card, decides.",
    ]
    for family, metrics in groupby(METRICS.values(), key=lambda metric: metric.family):
        lines += [
            "",
            f"## {_title(family)}",
            "",
            "| metric | unit | kind | labels | more is | meaning |",
        ]
        lines += ["|---|---|---|---|---|---|", *map(_metric_row, metrics)]
    return "\n".join(lines) + "\n"


def _title(family: str) -> str:
    return (family[0].upper() + family[1:]).replace("Gpu", "GPU")


def _metric_row(metric: Metric) -> str:
    judged = {True: "worse", False: "better", None: ""}[metric.more_is_worse]
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.unit} | {metric.kind} | {labels} | {judged} | {_cell(metric.help)} |"


def cli_page() -> str:
    """Every verb with its options, the exit codes and the settings."""
    lines = [
        "# The command line",
        "",
        MADE_BY,
        "| verb | what it does |",
        "|---|---|",
        *(f"| [`lens {name}`](#lens-{name}) | {_cell(module_of(name).HELP)} |" for name in VERBS),
        "",
        "Every verb takes `--help` and `--json` (one object on standard output, for programs). An error is one sentence and "
        'what to do next; with `--json` it is `{"error", "hint", "exit_code"}`.',
        "",
        "| exit code | meaning |",
        "|---|---|",
        *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()),
        "",
        "`lens run` gives back its command's own exit code; a command that a signal ended ends `lens run` by the same one.",
    ]
    for name in VERBS:
        lines += ["", *_verb(name)]
    lines += ["", *_settings()]
    return "\n".join(lines) + "\n"


def _verb(name: str) -> Iterator[str]:
    module = module_of(name)
    parser = argparse.ArgumentParser(add_help=False)
    module.configure(parser)
    actions = parser._actions
    words = [str(action.metavar or action.dest.upper()) for action in actions if not action.option_strings]
    options = [action for action in actions if action.option_strings]
    needed = [f"{_option(action)}" for action in options if action.required]
    usage = " ".join(
        ["lens", name, *needed, *(["[OPTIONS]"] if len(options) > len(needed) else []), *_optional(actions, words)]
    )
    yield f"## `lens {name}`"
    yield ""
    yield from inspect.cleandoc(module.__doc__ or "").splitlines()
    yield ""
    yield from ("```", usage, "```")
    if options:
        yield ""
        yield from ("| option | meaning |", "|---|---|")
        for action in options:
            yield f"| `{_cell(_option(action))}` | {_cell(_help(action))} |"


def _optional(actions: list[argparse.Action], words: list[str]) -> Iterator[str]:
    """The words behind the options, in brackets where they may be left out."""
    positional = [action for action in actions if not action.option_strings]
    for action, word in zip(positional, words, strict=True):
        yield f"[{word}]" if action.nargs in ("?", "*") else word


def _option(action: argparse.Action) -> str:
    name = action.option_strings[-1]
    if action.nargs == 0:
        return name
    metavar = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    return f"{name} {metavar}"


def _help(action: argparse.Action) -> str:
    return (action.help or "") % {"default": action.default} if action.help else ""


def _settings() -> Iterator[str]:
    """The settings, with what their docstrings say."""
    yield from (
        "## Settings",
        "",
        "Each is set by an argument, by the environment, or by the same name in small letters in `lens.toml` of the working "
        "directory, in this order. `LENS_CONFIG` names another file than `lens.toml`.",
        "",
        "| environment | default | meaning |",
        "|---|---|---|",
    )
    said = _field_docstrings()
    for field in fields(Settings):
        default = DEFAULTS.get(field.name)
        if default is None:
            value = field.default
            default = "" if value is None else f"`{int(value) if isinstance(value, bool) else value}`"
        yield f"| `LENS_{field.name.upper()}` | {default} | {_cell(said[field.name])} |"


def _field_docstrings() -> dict[str, str]:
    """The text below each field of `Settings`."""
    tree = ast.parse(inspect.getsource(settings))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
    found = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = inspect.cleandoc(str(text.value.value)).replace("``", "`")
    return found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {"metrics.md": metrics_page, "cli.md": cli_page}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    differences = []
    for name, make in PAGES.items():
        path, new = FOLDER / name, make()
        old = path.read_text() if path.exists() else ""
        differences += difflib.unified_diff(
            old.splitlines(), new.splitlines(), f"docs/{name}", "the code", lineterm=""
        )
        if not check:
            path.write_text(new)
    if check and differences:
        print("\n".join(differences))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
