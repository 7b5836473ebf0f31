"""Parse the command line and run one verb. Imports that verb alone, and nothing heavy: it answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType

from lens import __version__
from lens.cli.errors import EXIT_CODES, INTERRUPTED, UNUSABLE, CommandError
from lens.settings import SettingsError

VERBS = (
    "demo", "serve", "run", "attach", "detach", "agent", "list", "top", "diagnose",
    "compare", "query", "export", "store", "postmortem", "selftest", "doctor",
)  # fmt: skip
"""In the order in which ``lens --help`` shows them."""
_MODULES = {"list": "list_runs"}
"""Where a verb's file has another name."""


def module_of(verb: str) -> ModuleType:
    """The file of a verb: its HELP, `configure` and `run`."""
    return import_module(f"lens.cli.{_MODULES.get(verb, verb)}")


def build_parser(only: Iterable[str] = VERBS) -> argparse.ArgumentParser:
    """The parser of these verbs."""
    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog="lens",
        description="See where a training run's time goes, on which rank, and what to do about it.",
        epilog=f"exit codes:\n{codes}\n\nlens VERB --help says more about a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lens {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in only:
        module = module_of(name)
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(verb)
        verb.add_argument("--json", action="store_true", help="print one JSON object for programs")
        verb.set_defaults(execute=module.run)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code. Errors are one sentence and what to do next, as JSON with --json."""
    words = sys.argv[1:] if words is None else words
    arguments = build_parser(words[:1] if words[:1] and words[0] in VERBS else VERBS).parse_args(words)
    try:
        code: int = arguments.execute(arguments)
        return code
    except CommandError as error:
        return _complain(str(error), error.hint, error.code, arguments.json)
    except SettingsError as error:
        return _complain(str(error), "see: lens doctor", UNUSABLE, arguments.json)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (``lens list | head``): nothing to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _complain(message: str, hint: str, code: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": message, "hint": hint, "exit_code": code}))
    else:
        print(f"lens: {message}\n      {hint}", file=sys.stderr)
    return code
