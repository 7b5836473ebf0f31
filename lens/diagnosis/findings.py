"""What is said of slow ranks, from a change that was seen to a priced verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lens.diagnosis import policy
from lens.diagnosis.arrays import Floats, Ints
from lens.diagnosis.scenes import Measure
from lens.diagnosis.segments import Where
from lens.diagnosis.signatures import Explained

if TYPE_CHECKING:
    from lens.diagnosis.several import Hidden

LOADING = {"data", "h2d"}
"""Parts that come before the computing of a step."""


@dataclass(frozen=True)
class Finding:
    """Ranks (places) whose self time in a part of the step is too high, from a step on.

    last: over since then. noise: the share of a step that noise alone could have reached. second: the same ranks have a
    costlier one at that time. whole: they are a set that is compared with what lies outside.
    """

    feature: str
    rows: tuple[int, ...]
    onset: int
    last: int | None
    upto: int
    noise: float
    standing: bool = False
    second: bool = False
    whole: bool = False

    @property
    def alone(self) -> Finding:
        """The finding without what its weight does not hang on."""
        return replace(self, second=False, upto=self.upto if self.last is None else self.last)


@dataclass(frozen=True, eq=False)
class Verdict:
    """A finding with what it costs and how its explanations weigh.

    extra: seconds too long by rank [after, ranks]. share: of a usual step. sure: probability that the excess is
    real and sits in these ranks. ratio: step time over what it would be without. where: the stretches of the step in which
    it lies, None where that is not known. hidden: behind what it hides.
    """

    finding: Finding
    explained: list[Explained]
    measures: Mapping[str, Measure]
    after: Ints
    extra: Floats
    share: float
    sure: float
    ratio: float | None
    where: Where | None
    hidden: Hidden | None = None

    @property
    def at_begin(self) -> bool:
        """Whether the excess lies before the step's first collective."""
        return self.finding.feature in LOADING

    @property
    def listed(self) -> list[Explained]:
        """The best explanation and the rivals worth listing."""
        return listed(self.explained)


@dataclass(frozen=True, eq=False)
class Weighed:
    """A finding with how its explanations weigh, before its price.

    own: seconds too long of its ranks [after, rows]. unit: seconds of a usual step. share: of that, the mean of `own`.
    """

    before: Ints
    after: Ints
    own: Floats
    unit: float
    share: float
    explained: list[Explained]
    measures: Mapping[str, Measure]


def listed(explained: list[Explained]) -> list[Explained]:
    """The best explanation and the rivals worth listing."""
    return [e for place, e in enumerate(explained) if place == 0 or e.probability >= policy.RIVAL_SHARE]
