"""Parse the command line and run one verb. Imports nothing heavy: ``lens --help`` answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from lens import __version__
from lens.cli import (
    agent,
    attach,
    compare,
    demo,
    detach,
    diagnose,
    doctor,
    export,
    list_runs,
    postmortem,
    query,
    run,
    selftest,
    serve,
    store,
    top,
)  # fmt: skip
from lens.cli.errors import EXIT_CODES, INTERRUPTED, UNUSABLE, CommandError
from lens.settings import SettingsError

VERBS: dict[str, ModuleType] = {
    "demo": demo,
    "serve": serve,
    "run": run,
    "attach": attach,
    "detach": detach,
    "agent": agent,
    "list": list_runs,
    "top": top,
    "diagnose": diagnose,
    "compare": compare,
    "query": query,
    "export": export,
    "store": store,
    "postmortem": postmortem,
    "selftest": selftest,
    "doctor": doctor,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog="lens",
        description="See where a training run's time goes, on which rank, and what to do about it.",
        epilog=f"exit codes:\n{codes}\n\nlens VERB --help says more about a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lens {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in VERBS.items():
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
    arguments = build_parser().parse_args(words)
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
