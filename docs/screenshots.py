"""Makes the pictures of docs/images: every page of a healthy run and of one with a fault, light and dark.

    python docs/screenshots.py                      # two real demos of mixed vendors, one after the other
    python docs/screenshots.py --steps 400          # taken once that step is reached, while the run goes on
    python docs/screenshots.py --url URL --run RUN --prefix mine    # of a run of a server that is there already

Chromium must be installed, and what the tests need: pip install -e '.[dev]'.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
IMAGES = Path(__file__).parent / "images"
DEMOS = {"healthy": [], "fault": ["--fault", "slow_compute@60:2"]}
WANTED = {"healthy": "healthy", "fault": "degraded"}
PAGES = ["overview", "steps", "ranks", "communication", "experts", "memory", "hardware"]
PATIENCE_S = 600.0
SETTLE_MS = 1500
COLOURS = 160
"""A picture is kept with so many colours: pages have few, and a quarter of the bytes is enough."""
READY = """() => { const shown = [...document.querySelectorAll('[data-page]:not([hidden]) [data-panel]:not([hidden])')];
    const waits = each => each.hasAttribute('data-empty') && each.querySelector('.lens-message').innerText === 'Loading…';
    const open = document.querySelector('[data-page]:not([hidden])');
    const tiles = [...open.querySelectorAll('.lens-tile-detail')].every(each => each.innerText !== 'loading');
    return tiles && shown.length && shown.every(each => each.dataset.drawnStep !== undefined && !waits(each)); }"""


@contextmanager
def demo(arguments: list[str], folder: Path) -> Iterator[tuple[str, str]]:
    """A demo, until the pictures are taken: the address of its server with the token, and its run."""
    command = [sys.executable, "-m", "lens", "demo", "--cards", "H200,MI400", "--steps", "100000", "--port", "0"]
    command += ["--no-browser", "--data", str(folder), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        said: dict[str, str] = {}
        for line in process.stdout:
            word, _, rest = line.partition(":")
            said[word] = rest.strip()
            if "logs" in said:
                break
        yield said["page"], said["run"]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def ask(url: str, path: str) -> Any:
    """JSON of a path of the server whose address holds its token."""
    base, _, token = url.partition("/?token=")
    with urlopen(Request(base + path, headers={"Authorization": f"Bearer {token}"}), timeout=60) as reply:
        return json.load(reply)


def wait_for(url: str, run: str, step: int, status: str | None) -> None:
    """Return once the run has reached a step, and its verdict is as expected; say so and go on if that never comes."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        time.sleep(2)
        try:
            known = ask(url, f"/api/v1/runs/{quote(run, safe='')}")
            if (known["last_step"] or 0) < step:
                continue
            found = ask(url, f"/api/v1/runs/{quote(run, safe='')}/diagnosis")["status"]
        except OSError:
            continue
        if status in (None, found):
            return
    print(f"{run} did not become {status} by step {step}: its pictures show it as it is", file=sys.stderr)


def take(browser: Any, url: str, run: str, prefix: str, folder: Path) -> None:
    """One picture a page and colour scheme, and one of the list of runs."""
    base = url.partition("/?")[0]
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 1360, "height": 860}, color_scheme=scheme)
        context.set_default_timeout(1000 * PATIENCE_S / 5)
        context.request.get(url)
        page = context.new_page()
        for name in [*PAGES, "runs"]:
            path = "/" if name == "runs" else f"/run/{quote(run, safe='')}/{'' if name == 'overview' else name}"
            page.goto(base + path, wait_until="commit")
            page.wait_for_selector("#runs-list > *" if name == "runs" else f"#page-{name}:not([hidden])")
            if name != "runs":
                page.wait_for_function(READY)
            if name == "overview":
                page.wait_for_selector("#verdict:not([data-status='unknown'])")
            page.wait_for_timeout(SETTLE_MS)
            keep(page.screenshot(full_page=True), folder / f"{prefix}-{name}-{scheme}.png")
        context.close()


def keep(picture: bytes, path: Path) -> None:
    """Write a picture with few colours."""
    from PIL import Image

    image = Image.open(BytesIO(picture)).convert("RGB")
    image.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}  {path.stat().st_size // 1024} kB", flush=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures (default: docs/images)")
    parser.add_argument("--steps", type=int, default=240, help="pictures are taken once this step is reached")
    parser.add_argument("--only", choices=tuple(DEMOS), help="one of the two demos")
    parser.add_argument("--url", help="of a server that is there already, with its token: http://…/?token=…")
    parser.add_argument("--run", help="a run of that server")
    parser.add_argument("--prefix", default="mine", help="before the file names of that run")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("no Chromium on this machine: apt-get install chromium")
    options.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS + QUIET)
        if options.url:
            take(browser, options.url, options.run, options.prefix, options.out)
            return 0
        for name in [options.only] if options.only else DEMOS:
            with tempfile.TemporaryDirectory() as folder, demo(DEMOS[name], Path(folder)) as (url, run):
                wait_for(url, run, options.steps, WANTED[name])
                take(browser, url, run, name, options.out)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
