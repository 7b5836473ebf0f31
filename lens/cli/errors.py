"""What a verb raises when it cannot go on, and the exit codes that all verbs share."""

from __future__ import annotations

DONE = 0
FAILED = 1
UNUSABLE = 2
UNREACHABLE = 3
MISSING = 4
INTERRUPTED = 130

EXIT_CODES = {
    DONE: "done",
    FAILED: "what was asked for failed (the message says what)",
    UNUSABLE: "the words or the input cannot be used",
    UNREACHABLE: "no server answers, or another process owns the data folder",
    MISSING: "a package or a feature of the system is missing",
    INTERRUPTED: "interrupted (Ctrl-C)",
}


class CommandError(Exception):
    """A verb cannot go on: what happened, what to do about it, and the exit code."""

    def __init__(self, message: str, hint: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code


def missing_extra(error: ImportError, extra: str) -> CommandError:
    """The error for a package that belongs to an extra which is not installed."""
    return CommandError(
        f"the package {error.name or error} is not installed",
        f"install it with: pip install 'mistrallens[{extra}]'",
        MISSING,
    )
