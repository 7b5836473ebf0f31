"""Memory: of the processes, the cards, torch's allocator and the hosts, each below its limit."""

from __future__ import annotations

import dash_mantine_components as dmc
from dash.development.base_component import Component

from lens.dashboard.components import grid, panel
from lens.dashboard.pages.page import Page


def layout() -> list[Component]:
    """An envelope for each kind of memory."""
    return [
        grid(
            panel(
                "envelope",
                "Device memory",
                "In use on the cards, each against its own limit. At the limit the run ends, out of memory.",
                identifier="device-memory",
                metric="hw.gpu.memory.usage",
                limit="hw.gpu.memory.limit",
                nothing="no card has reported its memory. The agent of each host reads it: lens agent.",
            ),
            panel(
                "envelope",
                "torch's allocator",
                "Bytes that torch has taken from the device, and what tensors use of them. A gap that grows is "
                "fragmentation.",
                identifier="torch-memory",
                metric="torch.memory.reserved",
                part="torch.memory.allocated",
                limit="hw.gpu.memory.limit",
                nothing="torch has no allocator statistics here: they need a CUDA or ROCm build and a card.",
            ),
            panel(
                "envelope",
                "Memory of the processes",
                "Resident memory of the training processes. A line that climbs and never falls is a leak.",
                identifier="process-memory",
                metric="process.memory.usage",
                limit="container.memory.limit system.memory.limit",
                nothing="no process has reported its memory. The agent of each host reads it: lens agent.",
            ),
            panel(
                "envelope",
                "Memory of the hosts",
                "In use on the hosts, by everything that runs there.",
                identifier="host-memory",
                metric="system.memory.usage",
                limit="system.memory.limit",
                nothing="no host has reported its memory. The agent of each host reads it: lens agent.",
            ),
        ),
        dmc.Space(h="lg"),
    ]


PAGE = Page(
    name="memory",
    title="Memory",
    path="memory",
    key="m",
    shows="How much memory the cards, torch, the processes and the hosts use, and how far their limits are.",
    layout=layout,
)
