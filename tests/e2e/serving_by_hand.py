"""A server written by hand: one queue, one worker, requests as ``lens.request`` blocks, and no steps.

Words: ``open`` lets requests come four times as fast as they can be served, whatever becomes of them; ``closed`` sends
the next one when the last has been answered.
"""

from __future__ import annotations

import sys
import time

import lens

REQUESTS, TOKENS, LOOPS = 150, 8, 20_000


def work() -> int:
    """One token."""
    return sum(range(LOOPS))


def usual() -> float:
    """Seconds that a request needs where nothing disturbs it."""
    least = float("inf")
    for _ in range(10):
        began = time.monotonic()
        for _ in range(TOKENS):
            work()
        least = min(least, time.monotonic() - began)
    return least


def main() -> None:
    """Serve."""
    gap = usual() / 4 if sys.argv[1] == "open" else None
    lens.watch()
    began = time.monotonic()
    for number in range(REQUESTS):
        arrived = time.monotonic() if gap is None else began + number * gap
        time.sleep(max(0.0, arrived - time.monotonic()))
        with lens.request(
            "by-hand", prompt_tokens=TOKENS, batch=1, queue_s=max(0.0, time.monotonic() - arrived)
        ) as request:
            for _ in range(TOKENS):
                work()
                request.token()
    lens.detach()


if __name__ == "__main__":
    main()
