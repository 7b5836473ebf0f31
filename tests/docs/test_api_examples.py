"""docs/api.md shows what the server really answers: its replies are frozen by this."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lens.store.live import encode_frame

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.processes
def test_every_route_is_shown_with_the_reply_it_gives() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "api_examples.py"), "--check"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nif this is meant: python docs/api_examples.py"


def test_the_client_on_the_page_reads_a_frame() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (DOCS / "api.md").read_text(), re.S)
    page: dict[str, Any] = {}
    exec(program, page)
    columns = np.array([4, 5], np.int32), np.array([0, -1], np.int32), np.array([0.5, np.nan], np.float32)
    cells = {("step.duration", None): [columns], ("phase.duration", '{"phase":"data"}'): [columns]}
    blocks = list(page["read"](encode_frame({"cursor": 7}, cells)))
    assert [(metric, labels) for metric, labels, *_ in blocks] == [
        ("step.duration", {}), ("phase.duration", {"phase": "data"})
    ]  # fmt: skip
    for _, _, *found in blocks:
        for one, other in zip(found, columns, strict=True):
            np.testing.assert_array_equal(one, other)
