"""Overview: the verdict in one sentence, then the few pictures that show whether it is true."""

from __future__ import annotations

import dash_mantine_components as dmc
from dash import html
from dash.development.base_component import Component

from lens.dashboard.components import grid, panel, slot
from lens.dashboard.pages.page import Page


def layout() -> list[Component]:
    """Verdict, numbers of now, charts, ledger."""
    return [
        html.Section(
            [slot("verdict", "lens-verdict", **{"aria-live": "polite"})],
            **{"aria-label": "Verdict"},
        ),
        panel(
            "findings",
            "Findings",
            "Everything found so far, the verdict first. A note is no trouble; what is over stays in the list.",
            identifier="findings",
            height=0,
            wide=True,
        ),
        slot("numbers", "lens-numbers"),
        panel(
            "band",
            "Time per step",
            "The line is the median rank, the thick one its trend; the band reaches up to the slowest rank. "
            "A wide band means that ranks wait for one.",
            identifier="step-time",
            metric="step.duration",
            height=240,
            wide=True,
        ),
        grid(
            panel(
                "rate",
                "Tokens per second",
                "All tokens of a step, divided by the time of its slowest rank.",
                identifier="tokens",
                metric="step.tokens",
            ),
            panel(
                "line",
                "Training loss",
                "As the run reports it; a gap means that no value was reported.",
                identifier="loss",
                metric="train.loss",
                instead="train.loss.local",
            ),
        ),
        panel(
            "ledger",
            "Where the time went",
            "Every second of the mean rank, by what it was spent on. The parts add up to the whole.",
            identifier="ledger",
            height=0,
            wide=True,
        ),
        dmc.Space(h="lg"),
    ]


PAGE = Page(
    name="overview",
    title="Overview",
    path="",
    key="o",
    shows="What holds the run back, what it costs and what to do; then the pictures that show whether it is true.",
    layout=layout,
)
