"""What tests of several rooms need."""

from __future__ import annotations

import pytest

from lens.hooks.native import build
from lens.hooks.native.libraries import LIBRARIES


@pytest.fixture(scope="session")
def observer_library() -> None:
    """The native observer, built for this torch."""
    try:
        build.build(LIBRARIES["observer"])
    except build.BuildError as error:
        pytest.skip(str(error))
