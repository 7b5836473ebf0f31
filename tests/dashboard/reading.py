"""What a test reads off a page, and how it waits for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PageCase:
    """A page of a run, its key, and its panels: those drawn on canvases, and those written as text."""

    name: str
    key: str
    pictures: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return "" if self.name == "overview" else f"/{self.name}"

    @property
    def panels(self) -> tuple[str, ...]:
        return (*self.pictures, *self.words)


PAGES = (
    PageCase("overview", "o", ("step-time", "tokens", "loss"), ("ledger",)),
    PageCase("steps", "s", ("step-stack", "step-lanes")),
    PageCase("ranks", "r", ("rank-map", "rank-series")),
    PageCase("communication", "c", ("wait-map", "byte-map"), ("group-speed",)),
    PageCase("experts", "e", ("expert-map", "expert-imbalance", "expert-evenness", "expert-drops")),
    PageCase("memory", "m", ("device-memory", "process-memory", "host-memory")),
    PageCase("hardware", "h", (), ("hardware-grid",)),
)

SETTLED = """([page, panels]) => { const shown = document.querySelector(`#page-${page}:not([hidden])`);
    const panel = id => document.getElementById(id);
    return shown && panels.every(id => panel(id).dataset.drawnStep !== undefined && !panel(id).hasAttribute('data-empty')); }"""
CONTENT = """id => { const panel = document.getElementById(id); const canvases = [...panel.querySelectorAll('canvas')];
    const words = panel.querySelector('.lens-panel-legend').innerText;
    return words + (canvases.length ? canvases[0].toDataURL() : panel.querySelector('.lens-picture').innerText); }"""


def settled(page: Any, case: PageCase) -> None:
    """Wait until the page of this case is open and every panel of it shows something."""
    page.wait_for_function(SETTLED, arg=[case.name, list(case.panels)])


def content(page: Any, panel: str) -> str:
    """What a panel shows: its legend, and the picture or the words."""
    result: str = page.evaluate(CONTENT, panel)
    return result


def changed(page: Any, panel: str, before: str) -> None:
    """Wait until a panel shows something else."""
    page.wait_for_function(f"([id, before]) => ({CONTENT})(id) !== before", arg=[panel, before])


def drawn(page: Any, panel: str, step: int) -> None:
    """Wait until a panel has drawn this step."""
    page.wait_for_function(
        "([panel, step]) => Number(document.getElementById(panel)?.dataset.drawnStep || -1) >= step",
        arg=[panel, step],
    )


def says(page: Any, selector: str, words: str) -> None:
    """Wait until an element says this, whatever its spaces."""
    script = (
        r"([selector, words]) => document.querySelector(selector)?.innerText.replace(/\s+/g, ' ').includes(words)"
    )
    try:
        page.wait_for_function(script, arg=[selector, words])
    except Exception as error:
        raise AssertionError(f"{selector} does not say {words!r} but {text(page, selector)!r}") from error


def text(page: Any, selector: str) -> str:
    return re.sub(r"\s+", " ", page.locator(selector).inner_text())


def pixels(page: Any, selector: str) -> str:
    """What a canvas shows."""
    result: str = page.eval_on_selector(selector, "canvas => canvas.toDataURL()")
    return result


def colours(page: Any, selector: str) -> int:
    """How many different colours a canvas holds."""
    script = """canvas => new Set(new Uint32Array(canvas.getContext('2d')
        .getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"""
    result: int = page.eval_on_selector(selector, script)
    return result


def press(page: Any, panel: str, name: str) -> None:
    """Press one of a panel's tools: Table, CSV, PNG."""
    page.click(f"#{panel} .lens-panel-tools button:text-is('{name}')")


def tabled(page: Any, panel: str) -> str:
    """The table beside a picture."""
    press(page, panel, "Table")
    page.wait_for_selector(f"#{panel} .lens-table tbody tr")
    return text(page, f"#{panel} .lens-table")


def downloaded(page: Any, panel: str, kind: str) -> tuple[str, bytes]:
    """Name and content of what a panel saves."""
    with page.expect_download() as saved:
        press(page, panel, kind)
    return saved.value.suggested_filename, saved.value.path().read_bytes()
