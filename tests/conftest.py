"""What tests of several rooms need."""

from __future__ import annotations

import pytest

from lens.hooks.native import build
from lens.hooks.native.libraries import LIBRARIES


@pytest.fixture(scope="session")
def observer_library() -> None:
    """The native observer, built for this torch."""
    _built("observer")


@pytest.fixture(scope="session")
def timeline_library() -> None:
    """Steps and phases in C, built for this Python."""
    _built("timeline")


def _built(name: str) -> None:
    try:
        build.build(LIBRARIES[name])
    except build.BuildError as error:
        pytest.skip(str(error))
