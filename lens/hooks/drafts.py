"""Speculative decoding: tokens that a smaller model or a look-up drafts, and how many of them the model accepts.

A forward pass of the model checks what was drafted for it and always adds one token of its own, so that accepted tokens
are the generated ones less the passes. No number is read from a device for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lens.hooks.guard import StandIn, warn


class Drafts:
    """What was drafted for one request."""

    def __init__(self) -> None:
        self.drafted = 0
        """Tokens proposed so far."""
        self.with_prompt = 0
        """Those that were checked together with the prompt."""
        self.accepted: int | None = None
        """Those that are part of the output; None until it is there."""
        self.drafting = False
        """Whether tokens are being drafted now."""

    def numbers(self) -> dict[str, float | None]:
        """Metrics of it; nothing where nothing was drafted."""
        if not self.drafted or self.accepted is None:
            return {}
        return {"infer.speculative.accepted": self.accepted / self.drafted}


class MakesDrafts(StandIn):
    """Stands in, while a request runs, for the method of transformers by which a model gets what drafts for it."""

    NAME = "_get_candidate_generator"

    def __init__(self, model: Any, begin: Callable[[], Drafts]) -> None:
        super().__init__(model, self.NAME)
        self._begin = begin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generator = self._original(*args, **kwargs)
        try:
            generator.get_candidates = _Drafting(generator, self._begin())
        except Exception as error:
            warn(f"what is drafted is not counted ({type(error).__name__}: {error})")
        return generator


class _Drafting(StandIn):
    """Stands in for ``get_candidates`` of one generator of drafts, which ends with its request."""

    def __init__(self, generator: Any, drafts: Drafts) -> None:
        super().__init__(generator, "get_candidates")
        self._drafts = drafts

    def __call__(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = self._drafts
        drafts.drafting = True
        try:
            found = self._original(input_ids, *args, **kwargs)
        finally:
            drafts.drafting = False
        candidates = found[0] if isinstance(found, tuple) else found
        if hasattr(candidates, "shape"):
            drafts.drafted += int(candidates.shape[-1]) - int(input_ids.shape[-1])
        return found
