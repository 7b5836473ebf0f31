"""What tests of several rooms need."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from lens.hooks.native import build
from lens.hooks.native.libraries import LIBRARIES

# A busy machine makes any example slow, and what must hold before a change lands must not hang on the day's examples.
settings.register_profile("lens", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
# pytest --hypothesis-profile=explore: other examples each time.
settings.register_profile("explore", settings.get_profile("lens"), derandomize=False)
settings.load_profile("lens")


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
