"""What can go wrong in the store, each with what to do next."""

from __future__ import annotations


class StoreError(RuntimeError):
    """The store cannot do what was asked; ``hint`` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class FolderOwnedError(StoreError):
    """Another process owns the data folder; ``url`` is where it serves, if it said so."""

    def __init__(self, message: str, hint: str, url: str | None) -> None:
        super().__init__(message, hint)
        self.url = url


class UnknownRunError(StoreError, LookupError):
    """No run of this id is in the store."""

    def __init__(self, run: str) -> None:
        super().__init__(f"unknown run {run!r}", "GET /api/v1/runs lists the runs; POST /api/v1/runs creates one")


class StoreBehindError(StoreError):
    """What was acknowledged has not reached the database yet; ask again in a moment."""


class StoreFullError(StoreError):
    """The store takes no more records for now; ask again in a moment."""


class BadQueryError(StoreError):
    """A question that cannot be answered as it was put."""


class UndecodableError(StoreError):
    """A body of records that cannot be read at all."""


class TooLargeError(StoreError):
    """A body over the size limit, as sent or unpacked."""


class UnknownStepError(StoreError, LookupError):
    """No rank of the run has recorded that step."""
