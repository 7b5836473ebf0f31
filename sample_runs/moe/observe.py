"""lens, or nothing in its place: training reads the same either way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")


class Unobserved:
    """What training uses of lens, doing nothing."""

    def watch(self, *arguments: Any, **more: Any) -> None:
        """Record nothing."""

    def step(self, number: int, **attributes: Any) -> contextlib.AbstractContextManager[None]:
        """A step that nobody sees."""
        return contextlib.nullcontext()

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A phase that nobody sees."""
        return contextlib.nullcontext()

    def data(self, loader: Iterable[Item]) -> Iterable[Item]:
        """The loader itself."""
        return loader

    def log(self, values: dict[str, float]) -> None:
        """Keep no numbers."""

    def expert_tokens(self, layer: int, counts: list[int], dropped: int) -> None:
        """Keep no counts."""


def observer(with_lens: bool) -> Any:
    """The module `lens`, or an `Unobserved`."""
    if not with_lens:
        return Unobserved()
    import lens

    return lens
