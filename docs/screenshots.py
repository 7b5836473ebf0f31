"""Takes the pictures of docs/images: every page of a run, light and dark, from a running server.

    python docs/screenshots.py http://127.0.0.1:8321 TOKEN docs/images [--run RUN] [--prefix healthy-]

Without --run the newest run is taken. Chromium must be installed; nothing else is started.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PAGES = {
    "overview": ("/run/{run}", "#step-time canvas"),
    "ranks": ("/run/{run}/ranks?m=phase.duration:forward", "#rank-map canvas"),
}
SETTLE_MS = 1500
JUDGED = "() => !['unknown', ''].includes(document.getElementById('verdict').dataset.status ?? '')"


def newest_run(url: str, token: str) -> str:
    """The id of the newest run of a server."""
    request = Request(f"{url}/api/v1/runs", headers={"Authorization": f"Bearer {token}"})
    with urlopen(request, timeout=10) as reply:
        runs = json.load(reply)["runs"]
    if not runs:
        sys.exit(f"{url} has no run yet: start one with `lens demo`")
    return str(runs[0]["run"])


def take(browser: Any, url: str, token: str, run: str, folder: Path, prefix: str) -> None:
    """One picture a page and colour scheme."""
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 1360, "height": 860}, color_scheme=scheme)
        page = context.new_page()
        page.goto(f"{url}/?token={token}")
        page.wait_for_selector("#runs-list > *")
        page.screenshot(path=folder / f"{prefix}runs-{scheme}.png")
        for name, (address, drawn) in PAGES.items():
            page.goto(url + address.format(run=quote(run, safe="")))
            page.wait_for_selector(drawn)
            if name == "overview":
                page.wait_for_function(JUDGED, timeout=60_000)
            page.wait_for_timeout(SETTLE_MS)
            path = folder / f"{prefix}{name}-{scheme}.png"
            page.screenshot(path=path, full_page=True)
            print(f"{path}  {path.stat().st_size // 1024} kB")
        context.close()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="http://127.0.0.1:8321")
    parser.add_argument("token", help="the content of the file token in the data folder")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", help="default: the newest")
    parser.add_argument("--prefix", default="", help="before each file name")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("no Chromium on this machine: apt-get install chromium")
    url = options.url.rstrip("/")
    run = options.run or newest_run(url, options.token)
    options.folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS + QUIET)
        take(browser, url, options.token, run, options.folder, options.prefix)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
